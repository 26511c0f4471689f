"""Cost against size: prompts -> drafts -> scores -> pairs -> report with the null engine, everything around it as in a run.

* `scale_time_growth`: seconds a prompt at the largest size over the least of the smaller sizes;
* `scale_driver_mib`: the most memory that the driver took at any size beyond what it had before the first one;
* `scale_report_s`: seconds of the report at the largest size;
* `scale_files_per_shard`, `scale_bytes_growth`: files of the largest run, and its bytes a prompt over those of the smallest;
* `scale_8_actors`: requests/s of 8 engines over 8 times those of one, each request a fixed sleep, each engine the same work.
"""

import argparse
import contextlib
import datetime
import functools
import os
import shutil
import statistics
import tempfile
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evolve_ray.bench.table import Row
from evolve_ray.config.load import build
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import resolved
from evolve_ray.store import rows as tables
from evolve_ray.store.run import Run

PARTS = ("sizes", "actors")
ROUNDS = 4
DIGITS, FILLER = "abcdefghijklmnopqrstuvwxy", "z"
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
LOOK_S = 0.02  # between two looks at the driver's memory


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="what to measure")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**3, 10**4, 10**5], help="prompts")
    parser.add_argument("--repeats", type=int, default=1, help="of everything")
    parser.add_argument("--engines", type=int, default=2, help="null engines of the sizes")
    parser.add_argument("--shard", type=int, default=256, help="prompts of a shard of the sizes")
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 2, 8], help="null engines side by side")
    parser.add_argument("--service-ms", type=float, default=20.0, help="sleep of a request where engines are side by side")
    parser.add_argument("--shards-each", type=int, default=16, help="shards of 16 prompts for each of these engines")


def rows(given: argparse.Namespace) -> list[Row]:
    from evolve_ray.pools.session import stop_ray

    given.sizes, given.actors = sorted(set(given.sizes)), sorted(set(given.actors))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model_folder(root / "model")
        try:
            made = growth_rows(given, root) if "sizes" in given.only else []
            return made + (actor_rows(given, root) if "actors" in given.only else [])
        finally:
            stop_ray()


@dataclass
class Spent:
    """What one run took: seconds by part, and what it left behind."""

    prompts: int
    seconds: dict[str, float] = field(default_factory=dict)
    driver_cpu_s: float = 0.0
    files: int = 0
    num_bytes: int = 0
    largest: int = 0
    pairs: int = 0
    shards: int = 0
    peak_mib: float = 0.0
    first_s: float = 0.0  # until the first shard was done

    @property
    def each(self) -> float:
        """Seconds a prompt."""
        return sum(self.seconds.values()) / self.prompts

    def told(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        driver = 1000 * self.driver_cpu_s / self.prompts
        return (
            f"{1000 * self.each:.2f} ms a prompt ({parts} s), driver CPU {driver:.2f} ms a prompt, "
            f"driver memory +{self.peak_mib:.0f} MiB, {self.files} files of {self.num_bytes / 2**20:.1f} MiB, the largest "
            f"{self.largest / 2**20:.1f} MiB, {self.pairs} pairs, {self.shards} shards"
        )


def model_folder(folder: Path) -> None:
    """What a run asks of a model before its engine starts: a tokenizer, a shape and weights, which nothing reads here."""
    import numpy as np
    from safetensors.numpy import save_file

    from evolve_ray.toy.tokenizer import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256}')
    save_file({"weight": np.zeros(1)}, folder / "model.safetensors")


