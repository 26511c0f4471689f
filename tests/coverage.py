"""How often the 95 % intervals of evaluation and benchmarks hold the truth: `python -m tests.coverage` prints the tables.

0/1 outcomes are counted exactly, over every outcome with its probability. Other values are drawn, 1,000 times with a fixed seed.
Where few prompts are right or change there are few outcomes, and coverage moves in steps: a cell above 97 % also holds the least
coverage that an interval can have there.
"""

import functools
import math
from collections.abc import Callable, Iterator

import numpy as np
from scipy import stats

from evolve_ray.benchmarks import arena_hard
from evolve_ray.evaluate import intervals

SIZES = (30, 60, 100, 200, 500)
SHARES = (0.02, 0.05, 0.3, 0.5, 0.95, 0.98)
# (share before, share after, correlation of the two outcomes of a prompt)
PAIRS = (
    (0.02, 0.02, 0.0), (0.02, 0.02, 0.3), (0.02, 0.02, 0.6), (0.02, 0.05, 0.0), (0.02, 0.05, 0.3),
    (0.98, 0.98, 0.0), (0.98, 0.98, 0.3), (0.98, 0.98, 0.6), (0.95, 0.98, 0.0), (0.95, 0.98, 0.3), (0.5, 0.5, 0.9),
)  # fmt: skip
LOWEST, HIGHEST = 0.93, 0.97
DRAWS, DRAWN_SIZES = 1000, (60, 200)
TINY = 1e-9  # rounding of the ends, and outcomes too rare to count


def holds(figures: intervals.Figures, truth: float) -> bool:
    return figures["low"] - TINY <= truth <= figures["high"] + TINY


@functools.cache
def of_share(right: int, n: int) -> intervals.Figures:
    return intervals.mean([1.0] * right + [0.0] * (n - right))


@functools.cache
def of_difference(up: int, down: int, n: int) -> intervals.Figures:
    if up < down:
        figures = of_difference(down, up, n)
        return {"mean": -figures["mean"], "low": -figures["high"], "high": -figures["low"]}
    return intervals.difference([1.0] * up + [-1.0] * down + [0.0] * (n - up - down))


def share_coverage(share: float, n: int) -> tuple[float, float]:
    """(coverage, the least possible of at least 93 %) for a true share.

    An interval whose ends rise with the number of right answers holds the truth for a range of numbers, so those are all.
    """
    chances = stats.binom.pmf(np.arange(n + 1), n, share)
    sums = np.concatenate([[0.0], np.cumsum(chances)])
    ranges = np.subtract.outer(sums, sums)
    return sum(chances[k] for k in range(n + 1) if holds(of_share(k, n), share)), ranges[ranges >= LOWEST].min()


def pair_coverage(before: float, after: float, correlation: float, n: int) -> tuple[float, float]:
    """(coverage, the least possible of at least 93 % everywhere, or 0) for the difference of two true shares.

    If 0 were left out after three changes that all go one way, it would be held in 90 % only where four changes are expected. So
    an interval has to hold it wherever the evidence (McNemar's statistic) is no stronger; this says nothing where the true
    difference is not 0.
    """
    both = before * after + correlation * math.sqrt(before * (1 - before) * after * (1 - after))
    outcomes = list(moves(n, after - both, before - both))
    coverage = sum(chance for up, down, chance in outcomes if holds(of_difference(up, down, n), after - before))
    if before != after:
        return coverage, 0.0
    return coverage, sum(chance for up, down, chance in outcomes if (up - down) ** 2 <= 3 * (up + down))


def moves(n: int, rise: float, fall: float) -> Iterator[tuple[int, int, float]]:
    """(prompts that rise, prompts that fall, probability), without the rarest outcomes."""
    last = [int(stats.binom.isf(TINY, n, share)) for share in (rise, fall)]
    up, down = np.meshgrid(*(np.arange(end + 1) for end in last), indexing="ij")
    inside = up + down <= n
    up, down = up[inside], down[inside]
    chances = stats.multinomial.pmf(np.stack([up, down, n - up - down], axis=1), n, [rise, fall, 1 - rise - fall])
    return zip(up.tolist(), down.tolist(), chances.tolist(), strict=True)


def sparse(values: Callable, share: float) -> Callable:
    """Values of which all but a share are 0."""
    return lambda rng, n: np.where(rng.random(n) < share, values(rng, n), 0.0)


