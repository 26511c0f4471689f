"""What ZeRO-3 holds is what the checkpoint says: parameters bit by bit, and numbers that are not finite stop all ranks."""

import json
import os
import subprocess
import sys

import pytest

from evolve_ray.store import rows
from tests.real.conftest import ROOT

SCRIPT = """
import json, os, sys
from pathlib import Path
import numpy as np
import ray
from evolve_ray.config.load import load
from evolve_ray.pools.actors import Pools
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage
from evolve_ray.train import group, logprobs, rank
from evolve_ray.train.spec import TrainSpec

model, reference, pairs, out, *overrides = sys.argv[1:]

def probed(given):
    # Beside the product's export: every parameter as ZeRO-3 gives it back, written by another route.
    class Probe(rank.Rank):
        def export(self, log, train_seconds):
            gathered = {}
            for name, parameter in self.model.module.named_parameters():
                with self.model.gathered([parameter]):
                    gathered[name] = parameter.detach().float().numpy().copy()
            partitioned = sum(not parameter.ds_persist for parameter in self.model.module.parameters())
            if self.collectives.rank == 0:
                np.savez(Path(self.spec.run.root) / "gathered.npz", **gathered)
                (Path(self.spec.run.root) / "partitioned").write_text(str(partitioned))
            super().export(log, train_seconds)

    rank.Rank = Probe
    logprobs.CHUNK_TOKENS = 50  # so that tiny pairs need several chunks
    product_worker(given)  # in the rank's own process this is the product's function

product_worker, group.worker = group.worker, probed
threshold = "trainer.deepspeed.zero_optimization.stage3_param_persistence_threshold=0"
recipe = load("jobs/recipes/tiny.toml", [*overrides, threshold])
run = Run(Path(out))
run.root.mkdir()
reference_stage = Stage(run.root / "reference", "reference", "r" * 64)
if poisoned := os.environ.get("TEST_POISONED_PAIR"):
    table = [dict.fromkeys(rows.REFERENCE.names, -1.0) | {"pair_id": row["pair_id"]} for row in rows.read_table(Path(pairs))]
    for row in table:
        if row["pair_id"] == poisoned:
            row[rows.REFERENCE.names[1]] = float("nan")
    rows.write_table(reference_stage.start() / "reference.parquet", table, rows.REFERENCE)
    reference_stage.commit(num_in=len(table), num_rows=len(table))
ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, runtime_env={"env_vars": {"PYTHONPATH": "."}})
spec = TrainSpec(
    pairs=pairs, model=model, reference_model=reference, reference_hash="h", dtype="float32",
    template=load_template("tiny", "conversation"), training=recipe.training,
    trainer=recipe.trainer, seed=0, iteration=1, run=run, reference=reference_stage,
    checkpoint=Stage(run.root / "checkpoint", "checkpoint", "c" * 64))
try:
    group.fit(spec, run.root / ".ray-train", Pools())
except Exception as error:
    print(json.dumps({"kind": type(error).__name__, "message": str(error)}))
else:
    print(json.dumps({"kind": None}))
"""


def train_small(small, tmp_path, *overrides: str, out: str = "out", reference: str = "", poisoned: str = "") -> dict:
    given = small.run / "iteration-01" / "pairs" / "pairs.parquet"
    model = small.run / "iteration-00" / "checkpoint"
    return train_pairs(model, rows.read_table(given)[:17], tmp_path, *overrides, out=out, reference=reference, poisoned=poisoned)


def train_pairs(
    model, table: list[dict], tmp_path, *overrides: str, out: str = "out", reference: str = "", poisoned: str = ""
) -> dict:
    """Two ranks on 17 pairs: a ragged last batch. The reference of a `poisoned` pair is committed beforehand, with a NaN."""
    pairs = tmp_path / "pairs.parquet"
    rows.write_table(pairs, table, rows.PAIR, rows.PAIR_DETAILS)
    command = [sys.executable, "-c", SCRIPT, str(model), reference or str(model), str(pairs), str(tmp_path / out), *overrides]
    environment = {**os.environ, "CC": "/bin/false", "CXX": "/bin/false"}  # DeepSpeed compiles nothing
    environment["TEST_POISONED_PAIR"] = poisoned
    result = subprocess.run(command, capture_output=True, text=True, cwd=ROOT, timeout=400, env=environment)
    assert result.stdout.strip(), result.stderr[-3000:]
    return json.loads(result.stdout.strip().splitlines()[-1])


@pytest.fixture(scope="module")
def trained(small, tmp_path_factory):
    """One epoch in batches of 16 on two workers, a forward of eight pairs each, with a ragged end."""
    folder = tmp_path_factory.mktemp("trained")
    assert train_small(small, folder, *SIXTEEN, "training.micro_pairs=8")["kind"] is None
    return folder / "out"


