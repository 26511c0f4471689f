"""pairs -> mixed: the rows of an iteration's training, with rows of earlier iterations and given ones mixed in by share."""

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from evolve_ray.config.options import Training
from evolve_ray.config.plugs import is_own
from evolve_ray.errors import UserError
from evolve_ray.inputs.context import Context
from evolve_ray.plan.plan import find_objective
from evolve_ray.select.mixture import draw, evenly, wanted
from evolve_ray.store import rows
from evolve_ray.store.files import report_disk_errors
from evolve_ray.store.manifest import Manifest, read_manifest

VERSION = 1
GIVEN = "activation_pairs"


def mix(context: Context, iteration: int, pairs: Manifest) -> Manifest:
    """The committed rows of the training: `pairs` themselves if the recipe mixes nothing in.

    Raises UserError for rows of an earlier iteration that have other numbers for the loss.
    """
    config, training = context.config, context.config.training
    if not (training.replay or training.given):
        return pairs
    earlier: dict[int, Manifest] = {}
    for number in range(1, iteration) if training.replay else ():
        manifest = read_manifest(context.run.iteration(number) / "pairs", verify=True)
        assert manifest is not None, "an iteration begins when those before it are committed"
        earlier[number] = manifest
    triples = context.triples["activation"] if training.given else None
    key = {
        "version": VERSION, "seed": config.seed, "iteration": iteration, "replay": training.replay, "given": training.given,
        "compares": compares(training),
    }  # fmt: skip
    inputs = {"pairs": pairs.identity, **{f"pairs of iteration {number}": part.identity for number, part in earlier.items()}}
    inputs |= {GIVEN: triples.identity} if triples else {}
    stage = context.stage(context.run.iteration(iteration) / "mixed", "mixed", key, inputs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("mixed", iteration):
            table, origins, counts = mixture(pairs, earlier, triples, training, config.seed, iteration)
            work = stage.start()
            with report_disk_errors(work):
                pq.write_table(table, work / "pairs.parquet", compression="zstd")
                rows.write_table(work / "origins.parquet", origins, rows.ORIGIN)
            manifest = stage.commit(num_in=len(table), num_rows=len(table), **counts)
    context.say(f"  iteration {iteration}: mixed: {rows.mixture_text(manifest.stats)}")
    return manifest


def compares(training: Training) -> bool:
    """Whether the objective compares two answers, so that a triple of two equal ones teaches nothing."""
    sequences = find_objective(training).sequences if is_own(training.objective) else ()
    return training.objective != "sft" and (not sequences or any(name.startswith("rejected") for name in sequences))


def mixture(
    pairs: Manifest, earlier: dict[int, Manifest], triples: Manifest | None, training: Training, seed: int, iteration: int
) -> tuple[pa.Table, list[dict], dict]:  # fmt: skip
    """(own rows, then replayed ones by iteration, then given ones; where each comes from; the counts for the manifest)."""
    own = pq.read_table(pairs.path("pairs.parquet"))
    used = set(own["pair_id"].to_pylist())
    num_replayed, num_given = wanted(len(own), training.replay, training.given)
    for number, manifest in earlier.items():
        check_numbers_of(number, manifest, own.schema)
    places = {number: unused(pq.read_table(part.path("pairs.parquet"), columns=["pair_id"]), used)
              for number, part in sorted(earlier.items())}  # fmt: skip
    shares = evenly(num_replayed, {number: len(ids) for number, ids in places.items()})
    tables, origins = [own], origins_of(own, "own", iteration, pairs)
    for number, ids in places.items():
        chosen = draw(list(ids), shares[number], "replay", seed, iteration)
        tables.append(take(earlier[number], list(ids.values()), chosen))
        origins += origins_of(tables[-1], "replayed", number, earlier[number])
    if triples:
        candidates = pq.read_table(triples.path("pairs.parquet"), columns=["pair_id", "chosen", "rejected"])
        same = pc.equal(candidates["chosen"], candidates["rejected"]).to_pylist()
        ids = unused(candidates, used)
        ids = {name: place for name, place in ids.items() if not (same[place] and compares(training))}
        chosen = draw(list(ids), num_given, "given", seed, iteration)
        tables.append(take(triples, list(ids.values()), chosen))
        origins += origins_of(tables[-1], "given", 0, triples)
    counts = {
        "num_own": len(own),
        "num_replayed": sum(row["origin"] == "replayed" for row in origins),
        "num_given": sum(row["origin"] == "given" for row in origins),
        "replayed": {str(number): share for number, share in shares.items()},
        "wanted_replayed": num_replayed,
        "wanted_given": num_given,
    }
    return pa.concat_tables(tables, promote_options="default").combine_chunks(), origins, counts


def unused(table: pa.Table, used: set[str]) -> dict[str, int]:
    """The place of each row whose id is not among `used`, by its id; adds them, so that no row comes twice."""
    places = {name: place for place, name in enumerate(table["pair_id"].to_pylist()) if name not in used}
    used.update(places)
    return places


def take(manifest: Manifest, places: list[int], chosen: list[int]) -> pa.Table:
    """Some rows of a table of pairs, in its order."""
    return pq.read_table(manifest.path("pairs.parquet")).take(pa.array([places[number] for number in chosen], pa.int64()))


def origins_of(table: pa.Table, origin: str, iteration: int, source: Manifest) -> list[dict]:
    """Where the rows of a table come from, a row for each."""
    return [
        {"pair_id": name, "origin": origin, "iteration": iteration, "table": source.folder.name}
        for name in table["pair_id"].to_pylist()
    ]


def check_numbers_of(number: int, manifest: Manifest, own: pa.Schema) -> None:
    """Raises UserError if the rows of an earlier iteration have other numbers for the loss than this iteration's."""
    there, here = numbers(pq.read_schema(manifest.path("pairs.parquet"))), numbers(own)
    if there != here:
        raise UserError(
            f"training.replay: the rows of iteration {number} have the numbers {', '.join(there) or 'none'}, but those of this "
            f"iteration {', '.join(here) or 'none'}, so one loss cannot train both; set training.replay = 0, or use one selection"
        )


def numbers(schema: pa.Schema) -> list[str]:
    return [field.name for field in schema.field("numbers").type] if "numbers" in schema.names else []
