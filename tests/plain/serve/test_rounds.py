"""The rounds of a request with an engine and a scorer that answer from lists: their order, their end, the choice, the seeds."""

import asyncio
import itertools

import pytest

from evolve_ray.config.plugs import with_args
from evolve_ray.refine.asks import Ask, Made
from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.serve.errors import RequestError
from evolve_ray.serve.rounds import STOPPED, Rounds
from tests.plain.serve.examples import TEMPLATE, ListEngine, ListScorer, rules


def prepare(engine, body=None, *, scorer=None, shows_scores=False, seed=None, stream=False, earlier=(), max_seconds=5.0):
    refinement = rules().read(body, stream=stream)
    name = refinement.strategy.name
    start = with_args("strategy.args", name, STRATEGIES[name], refinement.strategy.args)
    strategy = start("the prompt", TEMPLATE, refinement.strategy)
    return Rounds(
        refinement, strategy, earlier, "the prompt", engine, scorer, shows_scores, seed, max_seconds, stream
    )  # fmt: skip


def run(engine, body=None, **more):
    return asyncio.run(prepare(engine, body, **more).run())


def test_a_chain_answers_with_its_last_draft():
    engine = ListEngine("a", "b", "c", "d")
    outcome = run(engine)
    assert (outcome.chosen.text, outcome.stopped) == ("d", "rounds")
    assert [round.text for round in outcome.rounds] == ["a", "b", "c", "d"]
    assert [message["content"] for message in engine.asks[2].messages][-2:] == ["b", TEMPLATE.refine]
    assert [(round.num_tokens, round.num_cached_tokens, round.finish_reason) for round in outcome.rounds] == [(1, 2, "stop")] * 4


def test_earlier_turns_stand_before_every_round():
    engine = ListEngine("a", "b")
    earlier = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"})
    short = run(engine, {"rounds": 2})
    long = run(ListEngine("a", "b"), {"rounds": 2}, earlier=earlier)
    added = [one.num_prompt_tokens - other.num_prompt_tokens for one, other in zip(long.rounds, short.rounds, strict=True)]
    assert added == [len("be brief?!")] * 2


def test_only_the_first_round_has_the_seed_of_the_request_and_all_are_repeatable():
    engines = [ListEngine("a", "b", "c", "d") for _ in range(3)]
    for engine, seed in zip(engines, (7, 7, 8), strict=True):
        run(engine, seed=seed)
    first, again, other = (engine.seeds for engine in engines)
    assert first == again
    assert first[0] == 7
    assert len(set(first + other)) == 8
    unseeded = ListEngine("a", "b")
    run(unseeded, {"rounds": 2})
    assert unseeded.seeds == [None, None]


def test_samples_run_together_and_have_seeds_of_their_own():
    engine = ListEngine("a", "b", "b")
    outcome = run(engine, {"strategy": "parallel", "samples": 3, "select": "vote"}, seed=1)
    assert len(set(engine.seeds)) == 3
    assert outcome.chosen.text == "b"
    assert [round.ask.round for round in outcome.rounds] == [1, 1, 1]


@pytest.mark.parametrize(
    ("texts", "body", "answer", "stopped", "rounds"),
    [
        (["a", "b", "b", "d"], {"stop": "unchanged"}, "b", "unchanged", 3),
        (["a", "b...", "b...", "d"], {"stop": "unchanged"}, "d", "rounds", 4),  # a cut draft is no reason to stop
        (["a", "right", "c", "d"], {"stop": "verified"}, "right", "verified", 2),
        (["a", "b", "c", "right"], {"stop": "verified"}, "right", "rounds", 4),
        (["abc", "def", "ghi", "j"], {"stop": {"budget_tokens": 6}}, "def", "budget_tokens", 2),
        (["abc", "def", "ghi", "j"], {"stop": {"budget_tokens": 8}}, "def", "budget_tokens", 3),  # the third is cut
        (["a", "better...", "c", "d"], {"stop": "verified"}, "d", "rounds", 4),
    ],
)
def test_rounds_end_for_a_reason_that_is_said(texts, body, answer, stopped, rounds):
    engine = ListEngine(*texts)
    outcome = run(engine, body, scorer=ListScorer(right=1.0))
    assert (outcome.chosen.text, outcome.stopped, len(outcome.rounds)) == (answer, stopped, rounds)
    assert outcome.stopped in STOPPED
    assert len(engine.asks) == rounds


