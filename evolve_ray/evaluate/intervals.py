"""95 % intervals of a mean over prompts and of a mean paired difference; docs/evaluation.md has their measured coverage.

A bootstrap and a t interval shrink to a point where all prompts agree (0 of 60 right), so they miss the truth where right or
wrong answers are rare. Score intervals do not: they hold every true mean under which the observed one would be no surprise.
"""

import math
from collections.abc import Callable, Sequence

import numpy as np

Z = 1.959963984540054  # 97.5 % quantile of the normal distribution
STEPS = 40  # halvings that find an end of Tango's interval, to 1e-12

Figures = dict[str, float]


def mean(values: Sequence[float], weights: Sequence[float] | None = None) -> Figures:
    """The mean of one value a prompt with its interval; `weights` are relative, by default equal.

    Shares (0 and 1) have Wilson's score interval (JASA 22, 1927). Other values within [0, 1] or [-1, 1] have it for as many 0/1
    values as would vary as much as their mean does (the effective sample size of Korn and Graubard, Survey Methodology 24, 1998).
    Where few of them lie far from a bound, that number would be known too badly: then the interval counts gaps of their mean
    size, in which one gap of the whole width counts as a quarter of a prompt. If more than four in five are the same value
    inside, the others are differences from it. Values beyond have Student's t interval, which is a point for a single value.
    """
    data, each, size = weighted(values, weights)
    center, (bottom, top) = average(data, each), bounds(data)
    at_bounds = bool(np.isin(data, (bottom, top)).all())
    variance = average((data - center) ** 2, each**2) / size  # of the mean
    unbiased = variance if at_bounds or len(data) == 1 else variance * size / (size - 1)
    quantile = Z if at_bounds else student(size)
    common = float(np.median(data))
    if math.isinf(top):
        half = quantile * math.sqrt(unbiased)
        low, high = center - half, center + half
    elif bottom < common < top and len(data) > 1 and average(data == common, each) > 0.8:
        others = difference((data - common).tolist(), max(common - bottom, top - common), each.tolist())
        low, high = max(bottom, common + others["low"]), min(top, common + others["high"])
    else:
        near, width = (bottom, top - bottom) if center <= (bottom + top) / 2 else (top, bottom - top)
        gaps, most = each * (data - near) / width, float(each.max())
        total, squares = float(gaps.sum()), float((gaps**2).sum())
        gap, step = total / len(gaps), 1.0
        if squares > 2 * gap * total:
            step = max((squares + most**2 / 4) / (total + most / 4), gap)
            like = gap * (squares / total - gap) * width**2 / variance
        else:
            like = gap * (1 - gap) * width**2 / unbiased if unbiased else size
        low, high = sorted(near + width * min(1.0, step * end) for end in wilson(gap / step, like, quantile))
    return {"mean": center, "low": min(center, low), "high": max(center, high)}


def paired(before: Sequence[float], after: Sequence[float]) -> Figures:
    """The mean of after - before, paired by prompt, with its interval; see `difference`."""
    both = np.asarray([*before, *after], dtype=np.float64)
    unit = 1.0 if math.isfinite(bounds(both)[1]) else math.sqrt(2) * float(both.std())  # or as far as two random prompts differ
    return difference([new - old for old, new in zip(before, after, strict=True)], unit)


def difference(values: Sequence[float], unit: float = 1.0, weights: Sequence[float] | None = None) -> Figures:
    """The mean of one paired difference a prompt with its interval, which stays wide where few prompts moved.

    Differences of 0/1 outcomes have Tango's score interval (Statistics in Medicine 17, 1998). Where other amounts come from few
    prompts (fewer than half moved, or few by much), it counts movements of their mean size; `unit`, how far a prompt may move,
    counts as half a prompt in that size, and is the size where nothing moved. Other differences have the interval of `mean`.
    """
    data, each, size = weighted(values, weights)
    moves = np.abs(data)
    by_units = bool(np.isin(moves, (0.0, unit)).all())
    if not by_units and len(data) > 1 and not is_sparse(moves, each):
        return mean(values, weights)
    total = size * average(moves, each) + unit / 2
    if not total:  # all values are equal, and nothing says how far they could move
        return {"mean": 0.0, "low": 0.0, "high": 0.0}
    step = max((size * average(moves**2, each) + unit**2 / 2) / total, average(moves, each))
    up, down = (size * average(np.maximum(sign * data, 0.0), each) / step for sign in (1, -1))
    low, high = tango(up, down, size, Z if by_units else student(size))
    center = average(data, each)
    return {"mean": center, "low": min(center, step * low), "high": max(center, step * high)}


def weighted(values: Sequence[float], weights: Sequence[float] | None) -> tuple[np.ndarray, np.ndarray, float]:
    """(values, their weights of mean 1, the number of equally weighted values that would tell as much), in one order."""
    data = np.asarray(values, dtype=np.float64)
    each = np.ones(len(data)) if weights is None else np.asarray(weights, dtype=np.float64)
    order = np.lexsort((each, data))
    data, each = data[order], each[order] * len(data) / each.sum()
    return data, each, float(each.sum() ** 2 / (each @ each))


def average(data: np.ndarray, each: np.ndarray) -> float:
    """The weighted mean; of equal values it is that value to the last bit, which `@` would not give."""
    return float((data * each).sum() / each.sum())


def is_sparse(moves: np.ndarray, each: np.ndarray) -> bool:
    """Whether fewer than half of the prompts moved, or few make up the most of all movement."""
    return average(moves > 0, each) < 0.5 or average(moves**2, each) > 4 * average(moves, each) ** 2


def bounds(data: np.ndarray) -> tuple[float, float]:
    """The scale that the values keep to: [0, 1], [-1, 1] or none."""
    for bottom in (0.0, -1.0):
        if bottom <= data.min() and data.max() <= 1.0:
            return bottom, 1.0
    return -math.inf, math.inf


def student(size: float) -> float:
    """97.5 % quantile of Student's t for a mean of `size` values; the normal one for a single value."""
    from scipy.special import stdtrit

    return float(stdtrit(size - 1, 0.975)) if size > 1.5 else Z


def wilson(rate: float, size: float, quantile: float) -> tuple[float, float]:
    """Wilson's score interval of a share."""
    slack = quantile**2 / size
    middle = (rate + slack / 2) / (1 + slack)
    half = math.sqrt(slack * rate * (1 - rate) + slack**2 / 4) / (1 + slack)
    return max(0.0, middle - half), min(1.0, middle + half)


def tango(up: float, down: float, size: float, quantile: float) -> tuple[float, float]:
    """Tango's score interval of (up - down) / size, for `up` and `down` of `size` prompts that moved by 1 and by -1."""

    def is_no_surprise(true: float) -> bool:
        linear = (2 * size - up + down) * true - up - down
        constant = -down * true * (1 - true)
        share = (math.sqrt(max(0.0, linear**2 - 8 * size * constant)) - linear) / (4 * size)  # of `down`, if `true` is true
        return (up - down - size * true) ** 2 <= quantile**2 * size * max(0.0, 2 * share + true * (1 - true))

    return farthest(is_no_surprise, (up - down) / size, -1.0), farthest(is_no_surprise, (up - down) / size, 1.0)


def farthest(holds: Callable[[float], bool], start: float, end: float) -> float:
    """The point nearest to `end` where `holds`, which holds at `start` and up to that point."""
    inside, outside = start, end
    for _ in range(STEPS):
        middle = (inside + outside) / 2
        inside, outside = (middle, outside) if holds(middle) else (inside, middle)
    return outside
