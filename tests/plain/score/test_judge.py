"""The scorer `judge` against a fake server: ratings, votes, both orders, replies that cannot be read, and faults."""

import math
from dataclasses import replace

import pytest

from evolve_ray.config.options import Scorer
from evolve_ray.errors import ResourceError, UserError
from evolve_ray.score.combined import build_scorer, local_judge
from evolve_ray.score.judge_engine import JudgeSpec, Reply
from tests.plain.benchmarks.examples import FakeJudge


@pytest.fixture
def server(monkeypatch):
    monkeypatch.setattr("evolve_ray.score.judge.RETRIES", 0)
    fake = FakeJudge()
    yield fake
    fake.server.shutdown()
    fake.server.server_close()


def judge(server, **args):
    return build_scorer(Scorer(name="judge", args={"model": "org/judge", "url": server.url} | args), {}, None)


def by_text(replies):
    """Answers with the reply whose key stands in the question."""
    return lambda messages: next(reply for key, reply in replies.items() if key in messages[-1]["content"])


def test_a_response_is_rated_on_its_scale_and_what_cannot_be_read_has_no_score(server):
    replies = {
        "fine": "good. Rating: 8",
        "beyond": "Rating: 11",
        "silent": "I cannot say.",
        "twice": "Rating: 2 ... Rating: **4.5**",
    }
    server.decide = by_text(replies)
    values = judge(server)(["q"] * 4, [None] * 4, ["fine", "beyond", "silent", "twice"])
    assert (values[0], values[3]) == (8.0, 4.5)
    assert all(map(math.isnan, values[1:3]))
    assert "from 1 to 10" in server.asked[0]["messages"][0]["content"]


def test_votes_are_averaged_without_those_that_cannot_be_read(server):
    seeds = {}

    def decide(messages):
        return ["Rating: 6", "no idea", "Rating: 9"][len(seeds) % 3]

    server.decide = decide
    original = server.reply

    def reply(body):
        reply_body = original(body)
        seeds[body["seed"]] = True
        return reply_body

    server.reply = reply
    assert judge(server, votes=3, concurrency=1, temperature=1.0)(["q"], [None], ["r"]) == [7.5]
    assert len(seeds) == 3, "each vote has a seed of its own"


def better_text_wins(messages):
    question = messages[-1]["content"]
    first, second = question.index("Response A:"), question.index("Response B:")
    a, b = question[first:second], question[second:]
    if "broken" in a:
        return "?"
    rank = lambda text: next(number for number, word in enumerate(("bad", "middle", "best", "broken")) if word in text)  # noqa: E731
    return "Verdict: A" if rank(a) > rank(b) else "Verdict: B"


def test_responses_to_a_prompt_are_compared_in_both_orders(server):
    server.decide = better_text_wins
    prompts = ["p", "other", "p", "p"]
    values = judge(server, mode="compare")(prompts, [None] * 4, ["best", "bad", "bad", "middle"])
    assert (values[0], values[2], values[3]) == (1.0, 0.0, 0.5)
    assert math.isnan(values[1]), "a response alone has nothing to win against"
    assert len(server.asked) == 6


def test_a_judge_that_prefers_a_position_prefers_nobody(server):
    server.decide = lambda messages: "Verdict: A"
    assert judge(server, mode="compare")(["p", "p"], [None] * 2, ["one", "two"]) == [0.5, 0.5]


def test_a_pair_of_which_one_order_cannot_be_read_is_not_counted(server):
    server.decide = better_text_wins
    values = judge(server, mode="compare")(["p"] * 3, [None] * 3, ["best", "bad", "broken"])
    assert values[:2] == [1.0, 0.0]
    assert math.isnan(values[2])


def test_a_rubric_of_ones_own(server, tmp_path):
    path = tmp_path / "rubric.txt"
    path.write_text("{prompt} | {response} | {high}\n")
    server.decide = lambda messages: "Rating: 5"
    judge(server, rubric=str(path), high=5)(["the {response}"], [None], ["r"])
    assert server.asked[0]["messages"][0]["content"] == "the {response} | r | 5\n"
    path.write_text("{prompt}")
    with pytest.raises(UserError, match=r"scorer\.args\.rubric: .*rubric\.txt: has no field \{response\}; add it"):
        judge(server, rubric=str(path))


