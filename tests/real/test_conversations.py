"""A whole iteration on conversations with system prompts: from the first ask to training, scores, evaluation, report, explain."""

import json
import subprocess
import sys

import pytest

from evolve_ray.models.chat import Chat
from evolve_ray.refine.template import load_template
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.turns import assistant, system, user
from tests.plain.conftest import allow_systems
from tests.real.conftest import ROOT, start
from tests.tensors import zoo

pytestmark = pytest.mark.long

OWN, ADDED = "Be polite.", "Answer in one word."


class Letters:
    """Counts the letters of a response; NaN, which rejects the draft, for a prompt that has lost its system prompt or a turn."""

    def __call__(self, prompts, answers, responses):
        return [
            sum(map(str.isalpha, response)) if is_whole(prompt) else float("nan")
            for prompt, response in zip(prompts, responses, strict=True)
        ]


def is_whole(prompt):
    roles = [message["role"] for message in prompt]
    earlier = ["user", "assistant"] if prompt[0]["content"] == OWN else []
    return roles == ["system", *earlier, "user"]


def conversation(number):
    if number % 2:
        return {"prompt": f"question {number}"}  # it gets the system prompt of the recipe
    return {"messages": [system(OWN), user("hello"), assistant("good day"), user(f"question {number}")]}


@pytest.fixture(scope="module", params=["conversation", "one_message"])
def run(request, tmp_path_factory):
    """One iteration of a random Llama in one of the layouts."""
    place = tmp_path_factory.mktemp("conversations")
    model = allow_systems(zoo.save("llama3", place / "plain"), place / "model")
    tables = {"prompts": [conversation(n) for n in range(24)], "held": [conversation(n) for n in range(100, 106)]}
    whole = [system(OWN), user("hello"), assistant("good day"), user("fine?")]
    tables["triples"] = [
        {"chosen": [*whole, assistant(f"yes {n}")], "rejected": [*whole, assistant(f"no {n}")]} for n in range(16)
    ]
    for name, table in tables.items():
        (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
    options = [
        "toy=none", "verifier=none", f"model.path={model}", "model.context_tokens=250", "sampling.max_tokens=12",
        f"prompts.path={place}/prompts.jsonl", "prompts.answer_column=''", "prompts.per_iteration=24", f"prompts.system={ADDED}",
        f"activation.path={place}/triples.jsonl", "activation.training.batch_pairs=16", "activation.training.micro_pairs=8",
        f'evaluation.splits={{held = "{place}/held.jsonl"}}', "evaluation.answer_column=''", "evaluation.parallel=0",
        "evaluation.rounds=2", f"scorer.name={__name__}:Letters", "strategy.rounds=3", f"template.layout={request.param}",
        "training.batch_pairs=16", "training.micro_pairs=8", "engine.actors=1", "engine.shard_prompts=8", "ray.dashboard=false",
        "trainer.forward=tree",
    ]  # fmt: skip
    command = start(place / "run", *options, "--iterations", "1")
    assert command.wait() == 0
    return command, request.param


def test_every_ask_scores_and_trained_pair_has_the_whole_conversation(run):
    command, layout = run
    here = command.run / "iteration-01"
    prompts = {row["prompt_id"]: row["prompt"] for row in rows.read_table(here / "prompts" / "prompts.parquet")}
    assert len(prompts) == 24
    assert all(is_whole(prompt) for prompt in prompts.values())
    chat, template = Chat(command.run / "iteration-00" / "checkpoint"), load_template("tiny", layout)
    drafts = list(shards.read_rows(read_manifest(here / "generations")))
    text_of = {draft["draft_id"]: draft["text"] for draft in drafts}
    for draft in drafts:
        prompt, parent = prompts[draft["prompt_id"]], draft["parent_id"]
        messages = template.refinement(prompt, text_of[parent]) if parent else template.direct(prompt)
        assert draft["num_prompt_tokens"] == len(chat.context_ids(messages))
    assert read_manifest(here / "scores").stats["num_rows"] == len(drafts) == 72
    pairs = rows.read_table(here / "pairs" / "pairs.parquet")
    assert pairs
    assert all(pair["prompt"] == prompts[pair["prompt_id"]] for pair in pairs)
    first = rows.read_jsonl(here / "checkpoint" / "training_log.jsonl")[0]
    assert abs(first["loss_dpo"] - 0.6931) < 1e-4


def test_report_explain_and_verify_show_and_check_the_turns(run):
    command, _ = run
    page = (command.run / "report.html").read_text()
    assert OWN in page
    assert "good day" in page
    pairs = rows.read_table(command.run / "iteration-01" / "pairs" / "pairs.parquet")
    pair = next(pair for pair in pairs if pair["prompt"][0]["content"] == OWN)
    said = job("explain.py", command.run, pair["pair_id"])
    assert f"[system]\n    {OWN}" in said
    assert "[assistant]\n    good day" in said
    assert "no errors; the run is complete" in job("verify.py", command.run)


def test_the_triples_are_the_last_answers_after_all_turns_before_them(run):
    command, _ = run
    pairs = rows.read_table(command.run / "iteration-00" / "activation_pairs" / "pairs.parquet")
    assert len(pairs) == 16
    assert all([m["role"] for m in pair["prompt"]] == ["system", "user", "assistant", "user"] for pair in pairs)
    assert {pair["chosen"] for pair in pairs} == {f"yes {n}" for n in range(16)}


def job(name, *arguments):
    done = subprocess.run([sys.executable, ROOT / "jobs" / name, *arguments], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout
