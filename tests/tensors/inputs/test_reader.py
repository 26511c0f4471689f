"""Conversations through the inputs of a run: read, checked against held-out ones, committed; faults replaced by a correction."""

import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evolve_ray import driver
from evolve_ray.config.load import load
from evolve_ray.errors import UserError
from evolve_ray.inputs import prepare as inputs
from evolve_ray.models.chat import Chat
from evolve_ray.refine.rendering import Rendering
from evolve_ray.store import rows
from evolve_ray.store.run import Run
from evolve_ray.store.turns import assistant, system, user
from tests.plain.conftest import allow_systems, make_bpe

ROOT = Path(__file__).resolve().parents[3]


class Zero:
    """Scores everything with zero."""

    def __call__(self, prompts, answers, responses):
        return [0.0] * len(responses)


@pytest.fixture
def prepare(recipe, tmp_path, tiny_model):
    """Prepares a run of the tiny model on rows that are written to files first; gives the context and the printed lines."""

    def prepare(prompts, *overrides, held=()):
        for name, table in (("prompts", prompts), ("held", held)):
            (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in table))
        fixed = [
            f"model.path={tiny_model}", "model.context_tokens=90", "sampling.max_tokens=10", "template.name=tiny",
            f"prompts.path={tmp_path}/prompts.jsonl", "prompts.per_iteration=2", "iterations=1", f"scorer.name={__name__}:Zero",
        ]  # fmt: skip
        splits = [f"evaluation.splits.held={tmp_path}/held.jsonl"] if held else []
        run = Run(tmp_path / "run")
        run.root.mkdir(exist_ok=True)
        lines = []
        config = load(recipe(), [*fixed, *splits, *overrides])
        return inputs.prepare(config, run, lines.append, lambda: pytest.fail("Ray was started"), rerun_changed=False), lines

    return prepare


def table(manifest, name="prompts.parquet"):
    return rows.read_table(manifest.path(name))


CHATS = [{"messages": [user("one"), assistant("a"), user(f"two {word}")]} for word in ("x", "y", "z")]


def test_conversations_are_committed_with_the_tokens_of_all_their_turns(prepare):
    context, lines = prepare(CHATS[:2])
    stored = table(context.prompts[1])
    assert sorted(row["prompt"][-1]["content"] for row in stored) == ["two x", "two y"]
    chat = inputs.Prompter(context, {}).reader.chat
    assert all(row["num_tokens"] == len(chat.context_ids(row["prompt"])) for row in stored)
    assert "  prompts: conversations of 3 turns from column 'messages'" in lines


def test_a_held_out_conversation_is_found_by_all_its_turns(prepare):
    same_question = {"messages": [user("another"), assistant("a"), user("two x")]}
    context, _ = prepare([*CHATS, same_question], held=[{"prompt": CHATS[0]["messages"]}])
    lost = rows.read_jsonl(context.prompts[1].path("rejected.jsonl"))
    assert [(row["line"], row["reason"]) for row in lost] == [(1, "is also a prompt of evaluation split 'held'")]


def test_the_system_prompt_of_the_recipe_is_in_every_table(prepare, tiny_model, tmp_path):
    triple = tmp_path / "triples.jsonl"
    triple.write_text(json.dumps({"prompt": "t", "chosen": "good", "rejected": "bad"}) + "\n")
    own = {"prompt": [system("own"), user("b")]}
    model = allow_systems(tiny_model, tmp_path / "model")
    options = ("prompts.system=Be kind.", f"activation.path={triple}", f"model.path={model}")
    context, lines = prepare([{"prompt": "a"}, own], *options, held=[{"prompt": "h"}])
    kind = system("Be kind.")
    assert sorted([m["content"] for m in row["prompt"]] for row in table(context.prompts[1])) == [["Be kind.", "a"], ["own", "b"]]
    assert [row["prompt"] for row in table(context.held_out)] == [(kind, user("h"))]
    assert [row["prompt"] for row in table(context.triples["activation"], "pairs.parquet")] == [(kind, user("t"))]
    assert (
        "  prompts: conversations of 1 turn from column 'prompt', 2 with a system prompt (1 of them from prompts.system)" in lines
    )


def test_a_system_prompt_that_the_template_refuses_is_named_by_row(prepare):
    with pytest.raises(UserError) as caught:
        prepare([{"prompt": "a"}, {"prompt": [system("s"), user("b")]}])
    said = "prompts.jsonl:2: the model's chat template cannot render its turns (system, user): the tiny world knows the"
    assert said in str(caught.value)
    assert str(caught.value).endswith("; write the system prompt into the first user turn")


@pytest.mark.parametrize(("name", "left"), [("offline", 1), ("activation", 3)])
def test_triples_with_two_equal_answers_are_for_activation_only(prepare, tmp_path, name, left):
    triple = tmp_path / "triples.jsonl"
    answers = [
        ("good", "bad"),
        ("good", "good"),
        ("caf\u00e9", "caf\u00e8"),
    ]  # the tiny tokenizer has no accents: both are unknown
    triple.write_text("".join(json.dumps({"prompt": "t", "chosen": c, "rejected": r}) + "\n" for c, r in answers))
    objective = () if name == "offline" else ("activation.training.objective=sft",)
    context, _ = prepare([{"prompt": "a"}, {"prompt": "b"}], f"{name}.path={triple}", *objective)
    manifest = context.triples[name]
    assert (manifest.stats["num_rows"], manifest.stats["num_rejected"]) == (left, 3 - left)


