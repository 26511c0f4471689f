"""Probes on tables small enough to count by hand; the strategy that refines given drafts, on a list of answers."""

import pytest

from evolve_ray.compare.skill_probes import affordable, foreign, keep, longer, majority, parallel, quality, tercile_bounds, vote
from evolve_ray.config import options
from evolve_ray.errors import UserError
from evolve_ray.evaluate.figures import changes
from evolve_ray.generate.drive import Drive
from evolve_ray.generate.spec import Completion, GenerateSpec
from evolve_ray.refine.asks import Draft, Given
from evolve_ray.refine.strategies import refine_given
from evolve_ray.refine.template import load_template
from evolve_ray.score.verifiers import same_answer
from evolve_ray.store import rows

TEMPLATE = load_template("tiny", "conversation")


def equal(one, other):
    return one.strip() == other.strip()


def draft(text, score, correct=None, tokens=10, prompt_tokens=5):
    return {"text": text, "score": score, "correct": correct, "num_tokens": tokens, "num_prompt_tokens": prompt_tokens}


def chains(**table):
    """prompt -> [(text, score)]; the score is the verifier's too."""
    return {name: {n: draft(*given, given[1]) for n, given in enumerate(rounds, 1)} for name, rounds in table.items()}


def unverified(table):
    return {name: {n: {**row, "correct": None} for n, row in chain.items()} for name, chain in table.items()}


FOUR = chains(
    fixed=[("a", 0.0), ("b", 1.0)], kept=[("c", 1.0), ("c", 1.0)], spoilt=[("d", 1.0), ("e", 0.5)], lost=[("f", 0.0), ("g", 0.0)],
)  # fmt: skip


def test_first_draft_comes_with_the_prompt_and_the_second_refines_it():
    strategy = refine_given("x", TEMPLATE, options.Strategy(rounds=3))
    assert next(strategy) == Given()
    first = Draft("d1", "given", 0, 1, None, "stop")
    ask = strategy.send(first)
    assert (ask.messages, ask.round, ask.parent_id) == (TEMPLATE.refinement("x", "given"), 2, "d1")
    second = Draft("d2", "better", 0, 2, "d1", "stop")
    ask = strategy.send(second)
    assert (ask.messages, ask.round, ask.parent_id) == (TEMPLATE.refinement("x", "better"), 3, "d2")
    third = Draft("d3", "best", 0, 3, "d2", "stop")
    with pytest.raises(StopIteration) as end:
        strategy.send(third)
    assert end.value.value == [first, second, third]


class ListEngine:
    """Answers from a list, in order."""

    def __init__(self, *texts):
        self.texts, self.waiting = list(texts), []

    def submit(self, request_id, prompt_ids, seed, *, logps=False):
        self.waiting.append((request_id, prompt_ids))

    def step(self):
        request_id, ids = self.waiting.pop(0)
        return [Completion(request_id, self.texts.pop(0), 3, len(ids), 0, "stop")]


def drive(prompts, *texts, context_tokens=100):
    strategy = options.Strategy(name="evolve_ray.probes:refine_given", rounds=2)
    spec = GenerateSpec(
        prompts="prompts.parquet", work="", key="", shard_prompts=1, model="", model_hash="m", dtype="float32",
        context_tokens=context_tokens, template=TEMPLATE, strategy=strategy, sampling=options.Sampling(max_tokens=10),
        engine=options.Engine(), seed=0, scope="foreign",
    )  # fmt: skip
    encode = lambda ask: [ord(c) for message in ask.messages for c in message["content"]]  # noqa: E731
    return Drive(ListEngine(*texts), encode, spec).run(prompts, lambda p: refine_given(p, TEMPLATE, strategy))


def given(draft, name="p"):
    return {"prompt_id": name, "prompt": "q", "split": "s", "file": "f", "line": 1, "draft": draft}


def test_given_draft_is_a_row_of_round_1_that_costs_nothing_and_is_of_no_model():
    (first, second), rejected, stats = drive([given("one")], "two")
    assert (first["text"], first["round"], first["model"], first["seed"], first["num_tokens"]) == ("one", 1, None, None, 0)
    assert (second["text"], second["round"], second["parent_id"]) == ("two", 2, first["draft_id"])
    assert second["model"] == "m"
    assert (stats["num_answers"], stats["num_asks"], stats["num_tokens"], rejected) == (2, 1, 3, [])
    assert set(first) == set(rows.GENERATION.names)


def test_empty_given_draft_is_a_draft():
    (first, second), _, _ = drive([given("")], "two")
    assert (first["text"], second["text"]) == ("", "two")


def test_given_draft_that_is_too_long_rejects_its_prompt_alone():
    found, rejected, _ = drive([given("x" * 200), given("one", "short")], "two")
    assert [row["prompt_id"] for row in found] == ["short", "short"]
    assert [row["id"] for row in rejected] == ["p"]
    assert "round 2" in rejected[0]["reason"]


