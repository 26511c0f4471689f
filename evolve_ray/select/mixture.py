"""Which rows of earlier iterations, and which given ones, are mixed into a training: pure functions of ids and counts."""

from fractions import Fraction

from evolve_ray.store.rows import derive_seed


def wanted(num_own: int, replay: float, given: float) -> tuple[int, int]:
    """(rows to replay, given rows) such that `replay` and `given` are their shares of all rows, each count rounded down.

    Exact: the shares are the decimals that the recipe has. Own rows are all kept: 5 own ones with shares of 0.3 and 0.2 are half
    of 10 rows, with 3 replayed and 2 given.
    """
    replayed, added = Fraction(str(replay)), Fraction(str(given))
    whole = num_own / (1 - replayed - added)
    return int(replayed * whole), int(added * whole)


def evenly(number: int, sizes: dict[int, int]) -> dict[int, int]:
    """How many of `number` rows each table gives: equally many as far as it has them; the first tables give what is left over."""
    counts = dict.fromkeys(sizes, 0)
    while number and (open_tables := [name for name in sorted(sizes) if counts[name] < sizes[name]]):
        share = max(1, number // len(open_tables))
        for name in open_tables:
            taken = min(share, sizes[name] - counts[name], number)
            counts[name] += taken
            number -= taken
    return counts


def draw(ids: list[str], number: int, *seed: object) -> list[int]:
    """Places of `number` of the ids, in their order. Which ones depends on the seed and the ids alone, not on their order."""
    ranked = sorted(range(len(ids)), key=lambda place: (derive_seed(*seed, ids[place]), ids[place]))
    return sorted(ranked[:number])
