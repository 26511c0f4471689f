"""Asks to a second model: in one list with asks to the policy, late, refused, too long; each is counted by the model's name."""

import pytest

from evolve_ray.config import options
from evolve_ray.errors import UserError
from evolve_ray.generate.drive import Drive, too_long
from evolve_ray.generate.second import Answer
from evolve_ray.generate.spec import Completion
from evolve_ray.refine.asks import Ask
from tests.plain.generate.test_drive import PROMPTS, FakeEngine, encode, spec


def ask(model="", number=0, **more):
    return Ask(({"role": "user", "content": "hm"},), number, 1, kind=more.pop("kind", "answer"), model=model, **more)


class Second:
    """A second model that answers `delay` looks later, the last ask first; of the prompts in `problems` it says why not."""

    model_hash, seconds = "m2", 1.5

    def __init__(self, delay=0, problems=()):
        self.delay, self.problems, self.open, self.waits = delay, problems, [], 0

    def ask(self, request_id, ask, seed):
        self.open.append([self.delay, request_id, ask])

    def finished(self, *, wait):
        self.waits += wait
        for request in self.open:
            request[0] -= 1
        ready = [request for request in self.open if request[0] < 0 or wait]
        self.open = [request for request in self.open if request not in ready]
        return [(request_id, self.answer(request_id)) for _, request_id, _ in reversed(ready)]

    def answer(self, request_id):
        if request_id.split("/")[0] in self.problems:
            return Answer(None, problem="is too long for the other one")
        return Answer(Completion("", f"second to {request_id}", 5, 20, 4, "stop"), {"num_thinking_tokens": 2})


def run(strategy, second=None, names=("critic",), **more):
    drive = Drive(FakeEngine(**more), encode, spec(options.Strategy(name="own:plug")))
    drive.models = dict.fromkeys(names, second or Second())
    return drive.run(PROMPTS, strategy)


def both(prompt):
    """Two drafts, of the second model and of the policy, and what they were as the next draft's parents."""
    first, other = yield [ask("critic", kind="critique"), ask()]
    assert first.text.startswith("second to")
    assert other.text.startswith("answer to")
    yield ask("critic", 1, parent_id=first.draft_id)
    return [other]


@pytest.mark.parametrize("delay", [0, 1, 7])
def test_answers_come_back_in_the_order_of_their_asks_whenever_they_come(delay):
    rows, rejected, stats = run(both, Second(delay))
    assert rejected == []
    assert [(row["model"], row["kind"], row["sample"]) for row in rows] == 3 * [
        ("m2", "critique", 0), ("m1", "answer", 0), ("m2", "answer", 1),
    ]  # fmt: skip
    assert rows == run(both)[0]
    assert (stats["num_asks"], stats["num_asks_of_critic"]) == (9, 6)
    assert (stats["num_tokens"], stats["num_tokens_of_critic"]) == (6 * 5 + 3 * 3, 6 * 5)
    assert stats["num_prompt_tokens_of_critic"] == 6 * 20
    assert rows[0]["num_thinking_tokens"] == 2


def test_engine_without_work_waits_for_the_second_model():
    second = Second(delay=1000)
    run(both, second)
    assert second.waits >= 1


def test_prompt_whose_ask_is_too_long_for_the_second_model_is_rejected_alone():
    rows, rejected, _ = run(both, Second(problems=("b",)), delays={"b": 3})
    assert [(row["id"], row["reason"]) for row in rejected] == [("b", "is too long for the other one")]
    assert {row["prompt_id"] for row in rows} == {"a", "c"}


@pytest.mark.parametrize(
    ("names", "hint"),
    [(("critic",), "did you mean 'critic'"), (("judge",), r"\[models\] has judge"), ((), r"\[models\] has none")],
)
def test_unknown_model_is_refused_by_the_nearest_name(names, hint):
    def misnamed(prompt):
        yield ask("critik")

    with pytest.raises(UserError, match=rf"'own:plug', prompt a: asks the model 'critik'; {hint}.*; see test_second\.py:\d+"):
        run(misnamed, names=names)


def test_room_is_that_of_the_model_which_is_asked():
    given = spec(context_tokens=40)
    assert too_long(ask(), 30, given) == ""
    assert too_long(ask(max_tokens=11), 30, given).endswith("with its max_tokens 11 that is beyond model.context_tokens 40")
    said = too_long(ask("critic"), 31, spec(context_tokens=40, table="models.critic"))
    assert said.endswith("with sampling.max_tokens 10 that is beyond models.critic.context_tokens 40")
