"""One thread drives many strategies on one engine: nobody waits for a round, and order decides nothing."""

import pickle
import random
import subprocess
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from evolve_ray.config import options
from evolve_ray.errors import UserError
from evolve_ray.generate.drive import Drive
from evolve_ray.generate.spec import Completion, GenerateSpec
from evolve_ray.generate.vllm import SPECULATION_METRICS, VllmEngine
from evolve_ray.refine.strategies import STRATEGIES
from evolve_ray.refine.template import load_template
from evolve_ray.store.rows import GENERATION, derive_seed

PROMPTS = [{"prompt_id": name, "prompt": f"q{name}", "split": "train", "file": "f", "line": n} for n, name in enumerate("abc", 1)]


class FakeEngine:
    """Answers each request after a number of steps that its prompt has in `delays`; `order` shuffles what is ready."""

    def __init__(self, delays=None, order=None, cut=()):
        self.delays, self.order, self.cut = delays or {}, order, cut
        self.waiting: list[list] = []
        self.log: list[tuple[str, str]] = []

    def submit(self, request_id, prompt_ids, seed, *, logps=False):
        self.log.append(("submit", request_id))
        self.waiting.append([self.delays.get(request_id.split("/")[0], 1), request_id, prompt_ids, seed])

    def step(self):
        for request in self.waiting:
            request[0] -= 1
        ready = [request for request in self.waiting if request[0] <= 0]
        self.waiting = [request for request in self.waiting if request[0] > 0]
        if self.order:
            self.order.shuffle(ready)
        return [self.answer(request_id, ids) for _, request_id, ids, _ in ready]

    def answer(self, request_id, ids):
        self.log.append(("done", request_id))
        reason = "length" if request_id in self.cut else "stop"
        return Completion(request_id, f"answer to {request_id}", 3, len(ids), len(ids) - 1, reason)


def spec(strategy=None, context_tokens=1000, seats=256, **more):
    fields = {"seed": 5, "scope": 1, "model_hash": "m1"} | more
    return GenerateSpec(
        prompts="", work="", key="", shard_prompts=1, model="", dtype="float32", context_tokens=context_tokens,
        template=load_template("tiny", "conversation"), strategy=strategy or options.Strategy(rounds=3),
        sampling=options.Sampling(max_tokens=10), engine=options.Engine(max_num_seqs=seats), **fields,
    )  # fmt: skip


def encode(ask):
    """A token for each character of the messages."""
    return [ord(character) for message in ask.messages for character in message["content"]]


class FakeJudge:
    """Scores a text by its last number, `delay` questions late; `order` shuffles what is ready."""

    def __init__(self, delay=0, order=None):
        self.delay, self.order, self.open, self.waits = delay, order, [], 0

    def ask(self, key, prompt, texts):
        self.open.append([self.delay, key, [hash_of(text) for text in texts]])

    def finished(self, *, wait):
        self.waits += wait
        for request in self.open:
            request[0] -= 1
        ready = [request for request in self.open if request[0] < 0 or wait]
        self.open = [request for request in self.open if request not in ready]
        if self.order:
            self.order.shuffle(ready)
        return [(key, scores) for _, key, scores in ready]


def hash_of(text):
    return derive_seed(text) / 2**31


def run(engine=None, prompts=PROMPTS, encode=encode, judge=None, **more):
    given = spec(**more)

    def start(prompt):
        return STRATEGIES[given.strategy.name](prompt, given.template, given.strategy)

    return Drive(engine or FakeEngine(), encode, given, judge).run(prompts, start)


def test_every_prompt_gets_every_round_in_canonical_order():
    rows, rejected, _ = run()
    assert [(row["prompt_id"], row["round"]) for row in rows] == [(name, n) for name in "abc" for n in (1, 2, 3)]
    assert rejected == []
    assert all(set(row) == set(GENERATION.names) for row in rows)


def test_fast_chain_does_not_wait_for_a_slow_one():
    engine = FakeEngine(delays={"a": 50})
    run(engine)
    assert engine.log.index(("done", "b/0/3/0")) < engine.log.index(("done", "a/0/1/0"))
    assert engine.log.index(("submit", "b/0/2/0")) < engine.log.index(("done", "a/0/1/0"))


