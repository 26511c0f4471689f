"""A shard that kills its worker: what the next worker makes of what the last one wrote down."""

import pytest

from evolve_ray.errors import ResourceError
from evolve_ray.pools import retries
from evolve_ray.pools.retries import Attempts, Heartbeat, StartCount, hang_mark

PROMPTS = [{"prompt_id": f"p{number}"} for number in range(10)]


class Died(BaseException):
    """The process is gone: nothing of this attempt runs any further."""


def live(work, fatal, limit=3, deaths=200):
    """Attempts one after the other, each a worker of its own, until one survives; `fatal(ids)` says whether it dies."""
    log = []

    def process(some):
        ids = [prompt["prompt_id"] for prompt in some]
        log.append(ids)
        if fatal(ids):
            raise Died
        return [{"id": name} for name in ids], [], {}

    for _ in range(deaths):
        try:
            (made, _, _), killers = Attempts(work, 0, limit, "engines").process(PROMPTS, process)
            return [row["id"] for row in made], [prompt["prompt_id"] for prompt in killers], log
        except Died:
            continue
    raise AssertionError("it never ends")


@pytest.mark.parametrize("fatal", [{"p0"}, {"p4"}, {"p9"}, {"p3", "p7"}, {"p0", "p1", "p9"}])
@pytest.mark.parametrize("limit", [1, 2, 3])
def test_rows_that_kill_are_found_and_no_other(tmp_path, fatal, limit):
    made, killers, log = live(tmp_path, lambda ids: bool(fatal & set(ids)), limit)
    assert sorted(killers) == sorted(fatal)
    assert made == [p["prompt_id"] for p in PROMPTS if p["prompt_id"] not in fatal]
    for name in fatal:
        assert log.count([name]) >= retries.MAX_DEATHS_ALONE, "a row was condemned without having killed alone twice"
    assert len(log) <= limit + 16 * len(fatal), "halving is not what was done"


def test_worker_that_lives_processes_its_shard_once(tmp_path):
    assert live(tmp_path, lambda _: False)[2] == [[p["prompt_id"] for p in PROMPTS]]


@pytest.mark.parametrize("kills", [1, 2, 3])
def test_kills_from_outside_reject_nothing(tmp_path, kills):
    left = [kills]

    def outside(_):
        left[0] -= 1
        return left[0] >= 0

    made, killers, _ = live(tmp_path, outside)
    assert (len(made), killers) == (10, [])


@pytest.mark.parametrize("limit", [0, 1, 3])
def test_worker_that_dies_of_the_whole_shard_and_of_no_row_ends_the_stage(tmp_path, limit):
    with pytest.raises(ResourceError, match=f"engines: the worker died {limit + 1} times on shard 0, but on none of its rows"):
        live(tmp_path, lambda ids: len(ids) == len(PROMPTS), limit)


def test_worker_that_dies_of_every_row_ends_the_stage(tmp_path):
    with pytest.raises(ResourceError, match="so the rows are not the cause"):
        live(tmp_path, lambda _: True)


def test_hang_that_was_ended_from_outside_is_no_death(tmp_path):
    for _ in range(9):
        with pytest.raises(Died):
            Attempts(tmp_path, 0, 1, "engines").process(PROMPTS, die)
        hang_mark(tmp_path, 0).touch()
    made, killers, _ = live(tmp_path, lambda _: False, 1)
    assert (len(made), killers) == (10, [])


def die(_):
    raise Died


def test_shards_do_not_share_their_deaths(tmp_path):
    for _ in range(3):
        with pytest.raises(Died):
            Attempts(tmp_path, 1, 3, "engines").process(PROMPTS, die)
    assert Attempts(tmp_path, 0, 3, "engines").state["deaths"] == 0
    assert Attempts(tmp_path, 1, 3, "engines").state["deaths"] == 3


def test_beats_change_with_progress_and_name_the_shard(tmp_path, monkeypatch):
    now = [10.0]
    monkeypatch.setattr(retries.time, "monotonic", lambda: now[0])
    beats = Heartbeat(tmp_path, 2)
    assert beats.read() == (-1, "")
    beats.start(7)
    first = Heartbeat(tmp_path, 2).read()
    assert first[0] == 7
    beats()
    assert beats.read() == first, "the disk is written more than once a second"
    now[0] += 2
    beats()
    assert beats.read() != first


def test_beats_into_a_folder_that_is_gone_are_no_fault(tmp_path):
    Heartbeat(tmp_path / "gone", 0)()


def test_actor_that_never_starts_is_not_started_for_ever(tmp_path):
    for _ in range(4):
        StartCount(tmp_path, "0", 3, "engines").begin()
    with pytest.raises(ResourceError, match="engines: the actor died 4 times while it started"):
        StartCount(tmp_path, "0", 3, "engines").begin()


def test_start_that_succeeds_clears_the_count(tmp_path):
    for _ in range(9):
        StartCount(tmp_path, "0", 1, "engines").begin()
        StartCount(tmp_path, "0", 1, "engines").reset()