def test_prompts_without_drafts_are_refused_by_the_name_of_the_column():
    row = given("one")
    del row["draft"]
    with pytest.raises(UserError, match=r"prompts\.parquet has no column 'draft'"):
        drive([row])


def test_moves_count_all_four_ways_and_sum_up():
    found = changes([(chain[1], chain[2]) for chain in FOUR.values()])
    ways = ("wrong_to_right", "kept_right", "right_to_wrong", "kept_wrong")
    assert [found[name] for name in ways] == [1, 1, 1, 1]
    assert (found["improved"], found["degraded"], found["unchanged"], found["same_text"]) == (1, 1, 2, 1)
    assert "kept_right" not in changes([(chain[1], chain[2]) for chain in unverified(FOUR).values()])


def test_foreign_says_before_after_and_their_difference():
    found = foreign(FOUR)
    assert found["n"] == 4
    assert (found["before"]["exact_match"]["mean"], found["after"]["exact_match"]["mean"]) == (0.5, 0.5)
    assert found["difference"]["exact_match"]["mean"] == 0.0
    assert found["difference"]["reward"]["mean"] == pytest.approx((1.0 + 0.0 - 0.5 + 0.0) / 4)
    assert (found["moves"]["improved"], found["moves"]["degraded"]) == (1, 1)
    assert foreign({}) == {"n": 0}


def test_keep_counts_only_what_the_verifier_finds_right_and_copies():
    found = keep(FOUR)
    assert (found["num_shown"], found["n"]) == (4, 2)
    assert (found["kept"]["mean"], found["unchanged"]["mean"]) == (0.5, 0.5)
    without = keep(unverified(FOUR))
    assert (without["n"], without["unchanged"]["mean"]) == (4, 0.25)
    assert "kept" not in without
    assert keep(chains(p=[("a", 0.0), ("b", 0.0)])) == {"num_shown": 1, "n": 0}


def test_quality_parts_the_gain_by_whether_the_first_draft_was_right():
    wrong, right = quality(FOUR, None)
    assert (wrong["group"], wrong["n"], wrong["gain"]["exact_match"]["mean"]) == ("y1 wrong", 2, 0.5)
    assert (right["group"], right["n"], right["gain"]["exact_match"]["mean"]) == ("y1 right", 2, -0.5)
    assert right["gain"]["reward"]["mean"] == pytest.approx(-0.25)


def test_quality_without_a_verifier_goes_by_thirds_that_all_models_share():
    table = unverified(chains(**{f"p{n}": [("a", float(n)), ("b", float(n) + (1.0 if n < 3 else -1.0))] for n in range(9)}))
    bounds = tercile_bounds(chain[1]["score"] for chain in table.values())
    low, middle, high = quality(table, bounds)
    assert [group["n"] for group in (low, middle, high)] == [3, 3, 3]
    assert [group["gain"]["reward"]["mean"] for group in (low, middle, high)] == [1.0, -1.0, -1.0]
    assert "exact_match" not in low["gain"]
    assert quality(table, (-2.0, -1.0))[0] == {"group": "y1 low", "n": 0}


@pytest.mark.parametrize(
    ("texts", "chosen"),
    [("aab", 1), ("abb", 2), ("aba", 2), ("abc", 2), ("aabb", 3), ("bbaac", 3), ("a", 0)],
)
def test_vote_takes_the_latest_draft_of_the_most_frequent_answer_and_of_equal_ones_the_latest(texts, chosen):
    drafts = [draft(text, float(place)) for place, text in enumerate(texts)]
    assert vote(drafts, equal) is drafts[chosen]


def test_majority_of_the_last_three_rounds_against_the_last():
    table = chains(
        mended=[("w", 0.0), ("r", 1.0), (" r", 1.0), ("w", 0.0)],  # r twice, surrounding space apart
        spoilt=[("r", 1.0), ("w", 0.0), ("w", 0.0), ("r", 1.0)],  # the first round has no vote
        same=[("w", 0.0), ("w", 0.0), ("r", 1.0), ("r", 1.0)],
    )
    found = majority(table, equal)
    assert (found["n"], found["rounds"], found["num_other_answer"]) == (3, 3, 2)
    assert found["vote"]["exact_match"]["mean"] == found["last"]["exact_match"]["mean"] == pytest.approx(2 / 3)
    assert found["difference"]["exact_match"]["mean"] == 0.0
    assert majority(chains(p=[("w", 0.0), ("r", 1.0)]), equal)["rounds"] == 2
    assert majority({}, equal) == {"n": 0}


