"""Workers that die of a row, hang, or die with finished work in hand; on a real Ray with fake engines and scorers."""

import contextlib
import threading
import time

import psutil
import pytest

from evolve_ray.errors import IntegrityError, NumericsError, StalledError
from evolve_ray.generate import worker as generate_worker
from evolve_ray.pools.actors import TRAINERS, PoolOptions
from evolve_ray.score import worker as score_worker
from evolve_ray.store import rows, shards
from evolve_ray.train.group import free_places
from evolve_ray.watch.cluster import title
from tests.fakes import DyingAfterCommit, DyingScorer, DyingScorerAfterCommit
from tests.wiring.test_pipeline import draft, folder, local_ray, make_context, pools, twin

__all__ = ["folder", "local_ray", "pools", "twin"]  # fixtures


def first_seed(drafts, prompt):
    """The seed of a prompt's first draft, by which the fake engine knows it."""
    return next(row["seed"] for row in shards.read_rows(drafts) if row["prompt_id"] == prompt and row["round"] == 1)


@pytest.fixture
def marked(twin, folder, tmp_path):
    """A context whose engine goes wrong at one prompt of the third shard, the prompt's id, and the marks it leaves."""

    def make(*overrides):
        marks = tmp_path / "marks"
        marks.mkdir()
        prompt = shards.read_slice(twin[0].folder.parent / "prompts" / "prompts.parquet", 2, 4)[2]["prompt_id"]
        faults = ("engine.name=tests.fakes:MarkedEngine", f'engine.env.FAKE_MARKS="{marks}"')
        seed = f'engine.env.FAKE_SEED="{first_seed(twin[0], prompt)}"'
        return make_context(folder, tmp_path / "run", *faults, seed, *overrides), prompt, marks

    return make


def test_a_prompt_that_always_kills_its_worker_is_rejected_by_name_and_the_others_are_equal(twin, marked, folder):
    context, prompt, marks = marked('engine.env.FAKE_DEATHS="99"', "engine.max_restarts=2")
    drafts, _, pairs = draft(context)
    assert 4 <= len(list(marks.iterdir())) <= 7, "twice the whole shard, then halves, then twice alone"
    (lost,) = rows.read_jsonl(drafts.path("rejected.jsonl"))
    table = rows.read_table(context.prompts[1].path("prompts.parquet"))
    (asked,) = [row for row in table if row["prompt_id"] == prompt]
    assert (lost["id"], lost["stage"]) == (prompt, "generations")
    assert (lost["file"], lost["line"]) == (asked["file"], asked["line"])
    assert asked["file"] == str(folder / "prompts.jsonl")
    assert asked["line"] > 0
    assert "killed its worker" in lost["reason"]
    assert list(shards.read_rows(drafts)) == [r for r in shards.read_rows(twin[0]) if r["prompt_id"] != prompt]
    expected = [row for row in rows.read_table(twin[2].path("pairs.parquet")) if row["prompt_id"] != prompt]
    assert rows.read_table(pairs.path("pairs.parquet")) == expected
    assert prompt in (context.run.iteration(1) / "rejected.jsonl").read_text()


@pytest.mark.long
def test_a_hanging_actor_is_ended_and_its_shard_done_by_the_next(twin, marked):
    context, _, marks = marked('engine.env.FAKE_HANGS="1"', "engine.stall_s=20")
    _, _, pairs = draft(context)
    assert len(list(marks.iterdir())) == 1, "the fault did not fire"
    assert pairs.path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()


@pytest.mark.long
def test_an_actor_that_hangs_every_time_ends_the_run_and_names_stage_and_shard(marked):
    context, _, marks = marked('engine.env.FAKE_HANGS="99"', "engine.stall_s=20", "engine.max_restarts=1")
    with pytest.raises(StalledError, match=r"generations: shard 2: .* no progress for 20 s, 2 times") as caught:
        draft(context)
    assert caught.value.exit_code == 7
    assert len(list(marks.iterdir())) == 2
    deadline = time.monotonic() + 60
    while left := stopped_actors():
        assert time.monotonic() < deadline, f"stopped actors were left behind: {left}"
        time.sleep(0.5)


