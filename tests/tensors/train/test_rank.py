"""What the ranks of a training group do together, without ZeRO: they stop with one sentence, and resume where they were."""

import asyncio
import contextlib
import errno
import json
import multiprocessing
import threading
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from ray.exceptions import ActorDiedError
from ray.train.v2._internal.exceptions import WorkerHealthCheckFailedError
from ray.train.v2.api.exceptions import ControllerError, WorkerGroupError

from evolve_ray.config.options import Trainer, Training
from evolve_ray.errors import EvolveError, IntegrityError, NumericsError, ResourceError, pack, unpack
from evolve_ray.pools.actors import TRAINERS, Actors, PoolOptions, Pools
from evolve_ray.store.manifest import MANIFEST, read_manifest
from evolve_ray.store.run import Run, Stage
from evolve_ray.train import group
from evolve_ray.train.collectives import Collectives
from evolve_ray.train.export import gather
from evolve_ray.train.forwards import Part
from evolve_ray.train.group import fit, raise_rank_error
from evolve_ray.train.objectives import Objective
from evolve_ray.train.rank import Rank
from evolve_ray.train.schedule import batches, micro_batches
from evolve_ray.train.steps import Steps
from evolve_ray.train.stored_steps import StoredSteps
from evolve_ray.train.trainings import Trainings, outcome, run_rank
from tests.plain.train.test_schedule import spec as train_spec


def steps_of(batches):
    """The steps of a rank of the process group that is there, without a model."""
    return Steps(PAIRS, batches, Training(), None, None, Collectives(torch.device("cpu")))


def one_of_two(number, meeting, work, said):
    """A process of a gloo group of two; says what error `work` ended with."""
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{meeting}", rank=number, world_size=2)
    try:
        work(number)
        said.put((number, None))
    except NumericsError as error:
        said.put((number, pack(error)))
    torch.distributed.destroy_process_group()


def both(tmp_path, work):
    """What the two ranks say to `work(rank)`, in their order."""
    context = multiprocessing.get_context("spawn")
    said = context.Queue()
    processes = [context.Process(target=one_of_two, args=(number, tmp_path / "meeting", work, said)) for number in (0, 1)]
    for process in processes:
        process.start()
    told = dict(said.get(timeout=120) for _ in processes)
    for process in processes:
        process.join(20)
    return [told[0] and unpack(told[0]), told[1] and unpack(told[1])]


PAIRS = [{"pair_id": f"pair {number}"} for number in range(6)]


def step_with_one_bad_loss(number):
    steps = steps_of([[0, 1], [5, 3, 2, 4]])
    steps.stop_if_not_finite(torch.tensor([1.0, 2.0]), 1, [[5, 2], [3, 4]][number])  # finite everywhere: it goes on
    losses = [torch.tensor([0.5, 0.25]), torch.tensor([1.0, float("nan")])]
    steps.stop_if_not_finite(losses[number], 1, [[5, 2], [3, 4]][number])


@pytest.mark.slow
def test_every_rank_names_the_rank_the_step_and_the_pairs_of_a_loss_that_is_not_finite(tmp_path):
    """Whichever rank's error reaches the driver last."""
    first, second = both(tmp_path, step_with_one_bad_loss)
    assert str(first) == str(second)
    assert str(first).startswith("training step 1: the loss is not finite on rank 1, pairs ['pair 4']; no weight was changed")
    assert first.exit_code == 6


def step_with_bad_losses_everywhere(number):
    steps = steps_of([[5, 3, 2, 4]])
    steps.stop_if_not_finite(torch.tensor([float("inf"), float("nan")]), 0, [[5, 2], [3, 5]][number])


@pytest.mark.slow
def test_ranks_that_all_have_losses_that_are_not_finite_are_all_named(tmp_path):
    first, second = both(tmp_path, step_with_bad_losses_everywhere)
    assert str(first) == str(second)
    assert "on rank 0, 1, pairs ['pair 5', 'pair 3', 'pair 2'];" in str(first)


def export_a_bad_weight(number):
    module = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        module[1].weight[0, 0] = float("nan")
    model = SimpleNamespace(module=module, gathered=lambda parts: contextlib.nullcontext())
    gather(model, Collectives(torch.device("cpu")))


@pytest.mark.slow
def test_all_ranks_refuse_to_export_a_parameter_that_is_not_finite(tmp_path):
    """Rank 0 alone sees it; a rank that was not told would wait for it."""
    first, second = both(tmp_path, export_a_bad_weight)
    assert (
        str(first) == str(second) == ("export: the parameter 1.weight is not finite; nothing was committed; lower learning_rate")
    )


