"""Measures cost by size: prompts -> drafts -> scores -> pairs -> report with the null engine, and all else as in a run.

* `scale_time_growth`: seconds per prompt at the largest size over the least seconds per prompt of the smaller sizes;
* `scale_driver_mib`: peak memory of the driver over all sizes, minus its memory before the first size;
* `scale_report_s`: seconds of the report at the largest size;
* `scale_files_per_shard`: files of the largest run, per shard;
* `scale_bytes_growth`: bytes per prompt of the largest run over those of the smallest;
* `scale_8_actors`: requests/s of 8 engines over 8 times those of one; each request is a fixed sleep, each engine has the same
  work.
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

from evolve_ray.bench.table import Row, turns
from evolve_ray.config.load import build
from evolve_ray.config.options import Config
from evolve_ray.config.resolve import resolved
from evolve_ray.store import rows as tables
from evolve_ray.store.run import Run

PARTS = ("sizes", "actors")
ROUNDS = 4
DIGITS, FILLER = "abcdefghijklmnopqrstuvwxy", "z"
PAGE_MIB = os.sysconf("SC_PAGE_SIZE") / 2**20
LOOK_S = 0.02  # interval between two readings of the driver's memory


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--only", nargs="+", choices=PARTS, default=list(PARTS), help="parts to measure")
    parser.add_argument("--sizes", nargs="+", type=int, default=[10**3, 10**4, 10**5], help="numbers of prompts")
    parser.add_argument("--repeats", type=int, default=1, help="repeats of every measurement")
    parser.add_argument("--engines", type=int, default=2, help="null engines of the part sizes")
    parser.add_argument("--shard", type=int, default=256, help="prompts of a shard of the part sizes")
    parser.add_argument("--actors", nargs="+", type=int, default=[1, 2, 8], help="null engines side by side, of the part actors")
    parser.add_argument("--service-ms", type=float, default=20.0, help="sleep of a request, of the part actors")
    parser.add_argument("--shards-each", type=int, default=16, help="shards of 16 prompts for each engine, of the part actors")


def rows(args: argparse.Namespace) -> list[Row]:
    from evolve_ray.pools.session import stop_ray

    args.sizes, args.actors = sorted(set(args.sizes)), sorted(set(args.actors))
    with tempfile.TemporaryDirectory() as folder:
        root = Path(folder)
        model_folder(root / "model")
        try:
            rows = growth_rows(args, root) if "sizes" in args.only else []
            return rows + (actor_rows(args, root) if "actors" in args.only else [])
        finally:
            stop_ray()


@dataclass
class RunCost:
    """The cost of one run: seconds by part, memory, and the files that it wrote."""

    prompts: int
    seconds: dict[str, float] = field(default_factory=dict)
    driver_cpu_s: float = 0.0
    files: int = 0
    num_bytes: int = 0
    largest: int = 0
    pairs: int = 0
    shards: int = 0
    peak_mib: float = 0.0
    first_s: float = 0.0  # seconds until the first shard was done

    @property
    def each(self) -> float:
        """Returns seconds per prompt."""
        return sum(self.seconds.values()) / self.prompts

    def summary(self) -> str:
        parts = ", ".join(f"{name} {seconds:.1f}" for name, seconds in self.seconds.items())
        driver = 1000 * self.driver_cpu_s / self.prompts
        return (
            f"{1000 * self.each:.2f} ms per prompt ({parts} s), driver CPU {driver:.2f} ms per prompt, "
            f"driver memory +{self.peak_mib:.0f} MiB, {self.files} files of {self.num_bytes / 2**20:.1f} MiB, the largest "
            f"{self.largest / 2**20:.1f} MiB, {self.pairs} pairs, {self.shards} shards"
        )


def model_folder(folder: Path) -> None:
    """Writes what a run needs of a model before its engine starts: tokenizer, shape, and weights that nothing reads here."""
    import numpy as np
    from safetensors.numpy import save_file

    from evolve_ray.toy.tokenizer import make_tokenizer

    make_tokenizer().save_pretrained(folder)
    (folder / "config.json").write_text('{"architectures": ["LlamaForCausalLM"], "max_position_embeddings": 256}')
    save_file({"weight": np.zeros(1)}, folder / "model.safetensors")


def recipe(root: Path, bench_args: argparse.Namespace, prompts: int, **engine: Any) -> Config:
    """Returns the configuration of a run: one iteration on `prompts` prompts, the null engine, scores from the verifier."""
    values = {
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
        # Logical CPUs: engines that sleep need none. Ray ends idle processes above this number; each step has two per engine.
        "ray": {"num_cpus": 4 * max(8, *bench_args.actors), "dashboard": False},
    }
    return build(values, "scale", "", ())


def one_run(root: Path, config: Config, pools: Any) -> RunCost:
    """Runs one iteration without model and training, in a run directory that is deleted afterwards; returns its cost."""
    from evolve_ray.inputs.prepare import prepare
    from evolve_ray.pools import session
    from evolve_ray.report import report
    from evolve_ray.stages import generations, measures
    from evolve_ray.stages.evaluation import evaluate
    from evolve_ray.stages.pairs import select

    prompts = config.prompts.per_iteration
    tables.write_jsonl(root / "prompts.jsonl", ({"prompt": letters(number), "answer": "yes"} for number in range(prompts)))
    run, cost, cpu = Run(root / "run"), RunCost(prompts), time.process_time()
    run.root.mkdir()
    prepare_quietly = functools.partial(prepare, config, run, lambda line: None, functools.partial(session.start_ray, config))
    with watched_memory() as memory:
        with timed(cost, "prompts"):
            context = prepare_quietly(rerun_changed=False)
        context.pools = pools
        models = [evaluate(context, 0, context.policy, "base", folder="base_evaluation")]
        job = generations.GenerationJob(
            1, "generations", context.policy, context.prompts[1], config.strategy, config.sampling, 1, context.reward_models
        )
        with timed(cost, "drafts and scores"):
            drafts, scores = generations.generate_and_score(context, job, run.iteration(1))
        with timed(cost, "pairs"):
            pairs = select(context, 1, drafts, scores)
            context.collect_rejected(1)
        with timed(cost, "drift"):
            models.append(models[0] | {"name": "iteration 1", "iteration": 1})
            models[-1]["drift"] = measures.measure_drift(context, 1, drafts, scores, pairs, None, models[:1])
        with timed(cost, "report"):
            report.write(run, resolved(config), models)
    cost.first_s = first_shard_s(tables.read_jsonl(run.root / "events.jsonl"))
    sizes = [path.stat().st_size for path in run.root.rglob("*") if path.is_file()]
    cost.files, cost.num_bytes, cost.largest = len(sizes), sum(sizes), max(sizes)
    cost.driver_cpu_s, cost.peak_mib = time.process_time() - cpu, memory[0]
    cost.pairs, cost.shards = pairs.stats["num_rows"], drafts.stats["num_shards"]
    shutil.rmtree(run.root)
    return cost


def first_shard_s(events: list[dict[str, Any]]) -> float:
    """Returns seconds from the start of the pipeline until its first shard was done."""
    started = next(event["time"] for event in events if event["event"] == "stage_start")
    done = next(event["time"] for event in events if event["event"] == "shard")
    return (datetime.datetime.fromisoformat(done) - datetime.datetime.fromisoformat(started)).total_seconds()


def letters(number: int) -> str:
    """Returns a prompt of 40 letters, a different one for each number."""
    text = ""
    while number:
        number, digit = divmod(number, len(DIGITS))
        text += DIGITS[digit]
    return text.ljust(40, FILLER)


@contextlib.contextmanager
def timed(cost: RunCost, name: str) -> Iterator[None]:
    started = time.perf_counter()
    yield
    cost.seconds[name] = time.perf_counter() - started


@contextlib.contextmanager
def watched_memory() -> Iterator[list[float]]:
    """Yields a list; its only member becomes the peak memory of this process (MiB) inside the block."""
    peak, done = [resident_mib()], threading.Event()

    def read_memory() -> None:
        while not done.wait(LOOK_S):
            peak[0] = max(peak[0], resident_mib())

    thread = threading.Thread(target=read_memory, daemon=True)
    thread.start()
    try:
        yield peak
    finally:
        done.set()
        thread.join()
        peak[0] = max(peak[0], resident_mib())


def resident_mib() -> float:
    """Returns the private memory of this process: shared pages belong to Ray's object store, which has its own limit."""
    _, resident, shared = Path("/proc/self/statm").read_text().split()[:3]
    return (int(resident) - int(shared)) * PAGE_MIB