def test_the_first_response_may_be_cut_by_the_budget_and_says_so():
    outcome = run(ListEngine("abcdef"), {"stop": {"budget_tokens": 4}})
    assert (outcome.chosen.text, outcome.chosen.finish_reason, outcome.chosen.cut_by) == ("abcd", "length", "budget_tokens")


def test_too_long_a_context_ends_with_what_there_is():
    first = len("".join(message["content"] for message in TEMPLATE.direct("the prompt")))
    engine = ListEngine("a", "b", "c", "d", context_tokens=first + 1)
    outcome = run(engine)
    assert (outcome.chosen.text, outcome.stopped, len(engine.asks)) == ("a", "context", 1)
    with pytest.raises(RequestError, match="too long"):
        run(ListEngine("a", context_tokens=3))


def test_a_deadline_takes_the_last_whole_draft_and_ends_the_running_one():
    engine = ListEngine("abc", "wait")
    outcome = run(engine, {"stop": {"deadline_s": 0.2}})
    assert (outcome.chosen.text, outcome.stopped) == ("abc", "deadline")
    assert (outcome.rounds[1].text, outcome.rounds[1].cut_by, outcome.rounds[1].finish_reason) == ("w", "deadline", "length")
    assert (engine.running, engine.closed) == (0, 2)
    outcome = run(ListEngine("wait"), {"stop": {"deadline_s": 0.2}})
    assert (outcome.chosen.text, outcome.chosen.finish_reason) == ("w", "length")


def test_a_request_that_is_cancelled_leaves_nothing_running():
    async def go(engine):
        task = asyncio.create_task(prepare(engine, {"strategy": "parallel", "samples": 3}).run())
        while len(engine.asks) < 3:
            await asyncio.sleep(0)
        task.cancel()
        await asyncio.wait([task])
        assert task.cancelled()

    engine = ListEngine("wait", "wait", "wait", "a")
    asyncio.run(go(engine))
    assert (engine.running, engine.closed, len(engine.asks)) == (0, 3, 3)


def test_an_error_of_the_engine_ends_the_other_samples_and_is_raised():
    class Broken(ListEngine):
        async def write(self, ask, ids, seed, max_tokens):
            async for piece in super().write(ask, ids, seed, max_tokens):
                if ask.sample == 1:
                    raise ValueError("broken")
                yield piece

    engine = Broken("wait", "b", "wait")
    with pytest.raises(ValueError, match="broken"):
        run(engine, {"strategy": "parallel", "samples": 3})
    assert engine.running == 0


def test_best_takes_the_best_whole_draft_and_the_later_of_equal_ones():
    scorer = ListScorer(a=0.5, b=0.9, c=0.9, d=0.1)
    assert run(ListEngine("a", "b", "c", "d"), {"select": "best"}, scorer=scorer).chosen.text == "c"
    scorer = ListScorer(**{"a": 0.5, "b...": 0.9})
    assert run(ListEngine("a", "b...", "?", "?"), {"select": "best"}, scorer=scorer).chosen.text == "a"


def test_a_vote_counts_equal_answers_and_takes_the_latest_of_them():
    outcome = run(ListEngine("x1", "y2", "z1", "2"), {"select": "vote"}, scorer=ListScorer())
    assert outcome.chosen.text == "2"  # two against two: the answer that was given last
    outcome = run(ListEngine("x1", "y2", "z1", "w1"), {"select": "vote"}, scorer=ListScorer())
    assert outcome.chosen.text == "w1"
    assert run(ListEngine("a", "b", "a", "c"), {"select": "vote"}).chosen.text == "a"


def test_each_draft_is_scored_once_though_strategy_choice_and_page_want_its_score():
    scorer = ListScorer(a=0.1, b=0.9, c=0.2, d=0.3)
    body = {"strategy": "best_of", "samples": 2, "rounds": 2, "select": "best"}
    outcome = run(ListEngine("a", "b", "c", "d"), body, scorer=scorer, shows_scores=True)
    assert sorted(scorer.scored) == ["a", "b", "c", "d"]
    assert outcome.chosen.text == "b"
    assert {round.text: round.score for round in outcome.rounds} == {"a": 0.1, "b": 0.9, "c": 0.2, "d": 0.3}