class Killed(Exception):
    """Stands for the end of the process."""


class Engine:
    """Takes DeepSpeed's place: its weights are the pairs that it was updated with, in their order."""

    def __init__(self, dies_at=None):
        self.weights, self.batch, self.dies_at = [], [], dies_at
        self.optimizer = SimpleNamespace(param_groups=[{}], overflow=False)
        self.loaded = False

    def set_gradient_accumulation_boundary(self, last):
        self.last = last

    def backward(self, loss):
        pass

    def step(self):
        if self.last:
            if self.dies_at == len(self.weights):
                raise Killed
            self.weights.append(self.batch)
            self.batch = []

    def get_global_grad_norm(self):
        return 1.0

    def save_checkpoint(self, folder, tag, save_latest):
        Path(folder, tag).mkdir()
        for name in ("model", "optimiser"):
            Path(folder, tag, f"{name}.pt").write_text(json.dumps(self.weights))

    def load_checkpoint(self, folder, tag):
        self.loaded = True
        self.weights = json.loads(Path(folder, tag, "model.pt").read_text())


class Reader:
    """Reads nothing: tells the engine which pairs it is asked for."""

    def __init__(self, pairs, training):
        self.pairs, self.training = pairs, training

    def parts(self, batch):
        return [Part(micro) for micro in micro_batches(batch, 0, self.training, 1)]

    def values(self, engine, part):
        engine.batch += [self.pairs[row]["pair_id"] for row, weight in part.pairs if weight]
        return {"chosen": torch.tensor([float(row) for row, _ in part.pairs])}, {}


class Tried(Rank):
    """The loop of a rank, its steps and its resuming, over an engine that keeps no model."""

    def __init__(self, spec, dies_at=None):
        self.spec, self.dies_at, self.collectives = spec, dies_at, Collectives(torch.device("cpu"))
        self.pairs = [{"pair_id": f"pair {number}"} for number in range(11)]
        self.batches = batches(len(self.pairs), spec.training, seed=spec.seed, iteration=spec.iteration)
        self.objective = Objective(lambda policy, reference, training: (policy["chosen"], {}), ("chosen",), reference=False)
        reader = Reader(self.pairs, spec.training)
        self.steps = Steps(self.pairs, self.batches, spec.training, self.objective, reader, self.collectives)
        self.stored = StoredSteps(spec, self.collectives)
        self.model, self.reference = SimpleNamespace(engine=None, folder=""), SimpleNamespace(seconds=0.0)

    def load(self, folder, *, frozen=False):
        self.model.engine, self.model.folder = Engine(self.dies_at), folder

    def export(self, log, train_seconds):
        self.exported = log


@pytest.fixture
def alone(tmp_path, monkeypatch):
    """A process group of this process alone, and what a training of 11 pairs, twice in batches of 4, stores in a run."""
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)

    def spec(name, checkpoint_steps=1):
        run = Run(tmp_path / name)
        run.root.mkdir(exist_ok=True)
        training, trainer = (
            Training(batch_pairs=4, micro_pairs=2, epochs=2),
            Trainer(workers=1, checkpoint_steps=checkpoint_steps),
        )
        return replace(train_spec(training, trainer), run=run, checkpoint=Stage(run.root / "checkpoint", "checkpoint", "key"))

    yield spec
    torch.distributed.destroy_process_group()


def trained(spec):
    rank = Tried(spec)
    rank.run()
    return rank


@pytest.mark.parametrize("checkpoint_steps", [1, 2, 5])
@pytest.mark.parametrize("step", range(6), ids=["first", "second", "ragged", "epoch edge", "later", "last and ragged"])
def test_training_that_died_at_any_step_takes_the_pairs_of_its_twin_in_their_order(alone, step, checkpoint_steps):
    twin = trained(alone("twin"))
    assert [len(batch) for batch in twin.model.engine.weights] == [4, 4, 3] * 2
    died = Tried(alone("run", checkpoint_steps), dies_at=step)
    with pytest.raises(Killed):
        died.run()
    again = trained(alone("run", checkpoint_steps))
    assert again.model.engine.loaded == (step >= checkpoint_steps)
    assert again.model.engine.weights == twin.model.engine.weights
    assert again.exported == twin.exported
    assert [line["step"] for line in again.exported] == list(range(6))