def growth_rows(args: argparse.Namespace, root: Path) -> list[Row]:
    from evolve_ray.pools.actors import Pools

    engine = {"actors": args.engines, "shard_prompts": args.shard, "args": {"service_s": 0.0}}
    pools = Pools()
    one_run(root, recipe(root, args, 4 * args.shard, **engine), pools)  # starts Ray and the actors, imports modules
    start_mib = resident_mib()
    costs: list[list[RunCost]] = []
    for _ in turns("scale: growth", args.repeats):
        costs.append([one_run(root, recipe(root, args, size, **engine), pools) for size in args.sizes])
        for cost in costs[-1]:
            cost.peak_mib -= start_mib
    for name in ("engines", "scorers"):
        pools.close(name)
    return growth(costs, start_mib)


def growth(repeats: list[list[RunCost]], start_mib: float) -> list[Row]:
    """Returns the rows; each repeat has the sizes in ascending order."""
    counts = {f"{cost.prompts:,} prompts": cost.summary() for cost in repeats[-1]}
    largest = [costs[-1] for costs in repeats]
    growths = [costs[-1].each / min(cost.each for cost in costs[:-1] or costs) for costs in repeats]
    memory = [max(cost.peak_mib for cost in costs) for costs in repeats]
    bytes_each = [(costs[-1].num_bytes / costs[-1].prompts) / (costs[0].num_bytes / costs[0].prompts) for costs in repeats]
    return [
        Row("scale_time_growth", "x", growths, counts),
        Row("scale_driver_mib", "MiB", memory, {"driver at its start, MiB": round(start_mib, 1)}),
        Row("scale_report_s", "s", [cost.seconds["report"] for cost in largest]),
        Row("scale_files_per_shard", "files", [cost.files / cost.shards for cost in largest], {"shards": largest[-1].shards}),
        Row("scale_bytes_growth", "x", bytes_each, {"largest file, bytes": largest[-1].largest}),
    ]


