"""One rank of a training with real ZeRO-3, in this process and without Ray: what the group does, on a few pairs."""

import json
import os
import socket
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest

from evolve_ray.config.options import Trainer, Training
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage
from evolve_ray.train.spec import TrainSpec

LETTERS = ("cab", "fed", "hgi", "lkj", "onm", "rqp")


def make_pairs(count: int = 6) -> list[dict]:
    """Preference pairs of the tiny world's kind, of several lengths; one rejected answer was cut."""
    pairs = []
    for number in range(count):
        letters = LETTERS[number % len(LETTERS)] * (1 + number % 3)
        pair = dict.fromkeys(rows.PAIR.names) | {"pair_id": f"pair-{number}", "prompt_id": f"prompt-{number}"}
        pair |= {"prompt": f"sort {letters}", "chosen": "".join(sorted(letters)), "rejected": letters}
        pairs.append(pair | {"chosen_finished": True, "rejected_finished": number != 1})
    return pairs


@pytest.fixture(scope="module")
def process_group():
    """A gloo group of this process alone, as DeepSpeed finds it."""
    import deepspeed
    import torch

    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
    wanted = {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    before = {name: os.environ.get(name) for name in wanted}
    os.environ.update(wanted)
    torch.set_num_threads(1)
    deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False  # otherwise it is compiled now, for minutes
    deepspeed.init_distributed(dist_backend="gloo", auto_mpi_discovery=False, verbose=False)
    yield
    deepspeed.comm.destroy_process_group()
    deepspeed.comm.comm.cdb = None  # so that the next module's is made anew
    for name, value in before.items():
        os.environ.pop(name) if value is None else os.environ.update({name: value})


def train(
    model: Path, out: Path, monkeypatch: pytest.MonkeyPatch, *, pairs: list[dict] | None = None, training: dict | None = None,
    trainer: dict | None = None, dtype: str = "float32", initial: Path | None = None,
) -> dict[str, Any]:  # fmt: skip
    """Trains `model` on pairs; returns `{"log": the metrics of each step, "reference": the table, "checkpoint": the folder}`."""
    import torch

    from evolve_ray.train.rank import Rank

    monkeypatch.setattr("ray.train.torch.get_device", lambda: torch.device("cpu"))
    monkeypatch.setattr("ray.train.report", lambda metrics: None)
    table = pairs or make_pairs()
    out.mkdir(parents=True)
    schema = rows.numbered(rows.PAIR, sorted(table[0].get("numbers", {})))
    rows.write_table(out / "pairs.parquet", table, schema, pa.schema([*rows.PAIR_DETAILS, *rows.TURN_DETAILS]))
    options = {"objective": "dpo", "batch_pairs": len(table), "micro_pairs": 2, "epochs": 1, "learning_rate": 1e-3}
    spec = TrainSpec(
        pairs=str(out / "pairs.parquet"), model=str(model), reference_model=str(model), reference_hash="hash", dtype=dtype,
        template=load_template("tiny", "conversation"), training=Training(**(options | (training or {}))),
        trainer=Trainer(**({"workers": 1} | (trainer or {}))), seed=0, iteration=1, run=Run(out),
        reference=Stage(out / "reference", "reference", "r" * 64), checkpoint=Stage(out / "checkpoint", "checkpoint", "c" * 64),
        initial_model=str(initial or model),
    )  # fmt: skip
    rank = Rank(spec)
    rank.run()
    rank.model.unload()
    log = [json.loads(line) for line in (out / "checkpoint" / "training_log.jsonl").read_text().splitlines()]
    reference = out / "reference" / "reference.parquet"
    return {"log": log, "reference": rows.read_table(reference) if reference.exists() else [], "checkpoint": out / "checkpoint"}