SIXTEEN = ("training.batch_pairs=16", "training.epochs=1")


def test_the_exported_weights_are_bit_equal_to_what_zero_3_holds(trained):
    import numpy as np
    from transformers import AutoModelForCausalLM

    held = np.load(trained / "gathered.npz")
    loaded = AutoModelForCausalLM.from_pretrained(trained / "checkpoint", dtype="float32").state_dict()
    assert int((trained / "partitioned").read_text()) > 0, "no parameter was partitioned: this was not ZeRO-3"
    assert held.files
    for name in held.files:
        assert np.array_equal(held[name], loaded[name].numpy()), name


@pytest.mark.long
def test_a_gradient_step_that_blows_up_stops_with_the_numbers_before_anything_is_committed(small, tmp_path):
    outcome = train_small(small, tmp_path, "training.learning_rate=1e30")
    assert outcome["kind"] == "NumericsError"
    assert "step" in outcome["message"] or "parameter" in outcome["message"]
    assert not (tmp_path / "out" / "checkpoint").exists()


def test_a_reference_that_is_not_finite_for_one_pair_stops_both_ranks_with_its_step_its_rank_and_that_pair_alone(small, tmp_path):
    """The reference is committed with the NaN. The pair is no first one of its batch: those also fill up ragged shares."""
    from evolve_ray.config.load import load
    from evolve_ray.train.schedule import batches

    recipe = load(ROOT / "jobs/recipes/tiny.toml", list(SIXTEEN))
    order = batches(17, recipe.training, seed=0, iteration=1)  # as SCRIPT trains
    bad, rank = order[0][5], 5 % 2
    pairs = rows.read_table(small.run / "iteration-01" / "pairs" / "pairs.parquet")[:17]
    pair = pairs[bad]["pair_id"]
    outcome = train_small(small, tmp_path, *SIXTEEN, poisoned=pair)
    assert outcome["kind"] == "NumericsError"
    expected = f"training step 0: the loss is not finite on rank {rank}, pairs ['{pair}']; no weight was changed"
    assert outcome["message"].startswith(expected), outcome["message"]
    assert (tmp_path / "out" / "reference" / "MANIFEST.json").exists()
    assert not (tmp_path / "out" / "checkpoint").exists()


@pytest.mark.long
def test_batch_1_times_accumulation_8_is_batch_8_times_accumulation_1(small, trained, tmp_path):
    import numpy as np

    assert train_small(small, tmp_path, *SIXTEEN, "training.micro_pairs=1")["kind"] is None
    folders = (tmp_path / "out", trained)
    losses = [[row["loss"] for row in rows.read_jsonl(folder / "checkpoint" / "training_log.jsonl")] for folder in folders]
    assert losses[0] == pytest.approx(losses[1], rel=1e-5)
    assert len(losses[0]) == 2
    one, eight = (np.load(folder / "gathered.npz") for folder in folders)
    for name in one.files:  # AdamW's first steps have the size of the rate, whatever the gradient's
        assert np.abs(one[name] - eight[name]).max() < 2e-5, name


def uneven_pairs() -> list[dict]:
    """17 pairs whose forwards differ from rank to rank: many lengths, three pairs a prompt, empty and equal answers."""
    table = []
    for number in range(17):
        prompt, answers = f"sort:{'dcba' * (number // 3 % 4)}x{number // 3}", ("ab" * (number * 7 % 23), "ba" * (number * 5 % 11))
        made = dict.fromkeys(rows.PAIR.names) | {"pair_id": f"p{number}", "prompt_id": prompt, "prompt": prompt}
        made |= {
            "chosen": answers[0],
            "rejected": answers[number % 5 > 0],
            "chosen_finished": True,
            "rejected_finished": number % 2 == 0,
        }
        table.append(made)
    return table