def test_critiques_are_neither_scored_nor_answers():
    scorer = ListScorer(a=0.1, b=0.2)
    outcome = run(ListEngine("a", "bad", "b"), {"strategy": "critique", "rounds": 2, "select": "best"}, scorer=scorer)
    assert (outcome.chosen.text, scorer.scored) == ("b", ["a", "b"])
    assert [round.ask.kind for round in outcome.rounds] == ["answer", "critique", "answer"]


@pytest.mark.parametrize(
    ("body", "live"),
    [
        (None, [False, False, False, True]),
        ({"stop": "unchanged"}, [False, False, False, True]),
        ({"select": "vote"}, [False] * 4),
        ({"stop": {"deadline_s": 5}}, [False] * 4),
        ({"stop": {"budget_tokens": 50}}, [False] * 4),
    ],
)
def test_the_final_round_is_the_answer_while_it_is_written_only_if_nothing_can_change_that(body, live):
    outcome = run(ListEngine("a", "b", "c", "d"), body, stream=True)
    assert [round.is_live for round in outcome.rounds] == live
    assert outcome.chosen.is_live == any(live)


def test_events_tell_the_story_in_order():
    rounds = prepare(ListEngine("ab", "c"), {"rounds": 2}, scorer=ListScorer(ab=1.0, c=0.5), shows_scores=True)
    seen = []
    rounds.emit = lambda event: seen.append((event.round.ask.round, event.name, event.piece.text if event.piece else ""))
    asyncio.run(rounds.run())
    told = [event for event in seen if event[1] != "scored"]
    assert told == [(1, "wrote", "a"), (1, "wrote", "b"), (1, "ended", ""), (2, "wrote", "c"), (2, "ended", "")]
    assert sorted(event for event in seen if event[1] == "scored") == [(1, "scored", ""), (2, "scored", "")]


def test_no_two_requests_share_anything():
    """Many requests at the same time, each with its own seeds and texts; none sees another's."""

    async def go():
        engines = [ListEngine(*(f"{number}-{round}" for round in range(4))) for number in range(50)]
        outcomes = await asyncio.gather(*[prepare(engine, seed=number).run() for number, engine in enumerate(engines)])
        assert [outcome.chosen.text for outcome in outcomes] == [f"{number}-3" for number in range(50)]
        assert len(set(itertools.chain(*(engine.seeds for engine in engines)))) == 200

    asyncio.run(go())


def test_a_model_that_judges_itself_answers_with_its_best_rated_sample():
    ratings = ["Rating: 3", "Rating: 5", "no", "Rating: 9", "Rating: 8", "Rating: 7"]
    engine = ListEngine("a", "b", *ratings)
    outcome = run(engine, {"strategy": "self_judge", "samples": 2}, seed=1)
    assert (outcome.chosen.text, [round.score for round in outcome.rounds[:2]]) == ("b", [4.0, 8.0])
    assert len({round.draft.draft_id for round in outcome.rounds}) == len(set(engine.seeds)) == 8


def test_an_ask_sets_its_own_length_and_prefix():
    def own(prompt):
        draft = yield Ask(({"role": "user", "content": "q"},), 0, 1, max_tokens=2, prefix="so ")
        assert draft.text == "so ab"
        return [draft]

    engine = ListEngine("abcd")
    rounds = prepare(engine, {"rounds": 1})
    rounds.strategy = own("q")
    outcome = asyncio.run(rounds.run())
    assert (outcome.chosen.text, engine.limits, outcome.chosen.num_prompt_tokens) == ("so ab", [2], len("qso "))


def test_a_composed_text_is_refused():
    def composing(prompt):
        yield Made("text", 0, 1)

    rounds = prepare(ListEngine())
    rounds.strategy = composing("q")
    with pytest.raises(RequestError, match="this strategy hands in its own texts; use another"):
        asyncio.run(rounds.run())