@pytest.mark.parametrize(("before", "after"), [(4, 3), (3, 4), (2, 5), (1, 6), (2, 1)])
def test_training_that_is_resumed_with_another_interval_goes_on_from_the_newest_stored_step(alone, before, after):
    twin = trained(alone("twin"))
    died = Tried(alone("run", before), dies_at=5)
    with pytest.raises(Killed):
        died.run()
    newest = 5 // before * before
    again = Tried(alone("run", after))
    assert again.stored.steps() == [newest]
    again.run()
    assert again.model.engine.loaded
    assert again.model.engine.weights == twin.model.engine.weights
    assert again.exported == twin.exported
    assert len(again.stored.steps()) == 1, "an older stored step was left"


def stored(alone):
    """A training that died with a committed step, and that step's folder."""
    spec = alone("run", 2)
    with pytest.raises(Killed):
        Tried(spec, dies_at=3).run()
    return spec, spec.checkpoint.work / "steps" / "step-000002"


@pytest.mark.parametrize("name", ["state/model.pt", "state/optimiser.pt", "log.json", MANIFEST])
def test_stored_step_with_one_flipped_byte_is_refused_before_it_is_unpickled(alone, name):
    spec, folder = stored(alone)
    data = bytearray((folder / name).read_bytes())
    data[data.index(b'"') + 1] ^= 1
    (folder / name).write_bytes(data)
    rank = Tried(spec)
    with pytest.raises(IntegrityError, match=rf"step-000002/{name}: sha256 is|{MANIFEST}: is damaged") as caught:
        rank.run()
    assert str(folder) in str(caught.value).partition("; delete ")[2]
    assert (rank.model.engine.loaded, rank.model.engine.weights) == (False, [])


def test_stored_step_that_lacks_a_file_is_refused(alone):
    spec, folder = stored(alone)
    (folder / "state/optimiser.pt").unlink()
    with pytest.raises(IntegrityError, match=r"optimiser\.pt: sha256 is missing"):
        trained(spec)


def test_step_that_was_being_stored_is_not_resumed_from(alone):
    spec, folder = stored(alone)
    folder.rename(folder.with_name(".step-000002"))
    again = trained(spec)
    assert (again.model.engine.loaded, len(again.model.engine.weights)) == (False, 6)
    assert read_manifest(folder) is None


def no_space():
    raise OSError(errno.ENOSPC, "No space left on device", "/work/events.jsonl")


def torch_on_a_full_disk():
    """In the words of torch's writer, which names no disk."""
    raise RuntimeError("[enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598")


def full_gpu():
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 79.11 GiB")


def full_memory():
    torch.empty(1 << 50, dtype=torch.float64)


def lost_peer():
    raise RuntimeError("Connection closed by peer")


def lost_actor():
    """As ray.train.report does where the actor is gone that the ranks meet at."""
    raise ActorDiedError


def run_worker(monkeypatch, tmp_path, fail):
    """A rank whose training ends with what `fail` raises; gives back the file in which errors that last are kept."""
    monkeypatch.setattr(Rank, "__init__", lambda self, spec: None)
    monkeypatch.setattr(Rank, "run", lambda self: fail())
    kept = tmp_path / "error.json"
    given = SimpleNamespace(checkpoint=SimpleNamespace(work=tmp_path / ".checkpoint-1", final=tmp_path / "checkpoint"))
    with pytest.raises((EvolveError, RuntimeError, ActorDiedError)):
        run_rank(given, kept)
    return kept


@pytest.mark.parametrize("fail", [no_space, torch_on_a_full_disk])
def test_full_disk_under_a_training_ends_it_with_the_path_and_exit_code_five(monkeypatch, tmp_path, fail):
    kept = run_worker(monkeypatch, tmp_path, fail)
    with pytest.raises(ResourceError, match=rf"{tmp_path}/\.checkpoint-1: cannot be written: .* MiB are free there"):
        raise_rank_error(kept)


@pytest.mark.parametrize(("fail", "said"), [(full_gpu, "CUDA out of memory"), (full_memory, "can't allocate memory")])
def test_full_memory_ends_a_training_with_what_to_change_and_exit_code_five(monkeypatch, tmp_path, fail, said):
    kept = run_worker(monkeypatch, tmp_path, fail)
    with pytest.raises(ResourceError, match=rf"checkpoint: a rank .*{said}.*; lower training.micro_pairs or trainer.max_tokens"):
        raise_rank_error(kept)


@pytest.mark.parametrize("fail", [lost_peer, lost_actor])
def test_rank_whose_peer_or_meeting_point_is_lost_keeps_no_error_so_that_the_group_starts_again(monkeypatch, tmp_path, fail):
    assert not run_worker(monkeypatch, tmp_path, fail).exists()


