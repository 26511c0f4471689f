"""Strategies of one's own on an engine: wrong requests, errors, several asks of one round, messages, verdicts with words."""

from dataclasses import replace

import pytest

from evolve_ray.config import options
from evolve_ray.errors import UserError
from evolve_ray.generate.drive import Drive
from evolve_ray.refine.asks import Ask, Verdict, Verify
from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.refine.template import load_template
from evolve_ray.score.verifiers import build_verifier
from tests.plain.generate.test_drive import PROMPTS, FakeEngine, encode, spec

NAME = "mine:strategy"


def ask(text="q", sample=0, round=1, **more):
    return Ask(({"role": "user", "content": text},), sample, round, **more)


def run(start, verify=None, name=NAME, engine=None):
    drive = Drive(engine or FakeEngine(), encode, spec(strategy=options.Strategy(name=name)))
    drive.verify = verify
    return drive.run(PROMPTS[:2], start)


def raising(prompt):
    yield ask()
    raise KeyError("plan")


def nothing(prompt):
    yield


def words(prompt):
    yield [ask(), "again"]


def wrong_messages(prompt):
    yield Ask(({"role": "user"},), 0, 1)


def no_generator(prompt):
    return [ask()]


def broken_start(prompt):
    raise ValueError("no prompt")


@pytest.mark.parametrize(
    ("start", "message"),
    [
        (raising, r"raised KeyError: 'plan'.*, for prompt a; fix the plug"),
        (
            nothing,
            r", prompt a: yielded None, but must yield one of Ask, Judge, Verify, .*; see test_drive_plugs\.py:35$",
        ),
        (words, r", prompt a: yielded 'again', but must yield"),
        (wrong_messages, r", prompt a: yielded an Ask with messages .*; each message must be a dict with the texts 'role'"),
        (no_generator, r" returned \[Ask\(.*, but must be a generator that yields asks"),
        (broken_start, r"raised ValueError: no prompt.*, for prompt a"),
    ],
)
def test_a_wrong_strategy_ends_in_one_sentence_with_plug_and_prompt(start, message):
    with pytest.raises(UserError, match=r"^strategy\.name: 'mine:strategy'" + "( |)" + message):
        run(start)


def no_asks(prompt):
    answers = yield []
    assert answers == []
    return []


def empty_then_one(prompt):
    yield []
    draft = yield ask()
    return [draft]


def test_an_empty_list_of_asks_is_answered_with_an_empty_list_and_no_prompt_is_lost():
    generated, rejected, _ = run(no_asks)
    assert (generated, [row["reason"] for row in rejected]) == ([], ["strategy mine:strategy returned without a draft"] * 2)
    generated, rejected, stats = run(empty_then_one)
    assert (len(generated), rejected, stats["num_answers"]) == (2, [], 2)


WRONG, RIGHT = "def add(a, b):\n    return a - b", "def add(a, b):\n    return a + b"
CODE = [{**PROMPTS[0], "prompt": "Write add(a, b).", "answer": "assert add(1, 2) == 3"}]


class Programmer(FakeEngine):
    """Writes a wrong program, and the right one where the prompt shows that an assertion failed."""

    def answer(self, request_id, ids):
        text = RIGHT if "AssertionError" in "".join(map(chr, ids)) else WRONG
        return replace(super().answer(request_id, ids), text=f"```python\n{text}\n```")


def test_a_program_is_refined_with_the_error_of_its_tests_in_view():
    settings = options.Strategy(name="feedback", rounds=3)
    verifier = build_verifier(options.Verifier(name="tests"))
    drive = Drive(Programmer(), encode, spec(strategy=settings, context_tokens=4000))
    drive.verify = lambda prompt, text: verifier([prompt["prompt"]], [prompt["answer"]], [text])[0]
    template = load_template("default", "conversation", "feedback")
    generated, _, stats = drive.run(CODE, lambda prompt: STRATEGIES["feedback"](prompt, template, settings))
    assert [(row["round"], row["kind"], RIGHT in row["text"]) for row in generated] == [
        (1, "answer", False), (2, "answer", True), (3, "skipped", False),
    ]  # fmt: skip
    assert stats["num_skipped"] == 1


class SeedEngine(FakeEngine):
    """Answers the latest request first, with the text of its seed."""

    def step(self):
        _, request_id, ids, seed = self.waiting.pop()
        return [self.answer(request_id, ids, seed)]

    def answer(self, request_id, ids, seed):
        return replace(super().answer(request_id, ids), text=f"{seed % 2}")


def several(prompt):
    return (yield [ask("q"), ask("q"), ask("q"), ask("why", kind="critique"), ask("q", round=2)])


def test_asks_of_one_round_have_seeds_and_ids_of_their_own_and_keep_their_order():
    generated, _, _ = run(several, engine=SeedEngine())
    rows = [row for row in generated if row["prompt_id"] == "a"]
    assert [(row["kind"], row["round"]) for row in rows] == [("critique", 1), *[("answer", 1)] * 3, ("answer", 2)]
    assert len({row["seed"] for row in rows}) == len({row["draft_id"] for row in rows}) == 5
    first, _, _ = run(lambda prompt: iter_one(), engine=SeedEngine())
    assert rows[1]["seed"] == first[0]["seed"], "the first ask of a place keeps its seed"


def iter_one():
    return (yield ask("q"))


def test_rows_of_a_strategy_of_ones_own_keep_the_messages_of_their_asks():
    generated, _, _ = run(empty_then_one)
    assert generated[0]["messages"] == [{"role": "user", "content": "q"}]
    generated, _, _ = run(empty_then_one, name="chain")
    assert "messages" not in generated[0]


def asks_why(prompt):
    draft = yield ask()
    verdict = yield Verify(draft)
    yield ask(f"{float(verdict)} {verdict.text}", round=2)


@pytest.mark.parametrize(("value", "shown"), [(Verdict(0.0, "line 2 fails"), "0.0 line 2 fails"), (1.0, "1.0 ")])
def test_a_strategy_gets_the_verifiers_value_and_its_words(value, shown):
    generated, _, _ = run(asks_why, verify=lambda prompt, text: value)
    assert generated[1]["messages"] == [{"role": "user", "content": shown}]
