"""A pair is followed back to its prompt, drafts, scores, model and reference through the committed tables of a run."""

import json
import shutil
from pathlib import Path

import pytest

from evolve_ray.audit import explain
from evolve_ray.config.load import load
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.models import folders
from evolve_ray.refine.template import load_template
from evolve_ray.stages.pairs import select
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import commit, read_manifest
from evolve_ray.store.run import Run, Stage

# prompt -> (text, score) of each round; None is a draft that got no finite score
CHAINS = {
    "p0": [("first", 0.25), ("second", 0.5), ("third", 1.0)],
    "p1": [("one", 1.0), ("two", None), ("three", 0.0)],
    "p2": [("same", 0.5), ("same", 0.5), ("same", 0.5)],
}


@pytest.fixture
def run(recipe, tmp_path):
    """A run of one iteration whose pairs were selected, referenced and trained on; two shards of two prompts and one."""
    config = load(recipe(), ["engine.shard_prompts=2", "template.name=tiny", "verifier.name=exact", "prompts.answer_column=a"])
    folder = Run(tmp_path / "runs" / "mine")
    here = folder.iteration(1)
    start = Stage(folder.iteration(0) / "checkpoint", "checkpoint", "start")
    start.start().joinpath("model.safetensors").write_text("weights")
    model = folders.content_hash(start.commit().folder)
    prompts = [
        {"prompt_id": name, "prompt": f"question {name}\nin two lines", "answer": "third", "split": "train", "file": "data.jsonl",
         "line": 10 + n, "num_tokens": 1}
        for n, name in enumerate(CHAINS)
    ]  # fmt: skip
    stage = Stage(here / "prompts", "prompts", "prompts")
    rows.write_table(stage.start() / "prompts.parquet", prompts, rows.PROMPT)
    made = {"prompts": stage.commit(num_in=3, num_rows=3)}
    for name, schema in (("generations", rows.GENERATION), ("scores", rows.SCORE)):
        stage = Stage(here / name, name, name)
        stage.resume()
        for shard in range(2):
            table, lost = [], []
            for prompt in prompts[2 * shard : 2 * shard + 2]:
                for number, (text, score) in enumerate(CHAINS[prompt["prompt_id"]], 1):
                    draft = draft_row(prompt["prompt_id"], number, text, model)
                    if name == "generations":
                        table.append(draft)
                    elif score is None:
                        lost.append(rows.reject({**prompt, "prompt_id": draft["draft_id"]}, "scores", "scorer gave nan"))
                    else:
                        ids = {"draft_id": draft["draft_id"], "prompt_id": prompt["prompt_id"]}
                        table.append({**ids, "score": score, "correct": float(text == "third")})
            aside = stage.work / f".{shard}"
            aside.mkdir()
            rows.write_table(aside / "rows.parquet", table, schema)
            rows.write_jsonl(aside / "rejected.jsonl", lost)
            commit(aside, stage.work / shards.shard_name(shard), stage="shard", key="k", num_in=1, num_rows=len(table))
        made[name] = shards.finish(stage, 2, 2)
    context = Context(
        config, folder, lambda _: None, lambda: None, False, load_template("tiny", "conversation"), Policy(Path(), "")
    )
    context.prompts[1], *tables = made.values()
    pairs = select(context, 1, *tables)
    stage = Stage(here / "reference", "reference", "reference", {"pairs": pairs.identity})
    empty = dict.fromkeys(rows.REFERENCE.names)
    table = [
        {**empty, "pair_id": row["pair_id"], "chosen": -1.5, "rejected": -2.25}
        for row in rows.read_table(pairs.path("pairs.parquet"))
    ]
    rows.write_table(stage.start() / "reference.parquet", table, rows.REFERENCE)
    stage.commit(policy="iteration", model=model)
    Stage(here / "checkpoint", "checkpoint", "trained", {"pairs": pairs.identity}).start().joinpath(
        "model.safetensors"
    ).write_text("x")
    Stage(here / "checkpoint", "checkpoint", "trained", {"pairs": pairs.identity}).commit()
    folder.root.joinpath("config.json").write_text(json.dumps(resolved(config)))
    return folder.root