def test_parallel_at_equal_samples_and_at_equal_tokens():
    chain = {
        "p": {1: draft("w", 0.0, 0.0, 10, 5), 2: draft("r", 1.0, 1.0, 20, 25)},
        "q": {1: draft("w", 0.0, 0.0, 10, 5), 2: draft("v", 0.0, 0.0, 5, 25)},
    }
    samples = {
        "p": {0: draft("w", 0.0, 0.0, 10), 1: draft("w", 0.0, 0.0, 10), 2: draft("r", 1.0, 1.0, 10), 3: draft("x", 0.0, 0.0, 10)},
        "q": {0: draft("r", 1.0, 1.0, 10), 1: draft("w", 0.0, 0.0, 10), 2: draft("w", 0.0, 0.0, 1), 3: draft("w", 0.0, 0.0, 1)},
    }
    found = parallel(chain, samples, equal)
    assert found["n"] == 2
    here = found["equal_samples"]
    assert here["chain"]["mean_responses"] == here["parallel"]["mean_responses"] == 2
    assert (here["chain"]["mean_tokens"], here["parallel"]["mean_tokens"]) == (22.5, 20)
    assert (here["chain"]["mean_prompt_tokens"], here["parallel"]["mean_prompt_tokens"]) == (30, 10)
    assert (here["chain"]["best"]["exact_match"]["mean"], here["parallel"]["best"]["exact_match"]["mean"]) == (0.5, 0.5)
    assert here["difference"]["best"]["exact_match"]["mean"] == 0.0
    assert here["difference"]["last_minus_vote"]["exact_match"]["mean"] == 0.5  # p: r - w, q: v - w
    here = found["equal_tokens"]  # p: 30 tokens buy 3 of 10; q: 15 buy the first, not the second
    assert (here["parallel"]["mean_responses"], here["parallel"]["mean_tokens"]) == (2, 20)
    assert here["parallel"]["best"]["exact_match"]["mean"] == 1.0
    assert here["difference"]["best"]["exact_match"]["mean"] == -0.5
    assert here["num_capped"] == 0


def test_chain_that_could_pay_for_more_samples_than_there_are_is_counted():
    chain = {"p": {1: draft("w", 0.0, 0.0, 50)}}
    found = parallel(chain, {"p": {0: draft("w", 0.0, 0.0, 10), 1: draft("w", 0.0, 0.0, 10)}}, equal)
    assert (found["equal_tokens"]["num_capped"], found["equal_tokens"]["parallel"]["mean_responses"]) == (1, 2)


def test_chain_too_cheap_for_a_single_sample_still_has_one_beside_it():
    assert affordable([draft("a", 0.0, tokens=1)], [draft("b", 0.0, tokens=10)] * 2) == 1


def test_prompt_that_lacks_a_sample_is_left_out():
    chain = chains(p=[("w", 0.0)], q=[("w", 0.0)])
    samples = {"p": {0: draft("w", 0.0, 0.0), 1: draft("w", 0.0, 0.0)}, "q": {0: draft("w", 0.0, 0.0)}}
    assert parallel(chain, samples, equal)["n"] == 1
    assert parallel(chain, {}, equal) == {"n": 0}


def test_one_longer_answer_against_the_last_round():
    answers = chains(fixed=[("b", 1.0)], kept=[("c", 1.0)], spoilt=[("d", 1.0)])
    answers["fixed"][1] |= {"num_tokens": 40, "finish_reason": "length"}
    for row in (answers["kept"][1], answers["spoilt"][1]):
        row["finish_reason"] = "stop"
    found = longer(FOUR, answers, 96)
    assert (found["n"], found["max_tokens"], found["num_cut"]) == (3, 96, 1)  # `lost` has no answer
    assert (found["answer"]["mean_tokens"], found["answer"]["mean_responses"]) == (pytest.approx(20.0), 1)
    assert (found["chain"]["mean_tokens"], found["chain"]["mean_responses"]) == (20.0, 2)
    assert found["answer"]["exact_match"]["mean"] == 1.0
    assert found["difference"]["exact_match"]["mean"] == pytest.approx(-1 / 3)
    assert found["difference"]["reward"]["mean"] == pytest.approx(-0.5 / 3)
    assert longer(FOUR, {}, 96) == {"n": 0}


@pytest.mark.parametrize(
    ("verifier", "one", "other", "expected"),
    [
        (None, "a ", "a", True),
        (None, "a", "b", False),
        (options.Verifier(name="exact"), "a b", "a  b", False),
        (options.Verifier(name="evolve_ray.toy.task:SortVerifier"), "a", " a", True),
        (options.Verifier(name="regex", pattern=r"#### (\d+)"), "x #### 3", "y #### 3", True),
        (options.Verifier(name="regex", pattern=r"#### (\d+)"), "none", "no", False),  # in neither is an answer
        (options.Verifier(name="numeric"), "it is 3,000", "so 3000.", True),
        (options.Verifier(name="numeric"), "it is 3", "so 4", False),
        (options.Verifier(name="numeric"), "none", "no", False),
    ],
)
def test_answers_are_the_same_as_the_verifier_reads_them(verifier, one, other, expected):
    assert same_answer(verifier)(one, other) is expected


def test_answers_are_the_same_if_math_finds_them_equal():
    same = same_answer(options.Verifier(name="math"))
    assert same("so $\\frac{1}{2}$", "It is 0.5.")
    assert not same("so $\\frac{1}{2}$", "It is 0.6.")
    assert not same("I do not know", "nor do I")