def test_a_server_that_fails_is_one_sentence(server):
    server.status = 500
    with pytest.raises(
        ResourceError, match=r"scorer 'judge': the request to http://127.* failed: .*not today.*; start or repair"
    ):
        judge(server)(["q"], [None], ["r"])


@pytest.mark.parametrize(
    ("args", "message"),
    [
        ({"url": "server:80"}, r"scorer\.args\.url: 'server:80' is not an http address"),
        ({"url": "http://me:secret@host"}, r"scorer\.args\.url: .* without a password"),
        ({"vote": 3}, r"scorer\.args\.vote: unknown option; did you mean 'votes'\?"),
        ({"low": 10}, r"scorer\.args\.low: is 10, but must be below scorer\.args\.high \(10\)"),
    ],
)
def test_wrong_options_are_refused(server, args, message):
    with pytest.raises(UserError, match=message):
        judge(server, **args)


def test_a_key_that_is_not_there_is_named(server, monkeypatch):
    monkeypatch.delenv("JUDGE_KEY", raising=False)
    with pytest.raises(UserError, match=r"scorer\.args\.key_env: JUDGE_KEY is not set"):
        judge(server, key_env="JUDGE_KEY")(["q"], [None], ["r"])
    monkeypatch.setenv("JUDGE_KEY", "canary")
    server.decide = lambda messages: "Rating: 5"
    judge(server, key_env="JUDGE_KEY")(["q"], [None], ["r"])
    assert server.keys == {"Bearer canary"}


class ListEngine:
    """A judge's engine that answers from a list."""

    def __init__(self, spec):
        self.spec, self.asked = spec, []

    def replies(self, questions, temperature, max_tokens):
        self.asked += questions
        texts = {"fine": Reply("Rating: 8", 3, 20), "silent": Reply("no", 1, 20), "refused": Reply("", refused=True)}
        return [next(reply for key, reply in texts.items() if key in text) for text, _ in questions]

    def reload(self, spec):
        self.spec = spec


SPEC = JudgeSpec("policy", "/model", "float32", 128, 4, {})


def local(monkeypatch, spec=SPEC, **args):
    monkeypatch.setattr("evolve_ray.score.judge.JudgeEngine", ListEngine)
    return build_scorer(Scorer(name="judge", args={"model": "policy"} | args), {}, None, judge=spec)


def test_a_judge_without_a_url_has_an_engine_of_its_own_and_counts_what_it_costs(monkeypatch):
    scorer = local(monkeypatch, votes=2)
    values = scorer(["q"] * 3, [None] * 3, ["fine", "silent", "refused"])
    assert values[0] == 8.0
    assert all(map(math.isnan, values[1:]))
    assert len({seed for _, seed in scorer.engine.asked}) == 6, "each vote has a seed of its own"
    assert scorer.take_counts() == {
        "num_judge_asks": 6, "num_unparsable": 2, "num_refused": 2, "num_judge_tokens": 8, "num_judge_prompt_tokens": 80,
    }  # fmt: skip
    assert set(scorer.take_counts().values()) == {0}, "every shard counts its own"


def test_a_judge_takes_the_weights_of_the_next_policy(monkeypatch):
    scorer = local(monkeypatch)
    later = replace(SPEC, folder="/next")
    scorer.reload(later)
    assert scorer.engine.spec is later, "an engine that was never asked starts with the new model"
    scorer.reload(SPEC)
    assert scorer.engine.spec is SPEC


def test_a_preview_cannot_ask_a_judge_that_has_no_engine_there(monkeypatch):
    with pytest.raises(UserError, match=r"scorer\.args\.url: is missing; here the judge must be behind a server"):
        local(monkeypatch, spec=None)(["q"], [None], ["fine"])


def test_the_server_counts_too_and_a_refusal_is_no_vote(server):
    server.decide = lambda messages: "Rating: 3"
    scorer = judge(server)
    assert scorer(["q"], [None], ["r"]) == [3.0]
    assert scorer.take_counts()["num_judge_asks"] == 1


@pytest.mark.parametrize(
    ("args", "name"), [({"model": "policy"}, "policy"), ({"model": "a", "url": "http://h"}, ""), ({"model": "m/n"}, "m/n")]
)
def test_which_model_a_judge_of_ones_own_is(args, name):
    assert local_judge(Scorer(name="judge", args=args)) == name
    assert local_judge(Scorer(name="vote", args={})) == ""
