"""What ZeRO-3 holds is what the checkpoint says: parameters bit by bit, and numbers that are not finite stop all ranks."""

import json
import subprocess
import sys

import pytest

from evolve_ray import rows
from tests.real.conftest import ROOT

SCRIPT = """
import json, sys
from pathlib import Path
import numpy as np
import ray
from evolve_ray import config, iterate, rows, train

from evolve_ray.refine import load_template
from evolve_ray.store import Run, Stage

model, pairs, out, rate = sys.argv[1:]

def probed(given):
    # Beside the product's export: every parameter as ZeRO-3 gives it back, written by another route.
    class Probe(train.Worker):
        def export(self, log):
            gathered = {}
            for name, parameter in self.engine.module.named_parameters():
                with self.deepspeed.zero.GatheredParameters([parameter]):
                    gathered[name] = parameter.detach().float().numpy().copy()
            partitioned = sum(not parameter.ds_persist for parameter in self.engine.module.parameters())
            if self.rank == 0:
                np.savez(Path(self.spec.run.root) / "gathered.npz", **gathered)
                (Path(self.spec.run.root) / "partitioned").write_text(str(partitioned))
            super().export(log)

    train.Worker = Probe
    train.worker(given)  # in the rank's own process this is the product's function

train.worker = probed
threshold = "trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
recipe = config.load("jobs/recipes/tiny.toml", [f"training.learning_rate={rate}", threshold])
run = Run(Path(out))
run.root.mkdir()
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": "."}})
spec = train.TrainSpec(
    pairs=pairs, model=model, dtype="float32", template=load_template("tiny", "conversation"), training=recipe.training,
    trainer=recipe.trainer, seed=0, iteration=1, run=run, reference=Stage(run.root / "reference", "reference", "r" * 64),
    checkpoint=Stage(run.root / "checkpoint", "checkpoint", "c" * 64))
try:
    train.fit(spec, run.root / ".ray-train")
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
else:
    print(json.dumps({"kind": None}))
"""


def train_small(small, place, tmp_path, rate: str) -> dict:
    given = small.run / "iteration-01" / "pairs" / "pairs.parquet"
    pairs = tmp_path / "pairs.parquet"
    rows.write_table(pairs, rows.read_table(given)[:33], rows.PAIR)  # a ragged last batch
    model = small.run / "iteration-00" / "checkpoint"
    command = [sys.executable, "-c", SCRIPT, str(model), str(pairs), str(tmp_path / "out"), rate]
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400)
    assert result.stdout.strip(), result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


def test_the_exported_weights_are_bit_equal_to_what_zero_3_holds(small, place, tmp_path):
    import numpy as np
    from transformers import AutoModelForCausalLM

    assert train_small(small, place, tmp_path, "1e-4")["kind"] is None
    held = np.load(tmp_path / "out" / "gathered.npz")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "out" / "checkpoint", dtype="float32").state_dict()
    assert int((tmp_path / "out" / "partitioned").read_text()) > 0, "no parameter was partitioned: this was not ZeRO-3"
    assert held.files
    for name in held.files:
        assert np.array_equal(held[name], loaded[name].numpy()), name


def test_a_gradient_step_that_blows_up_stops_with_the_numbers_before_anything_is_committed(small, place, tmp_path):
    outcome = train_small(small, place, tmp_path, "1e30")
    assert outcome["kind"] == "NumericsError"
    assert "step" in outcome["message"] or "parameter" in outcome["message"]
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.parametrize("folder", ["pairs", "reference"])
def test_the_training_log_counts_every_pair_of_its_iteration(small, folder):
    log = rows.read_jsonl(small.run / "iteration-01" / "checkpoint" / "training_log.jsonl")
    table = rows.read_table(small.run / "iteration-01" / folder / f"{folder}.parquet")
    assert sum(row["num_pairs"] for row in log) == 2 * len(table)  # two epochs
