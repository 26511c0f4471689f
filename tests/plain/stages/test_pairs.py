"""Selection over committed shards: every draft is accounted for, and nothing is trained on nothing."""

import dataclasses
import functools
from collections import Counter
from pathlib import Path
from types import SimpleNamespace

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.options import Selection
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.inputs.prepare import settle_config
from evolve_ray.refine.rendering import Rendering
from evolve_ray.refine.template import load_template
from evolve_ray.select.advantages import AdvantageArgs, advantages
from evolve_ray.select.pairs import make_pair, reject_draft
from evolve_ray.stages import pairs as stages_pairs
from evolve_ray.stages import probe, training
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import commit
from evolve_ray.store.run import Run, Stage


@pytest.fixture
def tables(recipe, tmp_path):
    """A run with prompts, drafts and scores of two shards committed; `scores` by draft id, None for a lost one."""

    def make(scores, *overrides, extra=()):
        config = load(recipe(), ["engine.shard_prompts=2", *overrides])
        run = Run(tmp_path / "run")
        context = Context(
            config, run, lambda _: None, lambda: None, False, load_template("tiny", "conversation"), Policy(Path(), "")
        )
        folder = run.iteration(1)
        prompts = [
            {"prompt_id": f"p{n}", "prompt": f"q{n}", "answer": None, "split": "s", "file": "f", "line": n, "num_tokens": 1}
            for n in range(3)
        ]
        stages = {name: Stage(folder / name, name, name) for name in ("prompts", "generations", "scores")}
        rows.write_table(stages["prompts"].start() / "prompts.parquet", prompts, rows.PROMPT)
        made = {"prompts": stages["prompts"].commit(num_in=3, num_rows=3)}
        for name in ("generations", "scores"):
            stages[name].resume()
            for shard in range(2):
                here = prompts[2 * shard : 2 * shard + 2]
                drafts = [draft(p["prompt_id"], n) for p in here for n in (1, 2)]
                table = drafts + [draft(p["prompt_id"], 2, "critique") for p in here]
                if name == "scores":
                    known = [d["draft_id"] for d in drafts if scores.get(d["draft_id"]) is not None] + list(extra) * (shard == 0)
                    table = [{"draft_id": i, "prompt_id": i[:2], "score": scores.get(i, 0.0), "correct": None} for i in known]
                aside = stages[name].work / f".{shard}"
                aside.mkdir()
                rows.write_table(aside / "rows.parquet", table, rows.SCORE if name == "scores" else rows.GENERATION)
                rows.write_jsonl(aside / "rejected.jsonl", [])
                commit(aside, stages[name].work / shards.shard_name(shard), stage="shard", key="k", num_in=1, num_rows=len(table))
            made[name] = shards.finish(stages[name], 2, 2)
        context.prompts[1] = made["prompts"]
        return context, *made.values()

    return make


def draft(prompt_id, number, kind="answer"):
    return {
        "draft_id": f"{prompt_id}-{number}{'c' * (kind == 'critique')}", "prompt_id": prompt_id, "split": "s", "sample": 0,
        "round": number, "kind": kind, "parent_id": f"{prompt_id}-1" if kind == "critique" else None,
        "text": f"y{number}", "finish_reason": "stop",
        "num_prompt_tokens": 1, "num_tokens": 1, "seed": 0, "model": "m",
    }  # fmt: skip


SCORES = {"p0-1": 0.0, "p0-2": 1.0, "p1-1": 1.0, "p1-2": 0.0, "p2-1": 0.5, "p2-2": None}


def test_pairs_of_all_shards_come_in_the_order_of_the_prompts(tables):
    context, *inputs = tables(SCORES)
    manifest = stages_pairs.select(context, 1, *inputs[1:])
    table = rows.read_table(manifest.path("pairs.parquet"))
    assert [(row["prompt_id"], row["chosen_id"], row["rejected_id"]) for row in table] == [
        ("p0", "p0-2", "p0-1"), ("p1", "p1-1", "p1-2"),
    ]  # fmt: skip


def test_every_draft_is_used_or_in_the_rejected_rows(tables):
    context, *inputs = tables(SCORES)
    manifest = stages_pairs.select(context, 1, *inputs[1:])
    rejected = rows.read_jsonl(manifest.path("rejected.jsonl"))
    assert {row["id"]: row["reason"] for row in rejected} == {
        "p2-1": "no draft with another text is left to pair it with", "p2-2": "has no finite score",
    }  # fmt: skip
    assert manifest.stats == {"num_in": 6, "num_rows": 2, "num_used": 4, "num_rejected": 2}