@pytest.mark.long
def test_trees_on_two_ranks_have_the_losses_and_the_weights_of_separate_forwards(tiny_model, tmp_path):
    """Few tokens a forward and a chunk: the ranks differ in forwards and in chunks, and must wait for each other."""
    import numpy as np

    both = (*SIXTEEN, "training.nll=0.1", "training.micro_pairs=4")
    kinds = {"tree": ("trainer.forward=tree", "trainer.max_tokens=300"), "separate": ("trainer.forward=separate",)}
    logs, weights, references = {}, {}, {}
    for kind, own in kinds.items():
        assert train_pairs(tiny_model, uneven_pairs(), tmp_path, *both, *own, out=kind)["kind"] is None
        logs[kind] = rows.read_jsonl(tmp_path / kind / "checkpoint" / "training_log.jsonl")
        weights[kind] = np.load(tmp_path / kind / "gathered.npz")
        references[kind] = rows.read_table(tmp_path / kind / "reference" / "reference.parquet")
        assert int((tmp_path / kind / "partitioned").read_text()) > 0
    assert len(logs["tree"]) == 2
    for tree, separate in zip(logs["tree"], logs["separate"], strict=True):
        assert tree.keys() == separate.keys()
        assert tree["loss"] == pytest.approx(separate["loss"], rel=1e-5)
        assert tree["gradient_norm"] == pytest.approx(separate["gradient_norm"], rel=1e-4)
    for tree, separate in zip(references["tree"], references["separate"], strict=True):
        assert [tree[name] for name in rows.REFERENCE.names[1:]] == pytest.approx(
            [separate[name] for name in rows.REFERENCE.names[1:]], rel=1e-5, abs=1e-5
        )
    for name in weights["tree"].files:
        assert np.abs(weights["tree"][name] - weights["separate"][name]).max() < 2e-5, name


@pytest.mark.long
def test_another_reference_model_is_computed_through_zero_3_and_recorded(small, place, tmp_path):
    """`training.reference = "initial"`: the reference is another model than the one that is trained."""
    import torch
    from transformers import AutoModelForCausalLM

    from evolve_ray.models.chat import Chat
    from evolve_ray.refine.template import load_template
    from evolve_ray.train.logprobs import pair_sequences, sequence_logps

    base = next(place.glob("toy-world-*")) / "base"
    overrides = ("training.reference=initial", "training.epochs=1")
    assert train_small(small, tmp_path, *overrides, reference=str(base))["kind"] is None
    manifest = json.loads((tmp_path / "out" / "reference" / "MANIFEST.json").read_text())
    assert (manifest["stats"]["policy"], manifest["stats"]["model"]) == ("initial", "h")
    stored = rows.read_table(tmp_path / "out" / "reference" / "reference.parquet")
    names, chat = rows.REFERENCE.names[1:], Chat(base)
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    for pair, row in zip(rows.read_table(tmp_path / "pairs.parquet"), stored, strict=True):
        sequences = pair_sequences(chat, load_template("tiny", "conversation"), pair, tuple(names))
        with torch.no_grad():
            expected = sequence_logps(model, [sequences[name] for name in names], chat.pad_id, torch.device("cpu"))
        assert [row[name] for name in names] == pytest.approx(expected.tolist(), rel=1e-4)
    first = rows.read_jsonl(tmp_path / "out" / "checkpoint" / "training_log.jsonl")[0]
    assert abs(first["chosen_shift"]) > 0.1, "the reference is the trained model itself: the test proves nothing"


@pytest.mark.parametrize("folder", ["pairs", "reference"])
def test_the_training_log_counts_every_pair_of_its_iteration(small, folder):
    log = rows.read_jsonl(small.run / "iteration-01" / "checkpoint" / "training_log.jsonl")
    table = rows.read_table(small.run / "iteration-01" / folder / f"{folder}.parquet")
    assert sum(row["num_pairs"] for row in log) == 2 * len(table)  # two epochs


@pytest.mark.long
def test_adapters_are_trained_on_two_ranks_and_leave_a_plain_model(tiny_model, tmp_path):
    """Trees, checkpointing, an optimiser in the CPU's memory and LoRA together: they must not know of each other."""
    import numpy as np
    from transformers import AutoModelForCausalLM

    offload = "trainer.deepspeed.zero_optimization.offload_optimizer.device=cpu"
    together = ("trainer.forward=tree", "trainer.max_tokens=300", "trainer.gradient_checkpointing=true", offload)
    lora = ("trainer.lora_rank=4", "training.learning_rate=1e-3", "training.epochs=4")
    assert train_pairs(tiny_model, uneven_pairs(), tmp_path, *SIXTEEN, *together, *lora)["kind"] is None
    log = rows.read_jsonl(tmp_path / "out" / "checkpoint" / "training_log.jsonl")
    assert log[0]["loss_dpo"] == pytest.approx(np.log(2), abs=1e-6), "an adapter begins as nothing"
    assert log[-2]["loss_dpo"] < 0.65  # the last steps of an epoch are single pairs
    folders = (tiny_model, tmp_path / "out" / "checkpoint")
    before, after = (AutoModelForCausalLM.from_pretrained(folder, dtype="float32").state_dict() for folder in folders)
    assert before.keys() == after.keys()
    moved = {name for name in before if not np.array_equal(before[name].numpy(), after[name].numpy())}
    assert moved == {name for name in before if name.endswith("_proj.weight")}
    for name in moved:
        change = np.linalg.svd((after[name] - before[name]).numpy(), compute_uv=False)
        assert change[4] < 1e-4 * change[0], f"{name} changed by more than rank 4"