def quarters(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.integers(1, 5, n) / 4


def signed_quarters(rng: np.random.Generator, n: int) -> np.ndarray:
    return quarters(rng, n) * np.where(rng.random(n) < 0.7, 1, -1)


def rewards(rng: np.random.Generator, n: int) -> np.ndarray:
    return rng.normal(1.0, 1.0, n)


def gain_changes(rng: np.random.Generator, n: int) -> np.ndarray:
    """The gain of one model minus that of another; each of the four outcomes of a prompt is right in 2 %."""
    right = (rng.random((4, n)) < 0.02).astype(float)
    return right[0] - right[1] - (right[2] - right[3])


WORSE_TO_BETTER = ("B>>A", "B>A", "A=B", "A>B", "A>>B")  # with the model at position A
RARELY_WON = (0.78, 0.15, 0.03, 0.03, 0.01)
OFTEN_WON = (0.2, 0.2, 0.2, 0.2, 0.2)


def games(chances: tuple[float, ...]) -> Callable:
    """Questions of Arena-Hard; the second game repeats the verdict of the first in 60 %."""

    def draw(rng: np.random.Generator, n: int) -> list[dict]:
        first, other = rng.choice(5, (2, n), p=chances)
        second = np.where(rng.random(n) < 0.6, first, other)
        labels = [(WORSE_TO_BETTER[4 - one], WORSE_TO_BETTER[two]) for one, two in zip(first, second, strict=True)]
        return [{"games": [{"score": score} for score in scores]} for scores in labels]

    return draw


def arena_rate(chances: tuple[float, ...]) -> float:
    """The true win rate in %."""
    won, fought = (
        sum(chance * of(arena_hard.WORTH[label]) for chance, label in zip(chances, WORSE_TO_BETTER, strict=True))
        for of in (sum, len)
    )
    return 100 * won / fought


# name: (draws of n values, true mean, interval)
DRAWN: dict[str, tuple[Callable, float, Callable]] = {
    "mean of rewards, normal": (lambda rng, n: rng.normal(7.0, 2.0, n), 7.0, intervals.mean),
    "mean of similarities, around 0.8": (lambda rng, n: rng.beta(8, 2, n), 0.8, intervals.mean),
    "mean of scores in quarters, 2 % above 0": (sparse(quarters, 0.02), 0.02 * 0.625, intervals.mean),
    "mean of scores in quarters, 20 % not the same": (
        lambda rng, n: np.where(rng.random(n) < 0.2, rng.integers(0, 5, n) / 4, 0.5), 0.5, intervals.mean,
    ),
    "AlpacaEval win rate 30 %, unsure judge": (lambda rng, n: rng.beta(0.3, 0.7, n), 0.3, intervals.mean),
    "AlpacaEval win rate 2 %, unsure judge": (lambda rng, n: rng.beta(0.02, 0.98, n), 0.02, intervals.mean),
    "Arena-Hard win rate 50 %": (games(OFTEN_WON), arena_rate(OFTEN_WON), arena_hard.figures),
    "Arena-Hard win rate 3 %": (games(RARELY_WON), arena_rate(RARELY_WON), arena_hard.figures),
    "change of a gain, shares of 2 %": (gain_changes, 0.0, intervals.difference),
    "difference of rewards, all changed": (rewards, 1.0, intervals.difference),
    "difference of rewards, 10 % changed": (sparse(rewards, 0.1), 0.1, intervals.difference),
    "difference of scores in quarters, 5 % changed": (sparse(signed_quarters, 0.05), 0.05 * 0.25, intervals.difference),
}  # fmt: skip


@functools.cache
def drawn_coverage(name: str, n: int) -> float:
    draw, truth, interval = DRAWN[name]
    rng = np.random.default_rng(0)
    return sum(holds(interval(draw(rng, n)), truth) for _ in range(DRAWS)) / DRAWS


def cell(coverage: float, least: float) -> str:
    return f"{100 * coverage:.1f}" + (f" ({100 * least:.1f})" if coverage > HIGHEST and least else "")


def table(header: list[str], lines: list[list[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in [header, ["---"] * len(header), *lines])


def tables() -> str:
    """All tables in Markdown, as docs/evaluation.md holds them."""
    sizes = [f"n = {n}" for n in SIZES]
    shares = [[f"{share:g}", *(cell(*share_coverage(share, n)) for n in SIZES)] for share in SHARES]
    pairs = [[f"{pair[0]:g}, {pair[1]:g}", f"{pair[2]:g}", *(cell(*pair_coverage(*pair, n)) for n in SIZES)] for pair in PAIRS]
    drawn = [[name, *(f"{100 * drawn_coverage(name, n):.1f}" for n in DRAWN_SIZES)] for name in DRAWN]
    return "\n\n".join(
        (
            table(["true share", *sizes], shares),
            table(["true shares before, after", "correlation", *sizes], pairs),
            table(["other values", *(f"n = {n}" for n in DRAWN_SIZES)], drawn),
        )
    )


if __name__ == "__main__":
    print(tables())