def draft_row(prompt_id, number, text, model):
    return {
        "draft_id": f"{prompt_id}-{number}", "prompt_id": prompt_id, "split": "train", "sample": 0, "round": number,
        "kind": "answer", "parent_id": f"{prompt_id}-{number - 1}" if number > 1 else None, "text": text,
        "finish_reason": "length" if text == "second" else "stop", "num_prompt_tokens": 4, "num_tokens": 3, "seed": 100 + number,
        "model": model,
    }  # fmt: skip


def pairs_of(run):
    return {row["prompt_id"]: row for row in rows.read_table(run / "iteration-01" / "pairs" / "pairs.parquet")}


def test_pair_is_followed_to_prompt_drafts_model_reference_and_checkpoint(run):
    pair = pairs_of(run)["p0"]
    found = explain.explain(run, pair["pair_id"])
    assert found["pair"] == pair
    assert (found["iteration"], found["table"]) == (1, "pairs")
    assert (found["prompt"]["file"], found["prompt"]["line"], found["prompt"]["answer"]) == ("data.jsonl", 10, "third")
    told = [(d["round"], d["text"], d["score"], d["correct"], d["seed"], d["finish_reason"], d["fate"]) for d in found["drafts"]]
    assert told == [
        (1, "first", 0.25, 0.0, 101, "stop", "rejected"),
        (2, "second", 0.5, 0.0, 102, "length", "not used: cut by length: cannot be chosen"),
        (3, "third", 1.0, 1.0, 103, "stop", "chosen"),
    ]
    start = run / "iteration-00" / "checkpoint"
    assert found["models"] == {folders.content_hash(start): str(start)}
    assert (found["reference"]["policy"], found["reference"]["model"]) == ("iteration", folders.content_hash(start))
    assert (found["reference"]["logps"]["chosen"], found["reference"]["logps"]["rejected"]) == (-1.5, -2.25)
    assert found["template"]["hash"] == load_template("tiny", "conversation").hash
    assert list(found["manifests"]) == ["pairs", "prompts", "generations", "scores", "reference", "checkpoint"]


def test_pair_that_was_mixed_into_trainings_has_their_reference_and_is_said_to_be_trained_again(run):
    pairs = read_manifest(run / "iteration-01" / "pairs")
    pair = pairs_of(run)["p0"]
    mixed = []
    for number in (1, 2):
        stage = Stage(run / f"iteration-0{number}" / "mixed", "mixed", f"mixed {number}", {"pairs": pairs.identity})
        origin = {"pair_id": pair["pair_id"], "origin": "replayed", "iteration": 1, "table": "pairs"}
        rows.write_table(stage.start() / "origins.parquet", [origin], rows.ORIGIN)
        mixed.append(stage.commit(num_rows=1))
    stage = Stage(run / "iteration-01" / "reference", "reference", "again", {"pairs": mixed[0].identity})
    shutil.rmtree(stage.final)
    table = [{**dict.fromkeys(rows.REFERENCE.names), "pair_id": pair["pair_id"], "chosen": -3.0}]
    rows.write_table(stage.start() / "reference.parquet", table, rows.REFERENCE)
    stage.commit(policy="iteration", model="m")
    found = explain.explain(run, pair["pair_id"])
    assert found["reference"]["logps"]["chosen"] == -3.0
    assert "checkpoint" not in found["manifests"], "it was trained on another table"
    assert found["replayed"] == [2]
    assert "trained again in iteration 2" in explain.text(found).splitlines()


def test_draft_without_a_score_has_the_scorers_reason_or_the_selections(run):
    found = explain.explain(run, pairs_of(run)["p1"]["pair_id"])
    assert [draft["fate"] for draft in found["drafts"]] == [
        "chosen",
        "not used: has no finite score; scorer gave nan",
        "rejected",
    ]
    assert found["drafts"][1]["score"] is None


def test_unique_beginning_of_an_id_is_enough(run):
    one, two = sorted(row["pair_id"] for row in pairs_of(run).values())
    assert one[0] != two[0], "the test needs ids that differ at once"
    assert explain.explain(run, two[:6])["pair"]["pair_id"] == two
    with pytest.raises(UserError, match=f"2 pairs begin with '': {one}, {two}; give more characters of the id"):
        explain.explain(run, "")


