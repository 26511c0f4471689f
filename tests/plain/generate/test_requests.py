"""What a strategy may set for one ask, hand in, or score; a wrong type ends in one sentence with plug, prompt and line."""

from dataclasses import replace

import pytest

from evolve_ray.config import options
from evolve_ray.config.plugs import takes
from evolve_ray.errors import UserError
from evolve_ray.generate.drive import Drive
from evolve_ray.refine.asks import Ask, Draft, Judge, LogProb, Made, Score, Skip, Verify
from evolve_ray.store.rows import DRAFT_DETAILS, GENERATION, read_table, write_table
from tests.plain.generate.test_drive import PROMPTS, FakeEngine, encode, spec
from tests.plain.generate.test_drive_plugs import ask

NAME = "mine:strategy"
DRAFT = Draft("d", "4", 0, 1, None, "stop")


class Continuing(FakeEngine):
    """Writes three letters and shows their ids; remembers what each request set."""

    def __init__(self, stopped_at=""):
        super().__init__()
        self.set, self.stopped_at = [], stopped_at

    def submit(self, request_id, prompt_ids, seed, *, logps=False, **sampling):
        self.set.append((bytes(prompt_ids).decode(), sampling))
        super().submit(request_id, prompt_ids, seed)

    def answer(self, request_id, ids):
        written = replace(super().answer(request_id, ids), text="abc", token_ids=(97, 98, 99, 0))
        return replace(written, stopped_at=self.stopped_at)


def run(start, engine=None, prompts=PROMPTS[:1], **more):
    drive = Drive(engine or Continuing(), encode, spec(strategy=options.Strategy(name=NAME), **more))
    drive.response_ids = lambda text, finished: [*text.encode(), *([0] if finished else [])]
    drive.read = lambda completion: {}
    drive.gives_row = takes(start, "row")
    return drive.run(list(prompts), start)


def own_sampling(prompt):
    plain = yield ask("q")
    hot = yield ask("q", round=2, temperature=0.5, max_tokens=3, stop=("\n", "."), prefix="so ")
    assert (plain.stopped_at, hot.stopped_at, hot.text) == ("\n", "\n", "so abc")
    return [plain, hot]


def test_an_ask_sets_its_own_sampling_and_the_model_continues_its_prefix():
    engine = Continuing(stopped_at="\n")
    generated, _, stats = run(own_sampling, engine)
    assert engine.set == [("q", {}), ("qso ", {"sampling": {"temperature": 0.5, "max_tokens": 3, "stop": ["\n", "."]}})]
    plain, hot = generated
    assert "num_prefix_tokens" not in plain
    assert (hot["text"], hot["num_prefix_tokens"], hot["num_tokens"]) == ("so abc", 3, 3)
    assert bytes(hot["token_ids"]) == b"so abc\0", "the ids of prefix and continuation, of which the first 3 were given"
    assert stats["num_tokens"] == 6


def test_an_asks_own_limit_counts_against_the_context():
    def short(prompt):
        return [(yield ask("q" * 92, max_tokens=8))]

    def long(prompt):
        return [(yield ask("q" * 90, max_tokens=8, prefix="abc"))]

    assert len(run(short, context_tokens=100)[0]) == 1
    _, (rejected,), _ = run(long, context_tokens=100)
    assert rejected["reason"] == ("ask of round 1 has 93 tokens; with its max_tokens 8 that is beyond model.context_tokens 100")


def with_row(prompt, row):
    draft = yield ask(f"{row['answer']} {row['draft']} {row['columns']['hint']}")
    return [draft]


def test_a_strategy_that_takes_the_row_gets_answer_draft_and_columns():
    row = {**PROMPTS[0], "answer": "4", "draft": "5", "columns": '{"hint":"add"}'}
    generated, _, _ = run(with_row, prompts=[row])
    assert generated[0]["messages"][0]["content"] == "4 5 add"


def composing(prompt):
    first = yield ask("q")
    second = yield ask("q", sample=1)
    whole = yield Made(f"{first.text}+{second.text}", 0, 2, first.draft_id, parts=(first, second))
    again = yield Made("other", 0, 2)
    yield Score(whole, 0.5)
    return [first, second, again, whole]


def test_a_composed_draft_is_a_row_without_a_model_and_takes_a_score(tmp_path):
    generated, _, stats = run(composing)
    first, whole, again, second = generated
    assert (whole["text"], whole["parts"], whole["parent_id"]) == (
        "abc+abc",
        [first["draft_id"], second["draft_id"]],
        first["draft_id"],
    )
    assert [whole[name] for name in ("seed", "model", "num_tokens", "kind", "strategy_score")] == [None, None, 0, "answer", 0.5]
    assert (again["text"], "strategy_score" in again, "returned_last" in again) == ("other", False, False)
    assert whole["returned_last"] is True
    assert (stats["num_made"], stats["num_asks"], stats["num_answers"]) == (2, 2, 4)
    write_table(tmp_path / "rows.parquet", generated, GENERATION, DRAFT_DETAILS)
    assert [row["strategy_score"] for row in read_table(tmp_path / "rows.parquet")] == [None, 0.5, None, None]