def test_selected_pairs_are_not_selected_again(tables):
    context, *inputs = tables(SCORES)
    first = stages_pairs.select(context, 1, *inputs[1:])
    before = (first.folder / "pairs.parquet").stat().st_mtime_ns
    assert stages_pairs.select(context, 1, *inputs[1:]) == first
    assert (first.folder / "pairs.parquet").stat().st_mtime_ns == before


@pytest.mark.parametrize("scores", [dict.fromkeys(SCORES, 0.5), dict.fromkeys(SCORES)])
def test_run_without_a_single_pair_stops_clearly(tables, scores):
    context, *inputs = tables(scores)
    with pytest.raises(UserError, match=r"the selection made no pairs from 6 drafts .*nothing to train on"):
        stages_pairs.select(context, 1, *inputs[1:])


def test_score_of_a_draft_that_does_not_exist_is_refused(tables):
    context, *inputs = tables(SCORES, extra=["p0-9"])
    with pytest.raises(IntegrityError, match=r"has scores of 1 drafts that are not in "):
        stages_pairs.select(context, 1, *inputs[1:])


def forgetful(prompt, drafts, options):
    """A selection that loses drafts."""
    return [], []


def test_selection_that_loses_drafts_is_refused(tables):
    context, *inputs = tables(SCORES, f"selection.name={__name__}:forgetful")
    with pytest.raises(IntegrityError, match="has 2 drafts, but 0 are in pairs and 0 rejected"):
        stages_pairs.select(context, 1, *inputs[1:])


@pytest.mark.parametrize(("difference", "agrees"), [(1e-6, True), (0.2, False), (float("nan"), False)])
def test_engines_that_differ_from_the_checkpoint_end_the_run_and_nothing_is_committed(tables, monkeypatch, difference, agrees):
    context, prompts, *_ = tables(SCORES)
    context.prompts, context.pools = {1: prompts}, SimpleNamespace(open=lambda _: [])
    found = {"mean_difference": difference, "kl_iteration": 0.1, "kl_initial": 0.2}
    monkeypatch.setattr(probe, "call_all", lambda *_: [])
    monkeypatch.setattr(probe.weight_probe, "compare", lambda *_: found)
    folder = context.run.iteration(1) / "probe"
    if agrees:
        assert probe.probe(context, 1, context.policy, context.policy) == found
        assert (folder / "MANIFEST.json").exists()
    else:
        with pytest.raises(IntegrityError, match=r"differ from the checkpoint's by .* submit the same command again"):
            probe.probe(context, 1, context.policy, context.policy)
        assert not folder.exists()


def test_option_that_changes_runs_its_own_stage_again_after_saying_so(tables, capsys):
    context, *inputs = tables(SCORES)
    first = stages_pairs.select(context, 1, *inputs[1:])
    committed = {path: path.stat().st_mtime_ns for path in context.run.root.rglob("MANIFEST.json") if path.parent != first.folder}
    said = []
    changed = dataclasses.replace(
        context,
        config=dataclasses.replace(context.config, selection=dataclasses.replace(context.config.selection, margin=0.75)),
        rerun_changed=True,
        say=said.append,
    )
    with pytest.raises(UserError, match="made from other inputs or options"):
        stages_pairs.select(dataclasses.replace(changed, rerun_changed=False), 1, *inputs[1:])
    second = stages_pairs.select(changed, 1, *inputs[1:])
    assert second.key != first.key
    why = "its options or its source changed; it is computed again, and the old one is kept at .superseded-pairs-"
    assert said[0].startswith(f"  iteration-01/pairs: {why}")
    assert {path: path.stat().st_mtime_ns for path in committed} == committed, "a stage whose key is the same was touched"


