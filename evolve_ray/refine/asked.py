"""What the ask of a stored draft showed the model: as it is stored, or built again from the drafts that the ask contained."""

from typing import Any

from evolve_ray.refine.strategies import REFINE_GIVEN
from evolve_ray.refine.template import Template
from evolve_ray.store.turns import Messages, Prompt

REBUILT = ("chain", "parallel", "chains", "few_shot", "critique", "best_of", REFINE_GIVEN)


def stores_messages(options: Any) -> bool:
    """Whether the rows of a strategy hold the messages of its asks, because drafts and template alone do not say them."""
    return options.name not in REBUILT or (options.name == "few_shot" and options.show == "best")


def asked(template: Template, options: Any, prompt: Prompt, draft: dict, drafts: list[dict]) -> Messages | None:
    """The messages before a draft; `drafts` are all of its prompt. None for a row of a strategy that should have stored them."""
    if draft.get("messages") is not None:
        return tuple(draft["messages"])
    if stores_messages(options):
        return None
    parent = next((other for other in drafts if other["draft_id"] == draft["parent_id"]), None)
    if parent is None:
        return template.direct(prompt)
    if draft["kind"] == "critique":
        return template.critical(prompt, parent["text"])
    if options.name == "critique":
        remarks = next(other for other in drafts if other["kind"] == "critique" and place(other) == place(draft))
        return template.revision(prompt, parent["text"], remarks["text"])
    if options.name == "few_shot":
        earlier = sorted((other for other in drafts if other["round"] < draft["round"]), key=lambda other: other["round"])
        return template.after_several(prompt, [other["text"] for other in earlier[-options.shots :]])
    return template.refinement(prompt, parent["text"])


def place(draft: dict) -> tuple[int, int]:
    return draft["sample"], draft["round"]
