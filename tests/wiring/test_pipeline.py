"""Generation, scoring and selection on a real Ray with a fake engine: order, retries, and errors that reach the driver."""

import json
from pathlib import Path

import pytest
import ray
from transformers import LlamaConfig, LlamaForCausalLM

from evolve_ray.audit import conservation
from evolve_ray.config.load import load
from evolve_ray.errors import ResourceError, UserError
from evolve_ray.inputs.context import Context
from evolve_ray.inputs.prepare import prepare
from evolve_ray.pools.actors import Pools
from evolve_ray.stages import generations
from evolve_ray.stages.pairs import select
from evolve_ray.store import rows, shards
from evolve_ray.store.run import Run
from evolve_ray.toy.tokenizer import make_tokenizer

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def local_ray():
    environment = {"env_vars": {"PYTHONPATH": str(ROOT)}}
    ray.init(address="local", num_cpus=4, include_dashboard=False, log_to_driver=False, runtime_env=environment)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return make_folder(tmp_path_factory.mktemp("inputs"), 20)


def make_folder(root: Path, num_prompts: int) -> Path:
    """A tiny model, of which a fake engine reads the tokenizer alone, and prompts."""
    tokenizer = make_tokenizer(256)
    tokenizer.save_pretrained(root / "model")
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
        max_position_embeddings=256, bos_token_id=None, eos_token_id=tokenizer.eos_token_id, pad_token_id=tokenizer.pad_token_id,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(root / "model")
    asked = [{"prompt": f"question {number}", "answer": "x"} for number in range(num_prompts)]
    rows.write_jsonl(root / "prompts.jsonl", asked)
    return root


def recipe_text(folder: Path, engine: str = "FakeEngine", per_iteration: int = 20) -> str:
    """A recipe of drafts, scores and pairs from fakes on the model and the prompts in `folder`."""
    return f"""
        iterations = 1
        [model]
        path = "{folder}/model"
        context_tokens = 200
        [prompts]
        path = "{folder}/prompts.jsonl"
        per_iteration = {per_iteration}
        [template]
        name = "tiny"
        [sampling]
        max_tokens = 8
        [scorer]
        name = "tests.fakes:LetterScorer"
        cpus_per_actor = 0.1
        [engine]
        name = "tests.fakes:{engine}"
        shard_prompts = 4
        cpus_per_actor = 0.5
        """


def make_context(folder: Path, run: Path, *overrides: str) -> Context:
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe_text(folder))
    config = load(recipe, overrides)
    run.mkdir()
    return prepare(config, Run(run), lambda line: None, lambda: None, rerun_changed=False)


def draft(context: Context, pools: Pools | None = None):
    """Drafts, scores and pairs of iteration 1, in pools that end with it or in those that are given."""
    context.pools = pools or Pools()
    prompts, config = context.prompts[1], context.config
    place = context.run.iteration(1)
    try:
        asked = generations.GenerationJob(1, "generations", context.policy, prompts, config.strategy, config.sampling, 1, {})
        drafts, scores = generations.generate_and_score(context, asked, place)
        context.prompts[1] = prompts
        pairs = select(context, 1, drafts, scores)
        context.collect_rejected(1)
        return drafts, scores, pairs
    finally:
        if pools is None:
            context.pools.close("engines")
            context.pools.close("scorers")


@pytest.fixture(scope="module")
def pools(local_ray):
    """One engine and one scorer that several tests take in turn, as the stages of a run do."""
    return Pools()


@pytest.fixture(scope="module")
def twin(pools, folder, tmp_path_factory):
    """An undisturbed run with one actor."""
    return draft(make_context(folder, tmp_path_factory.mktemp("twin") / "run"), pools)


def test_pairs_are_byte_identical_with_two_actors(twin, folder, tmp_path):
    drafts, _, pairs = draft(make_context(folder, tmp_path / "run", "engine.actors=2", "scorer.actors=2"))
    assert drafts.identity == twin[0].identity
    assert pairs.path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()
    assert pairs.stats["num_rows"] > 0


def test_each_row_comes_once_in_the_order_of_the_prompts(twin):
    drafts, scores, _ = twin
    table = list(shards.read_rows(drafts))
    assert len({row["draft_id"] for row in table}) == len(table) == 80
    assert [(row["sample"], row["round"]) for row in table] == [(0, number) for number in (1, 2, 3, 4)] * 20
    assert [row["draft_id"] for row in shards.read_rows(scores)] == [row["draft_id"] for row in table]