class Reading(Continuing):
    """Shows -1 nat for each token of the prompt but the first, where a request asks for it."""

    def answer(self, request_id, ids):
        reads = next(more for text, more in reversed(self.set) if text == bytes(ids).decode())
        logps = (
            tuple(-1.0 - number / 8 for number in range(len(ids) - 1)) if "prompt_logprobs" in reads.get("sampling", {}) else ()
        )
        return replace(super().answer(request_id, ids), prompt_logps=logps)


def reading(prompt):
    draft = yield ask("q")
    whole = yield LogProb(ask("q").messages, "ab")
    begun = yield LogProb(ask("q").messages, "ab", finished=False)
    yield Score(draft, whole - begun)
    return [draft]


def test_a_strategy_gets_the_log_probability_of_a_text():
    """After the 1 token of the context: a, b and the end token have -1, -1.125 and -1.25."""
    engine = Reading()
    generated, _, stats = run(reading, engine)
    assert engine.set[1] == ("qab\0", {"sampling": {"max_tokens": 1, "prompt_logprobs": 0}})
    assert [row["strategy_score"] for row in generated] == [-1.25], "nothing else is stored"
    assert (stats["num_asks"], stats["num_tokens"], stats["num_read_tokens"]) == (1, 3, 4 + 3)


def test_an_engine_without_log_probabilities_and_a_text_beyond_the_context_are_said():
    with pytest.raises(UserError, match=r"engine\.name: 'vllm' gives no log-probabilities of a text"):
        run(reading)
    _, (rejected,), _ = run(lambda prompt: long_text(), Reading(), context_tokens=20)
    assert rejected["reason"] == "a LogProb has 22 tokens; model.context_tokens is 20"


def long_text():
    yield LogProb(ask("q").messages, "a" * 20)


def many_scores(prompt):
    draft = yield ask("q")
    for number in range(3000):
        yield Score(draft, number)
    return [draft]


def test_the_last_of_many_scores_counts():
    assert run(many_scores)[0][0]["strategy_score"] == 2999.0


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ask("q", temperature="hot"), "an Ask with temperature 'hot'; it must be a number of at least 0, or None"),
        (ask("q", max_tokens=0), "an Ask with max_tokens 0; it must be a whole number of at least 1, or None"),
        (ask("q", stop="."), r"an Ask with stop '\.'; it must be a tuple of texts, none of them empty"),
        (ask("q", stop=("",)), r"an Ask with stop \('',\); it must be a tuple of texts"),
        (ask("q", prefix=None), "an Ask with prefix None; it must be a text"),
        (ask("q", round=0), "an Ask with round 0; it must be a whole number of at least 1"),
        ([ask("q", sample=None)], "an Ask with sample None; it must be a whole number of at least 0"),
        (Score(DRAFT, float("nan")), "a Score with value nan; it must be a finite number"),
        (Score("d", 1.0), "a Score with draft 'd'; it must be a Draft"),
        (Made(4, 0, 1), "a Made with text 4; it must be a text"),
        (Made("4", 0, 1, parts=("d",)), r"a Made with parts \('d',\); it must be a tuple of Draft"),
        (LogProb((), "4"), r"a LogProb with messages \(\)\; each message must be a dict"),
        (LogProb(ask().messages, 4), "a LogProb with text 4; it must be a text"),
        (Judge("d"), "a Judge with drafts 'd'; it must be a tuple of Draft"),
        (Verify(None), "a Verify with draft None; it must be a Draft"),
        (Skip(None, (1,), "why"), "a Skip with draft None; it must be a Draft"),
    ],
)
def test_a_request_with_a_wrong_type_ends_in_one_sentence_with_plug_prompt_and_line(request_, message):
    def wrong(prompt):
        yield request_

    with pytest.raises(UserError, match=f"^strategy.name: 'mine:strategy', prompt a: yielded {message}.*; see test_requests.py:"):
        run(wrong)


@pytest.mark.parametrize("request_", [Score(DRAFT, 1.0), Made("4", 0, 1, parts=(DRAFT,)), Skip(DRAFT, (2,), "right")])
def test_a_draft_of_another_prompt_is_refused(request_):
    def foreign(prompt):
        yield ask("q")
        yield request_

    with pytest.raises(UserError, match="prompt a: names draft 'd', which is no draft of this prompt; hand in a text"):
        run(foreign)


def test_plain_asks_reach_an_engine_as_before():
    assert Ask(({"role": "user", "content": "q"},), 0, 1).sampling == {}