def test_stage_that_is_computed_again_says_which_options_changed_and_what_else_it_is_made_from(tables, recipe):
    """The options are those of the whole recipe; what a stage is made from is its own."""
    context, _, drafts, scores = tables(SCORES)
    stages_pairs.select(context, 1, drafts, scores)
    settle_config(context.config, context.run, rerun_changed=False)
    config = load(recipe(), ["engine.shard_prompts=2", "selection.margin=0.75", "training.beta=0.3"])
    changed = settle_config(config, context.run, rerun_changed=True)
    assert changed == "selection.margin (0.0 -> 0.75), training.beta (0.1 -> 0.3)"
    said = []
    again = dataclasses.replace(context, config=config, rerun_changed=True, say=said.append, changed=changed)
    stages_pairs.select(again, 1, drafts, scores)
    stages_pairs.select(again, 1, drafts, dataclasses.replace(scores, key="other"))
    for line, why in zip(said, ("its options or its source changed", "its input changed: scores"), strict=True):
        assert line.startswith(f"  iteration-01/pairs: {why} (in the recipe: {changed}); it is computed again")
    events = rows.read_jsonl(context.run.root / "events.jsonl")
    assert [changed in event["why"] for event in events if event["event"] == "superseded"] == [True, True]
    assert settle_config(config, context.run, rerun_changed=True) == ""


def test_option_of_another_stage_runs_nothing_again(tables, monkeypatch):
    context, *inputs = tables(SCORES)
    first = stages_pairs.select(context, 1, *inputs[1:])
    other = dataclasses.replace(
        context, config=dataclasses.replace(context.config, training=dataclasses.replace(context.config.training, beta=0.3))
    )
    monkeypatch.setattr(stages_pairs, "write_pairs", lambda *_: pytest.fail("a stage whose options are the same ran again"))
    assert stages_pairs.select(other, 1, *inputs[1:]).identity == first.identity


def test_run_whose_scores_are_all_tied_stops_clearly(tables):
    context, *inputs = tables(dict.fromkeys(SCORES, 0.5))
    with pytest.raises(UserError, match="there is nothing to train on"):
        stages_pairs.select(context, 1, *inputs[1:])


@pytest.fixture
def trained(tables, monkeypatch):
    """(reference key, checkpoint key) of a training on the run's pairs; `group.fit` is not what is asked about."""
    context, *inputs = tables(SCORES)
    chosen = stages_pairs.select(context, 1, *inputs[1:])
    specs = []

    def fit(spec, storage, pools):
        specs.append(spec)
        (spec.checkpoint.start() / "model.safetensors").write_text(spec.checkpoint.key)
        return spec.checkpoint.commit()

    monkeypatch.setattr(training.group, "fit", fit)

    def keys(*overrides, policy="m1", pairs=chosen, template=context.template, initial=None):
        config = context.config
        for override in overrides:
            (section, name), value = override[0].split("."), override[1]
            config = dataclasses.replace(config, **{section: dataclasses.replace(getattr(config, section), **{name: value})})
        start = Policy(Path("initial"), initial) if initial else None
        given = dataclasses.replace(context, config=config, template=template, rerun_changed=True, initial=start)
        specs.clear()
        training.train(given, 1, Policy(Path("policy"), policy), pairs, config.training, "checkpoint")
        if specs:
            assert (specs[0].model, specs[0].reference.inputs) == ("policy", {"pairs": pairs.identity})
            keys.of = (specs[0].reference.key, specs[0].checkpoint.key)
        return keys.of

    return keys, chosen


OPTIONS = {
    "another dtype": ("model.dtype", "bfloat16"),
    "other batches": ("training.batch_pairs", 3),
    "other sequences": ("training.alpha", 0.25),
    "other forwards": ("trainer.forward", "tree"),
}
OTHERS = {
    "another policy": {"policy": "m2"},
    "other pairs": {"pairs": "other"},
    "another template": {"template": load_template("tiny", "one_message")},
}


@pytest.mark.parametrize("other", [*OPTIONS.values(), *OTHERS.values()], ids=[*OPTIONS, *OTHERS])
def test_whatever_decides_the_reference_gives_it_another_key_and_the_checkpoint_too(trained, other):
    keys, chosen = trained
    if other == {"pairs": "other"}:
        other = {"pairs": dataclasses.replace(chosen, key="other")}
    before, after = keys(), keys(**other) if isinstance(other, dict) else keys(other)
    assert after[0] != before[0]
    assert after[1] != before[1]
    assert keys() == before


