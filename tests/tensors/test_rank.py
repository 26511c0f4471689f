"""What the ranks of a training group do together, without ZeRO: they stop with one sentence, and resume where they were."""

import contextlib
import multiprocessing
from types import SimpleNamespace

import pytest
import torch

from evolve_ray.errors import NumericsError, pack, unpack
from evolve_ray.rank import Rank


def bare_rank(**given):
    """A rank of the process group that is there, without a model."""
    rank = Rank.__new__(Rank)
    vars(rank).update(
        torch=torch, rank=torch.distributed.get_rank(), world=torch.distributed.get_world_size(), device=torch.device("cpu"), **given
    )
    return rank


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
    rank = bare_rank(pairs=PAIRS, batches=[[0, 1], [5, 3, 2, 4]])
    rank.stop_if_not_finite(torch.tensor([1.0, 2.0]), 1, [[5, 2], [3, 4]][number])  # finite everywhere: it goes on
    losses = [torch.tensor([0.5, 0.25]), torch.tensor([1.0, float("nan")])]
    rank.stop_if_not_finite(losses[number], 1, [[5, 2], [3, 4]][number])


def test_every_rank_names_the_rank_the_step_and_the_pairs_of_a_loss_that_is_not_finite(tmp_path):
    """Whichever rank's error reaches the driver last."""
    first, second = both(tmp_path, step_with_one_bad_loss)
    assert str(first) == str(second)
    assert str(first).startswith("training step 1: the loss is not finite on rank 1, pairs ['pair 4']; no weight was changed")
    assert first.exit_code == 6


def step_with_bad_losses_everywhere(number):
    rank = bare_rank(pairs=PAIRS, batches=[[5, 3, 2, 4]])
    rank.stop_if_not_finite(torch.tensor([float("inf"), float("nan")]), 0, [[5, 2], [3, 5]][number])


def test_ranks_that_all_have_losses_that_are_not_finite_are_all_named(tmp_path):
    first, second = both(tmp_path, step_with_bad_losses_everywhere)
    assert str(first) == str(second)
    assert "on rank 0, 1, pairs ['pair 5', 'pair 3', 'pair 2'];" in str(first)


def export_a_bad_weight(number):
    model = torch.nn.Sequential(torch.nn.Linear(2, 2), torch.nn.Linear(2, 2))
    with torch.no_grad():
        model[1].weight[0, 0] = float("nan")
    zero = SimpleNamespace(GatheredParameters=lambda parts: contextlib.nullcontext())
    bare_rank(model=model, deepspeed=SimpleNamespace(zero=zero)).export([])


def test_all_ranks_refuse_to_export_a_parameter_that_is_not_finite(tmp_path):
    """Rank 0 alone sees it; a rank that was not told would wait for it."""
    first, second = both(tmp_path, export_a_bad_weight)
    assert str(first) == str(second) == (
        "export: the parameter 1.weight is not finite; nothing was committed; lower learning_rate"
    )