def recipe(root: Path, given: argparse.Namespace, prompts: int, **engine: Any) -> Config:
    """A run of one iteration on as many prompts with the null engine, scored by the verifier."""
    tree = {
        "name": "scale",
        "iterations": 1,
        "model": {"path": str(root / "model"), "context_tokens": 200},
        "prompts": {"path": str(root / "prompts.jsonl"), "answer_column": "answer", "per_iteration": prompts},
        "template": {"name": "tiny"},
        "strategy": {"name": "chain", "rounds": ROUNDS},
        "sampling": {"max_tokens": 8},
        "engine": {"name": "evolve_ray.bench.null:NullEngine", "cpus_per_actor": 0.5, **engine},
        "scorer": {"name": "verifier", "cpus_per_actor": 0.1},
        "verifier": {"name": "exact"},
        # Logical CPUs: engines that sleep need none. Ray ends idle processes beyond this number, and each step has two an engine.
        "ray": {"num_cpus": 4 * max(8, *given.actors), "dashboard": False},
    }
    return build(tree, "scale", "", ())


def one_run(root: Path, config: Config, pools: Any) -> Spent:
    """Everything of one iteration that is neither a model nor a training, in a run directory that is removed afterwards."""
    from evolve_ray.inputs.prepare import prepare
    from evolve_ray.pools import session
    from evolve_ray.report import report
    from evolve_ray.stages import generations, measures
    from evolve_ray.stages.evaluation import evaluate
    from evolve_ray.stages.pairs import select

    prompts = config.prompts.per_iteration
    tables.write_jsonl(root / "prompts.jsonl", ({"prompt": letters(number), "answer": "yes"} for number in range(prompts)))
    run, spent, cpu = Run(root / "run"), Spent(prompts), time.process_time()
    run.root.mkdir()
    quiet = functools.partial(prepare, config, run, lambda line: None, functools.partial(session.start_ray, config))
    with watched_memory() as memory:
        with timed(spent, "prompts"):
            context = quiet(rerun_changed=False)
        context.pools = pools
        models = [evaluate(context, 0, context.policy, "base", folder="base_evaluation")]
        asked = generations.GenerationJob(
            1, "generations", context.policy, context.prompts[1], config.strategy, config.sampling, 1, context.reward_models
        )
        with timed(spent, "drafts and scores"):
            drafts, scores = generations.generate_and_score(context, asked, run.iteration(1))
        with timed(spent, "pairs"):
            chosen = select(context, 1, drafts, scores)
            context.collect_rejected(1)
        with timed(spent, "drift"):
            models.append(models[0] | {"name": "iteration 1", "iteration": 1})
            models[-1]["drift"] = measures.measure_drift(context, 1, drafts, scores, chosen, None, models[:1])
        with timed(spent, "report"):
            report.write(run, resolved(config), models)
    spent.first_s = first_shard_s(tables.read_jsonl(run.root / "events.jsonl"))
    sizes = [path.stat().st_size for path in run.root.rglob("*") if path.is_file()]
    spent.files, spent.num_bytes, spent.largest = len(sizes), sum(sizes), max(sizes)
    spent.driver_cpu_s, spent.peak_mib = time.process_time() - cpu, memory[0]
    spent.pairs, spent.shards = chosen.stats["num_rows"], drafts.stats["num_shards"]
    shutil.rmtree(run.root)
    return spent


def first_shard_s(events: list[dict[str, Any]]) -> float:
    """Seconds from the start of the pipeline until its first shard was done: what it takes to get under way."""
    started = next(event["time"] for event in events if event["event"] == "stage_start")
    done = next(event["time"] for event in events if event["event"] == "shard")
    return (datetime.datetime.fromisoformat(done) - datetime.datetime.fromisoformat(started)).total_seconds()


def letters(number: int) -> str:
    """A prompt of 40 letters for each number."""
    text = ""
    while number:
        number, digit = divmod(number, len(DIGITS))
        text += DIGITS[digit]
    return text.ljust(40, FILLER)


@contextlib.contextmanager
def timed(spent: Spent, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    spent.seconds[name] = time.perf_counter() - started


@contextlib.contextmanager
def watched_memory() -> Iterator[list[float]]:
    """Gives a list whose only member becomes the most memory (MiB) that this process had inside."""
    peak, done = [resident_mib()], threading.Event()

    def look() -> None:
        while not done.wait(LOOK_S):
            peak[0] = max(peak[0], resident_mib())

    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], resident_mib())