@pytest.mark.parametrize("change", [("training.learning_rate", 0.5), ("training.beta", 0.5), ("training.epochs", 3)])
def test_what_the_reference_does_not_depend_on_gives_the_checkpoint_alone_another_key(trained, change):
    keys, _ = trained
    before, after = keys(), keys(change)
    assert after[0] == before[0]
    assert after[1] != before[1]


def test_context_length_is_in_the_reference_by_its_pairs_alone(trained):
    """It decides which prompts fit and how long answers may be; no pair is cut to it."""
    keys, _ = trained
    assert keys() == keys(("model.context_tokens", 77))


def test_reference_has_the_key_of_the_model_that_it_is_of(trained):
    """The policy that an iteration starts from, or the run's initial one; the other says nothing about it."""
    keys, _ = trained
    assert keys(initial="m0") == keys(initial="m9")
    fixed = ("training.reference", "initial")
    assert keys(fixed, initial="m0")[0] == keys(fixed, initial="m0", policy="m2")[0] == keys(policy="m0")[0]
    assert keys(fixed, initial="m0")[0] != keys(fixed, initial="m9")[0]


def numbered(prompt, drafts, options, args):
    """The better of two drafts, with a weight that only some prompts have."""
    scored = sorted((d for d in drafts if d["score"] is not None), key=lambda d: -d["score"])
    if len(scored) < 2 or prompt["prompt_id"] == args.get("none"):
        return [], [reject_draft(prompt, d, "no two scores") for d in drafts]
    numbers = {"weight": scored[0]["score"] * args["scale"], "correct": scored[0]["correct"] or 0.0}
    return [make_pair(prompt, *scored, numbers=numbers if prompt["prompt_id"] != args.get("bare") else None)], []


def test_numbers_of_a_pair_are_stored_only_if_the_selection_gives_them(tables):
    context, *inputs = tables(SCORES, f"selection.name={__name__}:numbered", "selection.args.scale=3")
    manifest = stages_pairs.select(context, 1, *inputs[1:])
    table = rows.read_table(manifest.path("pairs.parquet"))
    assert [row["numbers"] for row in table] == [{"correct": 0.0, "weight": 3.0}] * 2
    assert "numbers" not in rows.PAIR.names


def test_numbers_that_only_some_pairs_have_are_refused(tables):
    context, *inputs = tables(SCORES, f"selection.name={__name__}:numbered", 'selection.args={scale=1, bare="p1"}')
    with pytest.raises(UserError, match=r"prompt p1: has the numbers none, but earlier pairs have correct, weight; every pair"):
        stages_pairs.select(context, 1, *inputs[1:])


def test_a_changed_option_of_a_selection_is_another_stage(tables):
    context, *inputs = tables(SCORES, f"selection.name={__name__}:numbered", "selection.args.scale=3")
    stages_pairs.select(context, 1, *inputs[1:])
    settings = dataclasses.replace(context.config.selection, args={"scale": 4})
    context.config = dataclasses.replace(context.config, selection=settings)
    with pytest.raises(UserError, match="--rerun-changed"):
        stages_pairs.select(context, 1, *inputs[1:])


SEEN = {}


def looking(prompt, drafts, options):
    SEEN[prompt["prompt_id"]] = drafts
    return [], [reject_draft(prompt, d, "only looked at") for d in drafts]


def test_a_selection_sees_verdicts_and_remarks(tables):
    context, *inputs = tables(SCORES, f"selection.name={__name__}:looking")
    with pytest.raises(UserError, match="nothing to train on"):
        stages_pairs.select(context, 1, *inputs[1:])
    first = SEEN["p0"][0]
    assert {"draft_id", "text", "kind", "score", "correct", "remarks"} <= first.keys()
    assert [(d["draft_id"], [r["draft_id"] for r in d["remarks"]]) for d in SEEN["p0"]] == [("p0-1", ["p0-2c"]), ("p0-2", [])]


def test_an_objective_that_needs_a_number_which_no_pair_has_is_refused_before_ray(tables):
    context, *inputs = tables(SCORES)
    pairs = stages_pairs.select(context, 1, *inputs[1:])
    trained = dataclasses.replace(context.config.training, objective="tests.tensors.train.test_objectives_plugs:VOTED")
    message = r"needs the number 'weight' of each pair, but pairs has none; selection 'reward_model' must give it"
    with pytest.raises(UserError, match=message):
        training.check_numbers(pairs, trained, "reward_model")


