"""Batches and learning rates: pure functions, so that a resumed run takes the same steps on the same pairs."""

import math

from evolve_ray.config.options import Training
from evolve_ray.store import rows


def batches(num_pairs: int, training: Training, *, seed: int, iteration: int) -> list[list[int]]:
    """The global batches of all epochs, as row numbers of the pairs."""
    import numpy as np

    order = []
    for epoch in range(training.epochs):
        generator = np.random.default_rng(rows.derive_seed("batches", seed, iteration, epoch))
        shuffled = generator.permutation(num_pairs).tolist()
        order += [shuffled[first : first + training.batch_pairs] for first in range(0, num_pairs, training.batch_pairs)]
    return order


def learning_rate(step: int, num_steps: int, training: Training) -> float:
    """The learning rate of update `step` (from 0): a linear warm-up, then the schedule; cosine and linear end at one tenth."""
    warmup = max(1, round(training.warmup_fraction * num_steps)) if training.warmup_fraction else 0
    if step < warmup:
        return training.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, num_steps - warmup)
    if training.schedule == "cosine":
        return training.learning_rate * (0.1 + 0.9 * 0.5 * (1 + math.cos(math.pi * progress)))
    if training.schedule == "linear":
        return training.learning_rate * (1 - 0.9 * progress)
    return training.learning_rate


def micro_steps(training: Training, workers: int) -> int:
    """The number of micro-batches in one update on each worker."""
    return max(1, math.ceil(training.batch_pairs / (workers * training.micro_pairs)))


def micro_batches(batch: list[int], rank: int, training: Training, workers: int) -> list[list[tuple[int, float]]]:
    """This rank's share of a global batch, as micro-batches of (row number, weight).

    Every rank has the same number of forwards with the same number of rows, as ZeRO-3 requires; rows that only fill up a batch
    have weight 0. DeepSpeed averages over ranks and micro-batches; the weights are such that the gradient is then the mean over
    the global batch.
    """
    accumulation = micro_steps(training, workers)
    share = batch[rank::workers]
    weight = workers * accumulation / len(batch)
    padded = [(row, weight) for row in share]
    padded += [(batch[0], 0.0)] * (accumulation * training.micro_pairs - len(share))
    return [padded[first : first + training.micro_pairs] for first in range(0, len(padded), training.micro_pairs)]