ULTRAFEEDBACK = [
    {
        "prompt": f"question {number}", "prompt_id": f"{number:064x}",
        "chosen": [user(f"question {number}"), assistant("good")], "rejected": [user(f"question {number}"), assistant("bad")],
        "messages": [user(f"question {number}"), assistant("good")], "score_chosen": 8.5, "score_rejected": 5.0,
    }
    for number in range(8)
]  # fmt: skip


@pytest.mark.parametrize("name", ["llama31_8b", "llama31_8b_4nodes"])
def test_the_recipe_of_the_paper_reads_ultrafeedback_as_it_is(tmp_path, tiny_model, name):
    """The columns and types of HuggingFaceH4/ultrafeedback_binarized, in the Parquet files that it is made of."""
    paths = [tmp_path / f"{split}.parquet" for split in ("train_prefs", "train_sft", "test_prefs")]
    for path, part in zip(paths, (ULTRAFEEDBACK[:5], ULTRAFEEDBACK[5:7], ULTRAFEEDBACK[7:]), strict=True):
        pq.write_table(pa.Table.from_pylist(part), path)
    plain = load(ROOT / "jobs" / "recipes" / f"{name}.toml")
    assert {plain.prompts.path, plain.activation.path, *plain.evaluation.splits.values()} == {
        "HuggingFaceH4/ultrafeedback_binarized"
    }
    assert (plain.prompts.split, plain.activation.split, plain.evaluation.split) == ("train_prefs", "train_sft", "test_prefs")
    config = load(
        ROOT / "jobs" / "recipes" / f"{name}.toml",
        [
            f"model.path={tiny_model}", "model.chat_template=''", "model.context_tokens=250", "sampling.max_tokens=20",
            "prompts.per_iteration=5",
            "iterations=1", f"prompts.path={paths[0]}", f"activation.path={paths[1]}", f"evaluation.splits.heldout={paths[2]}",
            f"scorer.name={__name__}:Zero", "scorer.model=''", "template.name=tiny",
        ],
    )  # fmt: skip
    run = Run(tmp_path / "run")
    run.root.mkdir()
    context = inputs.prepare(config, run, lambda line: None, lambda: pytest.fail("Ray was started"), rerun_changed=False)
    assert sorted(row["prompt"] for row in table(context.prompts[1])) == [f"question {number}" for number in range(5)]
    pairs = table(context.triples["activation"], "pairs.parquet")
    assert [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs] == [
        (f"question {number}", "good", "bad") for number in (5, 6)
    ]


def test_the_chat_template_of_the_recipe_writes_all_turns_and_ends_answers_with_the_end_of_turn(tmp_path):
    special = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    make_bpe(special, None, bos_token=special[0], eos_token=special[1]).save_pretrained(tmp_path)
    config = load(ROOT / "jobs/recipes/llama31_8b.toml")
    chat = Chat(tmp_path, rendering=Rendering(chat_template=(ROOT / config.model.chat_template).read_text()))
    assert chat.tokenizer.convert_ids_to_tokens(chat.end_id) == "<|eot_id|>"
    messages = (system("s"), user(" a "), assistant("b"), user("c"))
    headers = [f"<|start_header_id|>{m['role']}<|end_header_id|>\n\n{m['content']}<|eot_id|>" for m in messages]
    whole = "<|begin_of_text|>" + "".join(headers) + "<|start_header_id|>assistant<|end_header_id|>\n\n"
    assert chat.tokenizer.decode(chat.context_ids(messages)) == whole


def test_what_fails_on_its_input_leaves_nothing_that_refuses_the_corrected_command(
    recipe, tmp_path, tiny_model, monkeypatch, capsys
):
    """A typo, then a held-out split that is committed beside faulty prompts, then the corrected recipe and file."""
    from evolve_ray import iterate as iteration

    data, held = tmp_path / "prompts.jsonl", tmp_path / "held.jsonl"
    held.write_text('{"question": "h"}\n')
    data.write_text('{"question": ""}\n{"question": "b"}\n')
    run = str(tmp_path / "run")
    fixed = [
        str(recipe()), "--run", run, f"model.path={tiny_model}", "model.context_tokens=90", "sampling.max_tokens=10",
        f"prompts.path={data}", "prompts.per_iteration=2", "iterations=1", "template.name=tiny", f"scorer.name={__name__}:Zero",
        f"evaluation.splits.held={held}", "trackers.use=[]",
    ]  # fmt: skip
    reached = []
    monkeypatch.setattr(iteration, "iterate", lambda context: reached.append(context) or (_ for _ in ()).throw(UserError("stop")))
    assert driver.main([*fixed, "evaluation.prompt_column=question"]) == 2
    assert "has no column 'prompt'" in capsys.readouterr().err
    assert driver.main([*fixed, "evaluation.prompt_column=question", "prompts.prompt_column=question"]) == 2
    assert "prompts.jsonl:1: column 'question' is empty" in capsys.readouterr().err
    data.write_text('{"question": "a"}\n{"question": "b"}\n')
    assert driver.main([*fixed, "evaluation.prompt_column=question", "prompts.prompt_column=question", "seed=3"]) == 2
    assert capsys.readouterr().err.splitlines()[-1].endswith("stop")
    assert [row["prompt"] for row in table(reached[0].held_out)] == ["h"]