def test_an_actor_that_dies_twice_in_a_shard_changes_nothing(twin, folder, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    context = make_context(
        folder,
        tmp_path / "run",
        "engine.name=tests.fakes:DyingEngine",
        f'engine.env.FAKE_MARKS="{marks}"',
        'engine.env.FAKE_DEATHS="2"',
    )
    drafts, _, pairs = draft(context)
    assert len(list(marks.iterdir())) == 2, "the fault did not fire"
    assert [row["text"] for row in shards.read_rows(drafts)] == [row["text"] for row in shards.read_rows(twin[0])]
    assert pairs.path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()


def test_an_actor_that_always_dies_ends_the_stage_with_a_resource_error(local_ray, folder, tmp_path):
    marks = tmp_path / "marks"
    marks.mkdir()
    faults = ("engine.name=tests.fakes:DyingEngine", f'engine.env.FAKE_MARKS="{marks}"', 'engine.env.FAKE_DEATHS="99"')
    context = make_context(folder, tmp_path / "run", *faults, "engine.max_restarts=0")
    with pytest.raises(ResourceError, match=r"engines: the worker died 1 times on shard \d"):
        draft(context)


def test_a_plug_that_does_not_exist_is_refused_before_ray(folder, tmp_path):
    with pytest.raises(UserError, match=r"engine\.name: .*NoSuchEngine"):
        make_context(folder, tmp_path / "run", "engine.name=tests.fakes:NoSuchEngine")


@pytest.mark.parametrize(("scorer", "value"), [("OddScorer", "nan"), ("InfiniteScorer", "inf"), ("WordScorer", "'0.5'")])
def test_a_draft_without_a_finite_score_is_rejected_with_the_value(pools, folder, tmp_path, scorer, value):
    context = make_context(folder, tmp_path / "run", f"scorer.name=tests.fakes:{scorer}", "scorer.max_rejected_fraction=0.5")
    drafts, scores, pairs = draft(context, pools)
    lost = rows.read_jsonl(scores.path("rejected.jsonl"))
    assert lost, "the fault did not fire"
    assert drafts.stats["num_rows"] == scores.stats["num_rows"] + len(lost)
    assert {row["reason"] for row in lost} == {f"scorer gave {value}, verifier None: not a finite number"}
    used = {pair[name] for pair in rows.read_table(pairs.path("pairs.parquet")) for name in ("chosen_id", "rejected_id")}
    assert not used & {row["id"] for row in lost}


def test_committed_stages_are_returned_without_ray(pools, folder, tmp_path, monkeypatch):
    run = tmp_path / "run"
    context = make_context(folder, run)
    first = draft(context, pools)
    monkeypatch.setattr("evolve_ray.pools.dispatch.run", lambda *_: pytest.fail("a committed stage was computed again"))
    again = draft(context, pools)
    assert [part.identity for part in again] == [part.identity for part in first]
    assert (
        json.loads((run / "iteration-01" / "pairs" / "MANIFEST.json").read_text())["stats"]["num_rows"]
        == first[2].stats["num_rows"]
    )


def test_rounds_that_a_chain_leaves_out_are_rows_that_nobody_scores_or_selects(pools, folder, tmp_path):
    overrides = ("strategy.stop_right=true", "verifier.name=tests.fakes:EvenDigit", "prompts.answer_column=answer")
    drafts, scores, pairs = draft(make_context(folder, tmp_path / "run", *overrides), pools)
    table = list(shards.read_rows(drafts))
    left_out = {row["draft_id"]: row for row in table if row["kind"] == "skipped"}
    assert left_out, "no chain ended early"
    assert len(table) == 80
    assert drafts.stats["num_skipped"] == len(left_out) == 80 - drafts.stats["num_answers"]
    assert drafts.stats["num_saved_tokens"] == 7 * len(left_out)
    assert not {row["draft_id"] for row in shards.read_rows(scores)} & set(left_out)
    members = {pair[name] for pair in rows.read_table(pairs.path("pairs.parquet")) for name in ("chosen_id", "rejected_id")}
    unused = {row["id"] for row in rows.read_jsonl(pairs.path("rejected.jsonl"))}
    assert members | unused == {row["draft_id"] for row in table} - set(left_out)
    assert list(conservation.check(drafts, {})) == list(conservation.check(scores, {"generations": drafts})) == []


def test_every_unused_row_of_the_iteration_is_in_its_rejected_file(twin):
    drafts, _, pairs = twin
    lines = rows.read_jsonl(pairs.folder.parent / "rejected.jsonl")
    assert all(line["reason"] and line["stage"] for line in lines)
    used = 2 * pairs.stats["num_rows"]
    assert sum(line["stage"] == "pairs" for line in lines) == drafts.stats["num_rows"] - used