def test_an_engine_has_no_more_requests_than_seats_and_who_has_the_most_rounds_left_is_next():
    engine, most = FakeEngine(delays={"a": 3}), 0
    step = engine.step

    def watched():
        nonlocal most
        most = max(most, len(engine.waiting))
        return step()

    engine.step = watched
    prompts = [{"prompt_id": name, "prompt": name, "split": "train", "file": "f", "line": 1} for name in "abcd"]
    expected, _, _ = run(prompts=prompts)
    assert run(engine, prompts, seats=2)[0] == expected
    assert most == 2
    asked = [name for kind, name in engine.log if kind == "submit"]
    rounds = [int(name.split("/")[2]) for name in asked if name[0] != "a"]
    assert rounds == sorted(rounds), "d is asked for the first time before b is asked again"
    assert asked[:4] == ["a/0/1/0", "b/0/1/0", "c/0/1/0", "d/0/1/0"]


def test_order_of_completion_changes_no_row():
    expected, _, _ = run()
    for seed in range(5):
        rng = random.Random(seed)
        engine = FakeEngine(delays={name: rng.randint(1, 4) for name in "abc"}, order=rng)
        assert run(engine)[0] == expected


def test_order_of_the_prompts_changes_no_prompts_rows():
    rows, _, _ = run()
    backwards, _, _ = run(prompts=PROMPTS[::-1])
    key = lambda row: row["draft_id"]  # noqa: E731
    assert sorted(rows, key=key) == sorted(backwards, key=key)
    assert rows != backwards


def test_seeds_come_from_run_scope_prompt_sample_and_round():
    rows, _, _ = run()
    assert [row["seed"] for row in rows] == [derive_seed(5, 1, row["prompt_id"], 0, row["round"]) for row in rows]
    assert len({row["seed"] for row in rows}) == len(rows)


@pytest.mark.parametrize("change", [{"seed": 6}, {"scope": 2}, {"scope": "evaluation"}])
def test_other_run_or_scope_samples_with_other_seeds(change):
    assert not {row["seed"] for row in run()[0]} & {row["seed"] for row in run(**change)[0]}


def test_parents_link_the_rounds():
    rows, _, _ = run()
    of = {(row["prompt_id"], row["round"]): row for row in rows}
    for (prompt_id, number), row in of.items():
        assert row["parent_id"] == (of[prompt_id, number - 1]["draft_id"] if number > 1 else None)


def test_every_draft_names_its_model_and_has_an_id_of_its_own():
    one, two = run()[0], run(model_hash="m2")[0]
    assert {row["model"] for row in two} == {"m2"}
    assert len({row["draft_id"] for row in one + two}) == len(one) + len(two)


def test_answers_of_a_list_of_asks_come_back_in_the_order_of_the_asks():
    given = []

    def strategy(prompt):
        template = load_template("tiny", "conversation")
        drafts = yield from STRATEGIES["parallel"](prompt, template, options.Strategy(name="parallel", samples=4))
        given.append([draft.sample for draft in drafts])
        return drafts

    rows, _, _ = Drive(FakeEngine(order=random.Random(3)), encode, spec()).run(PROMPTS, strategy)
    assert given == [[0, 1, 2, 3]] * 3
    assert [row["sample"] for row in rows] == [0, 1, 2, 3] * 3


def test_ask_that_outgrows_the_context_rejects_its_prompt_alone():
    def long_for_b(ask):
        return [0] * (991 if "b" in ask.messages[0]["content"] and ask.round == 2 else 990)

    rows, rejected, _ = run(encode=long_for_b)
    assert [(row["id"], row["stage"], row["line"]) for row in rejected] == [("b", "generations", 2)]
    assert rejected[0]["reason"] == (
        "ask of round 2 has 991 tokens; with sampling.max_tokens 10 that is beyond model.context_tokens 1000"
    )
    assert [row["prompt_id"] for row in rows] == ["a"] * 3 + ["c"] * 3


def test_ask_that_never_fits_is_not_submitted():
    engine = FakeEngine()
    rows, rejected, _ = run(engine, encode=lambda ask: [0] * 5000)
    assert (rows, len(rejected), engine.log) == ([], 3, [])


def test_one_long_ask_of_a_list_rejects_the_prompt_before_any_of_them_runs():
    engine = FakeEngine()
    strategy = options.Strategy(name="parallel", samples=3)
    _, rejected, _ = run(engine, strategy=strategy, encode=lambda ask: [0] * (5000 if ask.sample == 2 else 5))
    assert (len(rejected), engine.log) == (3, [])


def test_cut_answer_stays_marked_as_cut_and_is_refined_further():
    rows, _, _ = run(FakeEngine(cut=("a/0/1/0",)))
    reasons = {(row["prompt_id"], row["round"]): row["finish_reason"] for row in rows}
    assert [key for key, reason in reasons.items() if reason == "length"] == [("a", 1)]
    assert len(reasons) == 9