def resident_mib() -> float:
    """Memory of this process that is its own: shared pages are Ray's object store, which has a bound of its own."""
    _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * PAGE_MIB


def growth_rows(given: argparse.Namespace, root: Path) -> list[Row]:
    from evolve_ray.pools.actors import Pools

    engine = {"actors": given.engines, "shard_prompts": given.shard, "args": {"service_s": 0.0}}
    pools = Pools()
    one_run(root, recipe(root, given, 4 * given.shard, **engine), pools)  # starts Ray, actors, imports
    start = resident_mib()
    found: list[list[Spent]] = []
    for _ in range(given.repeats):
        found.append([one_run(root, recipe(root, given, size, **engine), pools) for size in given.sizes])
        for spent in found[-1]:
            spent.peak_mib -= start
    for name in ("engines", "scorers"):
        pools.close(name)
    return growth(found, start)


def growth(found: list[list[Spent]], start_mib: float) -> list[Row]:
    """The rows of the repeats; in each the sizes in ascending order."""
    counts = {f"{spent.prompts:,} prompts": spent.told() for spent in found[-1]}
    last = [sizes[-1] for sizes in found]
    times = [sizes[-1].each / min(spent.each for spent in sizes[:-1] or sizes) for sizes in found]
    memory = [max(spent.peak_mib for spent in sizes) for sizes in found]
    bytes_each = [(sizes[-1].num_bytes / sizes[-1].prompts) / (sizes[0].num_bytes / sizes[0].prompts) for sizes in found]
    return [
        Row("scale_time_growth", "x", times, counts),
        Row("scale_driver_mib", "MiB", memory, {"driver at its start, MiB": round(start_mib, 1)}),
        Row("scale_report_s", "s", [spent.seconds["report"] for spent in last]),
        Row("scale_files_per_shard", "files", [spent.files / spent.shards for spent in last], {"shards": last[-1].shards}),
        Row("scale_bytes_growth", "x", bytes_each, {"largest file, bytes": last[-1].largest}),
    ]


def actor_rows(given: argparse.Namespace, root: Path) -> list[Row]:
    """Each number of engines after the other, so that no two compete; their start is left out."""
    from evolve_ray.pools.actors import Pools

    size, service_s = 16, given.service_ms / 1000
    took: dict[int, list[Spent]] = {number: [] for number in given.actors}
    for number in given.actors:
        engine = {"actors": number, "shard_prompts": size, "args": {"service_s": service_s}}
        pools = Pools()
        one_run(root, recipe(root, given, 2 * number * size, **engine), pools)
        for _ in range(given.repeats):
            took[number].append(one_run(root, recipe(root, given, number * given.shards_each * size, **engine), pools))
        for name in ("engines", "scorers"):
            pools.close(name)
    return side_by_side(took, size * ROUNDS * given.shards_each, service_s)


def side_by_side(took: dict[int, list[Spent]], requests_each: int, service_s: float) -> list[Row]:
    """Each engine has the same work, so its seconds alone over those of many side by side are the share of the ideal."""
    seconds = {number: [spent.seconds["drafts and scores"] for spent in runs] for number, runs in took.items()}
    alone = statistics.median(seconds[min(took)])
    made = []
    for number, runs in took.items():
        each = statistics.median(seconds[number])
        counts = {
            "requests of an engine": requests_each,
            "requests/s": round(number * requests_each / each, 2),
            "seconds": round(each, 2),
            "of these serving": round(requests_each * service_s, 2),
            "until the first shard was done": round(statistics.median(spent.first_s for spent in runs), 2),
            "of these serving it": round(requests_each * service_s * number / runs[0].shards, 2),
            "driver CPU": round(statistics.median(spent.driver_cpu_s for spent in runs), 2),
        }
        unit = f"of {number} times {min(took)}" if number > min(took) else "of itself"
        made.append(Row(f"scale_{number}_actors", unit, [alone / value for value in seconds[number]], counts))
    return made