def test_unknown_pair_is_told_the_nearest_ids(run):
    near = pairs_of(run)["p1"]["pair_id"]
    wrong = near[:-1] + ("0" if near[-1] != "0" else "1")
    with pytest.raises(UserError, match=rf"has no pair '{wrong}'; the closest of its 2 ids are {near}, "):
        explain.explain(run, wrong)


def test_unknown_run_is_told_what_stands_beside_it(run):
    with pytest.raises(
        UserError, match=r"other: is not a run directory \(it has no config\.json\); runs in the same folder: mine"
    ):
        explain.explain(run.with_name("other"), "x")
    (run / "config.json").write_text("{")
    with pytest.raises(IntegrityError, match=r"config\.json: is damaged"):
        explain.explain(run, "x")


def test_run_without_pairs_says_so(run):
    for path in (run / "iteration-01").glob("pairs"):
        path.rename(run / "away")
    with pytest.raises(UserError, match="has no pairs yet"):
        explain.explain(run, "x")


@pytest.mark.parametrize(
    "damaged",
    [
        "pairs/pairs.parquet", "pairs/rejected.jsonl", "prompts/prompts.parquet", "generations/shard-00000/rows.parquet",
        "scores/shard-00000/rows.parquet", "reference/reference.parquet",
    ],
)  # fmt: skip
def test_damaged_file_is_named_with_the_way_out(run, damaged):
    name = pairs_of(run)["p0"]["pair_id"]
    path = run / "iteration-01" / damaged
    path.write_bytes(path.read_bytes()[:-1] + b"~")
    with pytest.raises(IntegrityError, match=rf"{damaged}: is damaged: sha256 is .*; delete .* and submit"):
        explain.explain(run, name)


def test_shard_that_is_not_the_pairs_is_not_read(run):
    path = run / "iteration-01" / "generations" / "shard-00001" / "rows.parquet"
    path.write_bytes(b"damaged")
    assert explain.explain(run, pairs_of(run)["p0"]["pair_id"])["drafts"]


def test_pairs_of_other_tables_than_those_that_are_there_now_are_refused(run):
    name = pairs_of(run)["p0"]["pair_id"]
    manifest = run / "iteration-01" / "scores" / "MANIFEST.json"
    body = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**body, "key": "another"}))
    with pytest.raises(IntegrityError, match=r"was selected from a different version of .*scores"):
        explain.explain(run, name)
    manifest.parent.rename(run / "away")
    with pytest.raises(IntegrityError, match="scores: is missing"):
        explain.explain(run, name)


def test_given_pair_is_followed_to_its_file(run, recipe):
    more = ["activation.path=triples.jsonl", "activation.training.objective=sft", "template.name=tiny"]
    (run / "config.json").write_text(json.dumps(resolved(load(recipe(), more))))
    given = dict.fromkeys(rows.PAIR.names) | {"pair_id": "given", "prompt": "q", "chosen": "a\nb", "rejected": "c"}
    stage = Stage(run / "iteration-00" / "activation_pairs", "pairs", "given")
    rows.write_table(stage.start() / "pairs.parquet", [given], rows.PAIR)
    stage.commit()
    found = explain.explain(run, "given")
    assert (found["source"]["path"], found["source"]["objective"], found["reference"]) == ("triples.jsonl", "sft", None)
    assert "read from triples.jsonl" in explain.text(found)


def test_command_prints_text_or_json_and_ends_with_the_exit_code(run, capsys):
    name = pairs_of(run)["p0"]["pair_id"]
    assert explain.main([str(run), name[:8]]) == 0
    said = capsys.readouterr().out
    for part in (f"pair {name} of iteration 1 (pairs)", "data.jsonl:10", "    in two lines", "round 3: score 1, verifier 1",
                 "draft p0-3: chosen", "chosen -1.5000", "used to train", "verifier exact"):  # fmt: skip
        assert part in said
    assert explain.main([str(run), name, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["pair"]["pair_id"] == name
    assert explain.main([str(run), "zzz"]) == 2
    said = capsys.readouterr()
    assert (said.out, said.err.count("\n")) == ("", 1)
    (run / "config.json").write_text("{")
    assert explain.main([str(run), name]) == 4
