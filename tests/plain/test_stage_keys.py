"""Stage keys of every shipped recipe, so that a run that was begun with an older version goes on with this one.

`stage_keys.json` holds the keys that version 0.1.0 (revision 950e949) gave to the same inputs; trainings in bfloat16 have keys of
0.2.0, which sums their gradients in float32. A change that is meant to compute
stages again (a new VERSION, an option that decides a result) writes the file anew and says so in CHANGELOG.md:
`python -m tests.plain.test_stage_keys`.
"""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evolve_ray.config.load import load
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.inputs.prompts import Prompter
from evolve_ray.refine.template import load_template
from evolve_ray.stages.evaluation import evaluate
from evolve_ray.stages.generations import GenerationJob, generate_and_score
from evolve_ray.stages.measures import decide, measure_drift
from evolve_ray.stages.pairs import select
from evolve_ray.stages.probe import probe
from evolve_ray.stages.refresh import refresh
from evolve_ray.stages.training import train
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Run, Stage
from tests.plain.processes import ROOT

WRITTEN = Path(__file__).parent / "stage_keys.json"
CASES = {
    **{name: (name, ()) for name in ("tiny", "tiny_iterative_dpo", "tiny_parallel", "tiny_rule", "tiny_reward_model")},
    # In 0.1.0 these recipes had the instruct model, and took the triples from a file of the user's.
    **{name: (name, ("model.path=meta-llama/Llama-3.1-8B-Instruct", "model.chat_template=''", "activation.limit=0",
                     "activation.path=triples.jsonl", "activation.split=train"))
       for name in ("llama31_8b", "llama31_8b_4nodes")},
    "best of, stopped": ("tiny", ("strategy.name=best_of",)),
    "verifier asked": ("tiny", ("strategy.stop_right=true",)),
    "given drafts": ("tiny", ("strategy.name=evolve_ray.probes:refine_given",)),
    "lora, trees": ("tiny", ("trainer.lora_rank=4", "trainer.forward=tree")),
}  # fmt: skip
RUN = Path("/nowhere/run")


class Stop(Exception):
    """Raised where a stage is asked whether it is committed: its key is known by then, and nothing is computed."""


def stage_keys(recipe: str, overrides: tuple[str, ...], patch: pytest.MonkeyPatch) -> dict[str, str]:
    """The key of every stage of a recipe, by the stage's folder, for inputs that are given by name alone."""
    config = load(ROOT / "jobs" / "recipes" / f"{recipe}.toml", overrides)
    template = load_template(config.template.name, config.template.layout, config.strategy.name)
    policy = Policy(Path("/nowhere/policy"), "policy hash")
    context = Context(config, Run(RUN), lambda line: None, lambda: None, False, template, policy)
    if config.scorer.name == "reward_model":
        context.reward_models = {config.scorer.model: Policy(Path("/nowhere/reward"), "reward hash")}
    names = ("prompts", "generations", "scores", "pairs", "held_out")
    manifests = {name: named_manifest(name) for name in names}
    context.prompts, context.held_out = {1: manifests["prompts"]}, manifests["held_out"]
    keys: dict[str, str] = {}
    original = Context.stage

    def stage(self: Context, final: Path, name: str, key: dict, inputs: dict[str, str]) -> Stage:
        found = original(self, final, name, key, inputs)
        keys[str(final.relative_to(RUN))] = found.key[:16]
        return found

    def committed(self: Stage) -> Manifest:
        if self.final.name == "labels":
            return named_manifest("labels")
        raise Stop

    patch.setattr(Context, "stage", stage)
    patch.setattr(Stage, "committed", committed)

    def ask(function: Callable[..., Any], *arguments: Any) -> None:
        with pytest.raises(Stop):
            function(*arguments)

    reward_models = context.reward_models
    job = GenerationJob(1, "generations", policy, manifests["prompts"], config.strategy, config.sampling, 1, reward_models)
    ask(generate_and_score, context, job, RUN / "iteration-01")
    ask(select, context, 1, manifests["generations"], manifests["scores"])
    ask(train, context, 1, policy, manifests["pairs"], config.training, "checkpoint")
    ask(evaluate, context, 1, policy, "iteration 1")
    ask(probe, context, 1, policy, Policy(Path("/nowhere/before"), "before hash"))
    ask(measure_drift, context, 1, manifests["generations"], manifests["scores"], manifests["pairs"], None, [])
    models = [
        {"name": name, "iteration": number, "model": "m", "path": "/p", "evaluation": None, "splits": {}}
        for number, name in enumerate(("base", "iteration 1"))
    ]
    ask(decide, context, 1, models)
    if config.refresh:
        ask(refresh, context, 1, dict(reward_models), manifests["prompts"], manifests["generations"])
    prompter = Prompter(context, {})
    ask(prompter.held_out)
    for name in ("activation", "offline"):
        if getattr(config, name):
            ask(prompter.triples, name, getattr(config, name))
    ask(prompter.training)
    return keys


def named_manifest(name: str) -> Manifest:
    return Manifest(RUN / name, name, f"{name} key", {}, {}, {"num_rows": 8, "num_shards": 1, "num_in": 8})


@pytest.mark.parametrize("case", CASES)
def test_every_stage_has_the_key_that_older_runs_have(case, monkeypatch):
    assert stage_keys(*CASES[case], monkeypatch) == json.loads(WRITTEN.read_text())[case]


if __name__ == "__main__":
    found = {}
    for case, (recipe, overrides) in CASES.items():
        with pytest.MonkeyPatch.context() as patch:
            found[case] = stage_keys(recipe, overrides, patch)
    WRITTEN.write_text(json.dumps(found, indent=1) + "\n")