def test_a_pair_has_the_engines_log_probabilities_of_the_answer_that_is_trained():
    pair = {"chosen_id": "a", "rejected_id": "b"}
    by_id = {"a": {"logps": [-1.0, -0.5], "token_ids": None}, "b": {"logps": [-2.0]}}
    assert stages_pairs.add_details(pair, by_id) == pair | {"chosen_logps": [-1.0, -0.5]}


def test_the_reference_of_policy_gradients_is_another_one_where_it_holds_something_else(tables):
    """Tokens, the sequences after a draft, the initial policy; but not the clip, which only the updates see."""
    context, prompts, *_ = tables(SCORES)
    context.initial = Policy(Path("/initial"), "initial")
    policy = Policy(Path("/now"), "now")

    def key(**options):
        wanted = dataclasses.replace(context.config.training, objective="policy_gradient", **options)
        return training.stages(context, 1, policy, policy, prompts, wanted, "checkpoint")[0].key

    same = [key(), key(objective_args={"clip_low": 0.1})]
    others = [
        key(objective_args={"level": "token"}), key(refine_weight=0.0), key(objective_args={"kl": 0.1, "kl_to": "initial"}),
    ]  # fmt: skip
    assert len(set(same)) == 1
    assert len({*same, *others}) == 4
    assert key(objective_args={"level": "token", "length": "batch"}) == others[0]


def written_by(model):
    tokens = {"token_ids": [1, 2], "logps": [-0.1, -0.2], "num_thinking_tokens": 1, "num_prefix_tokens": 1}
    return {"draft_id": "d", "model": model, "text": "t"} | tokens


@pytest.mark.parametrize(
    ("owner", "owned"),
    [
        ({}, {"p", "c", "q", None}),  # a recipe of one model
        ({"others": frozenset({"c"})}, {"p", "q", None}),  # the policy, now and before
        ({"own": True}, {"p", None}),  # a further model, here with the hash p
    ],
)
def test_tokens_of_a_draft_are_those_of_the_model_that_wrote_it_alone(owner, owned):
    owner = stages_pairs.Owner(Policy(Path("p"), "p"), Rendering(), **owner)
    for model in ("p", "c", "q", None):
        draft = owner.taken(written_by(model))
        assert draft == (written_by(model) if model in owned else {"draft_id": "d", "model": model, "text": "t"})


def test_draft_of_another_model_is_what_a_policy_gradient_refines_but_does_not_train():
    owner = stages_pairs.Owner(Policy(Path("p"), "p"), Rendering(), others=frozenset({"c"}), on_policy=True)

    def draft(name, score, number, parent, model):
        row = {"draft_id": name, "prompt_id": "q", "parent_id": parent, "sample": number, "round": 1 + bool(parent), "text": name}
        row |= {"kind": "answer", "finish_reason": "stop", "score": score, "correct": None, "model": model}
        return owner.taken(row)

    drafts = [draft("theirs", 1.0, 0, None, "c"), draft("worse", 0.0, 0, "theirs", "p"), draft("better", 1.0, 1, "theirs", "p")]
    prompt, counts = {"prompt_id": "q", "prompt": "?", "file": "f", "line": 1}, Counter()
    selection = functools.partial(advantages, args=AdvantageArgs())
    found = functools.partial(stages_pairs.select_all, [prompt], {"q": drafts}, counts=counts, same_tokens=lambda a, b: False)
    pairs, rejected = found(selection, Selection(name="advantages"))
    assert {(row["chosen_id"], row["rejected_id"], row["numbers"]["refined"]) for row in pairs} == {
        ("worse", "theirs", 1.0), ("better", "theirs", 1.0),
    }  # fmt: skip
    assert rejected == []
    alone = {"q": [draft("theirs", 1.0, 0, None, "c"), draft("other", 0.5, 0, None, "p")]}
    _, rejected = stages_pairs.select_all([prompt], alone, selection, Selection(name="advantages"), counts, lambda a, b: False)
    assert "was written by another model" in next(row["reason"] for row in rejected if row["id"] == "theirs")

    def careless(prompt, drafts, options):
        return [make_pair(prompt, drafts[0], drafts[1])], [reject_draft(prompt, drafts[2], "third")]

    with pytest.raises(UserError, match=r"'own:careless', prompt q: trains draft theirs, which was written by another model"):
        found(careless, Selection(name="own:careless"))
