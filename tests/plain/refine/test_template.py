"""The asks of a conversation keep its system prompt and earlier turns, in both layouts and for every strategy's ask."""

import pytest

from evolve_ray.refine.template import load_template
from evolve_ray.store.turns import assistant, system, user

EARLIER = (system("s"), user("a"), assistant("b"))
PROMPT = (*EARLIER, user("c {draft}"))


def asks(template, prompt):
    return {
        "direct": template.direct(prompt),
        "refinement": template.refinement(prompt, "y1"),
        "after several": template.after_several(prompt, ["y1", "y2"]),
        "critical": template.critical(prompt, "y1"),
        "revision": template.revision(prompt, "y1", "wrong"),
    }


@pytest.mark.parametrize("layout", ["conversation", "one_message"])
def test_every_ask_is_the_earlier_turns_and_then_the_ask_of_the_last_turn_alone(layout):
    template = load_template("default", layout, "critique")
    for of_conversation, of_text in zip(
        asks(template, PROMPT).values(), asks(template, PROMPT[-1]["content"]).values(), strict=True
    ):
        assert of_conversation == (*EARLIER, *of_text)


def test_the_layout_of_a_conversation_goes_on_with_the_draft_and_the_instruction():
    template = load_template("default", "conversation")
    assert template.refinement(PROMPT, "y1") == (*PROMPT, assistant("y1"), user(template.refine))


def test_the_layout_of_one_message_shows_question_and_draft_after_the_earlier_turns():
    template = load_template("default", "one_message")
    *earlier, last = template.refinement(PROMPT, "y1")
    assert tuple(earlier) == EARLIER
    assert last["role"] == "user"
    assert "## Question\nc {draft}\n" in last["content"]  # what a user wrote is never filled in
    assert last["content"].endswith("## Draft\ny1")
