"""A whole comparison in one process, with a fake engine: what is committed, what is reused, and that the tables bear it out."""

import json
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from evolve_ray.compare import driver
from evolve_ray.compare.models import model_shape
from evolve_ray.errors import UserError
from evolve_ray.models import folders as models
from evolve_ray.pools.actors import Host, Pools
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from tests.tensors import zoo

ANSWERS = ["aab", "bba", "aaa", "bbb", "aba"]


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Three model folders that differ in their weights, the last one in its shape too; and prompts with and without drafts."""
    root = tmp_path_factory.mktemp("compare")
    for number, name in enumerate(("one", "two", "wide")):
        zoo.save("llama_dropout", root / name, seed=number + 3, hidden_size=64 + 64 * (name == "wide"))
    lines = [{"prompt": f"q {number}", "answer": f"so it is\n#### {ANSWERS[number % 5]}"} for number in range(30)]
    rows.write_jsonl(root / "plain.jsonl", lines)
    rows.write_jsonl(root / "drafted.jsonl", [{**line, "draft": "abb"} for line in lines])
    (root / "recipe.toml").write_text(
        f"""
        [model]
        path = "{root}/one"
        context_tokens = 200
        [prompts]
        path = "{root}/plain.jsonl"
        answer_column = "answer"
        [template]
        name = "tiny"
        [sampling]
        max_tokens = 24
        [scorer]
        name = "verifier"
        [verifier]
        name = "regex"
        pattern = "[ab]{{3}}$"
        [evaluation]
        answer_column = "answer"
        answer_pattern = '####\\s*(.+)'
        rounds = 3
        [evaluation.splits]
        held = "{root}/plain.jsonl"
        [engine]
        name = "tests.fakes:ModelEngine"
        shard_prompts = 8
        """
    )
    return root


@pytest.fixture
def no_ray(monkeypatch):
    """Shards are worked on here, one after the other; workers live as long as a pool stays open."""
    log = {"shards": 0, "made": 0, "closed": []}

    def open_here(pools, pool):
        if pool.name not in pools._actors:
            log["made"] += pool.name == "engines"
            pools._actors[pool.name] = [Host(pool.worker)]
        return pools._actors[pool.name]

    def close_here(pools, name):
        log["closed"].append(name)
        pools._actors.pop(name, None)

    def run(pools, steps, num_shards, on_shard):
        for shard in range(num_shards):
            for step in steps:
                pools.open(step.pool)[0].call(step.spec, "commit_shard", shard)
            log["shards"] += 1
            on_shard(shard, {"steps": {}})

    monkeypatch.setattr("evolve_ray.pools.dispatch.run", run)
    monkeypatch.setattr(Pools, "open", open_here)
    monkeypatch.setattr(Pools, "close", close_here)
    monkeypatch.setattr(driver, "start_ray", lambda config: None)
    monkeypatch.setattr(driver, "stop_ray", lambda: None)
    return log


def evaluate(folders, out, *arguments, names=("one", "two")):
    command = [*(str(folders / name) for name in names), "--recipe", str(folders / "recipe.toml"), "--out", str(out), *arguments]
    assert driver.main(command) == 0
    return json.loads((out / "evaluation.json").read_text())


def chains_of(out, model, part="chain"):
    """{prompt: {round: (text, score)}} straight from the Parquet files."""
    folder = next(path for path in (out / "models").iterdir() if path.name.startswith(f"{model}-")) / part
    drafts = [row for path in sorted(folder.glob("generations/shard-*/rows.parquet")) for row in pq.read_table(path).to_pylist()]
    score = {
        row["draft_id"]: row for path in folder.glob("scores/shard-*/rows.parquet") for row in pq.read_table(path).to_pylist()
    }
    table: dict = {}
    for row in drafts:
        place = row["sample"] if part == "parallel" else row["round"]
        table.setdefault(row["prompt_id"], {})[place] = (row, score[row["draft_id"]]["score"])
    return table


def mean(values):
    values = list(values)
    return sum(values) / len(values)


@pytest.fixture
def compared(folders, tmp_path, no_ray):
    return evaluate(folders, tmp_path / "out"), tmp_path / "out"


def test_figures_are_those_of_the_committed_tables(compared):
    found, out = compared
    assert [model["name"] for model in found["models"]] == ["one", "two"]
    tables = {}
    for model in found["models"]:
        tables[model["name"]] = table = chains_of(out, model["name"])
        held = model["splits"]["held"]
        assert (held["num_prompts"], held["rounds"]["1"]["n"], len(table)) == (30, 30, 30)
        for number in (1, 2, 3):
            right = mean(chain[number][1] for chain in table.values())
            assert held["rounds"][str(number)]["exact_match"]["mean"] == pytest.approx(right)
            assert 0 < right < 1, "a table in which nothing varies tests nothing"
        first, last = ([chain[number][1] for chain in table.values()] for number in (1, 3))
        moved = held["rounds"]["3"]["against_first"]
        assert moved["wrong_to_right"] == sum(not one and other for one, other in zip(first, last, strict=True)) > 0
        assert moved["right_to_wrong"] == sum(one and not other for one, other in zip(first, last, strict=True)) > 0
        assert moved["kept_right"] == sum(one and other for one, other in zip(first, last, strict=True))
        groups = {group["group"]: group for group in held["probes"]["quality"]}
        wrong = [other - one for one, other in zip(first, last, strict=True) if not one]
        assert groups["y1 wrong"]["gain"]["exact_match"]["mean"] == pytest.approx(mean(wrong))
    assert tables["one"].keys() == tables["two"].keys()
    apart = found["differences"][0]["splits"]["held"]["rounds"]["2"]["exact_match"]["mean"]
    assert apart == pytest.approx(mean(tables["two"][p][2][1] - tables["one"][p][2][1] for p in tables["one"]))


def test_seeds_and_prompts_are_the_same_for_every_model(compared):
    _, out = compared
    one, two = chains_of(out, "one"), chains_of(out, "two")
    assert {p: [row["seed"] for row, _ in chain.values()] for p, chain in one.items()} == {
        p: [row["seed"] for row, _ in chain.values()] for p, chain in two.items()
    }
    assert {row["model"] for chain in one.values() for row, _ in chain.values()} != {
        row["model"] for chain in two.values() for row, _ in chain.values()
    }


def test_foreign_drafts_are_the_first_models_for_everyone(compared):
    found, out = compared
    own = {prompt: chain[1][0]["text"] for prompt, chain in chains_of(out, "one").items()}
    assert found["foreign"] == "y1 of one"
    for name in ("one", "two"):
        table = chains_of(out, name, "foreign")
        assert {prompt: chain[1][0]["text"] for prompt, chain in table.items()} == own
        (figures,) = [model["splits"]["held"]["probes"]["foreign"] for model in found["models"] if model["name"] == name]
        assert figures["before"]["exact_match"]["mean"] == pytest.approx(mean(chain[1][1] for chain in table.values()))
        assert figures["after"]["exact_match"]["mean"] == pytest.approx(mean(chain[2][1] for chain in table.values()))


def test_kept_drafts_are_the_whole_solutions_and_all_right(compared):
    found, out = compared
    table = chains_of(out, "two", "keep")
    assert all(chain[1][0]["text"].startswith("so it is\n#### ") and chain[1][1] == 1.0 for chain in table.values())
    made = found["models"][1]["splits"]["held"]["probes"]["keep"]
    assert (made["num_shown"], made["n"]) == (30, 30)
    assert made["kept"]["mean"] == pytest.approx(mean(chain[2][1] for chain in table.values()))


def test_parallel_samples_are_bought_with_the_chains_tokens(compared):
    found, out = compared
    chains, samples = chains_of(out, "one"), chains_of(out, "one", "parallel")
    made = found["models"][0]["splits"]["held"]["probes"]["parallel"]
    assert {len(drawn) for drawn in samples.values()} == {6}  # twice the rounds
    best = []
    for prompt, chain in chains.items():
        left, count = sum(row["num_tokens"] for row, _ in chain.values()), 0
        while count < 6 and left >= samples[prompt][count][0]["num_tokens"]:
            left -= samples[prompt][count][0]["num_tokens"]
            count += 1
        best.append(max(samples[prompt][n][1] for n in range(max(1, count))))
    assert made["equal_tokens"]["parallel"]["best"]["exact_match"]["mean"] == pytest.approx(mean(best))
    three = mean(max(drawn[n][1] for n in range(3)) for drawn in samples.values())
    assert made["equal_samples"]["parallel"]["best"]["exact_match"]["mean"] == pytest.approx(three)
    assert made["equal_samples"]["chain"]["mean_prompt_tokens"] > made["equal_samples"]["parallel"]["mean_prompt_tokens"]


def test_second_call_computes_nothing_and_a_further_model_only_itself(folders, tmp_path, no_ray):
    out = tmp_path / "out"
    before = evaluate(folders, out)
    stamps = {path: path.stat().st_mtime_ns for path in out.rglob("MANIFEST.json")}
    done = no_ray["shards"]
    assert done == 2 * 5 * 4  # models, parts, shards
    assert evaluate(folders, out) == before
    assert no_ray["shards"] == done
    third = evaluate(folders, out, names=("one", "two", "wide"))
    assert no_ray["shards"] == done + 5 * 4
    assert {path: path.stat().st_mtime_ns for path in stamps} == stamps
    assert third["models"][:2] == before["models"]
    assert len(third["differences"]) == 3


def test_engines_take_weights_in_place_but_not_another_shape(folders, tmp_path, no_ray):
    evaluate(folders, tmp_path / "two", "--probes", "none")
    assert (no_ray["made"], no_ray["closed"]) == (1, [])
    evaluate(folders, tmp_path / "three", "--probes", "none", names=("one", "wide", "two"))
    assert (no_ray["made"], no_ray["closed"]) == (4, ["engines", "engines"])
    assert model_shape(folders / "one") == model_shape(folders / "two") != model_shape(folders / "wide")


def test_drafts_of_a_column_go_before_those_of_a_model(folders, tmp_path, no_ray):
    data = ["--data", f"held={folders}/drafted.jsonl", "--probes", "foreign"]
    found = evaluate(folders, tmp_path / "out", *data, names=("one",))
    assert found["foreign"] == "column draft"
    assert {chain[1][0]["text"] for chain in chains_of(tmp_path / "out", "one", "foreign").values()} == {"abb"}
    asked = evaluate(folders, tmp_path / "asked", *data, "--foreign", str(folders / "two"), names=("one",))
    assert asked["foreign"] == "y1 of two"
    own = {p: chain[1][0]["text"] for p, chain in chains_of(tmp_path / "asked", "two", "first").items()}
    assert {p: chain[1][0]["text"] for p, chain in chains_of(tmp_path / "asked", "one", "foreign").items()} == own
    evaluate(folders, tmp_path / "whole", names=("two",))
    assert {
        p: chain[1][0]["text"] for p, chain in chains_of(tmp_path / "whole", "two").items()
    } == own  # the very y1 of its chain


def test_single_model_without_given_drafts_has_no_foreign_probe(folders, tmp_path, no_ray):
    found = evaluate(folders, tmp_path / "out", names=("one",))
    assert found["foreign"] is None
    assert set(found["models"][0]["splits"]["held"]["probes"]) == {"keep", "quality", "majority", "parallel", "longer"}
    assert found["differences"] == []


def test_column_of_drafts_that_is_not_there_is_named(folders, tmp_path, no_ray, capsys):
    command = [str(folders / "one"), "--recipe", str(folders / "recipe.toml"), "--out", str(tmp_path / "out")]
    assert driver.main([*command, "--draft-column", "guess"]) == 2
    assert "has no column 'guess'; its columns are: answer, prompt" in capsys.readouterr().err


def test_other_options_in_the_same_folder_are_refused_by_name(folders, tmp_path, no_ray, capsys):
    evaluate(folders, tmp_path / "out", "--probes", "none")
    command = [str(folders / "one"), "--recipe", str(folders / "recipe.toml"), "--out", str(tmp_path / "out"), "seed=4"]
    assert driver.main(command) == 2
    assert "changed: seed (0 -> 4); use another --run" in capsys.readouterr().err
    assert driver.main([*command, "--rerun-changed", "--probes", "none"]) == 0


def test_another_answer_pattern_makes_the_prompts_anew(folders, tmp_path, no_ray):
    """It decides the gold answers, so the committed ones of another pattern are no use."""
    for pattern in (r"####\s*(.+)", r"####\s*(.)"):
        evaluate(folders, tmp_path / "out", "--rerun-changed", "--probes", "none", f"evaluation.answer_pattern='{pattern}'")
        table = rows.read_table(tmp_path / "out" / "prompts" / "prompts.parquet")
        assert {len(row["answer"]) for row in table} == {3 if pattern.endswith("+)") else 1}


def test_default_folder_is_the_same_for_the_same_command_alone(folders, monkeypatch, tmp_path, no_ray):
    monkeypatch.chdir(tmp_path)
    common = [str(folders / "one"), "--recipe", str(folders / "recipe.toml"), "--probes", "none"]
    for arguments in ([], [], ["seed=4"], ["--foreign", str(folders / "two")]):
        assert driver.main([*common, *arguments]) == 0
    assert len(list(Path("runs").glob("evaluation-*"))) == 3


def test_prompt_too_long_for_one_model_is_rejected_there_and_seen_in_the_counts(folders, tmp_path, no_ray):
    lines = rows.read_jsonl(folders / "plain.jsonl")
    rows.write_jsonl(tmp_path / "data.jsonl", [*lines[:8], {**lines[8], "draft": "ab" * 100}])
    rows.write_jsonl(tmp_path / "drafted.jsonl", [{"draft": "ab", **line} for line in rows.read_jsonl(tmp_path / "data.jsonl")])
    found = evaluate(
        folders, tmp_path / "out", "--data", f"held={tmp_path}/drafted.jsonl", "engine.max_rejected_fraction=0.2", names=("one",)
    )
    assert found["models"][0]["splits"]["held"]["probes"]["foreign"]["n"] == 8
    assert found["models"][0]["usage"]["foreign"]["num_rejected"] == 1
    folder = next((tmp_path / "out" / "models").iterdir()) / "foreign" / "generations"
    assert "round 2" in rows.read_jsonl(read_manifest(folder).path("rejected.jsonl"))[0]["reason"]


def test_model_that_cannot_hold_the_context_is_refused_before_anything_runs(folders, tmp_path, no_ray, capsys):
    command = [str(folders / "one"), "--recipe", str(folders / "recipe.toml"), "--out", str(tmp_path / "out")]
    assert driver.main([*command, "model.context_tokens=1000"]) == 2
    assert "model.context_tokens: is 1000, but" in capsys.readouterr().err
    assert no_ray["shards"] == 0


def test_model_hash_is_that_of_the_folder(compared, folders):
    found, _ = compared
    assert found["models"][0]["model"] == models.content_hash(folders / "one")
    with pytest.raises(UserError):
        driver.choose_probes("no")


def test_strategies_are_measured_on_the_same_prompts_and_the_chain_is_not_generated_twice(folders, tmp_path, no_ray, capsys):
    wanted = ["chain,rounds=3", "parallel,samples=4,pick=vote", "critique,rounds=2,pick=returned", "chain,rounds=2"]
    arguments = [part for text in wanted for part in ("--strategy", text)]
    found = evaluate(folders, tmp_path / "out", "--probes", "none", *arguments, names=("one",))
    (entries,) = (model["splits"]["held"]["strategies"] for model in found["models"])
    labels = ["chain,rounds=3", "parallel,samples=4", "critique,rounds=2", "chain,rounds=2"]
    assert [entry["name"] for entry in entries] == labels
    assert [entry["pick"] for entry in entries] == ["last", "vote", "returned", "last"]
    assert all(entry["n"] == 30 for entry in entries)
    chain, vote, critique, shorter = entries
    assert shorter["exact_match"] == found["models"][0]["splits"]["held"]["rounds"]["2"]["exact_match"]
    assert chain["difference"]["exact_match"]["mean"] == chain["at_chain_tokens"]["difference"]["exact_match"]["mean"] == 0.0
    assert chain["mean_tokens"] == chain["at_chain_tokens"]["mean_tokens"]
    assert vote["at_chain_tokens"]["mean_tokens"] <= chain["mean_tokens"]
    usage = found["models"][0]["usage"]
    assert critique["mean_tokens"] * 30 == usage["strategy critique,rounds=2"]["num_tokens"], "critiques cost tokens too"
    assert no_ray["shards"] == 4 * 4, "the chain is that of the evaluation"
    assert "Final answers of strategies" in capsys.readouterr().out
    assert "Final answers of strategies" in (tmp_path / "out" / "evaluation.html").read_text()
