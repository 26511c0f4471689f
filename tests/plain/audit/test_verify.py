"""A run is checked file by file and row by row; what is damaged is named, with the command that computes it again."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evolve_ray.audit import verify
from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.refine.template import load_template
from evolve_ray.stages.pairs import select
from evolve_ray.store import rows, shards
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import MANIFEST, commit
from evolve_ray.store.run import Run, Stage
from tests.plain.processes import ROOT

COMMAND = "python jobs/iterate.py recipe.toml --run 'a run'"
SCORES = {"p0": (0.0, 1.0), "p1": (1.0, None), "p2": (0.5, 0.25)}  # None: no finite score


@pytest.fixture
def run(recipe, tmp_path) -> Path:
    """A run that ended after one iteration: three prompts (a fourth is a duplicate) in two shards, two drafts each."""
    config = load(recipe("[probe]\nprompts = 0\n[engine]\nshard_prompts = 2\n"), ["template.name=tiny", "iterations=1"])
    folder = Run(tmp_path / "a run")
    here = folder.iteration(1)
    prompts = [
        {"prompt_id": name, "prompt": f"q {name}", "answer": None, "split": "train", "file": "f", "line": n, "num_tokens": 1}
        for n, name in enumerate(SCORES)
    ]
    stage = Stage(here / "prompts", "prompts", "prompts key")
    rows.write_table(stage.start() / "prompts.parquet", prompts, rows.PROMPT)
    made = [stage.commit([rows.reject(prompts[0], "prompts", "duplicate of line 0")], num_in=4, num_rows=3)]
    key = {"generations": "drafts key", "scores": "scores key"}
    for name, inputs in (("generations", {"prompts": made[0].identity}), ("scores", {"generations": key["generations"]})):
        stage = Stage(here / name, name, key[name], inputs)
        stage.resume()
        for shard in range(2):
            table, lost = [], []
            for prompt in prompts[2 * shard : 2 * shard + 2]:
                for number, score in enumerate(SCORES[prompt["prompt_id"]], 1):
                    draft = draft_row(prompt["prompt_id"], number)
                    ids = {"draft_id": draft["draft_id"], "prompt_id": prompt["prompt_id"]}
                    if name == "generations":
                        table.append(draft)
                    elif score is None:
                        lost.append(rows.reject({"id": draft["draft_id"]}, "scores", "scorer gave nan"))
                    else:
                        table.append({**ids, "score": score, "correct": None})
            aside = stage.work / f".{shard}"
            aside.mkdir()
            rows.write_table(aside / "rows.parquet", table, rows.GENERATION if name == "generations" else rows.SCORE)
            rows.write_jsonl(aside / "rejected.jsonl", lost)
            num_in = len({row["prompt_id"] for row in table}) if name == "generations" else len(table) + len(lost)
            commit(aside, stage.work / shards.shard_name(shard), stage="shard", key="k", num_in=num_in, num_rows=len(table))
        made.append(shards.finish(stage, 2, 3 if name == "generations" else 6))
    context = Context(config, folder, print, print, False, load_template("tiny", "conversation"), Policy(Path(), ""))
    context.prompts[1] = made[0]
    pairs = select(context, 1, *made[1:])
    stage = Stage(here / "reference", "reference", "reference key", {"pairs": pairs.identity})
    table = [dict.fromkeys(rows.REFERENCE.names) | {"pair_id": row["pair_id"]} for row in read(here / "pairs/pairs.parquet")]
    rows.write_table(stage.start() / "reference.parquet", table, rows.REFERENCE)
    stage.commit(num_in=2, num_rows=2)
    for name, file in (("checkpoint", "model.safetensors"), ("drift", "drift.jsonl"), ("decision", "decision.json")):
        stage = Stage(here / name, name, f"{name} key", {"pairs": pairs.identity})
        stage.start().joinpath(file).write_text('{"action": "stop"}')
        stage.commit()
    folder.root.joinpath("config.json").write_text(json.dumps(resolved(config)))
    folder.event("driver_start", command=COMMAND)
    with open(folder.root / "events.jsonl", "ab") as file:
        file.write(b'{"event": "driver_start", "comm')  # killed while it wrote
    return folder.root


@pytest.fixture
def evaluated(run, recipe) -> Path:
    """The same run with what held-out prompts and a probe add: every kind of stage that an iteration has."""
    more = ["template.name=tiny", "iterations=1", "evaluation.splits.held=held.jsonl", "probe.prompts=2"]
    config = load(recipe("[engine]\nshard_prompts = 2\n"), more)
    (run / "config.json").write_text(json.dumps(resolved(config)))
    first, here = run / "iteration-00", run / "iteration-01"
    stage = Stage(first / "held_out", "prompts", "held key")
    shutil.copy(here / "prompts/prompts.parquet", stage.start())
    held_out = stage.commit(num_in=3, num_rows=3).identity
    for folder, name in ((first, "base_evaluation"), (here, "evaluation")):
        stage = Stage(folder / name, "evaluation", f"{name} key", {"prompts": held_out})
        for part in ("generations", "scores"):
            shutil.copytree(here / part, stage.work / part)
        rows.write_jsonl(stage.work / "summary.jsonl", [{"held": {}}])
        stage.commit(num_in=3, num_rows=6)
    stage = Stage(here / "probe", "probe", "probe key")
    rows.write_jsonl(stage.start() / "probe.jsonl", [{"kl_iteration": 0.1}])
    stage.commit(num_in=2, num_rows=2)
    return run


def draft_row(prompt_id, number):
    return {
        "draft_id": f"{prompt_id}-{number}", "prompt_id": prompt_id, "split": "train", "sample": 0, "round": number,
        "kind": "answer", "parent_id": None, "text": f"text {number}", "finish_reason": "stop", "num_prompt_tokens": 1,
        "num_tokens": 1, "seed": 1, "model": "m",
    }  # fmt: skip


def read(path):
    return pq.read_table(path).to_pylist()


def signed_again(folder, **stats):
    """Writes the manifest of an edited folder anew, as somebody would who wants the edit to pass."""
    body = json.loads((folder / MANIFEST).read_text())
    body["stats"] |= stats
    for name in body["files"]:
        body["files"][name] = {"bytes": (folder / name).stat().st_size, "sha256": sha256_file(folder / name)}
    (folder / MANIFEST).write_text(json.dumps(body))


def edit(path, schema, change, *manifests, **stats):
    """Rewrites a table with `change(rows)` and signs it again up to its stage."""
    rows.write_table(path, change(read(path)), schema)
    for folder in manifests:
        signed_again(folder, **stats)


def faults(run):
    return {place: "\n".join(found) for place, found in verify.verify(run).faults.items()}


def test_sound_run_ends_with_exit_code_zero_and_names_every_stage(run, capsys):
    assert verify.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "iteration-01/pairs: ok (in 6, rows 2, rejected 2)" in said
    assert said.strip().endswith("no errors; the run is complete")


def test_looking_changes_nothing(run):
    before = {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")}
    verify.main([str(run)])
    assert {path: (path.stat().st_mtime_ns, path.stat().st_size) for path in run.rglob("*")} == before


def test_run_that_is_not_finished_is_sound_and_told_how_to_go_on(run, capsys):
    for name in ("reference", "checkpoint", "drift", "decision"):
        shutil.rmtree(run / "iteration-01" / name)
    assert verify.main([str(run)]) == 0
    said = capsys.readouterr().out
    assert "iteration-01: reference, checkpoint, drift, decision" in said
    assert f"no errors; continue with: {COMMAND}" in said


def flip(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def truncate(path):
    os.truncate(path, path.stat().st_size - 1)


FILES = [
    "prompts/prompts.parquet", "prompts/rejected.jsonl", "generations/shard-00001/rows.parquet",
    "generations/shard-00000/MANIFEST.json", "generations/rejected.jsonl", "scores/shard-00000/rejected.jsonl",
    "pairs/pairs.parquet", "pairs/MANIFEST.json", "reference/reference.parquet", "checkpoint/model.safetensors",
    "probe/probe.jsonl", "evaluation/summary.jsonl", "evaluation/generations/shard-00001/rows.parquet",
    "evaluation/scores/MANIFEST.json", "drift/drift.jsonl", "decision/decision.json",
]  # fmt: skip
FILES_0 = ["held_out/prompts.parquet", "held_out/MANIFEST.json", "base_evaluation/summary.jsonl"]
EVERY = [("iteration-01", name) for name in FILES] + [("iteration-00", name) for name in FILES_0]


def test_every_kind_of_stage_is_damaged_in_turn(evaluated):
    stages = {place.rpartition("/")[2] for place in verify.verify(evaluated).committed}
    assert {name.split("/")[0] for _, name in EVERY} == stages
    assert verify.verify(evaluated).missing == {}


@pytest.mark.parametrize("damage", [flip, truncate, Path.unlink], ids=["flip", "truncate", "delete"])
@pytest.mark.parametrize(("iteration", "name"), EVERY, ids=[name for _, name in EVERY])
def test_damage_of_any_file_is_named_with_the_command_that_repairs_it(evaluated, capsys, iteration, name, damage):
    path = evaluated / iteration / name
    if path.stat().st_size == 0:
        path.write_text("{}\n") if damage is flip else path.unlink()
    else:
        damage(path)
    assert verify.main([str(evaluated)]) == 4
    said = capsys.readouterr()
    stage = evaluated / iteration / name.split("/")[0]
    if path.name != MANIFEST or name.count("/") > 1:
        assert f"{path}: sha256 is" in said.out
    assert said.err.count("\n") == 1
    assert said.err.rstrip().endswith(f"repair with: rm -r '{stage}' && {COMMAND}")
    assert "Traceback" not in said.out + said.err


def test_the_repair_leads_back_to_a_sound_run(run, capsys):
    flip(run / "iteration-01/decision/decision.json")
    assert verify.main([str(run)]) == 4
    repair = capsys.readouterr().err.rpartition("repair with: ")[2].rpartition(" && ")[0]
    subprocess.run(repair, shell=True, check=True)
    assert verify.main([str(run)]) == 0


def test_stage_that_is_gone_though_others_were_made_from_it_is_named(run, capsys):
    shutil.rmtree(run / "iteration-01" / "generations")
    assert verify.main([str(run)]) == 4
    said = capsys.readouterr()
    assert "generations: is missing, but the later stage decision exists" in said.err
    assert said.err.rstrip().endswith(f"repair with: {COMMAND}")


def test_file_that_nobody_committed_is_named(run):
    (run / "iteration-01/checkpoint/extra.safetensors").write_text("x")
    assert "extra.safetensors: is not in the manifest" in faults(run)["iteration-01/checkpoint"]


def test_folder_without_manifest_under_the_name_of_a_stage_is_named(run):
    (run / "iteration-01/scores" / MANIFEST).unlink()
    assert "has no MANIFEST.json" in faults(run)["iteration-01/scores"]


@pytest.mark.parametrize("name", ["pairs", "generations/shard-00000"])
def test_hand_edited_row_is_found_by_its_hash(run, name):
    path = run / "iteration-01" / name / ("pairs.parquet" if name == "pairs" else "rows.parquet")
    column, schema = ("chosen", rows.PAIR) if name == "pairs" else ("text", rows.GENERATION)
    edit(path, schema, lambda table: [{**row, column: "better"} for row in table])
    assert f"{path}: sha256 is" in faults(run)[f"iteration-01/{name.split('/')[0]}"]


def test_hand_edited_row_is_found_even_with_a_manifest_written_anew(run):
    here = run / "iteration-01/pairs"
    edit(here / "pairs.parquet", rows.PAIR, lambda table: [{**row, "chosen": "better"} for row in table], here)
    assert "was computed from a version of pairs" in faults(run)["iteration-01/reference"]
    assert "the chosen response of pair" in faults(run)["iteration-01/pairs"]


SHARD = "generations/shard-00000"


@pytest.mark.parametrize(
    ("name", "schema", "change", "message"),
    [
        (SHARD, rows.GENERATION, lambda t: t[:-2], "1 prompts are neither in the table nor rejected: p1"),
        (SHARD, rows.GENERATION, lambda t: [*t, t[0]], "1 drafts occur twice: p0-1"),
        (SHARD, rows.GENERATION, lambda t: t[::-1], "not in the order"),
        (SHARD, rows.GENERATION, lambda t: [*t, {**t[0], "prompt_id": "x", "draft_id": "y"}], "are not in its input: x"),
        ("scores/shard-00001", rows.SCORE, lambda t: t[:-1], "1 drafts are neither in the table nor rejected: p2-2"),
        ("scores/shard-00001", rows.SCORE, lambda t: [*t, t[0]], "1 scores occur twice: p2-1"),
        ("pairs", rows.PAIR, lambda t: [*t, t[0]], "1 pairs occur twice"),
        ("pairs", rows.PAIR, lambda t: t[:-1], "6 rows were read, but 2 are used and 2 rejected"),
        ("pairs", rows.PAIR, lambda t: [{**row, "chosen_id": "gone"} for row in t], "is not the draft gone"),
        ("pairs", rows.PAIR, lambda t: [{**row, "chosen_score": 9.0} for row in t], "score of pair"),
        ("pairs", rows.PAIR, lambda t: t[::-1], "not in the order of the prompts"),
        ("prompts", rows.PROMPT, lambda t: t[:-1], "4 rows were read, but 2 are in the table and 1 rejected"),
        ("reference", rows.REFERENCE, lambda t: t[::-1], "not the pairs of its input"),
    ],
)  # fmt: skip
def test_rows_that_are_lost_doubled_or_moved_are_found_under_right_hashes(run, name, schema, change, message):
    """Who breaks the conservation law may have written the manifests too."""
    here, stage = run / "iteration-01" / name, run / "iteration-01" / name.split("/")[0]
    table = f"{name}.parquet" if here == stage else "rows.parquet"
    edit(here / table, schema, change, *dict.fromkeys((here, stage)))
    assert message in faults(run)[f"iteration-01/{stage.name}"]


def test_counts_of_a_manifest_are_held_against_the_files(run):
    signed_again(run / "iteration-01/scores", num_rows=7)
    assert "num_rows is 7 in its manifest, but 5 in its files" in faults(run)["iteration-01/scores"]


def test_shards_of_a_stage_in_the_making_are_checked(run):
    here = run / "iteration-01"
    for name in ("pairs", "reference", "checkpoint", "drift", "decision"):
        shutil.rmtree(here / name)
    os.rename(here / "scores", here / ".scores-abc")
    (here / ".scores-abc" / MANIFEST).unlink()
    assert faults(run) == {}
    flip(here / ".scores-abc/shard-00001/rows.parquet")
    assert list(faults(run)) == ["iteration-01/.scores-abc/shard-00001"]


def test_what_was_put_aside_is_left_alone(run):
    old = run / "iteration-01/.superseded-pairs-0"
    shutil.copytree(run / "iteration-01/pairs", old)
    flip(old / "pairs.parquet")
    assert faults(run) == {}


def test_model_card_is_in_no_manifest_and_no_fault(run):
    (run / "iteration-01/checkpoint/README.md").write_text("# A model")
    assert faults(run) == {}


def test_folder_that_is_no_run_is_refused(tmp_path, run):
    with pytest.raises(UserError, match="is not a run directory"):
        verify.verify(tmp_path / "nowhere")


def test_the_command_itself(run):
    flip(run / "iteration-01/pairs/pairs.parquet")
    result = subprocess.run([sys.executable, ROOT / "jobs/verify.py", run], capture_output=True, text=True)
    assert (result.returncode, result.stderr.count("\n")) == (4, 1)
    assert result.stderr.startswith("error: ")