def stopped_actors():
    """Actors of this test's Ray that SIGSTOP holds."""
    family = psutil.Process().children(recursive=True)
    found = []
    for process in family:
        with contextlib.suppress(psutil.NoSuchProcess):
            if process.status() == psutil.STATUS_STOPPED and "ray::Host" in " ".join(process.cmdline()):
                found.append(process.pid)
    return found


def test_a_scorer_that_dies_with_its_scores_in_hand_gives_equal_scores(twin, folder, tmp_path):
    DyingScorer.mark.unlink(missing_ok=True)
    context = make_context(folder, tmp_path / "run", "scorer.name=tests.fakes:DyingScorer")
    _, scores, pairs = draft(context)
    assert DyingScorer.mark.exists(), "the fault did not fire"
    assert list(shards.read_rows(scores)) == list(shards.read_rows(twin[1]))
    assert pairs.path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()


@pytest.mark.parametrize("stage", ["generations", "scores"])
def test_an_actor_that_dies_right_after_its_commit_gives_the_committed_shard(twin, folder, tmp_path, monkeypatch, stage):
    """The answer is lost, the shard is not: the retry returns what is committed, which is the first process's."""
    place, kind = {"generations": (generate_worker, DyingAfterCommit), "scores": (score_worker, DyingScorerAfterCommit)}[stage]
    monkeypatch.setattr(place, {"generations": "Generator", "scores": "ScoreWorker"}[stage], kind)
    tables = draft(make_context(folder, tmp_path / "run"))
    pid, name, mtime_ns = (tmp_path / "run" / "died").read_text().split()
    assert not psutil.pid_exists(int(pid)), "the fault did not fire"
    committed = tables[stage == "scores"].folder / name
    assert (committed / "rows.parquet").stat().st_mtime_ns == int(mtime_ns), "the shard was computed again"
    for made, expected in zip(tables[:2], twin[:2], strict=True):
        assert list(shards.read_rows(made)) == list(shards.read_rows(expected))
    assert tables[2].path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()


@pytest.mark.long
def test_an_engine_that_is_slow_on_the_first_shard_changes_the_order_of_shards_and_no_byte(twin, folder, tmp_path):
    names = [row["prompt_id"] for row in shards.read_slice(twin[0].folder.parent / "prompts" / "prompts.parquet", 0, 4)]
    slow = f'engine.env.FAKE_SLOW="{first_seed(twin[0], names[0])}"'
    context = make_context(folder, tmp_path / "run", "engine.name=tests.fakes:SlowStartEngine", slow, "engine.actors=2")
    drafts, _, pairs = draft(context)
    order = [event["shard"] for event in rows.read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "shard"]
    assert sorted(order) == [0, 1, 2, 3, 4]
    assert order[0] != 0, f"the shards came in their order: {order}"
    assert list(shards.read_rows(drafts)) == list(shards.read_rows(twin[0]))
    assert pairs.path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()


@contextlib.contextmanager
def those_that_hand_out(run, hit):
    """Hits every process that hands out shards once a shard of the run is committed; gives those that were hit."""
    found = []

    def strike():
        while not list(run.glob("iteration-01/.generations-*/shard-*")):
            time.sleep(0.05)
        for process in psutil.Process().children(recursive=True):
            if "MapBatches(ShardDispatcher)" in title(process):
                hit(process)
                found.append(process)

    striker = threading.Thread(target=strike, daemon=True)
    striker.start()
    yield found
    striker.join()
    assert found, "the fault did not fire"