def test_any_error_of_a_rank_whose_process_group_was_taken_away_is_that_of_a_lost_peer(monkeypatch, tmp_path):
    joined = [True]
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: joined[0])

    def fail():
        joined[0] = False
        raise AssertionError("DeepSpeed backend not set")

    monkeypatch.setattr(Rank, "__init__", lambda self, spec: None)
    monkeypatch.setattr(Rank, "run", lambda self: fail())
    with pytest.raises(AssertionError):
        run_rank(SimpleNamespace(), tmp_path / "error.json")
    assert not (tmp_path / "error.json").exists()


class Group(Actors):
    """A worker group whose every training ends with one error; `restarts` of its ranks come before that."""

    def __init__(self, error, restarts):
        super().__init__([], PoolOptions(TRAINERS, Trainings, 2, 0.4, 0.0, restarts=2))
        self.ended = outcome(lambda: self.end(error)) | {"begun": 1 + restarts}
        self.stopped = False

    def end(self, error):
        raise error

    def stop(self):
        self.stopped = True


def fitted(monkeypatch, tmp_path, error, restarts=0):
    """The groups that were started for a training where each ends with `error`, and what the training ended with."""
    pools, groups = Pools(), []

    def opened(spec, storage, pools):
        if (kept := pools.opened(TRAINERS)) is None:
            groups.append(kept := Group(error, restarts))
            pools.keep(kept)
        return kept

    monkeypatch.setattr(group, "opened", opened)
    monkeypatch.setattr(group, "call", lambda started, spec, error_file: started.ended)
    given = SimpleNamespace(
        trainer=Trainer(max_failures=2), checkpoint=SimpleNamespace(final=tmp_path / "checkpoint", key="c" * 64)
    )
    with pytest.raises((ResourceError, RuntimeError)) as caught:
        fit(given, tmp_path / "storage", pools)
    assert all(started.stopped for started in groups)
    return len(groups), caught.value


def lost_rank():
    lost = WorkerHealthCheckFailedError("no answer", ActorDiedError())
    return WorkerGroupError("two", {0: RuntimeError("Connection closed by peer"), 1: lost})


def test_training_whose_controller_dies_again_and_again_ends_with_a_sentence(monkeypatch, tmp_path):
    started, error = fitted(monkeypatch, tmp_path, ActorDiedError())
    assert started == 3
    assert str(error).startswith("checkpoint: processes of the training died more often than trainer.max_failures (2) allows; ")


def test_group_that_ray_train_gave_up_is_not_begun_again(monkeypatch, tmp_path):
    started, error = fitted(monkeypatch, tmp_path, lost_rank(), restarts=2)
    assert started == 1
    assert str(error).endswith("submit the same command again: The actor died unexpectedly before finishing this task.")


def test_restarts_that_an_earlier_training_used_up_are_not_those_of_this_one(monkeypatch, tmp_path):
    started, error = fitted(monkeypatch, tmp_path, lost_rank(), restarts=0)
    assert started == 3
    assert isinstance(error, ResourceError)


def test_error_of_a_training_that_is_no_death_is_not_hidden(monkeypatch, tmp_path):
    started, error = fitted(monkeypatch, tmp_path, ControllerError(ValueError("a fault of the code")))
    assert started == 1
    assert "a fault of the code" in str(error)


def test_trainings_are_given_to_each_rank_once_and_the_end_of_the_group_is_told():
    async def ranks(trainings):
        """Two ranks of a group: both do the training, and only then rank 0 says so."""
        numbers = [number for number, _, _ in await asyncio.gather(trainings.next(0), trainings.next(0))]
        await trainings.begin(numbers[0])
        await trainings.done(numbers[0])
        return numbers

    async def play():
        ended = threading.Event()

        def wait_for_the_end(self):
            ended.wait(10)
            return outcome(lambda: None)

        trainings = type("Played", (Trainings,), {"run": wait_for_the_end})(Trainer(), Path("storage"), print)
        first = [await asyncio.gather(trainings.fit("spec 1", "error 1"), ranks(trainings)), trainings.begun]
        late = asyncio.ensure_future(trainings.next(1))
        await asyncio.sleep(0)
        waited = late.done()
        second = asyncio.ensure_future(trainings.fit("spec 2", "error 2"))
        given = await late
        ended.set()
        return first, waited, given, await second

    first, waited, given, second = asyncio.run(play())
    assert first == [[None, [1, 1]], 1]
    assert (waited, given) == (False, (2, "spec 2", "error 2"))
    assert second == {"lost": "", "controller": False, "traceback": "", "begun": 0}