def test_counts_add_up_over_all_asks():
    rows, _, stats = run()
    assert stats["num_asks"] == len(rows) == 9
    assert stats["num_tokens"] == sum(row["num_tokens"] for row in rows) == 27
    assert stats["num_prompt_tokens"] == sum(row["num_prompt_tokens"] for row in rows)
    assert stats["num_cached_tokens"] == stats["num_prompt_tokens"] - 9


def test_no_prompts_need_no_step():
    assert run(prompts=[])[:2] == ([], [])


def test_what_an_actor_gets_survives_pickling():
    assert pickle.loads(pickle.dumps(spec())) == spec()


BEST_OF = options.Strategy(name="best_of", rounds=3, samples=2)


def test_best_of_goes_on_with_the_draft_that_the_scorer_puts_first():
    rows, _, stats = run(strategy=BEST_OF, judge=FakeJudge())
    of = {(row["prompt_id"], row["sample"], row["round"]): row for row in rows}
    for name in "abc":
        for number in (2, 3):
            before = [of[name, sample, number - 1] for sample in (0, 1)]
            best = max(before, key=lambda row: hash_of(row["text"]))
            assert {of[name, sample, number]["parent_id"] for sample in (0, 1)} == {best["draft_id"]}
    assert (len(rows), stats["num_judged"], stats["num_answers"]) == (18, 6, 18)


def test_late_scores_hold_up_nobody_else_and_change_no_row():
    expected, _, _ = run(strategy=BEST_OF, judge=FakeJudge())
    for seed in range(5):
        rng = random.Random(seed)
        engine = FakeEngine(delays={name: rng.randint(1, 4) for name in "abc"}, order=rng)
        assert run(engine, strategy=BEST_OF, judge=FakeJudge(rng.randint(0, 6), rng))[0] == expected


def test_engine_without_work_waits_for_the_scorer():
    judge = FakeJudge(delay=1000)
    run(strategy=BEST_OF, judge=judge)
    assert judge.waits > 0


def test_strategy_that_asks_for_scores_is_refused_where_there_is_no_scorer():
    with pytest.raises(UserError, match=r"strategy\.name: 'best_of' asks for scores"):
        run(strategy=BEST_OF)


def test_critiques_are_rows_of_their_own_kind_before_the_answer_that_they_lead_to():
    rows, _, stats = run(strategy=options.Strategy(name="critique", rounds=2))
    assert [(row["round"], row["kind"]) for row in rows if row["prompt_id"] == "a"] == [
        (1, "answer"),
        (2, "critique"),
        (2, "answer"),
    ]
    assert (stats["num_asks"], stats["num_answers"]) == (9, 6)
    assert len({row["seed"] for row in rows}) == len({row["draft_id"] for row in rows}) == 9


class SettlingEngine(FakeEngine):
    """Repeats itself from the round on that its prompt has in `settles`; a round above 9 never comes."""

    def __init__(self, settles, **more):
        super().__init__(**more)
        self.settles = settles

    def answer(self, request_id, ids):
        done = super().answer(request_id, ids)
        name, _, number, _ = request_id.split("/")
        settled = min(int(number), self.settles.get(name, 9))
        return Completion(request_id, f"{name} {settled}", settled, len(ids), 0, done.finish_reason)


UNCHANGED = options.Strategy(rounds=4, stop_unchanged=True)
RIGHT = options.Strategy(rounds=4, stop_right=True)


def of_prompt(rows, name):
    return [(row["round"], row["kind"], row["text"], row["finish_reason"]) for row in rows if row["prompt_id"] == name]


def test_chain_that_changes_nothing_any_more_leaves_its_rounds_out_and_says_so():
    engine = SettlingEngine({"a": 2, "b": 3})
    rows, _, stats = run(engine, strategy=UNCHANGED)
    assert of_prompt(rows, "a") == [
        (1, "answer", "a 1", "stop"), (2, "answer", "a 2", "stop"), (3, "answer", "a 2", "stop"), (4, "skipped", "", "unchanged"),
    ]  # fmt: skip
    assert [row[1] for row in of_prompt(rows, "b")] == ["answer"] * 4  # its fixed point is seen in the last round only
    assert ("submit", "a/0/4/0") not in engine.log
    assert (stats["num_answers"], stats["num_skipped"], stats["num_saved_tokens"]) == (11, 1, 2)
    left_out = next(row for row in rows if row["kind"] == "skipped")
    assert (left_out["num_tokens"], left_out["num_prompt_tokens"], left_out["seed"], left_out["model"]) == (0, 0, None, None)
    assert left_out["parent_id"] == next(r["draft_id"] for r in rows if (r["prompt_id"], r["round"]) == ("a", 3))
    assert len({row["draft_id"] for row in rows}) == len(rows) == 12
    assert all(set(row) == set(GENERATION.names) for row in rows)