def actor_rows(args: argparse.Namespace, root: Path) -> list[Row]:
    """Measures one number of engines after the other, so that they do not compete; their start is not measured."""
    from evolve_ray.pools.actors import Pools

    size, service_s = 16, args.service_ms / 1000
    costs: dict[int, list[RunCost]] = {number: [] for number in args.actors}
    for number in args.actors:
        engine = {"actors": number, "shard_prompts": size, "args": {"service_s": service_s}}
        pools = Pools()
        one_run(root, recipe(root, args, 2 * number * size, **engine), pools)
        for _ in turns(f"scale: {number} engines", args.repeats):
            costs[number].append(one_run(root, recipe(root, args, number * args.shards_each * size, **engine), pools))
        for name in ("engines", "scorers"):
            pools.close(name)
    return side_by_side(costs, size * ROUNDS * args.shards_each, service_s)


def side_by_side(costs: dict[int, list[RunCost]], requests_each: int, service_s: float) -> list[Row]:
    """Returns the rows: seconds of one engine alone over those of many side by side. The ideal is 1: each has the same work."""
    seconds = {number: [cost.seconds["drafts and scores"] for cost in runs] for number, runs in costs.items()}
    alone = statistics.median(seconds[min(costs)])
    rows = []
    for number, runs in costs.items():
        median_s = statistics.median(seconds[number])
        counts = {
            "requests of an engine": requests_each,
            "requests/s": round(number * requests_each / median_s, 2),
            "seconds": round(median_s, 2),
            "of these serving": round(requests_each * service_s, 2),
            "until the first shard was done": round(statistics.median(cost.first_s for cost in runs), 2),
            "of these serving it": round(requests_each * service_s * number / runs[0].shards, 2),
            "driver CPU": round(statistics.median(cost.driver_cpu_s for cost in runs), 2),
        }
        unit = f"of {number} times {min(costs)}" if number > min(costs) else "of itself"
        rows.append(Row(f"scale_{number}_actors", unit, [alone / value for value in seconds[number]], counts))
    return rows