@pytest.mark.long
def test_what_hands_out_shards_ends_the_run_where_it_hangs(local_ray, folder, tmp_path, monkeypatch):
    """Nobody watches the engine then, so the driver watches for signs of it."""
    monkeypatch.setattr("evolve_ray.pools.dispatch.START_S", 10.0)
    patient = ("engine.stall_s=20", "scorer.stall_s=20")
    context = make_context(folder, tmp_path / "run", "engine.name=tests.fakes:SlowEngine", *patient)
    with those_that_hand_out(tmp_path / "run", psutil.Process.suspend) as stopped:
        try:
            with pytest.raises(StalledError, match=r"^generations: made no progress for 30 s; the shard dispatcher hangs"):
                draft(context)
        finally:
            for process in stopped:
                process.kill()


@pytest.mark.long
def test_what_hands_out_shards_is_replaced_when_it_dies_and_changes_no_byte(twin, folder, tmp_path):
    """It waits for the engine in a process of Ray Data; the engine goes on meanwhile."""
    context = make_context(folder, tmp_path / "run", "engine.name=tests.fakes:SlowEngine")
    with those_that_hand_out(tmp_path / "run", psutil.Process.kill):
        drafts, _, pairs = draft(context)
    assert list(shards.read_rows(drafts)) == list(shards.read_rows(twin[0]))
    assert pairs.path("pairs.parquet").read_bytes() == twin[2].path("pairs.parquet").read_bytes()
    told = [event["shard"] for event in rows.read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "shard"]
    assert len(set(told)) == len(told)


@pytest.mark.parametrize(("scorer", "value"), [("OddScorer", "nan"), ("InfiniteScorer", "inf"), ("WordScorer", "'0.5'")])
def test_too_many_scores_that_are_no_numbers_end_the_run_with_the_values(pools, folder, tmp_path, scorer, value):
    context = make_context(folder, tmp_path / "run", f"scorer.name=tests.fakes:{scorer}", "scorer.max_rejected_fraction=0.01")
    with pytest.raises(NumericsError, match=rf"rows were rejected, more than scorer\.max_rejected_fraction.*{value}") as caught:
        draft(context, pools)
    assert caught.value.exit_code == 6


def test_scores_that_nobody_can_assign_to_drafts_are_lost_rows_and_end_the_run_with_the_name_of_the_scorer(
    pools, folder, tmp_path
):
    """Whatever loss is allowed: which draft has no score cannot be told, so no row can be rejected by name."""
    context = make_context(folder, tmp_path / "run", "scorer.name=tests.fakes:ShortScorer", "scorer.max_rejected_fraction=0.9")
    with pytest.raises(
        IntegrityError, match=r"^scorer tests\.fakes:ShortScorer: returned 15 values for 16 responses; .* fix it"
    ) as caught:
        draft(context, pools)
    assert caught.value.exit_code == 4
    assert not (context.run.iteration(1) / "scores").exists()


def reserver():
    """An actor that reserves two places, as Ray Train's controller does."""
    import ray

    class Reserver:
        def reserve(self, cpus):
            from ray.util.placement_group import placement_group

            place = placement_group([{"CPU": cpus}] * 2)
            ray.get(place.ready())
            return place.id.hex()

    return ray.remote(num_cpus=0)(Reserver).remote()


def test_places_of_a_lost_controller_of_trainings_are_freed_and_those_of_others_stay(local_ray):
    import ray
    from ray.util.placement_group import PlacementGroup, placement_group_table, remove_placement_group

    lost, other = reserver(), reserver()
    names = ray.get(lost.reserve.remote(0.21)), ray.get(other.reserve.remote(0.22))

    def states():
        return [placement_group_table()[name]["state"] for name in names]

    ray.kill(lost)
    time.sleep(1)
    assert states() == ["CREATED", "CREATED"], "Ray keeps what the actor had reserved"
    free_places(PoolOptions(TRAINERS, object, 2, 0.21, 0.0, restarts=0))
    deadline = time.monotonic() + 20
    while states()[0] != "REMOVED" and time.monotonic() < deadline:
        time.sleep(0.1)
    assert states() == ["REMOVED", "CREATED"]
    remove_placement_group(PlacementGroup(ray.PlacementGroupID(bytes.fromhex(names[1]))))
    ray.kill(other)