def test_drafts_before_the_end_of_a_chain_are_those_of_the_whole_chain():
    whole, _, stats = run(SettlingEngine({"a": 2, "b": 1}), strategy=options.Strategy(rounds=4))
    short, _, _ = run(SettlingEngine({"a": 2, "b": 1}), strategy=UNCHANGED)
    assert [row for row in short if row["kind"] == "answer"] == [row for row in whole if row in short]
    assert "num_skipped" not in stats


def verified(strategy, right, **more):
    engine = FakeEngine(**more)
    drive = Drive(engine, encode, spec(strategy))
    drive.verify = lambda prompt, text: right.get(text, 0.5)
    template = load_template("tiny", "conversation")
    return drive.run(PROMPTS, lambda prompt: STRATEGIES["chain"](prompt, template, strategy))


def test_chain_ends_where_the_verifier_gives_its_full_mark():
    rows, _, stats = verified(RIGHT, {"answer to b/0/2/0": 1.0, "answer to c/0/1/0": 1.0, "answer to a/0/4/0": 1.0})
    kinds = {name: [(number, reason) for number, kind, _, reason in of_prompt(rows, name) if kind == "skipped"] for name in "abc"}
    assert kinds == {"a": [], "b": [(3, "right"), (4, "right")], "c": [(2, "right"), (3, "right"), (4, "right")]}
    assert (stats["num_skipped"], stats["num_saved_tokens"]) == (5, 15)


def test_a_draft_that_was_cut_ends_no_chain():
    rows, _, _ = verified(RIGHT, {"answer to b/0/2/0": 1.0}, cut=("b/0/2/0",))
    assert [row["kind"] for row in rows] == ["answer"] * 12
    rows, _, _ = run(SettlingEngine({"a": 2}, cut=("a/0/3/0", "a/0/4/0")), strategy=UNCHANGED)
    assert [row["kind"] for row in rows] == ["answer"] * 12


def test_strategy_that_asks_the_verifier_is_refused_where_there_is_none():
    with pytest.raises(UserError, match=r"strategy\.name: 'chain' asks the verifier"):
        run(strategy=RIGHT)


def test_an_engine_that_speculates_counts_its_guesses_since_the_last_call():
    guessed = 0

    def metrics():
        values = {
            "vllm:spec_decode_num_draft_tokens": guessed,
            "vllm:spec_decode_num_accepted_tokens": guessed // 4,
            "vllm:other": 1.5,
        }
        return [SimpleNamespace(name=name, value=value) for name, value in values.items()]

    engine = VllmEngine.__new__(VllmEngine)
    engine.last_counts = dict.fromkeys(SPECULATION_METRICS, 0)
    engine.llm = SimpleNamespace(llm_engine=SimpleNamespace(log_stats=True), get_metrics=metrics)
    assert engine.counts() == {"num_guessed_tokens": 0, "num_accepted_tokens": 0}
    guessed = 100
    assert engine.counts() == {"num_guessed_tokens": 100, "num_accepted_tokens": 25}
    guessed = 180
    assert engine.counts() == {"num_guessed_tokens": 80, "num_accepted_tokens": 20}
    engine.llm.llm_engine.log_stats = False
    assert engine.counts() == {}


@pytest.mark.parametrize(
    ("core", "dies"),
    [
        ("N(resources=N(engine_dead=False))", "core.resources.engine_dead"),
        ("N(engine_core=N(model_executor=N(is_failed=False)))", "core.engine_core.model_executor.is_failed"),
    ],
)
def test_a_process_ends_with_the_others_of_its_engine(core, dies):
    code = (
        "import time\nfrom types import SimpleNamespace as N\n"
        "from evolve_ray.generate.vllm import exit_with_engine_processes\n"
        f"exit_with_engine_processes(N(engine_core=N(model_executor=N())))\ncore = {core}\nexit_with_engine_processes(core)\n"
        f"time.sleep(1)\nprint('alive', flush=True)\n{dies} = True\ntime.sleep(60)"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=50)
    assert (ended.returncode, ended.stdout) == (1, "alive\n")


@pytest.mark.parametrize("asked", [False, True])
def test_the_engine_is_asked_for_log_probabilities_where_the_recipe_says_so(asked):
    engine, calls = FakeEngine(), []
    submit = engine.submit
    engine.submit = lambda *arguments, **more: (calls.append(more), submit(*arguments, **more))
    wanted = replace(spec(), sampling=options.Sampling(max_tokens=10, logps=asked))
    drive = Drive(engine, encode, wanted)
    drive.run(PROMPTS[:1], lambda prompt: STRATEGIES["chain"](prompt, wanted.template, wanted.strategy))
    assert calls == [{"logps": True} if asked else {}] * 3
