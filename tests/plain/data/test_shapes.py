"""The shapes of TRL's documentation, UltraFeedback, Arena-Hard, AlpacaEval and ShareGPT, in every file format."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evolve_ray.data.prompts import read_prompts
from evolve_ray.data.shapes import Shape
from evolve_ray.data.triples import read_triples
from evolve_ray.errors import UserError


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


SYSTEM = {"role": "system", "content": "Be brief."}
SKY, BLUE, GREEN = "What colour is the sky?", "It is blue.", "It is green."
FOUR_TURNS = [SYSTEM, user("Hi"), assistant("Hello"), user(SKY)]

# name -> (row, the prompt that it holds)
PROMPTS = {
    "trl: standard prompt-only": ({"prompt": SKY}, SKY),
    "trl: conversational prompt-only": ({"prompt": [user(SKY)]}, SKY),
    "trl: standard prompt-completion": ({"prompt": SKY, "completion": BLUE}, SKY),
    "trl: conversational prompt-completion": ({"prompt": [user(SKY)], "completion": [assistant(BLUE)]}, SKY),
    "trl: conversational language modelling": ({"messages": [user(SKY), assistant(BLUE)]}, SKY),
    "trl: several turns with a system prompt": ({"messages": [*FOUR_TURNS, assistant(BLUE)]}, tuple(FOUR_TURNS)),
    "trl: explicit preference": ({"prompt": [user(SKY)], "chosen": [assistant(BLUE)], "rejected": [assistant(GREEN)]}, SKY),
    "trl: implicit preference": ({"chosen": [*FOUR_TURNS, assistant(BLUE)], "rejected": [*FOUR_TURNS, assistant(GREEN)]},
                                 tuple(FOUR_TURNS)),
    "trl: unpaired preference": ({"prompt": SKY, "completion": BLUE, "label": True}, SKY),
    "trl: stepwise supervision": ({"prompt": SKY, "completions": ["It is", " blue."], "labels": [True, False]}, SKY),
    "trl: a content in parts": ({"prompt": [{"role": "user", "content": [{"type": "text", "text": SKY}]}]}, SKY),
    "ultrafeedback": ({"prompt": SKY, "prompt_id": "a1", "chosen": [user(SKY), assistant(BLUE)],
                       "rejected": [user(SKY), assistant(GREEN)], "messages": [user(SKY), assistant(BLUE)],
                       "score_chosen": 8.0, "score_rejected": 6.0}, SKY),
    "arena-hard 2": ({"uid": "a", "category": "hard_prompt", "prompt": SKY}, SKY),
    "arena-hard 0.1": ({"question_id": "a", "category": "arena-hard", "cluster": "x", "turns": [{"content": SKY}]}, SKY),
    "alpaca eval": ({"instruction": SKY, "output": BLUE, "generator": "someone", "dataset": "helpful_base"}, SKY),
    "alpaca with an input": ({"instruction": "Translate.", "input": "Guten Tag", "output": "x"}, "Translate.\n\nGuten Tag"),
    "sharegpt": ({"conversations": [{"from": "system", "value": "Be brief."}, {"from": "human", "value": SKY},
                                    {"from": "gpt", "value": BLUE}]}, (SYSTEM, user(SKY))),
}  # fmt: skip


def write(tmp_path, rows, form):
    """The path of a table of rows in one of the forms that are read."""
    path = tmp_path / f"table.{form}"
    if form == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif form == "json":
        path.write_text(json.dumps(rows))
    elif form == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    else:
        datasets = pytest.importorskip("datasets")
        datasets.Dataset.from_list(rows).save_to_disk(str(path))
    return str(path)


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", PROMPTS)
def test_every_shape_gives_its_prompt(tmp_path, name, form):
    row, expected = PROMPTS[name]
    (prompt,), _ = read_prompts(write(tmp_path, [row], form), prompt_column="prompt")
    assert prompt["prompt"] == expected


def test_the_same_prompt_has_the_same_id_in_every_shape(tmp_path):
    ids = {
        read_prompts(write(tmp_path, [row], "jsonl"), prompt_column="prompt")[0][0]["prompt_id"]
        for row, expected in PROMPTS.values()
        if expected == SKY
    }
    assert len(ids) == 1


def test_conversations_of_a_datasets_folder_are_read(tmp_path):
    path = write(tmp_path, [PROMPTS["ultrafeedback"][0], PROMPTS["ultrafeedback"][0] | {"prompt": "other"}], "folder")
    prompts, _ = read_prompts(path, prompt_column="prompt")
    assert [row["prompt"] for row in prompts] == [SKY, "other"]
    by_messages, duplicates = read_prompts(path, prompt_column="messages")
    assert ([row["prompt"] for row in by_messages], len(duplicates)) == ([SKY], 1)


def test_what_a_table_was_taken_for_is_one_line(tmp_path):
    conversations = [{"messages": [*FOUR_TURNS[:1], user(f"q{n}")]} for n in range(2)]
    conversations += [{"messages": [*FOUR_TURNS[1:], assistant(BLUE)]}, {"messages": [user("alone")]}]
    shape = Shape()
    read_prompts(write(tmp_path, conversations, "jsonl"), prompt_column="prompt", shape=shape)
    assert str(shape) == (
        "1 texts and 3 conversations of 1-3 turns from column 'messages', 2 with a system prompt, "
        "the last answers of 1 are not used"
    )


def test_a_system_prompt_is_added_where_there_is_none(tmp_path):
    path = write(tmp_path, [{"messages": [SYSTEM, user("a")]}, {"messages": [user("b")]}], "jsonl")
    shape = Shape()
    prompts, _ = read_prompts(path, prompt_column="prompt", system="Be kind.", shape=shape)
    kind = {"role": "system", "content": "Be kind."}
    assert [row["prompt"] for row in prompts] == [(SYSTEM, user("a")), (kind, user("b"))]
    assert str(shape).endswith("2 with a system prompt (1 of them from prompts.system)")


def test_repeated_conversations_count_once_and_another_system_prompt_is_another_prompt(tmp_path):
    rows = [{"prompt": FOUR_TURNS}, {"prompt": FOUR_TURNS}, {"prompt": FOUR_TURNS[1:]}]
    prompts, duplicates = read_prompts(write(tmp_path, rows, "jsonl"), prompt_column="prompt")
    assert len(prompts) == 2
    assert [row["reason"] for row in duplicates] == ["duplicate of line 1"]


# row -> what is said about it
REFUSED = {
    "trl: standard language modelling": ({"text": "The sky is blue."}, "must be split into prompt and answer"),
    "trl: implicit preference in texts": ({"chosen": "The sky is blue.", "rejected": "The sky is green."}, "trl.extract_prompt"),
    "texts of several turns": ({"turns": ["a", "b"]}, "2 user turns without the answers between them"),
    "a list of texts": ({"prompt": ["a"]}, "is list, but must be a string or a list of messages"),
    "an image": ({"prompt": [{"role": "user", "content": [{"type": "image"}]}]}, "part of type 'image', but only text is read"),
    "tool calls": ({"prompt": [user("a"), {"role": "assistant", "content": "", "tool_calls": [1]}, user("b")]},
                   "message 2 has 'tool_calls'"),
    "a tool": ({"prompt": [user("a"), {"role": "tool", "content": "4"}]}, "role 'tool'"),
    "tools": ({"prompt": [user("a")], "tools": [{"name": "f"}]}, "column 'tools' is not read"),
    "two user turns": ({"prompt": [user("a"), user("b")]}, "two user turns in a row, messages 1 and 2; join them"),
    "an answer first": ({"prompt": [assistant("a"), user("b")]}, "begins with an assistant turn"),
    "a late system prompt": ({"prompt": [user("a"), SYSTEM, user("b")]}, "has a system prompt as message 2"),
    "a system prompt alone": ({"prompt": [SYSTEM]}, "has a system prompt alone"),
    "an answer alone": ({"prompt": [assistant("a")]}, "has no turn before its last answer"),
    "an empty turn": ({"prompt": [user(" ")]}, "message 1: column 'content' is empty"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_named_with_its_row_and_the_way_out(tmp_path, name):
    row, said = REFUSED[name]
    path = write(tmp_path, [row], "jsonl")
    with pytest.raises(UserError) as caught:
        read_prompts(path, prompt_column="prompt")
    assert f"{path}:1: " in str(caught.value)
    assert said in str(caught.value)


def test_a_column_that_was_named_is_not_looked_for_elsewhere(tmp_path):
    path = write(tmp_path, [{"messages": [user("a")]}], "jsonl")
    with pytest.raises(UserError, match="has no column 'question'; its columns are: messages"):
        read_prompts(path, prompt_column="question")


def triples(path, **columns):
    names = {"prompt_column": "prompt", "chosen_column": "chosen", "rejected_column": "rejected", **columns}
    pairs, rejected = read_triples(path, **names)
    return [(pair["prompt"], pair["chosen"], pair["rejected"]) for pair in pairs], rejected


TRIPLES = {
    "trl: standard": ({"prompt": SKY, "chosen": BLUE, "rejected": GREEN}, SKY),
    "trl: conversational explicit": PROMPTS["trl: explicit preference"],
    "trl: conversational implicit": PROMPTS["trl: implicit preference"],
    "ultrafeedback": PROMPTS["ultrafeedback"],
    "whole conversations, and the prompt as messages": (
        {"prompt": FOUR_TURNS, "chosen": [*FOUR_TURNS, assistant(BLUE)], "rejected": [*FOUR_TURNS, assistant(GREEN)]},
        tuple(FOUR_TURNS),
    ),
    "what follows the prompt": (
        {"prompt": [user("Hi")], "chosen": [assistant("Hello"), user(SKY), assistant(BLUE)],
         "rejected": [assistant("Hello"), user(SKY), assistant(GREEN)]},
        (user("Hi"), assistant("Hello"), user(SKY)),
    ),
}  # fmt: skip


@pytest.mark.parametrize("form", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize("name", TRIPLES)
def test_every_shape_of_a_triple_gives_prompt_and_both_answers(tmp_path, name, form):
    row, prompt = TRIPLES[name]
    assert triples(write(tmp_path, [row], form))[0] == [(prompt, BLUE, GREEN)]


REFUSED_TRIPLES = {
    "unpaired": ({"prompt": SKY, "completion": BLUE, "label": True}, "join a prompt's answers with label true and false"),
    "one answer": ({"messages": [user(SKY), assistant(BLUE)]}, "a triple needs a better and a worse one"),
    "steps": ({"prompt": SKY, "completions": ["a"], "labels": [True]}, "labelled steps are no answers"),
    "no prompt": ({"chosen": "a", "rejected": "b"}, "trl.extract_prompt makes the column"),
    "another prompt": ({"prompt": "x", "chosen": [user(SKY), assistant("a")], "rejected": [user(SKY), assistant("b")]},
                       "does not hold the prompt in column 'prompt'"),
    "other questions": ({"chosen": [user("x"), assistant("a")], "rejected": [user("y"), assistant("b")]},
                        "differ before their last answers, from message 1 on"),
    "no answer": ({"chosen": [user("x")], "rejected": [user("x")]}, "ends with a user turn, but must end with the answer"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED_TRIPLES)
def test_what_is_no_triple_is_named_with_its_row_and_the_way_out(tmp_path, name):
    row, said = REFUSED_TRIPLES[name]
    path = write(tmp_path, [row], "jsonl")
    with pytest.raises(UserError) as caught:
        triples(path)
    assert f"{path}:1: " in str(caught.value)
    assert said in str(caught.value)


def test_answers_that_are_the_same_are_left_out_and_counted_where_they_are_compared(tmp_path):
    rows = [{"prompt": SKY, "chosen": BLUE, "rejected": BLUE}, {"prompt": SKY, "chosen": BLUE, "rejected": GREEN}]
    path = write(tmp_path, rows, "jsonl")
    pairs, rejected = triples(path, same=str.__eq__)
    assert (len(pairs), [(row["line"], row["reason"].split(",")[0]) for row in rejected]) == (
        1, [(1, "chosen and rejected are the same tokens")]
    )  # fmt: skip
    assert len(triples(path)[0]) == 2


# How a number is written is kept where the file says it, and refused where a column of floats has lost it.
@pytest.mark.parametrize(
    ("written", "answer"), [("12", "12"), ("12.0", "12.0"), ("1e3", "1e3"), ("0.10", "0.10"), ('"007"', "007")]
)
def test_a_number_of_a_json_file_stays_as_it_is_written(tmp_path, written, answer):
    path = tmp_path / "table.jsonl"
    path.write_text(f'{{"prompt": "a", "answer": {written}}}\n')
    assert read_prompts(str(path), prompt_column="prompt", answer_column="answer")[0][0]["answer"] == answer


@pytest.mark.parametrize("answers", [[12, 12.5], [12.0, float("nan")], [None, 3.0]])
def test_a_column_of_floats_is_refused_by_row_and_type(tmp_path, answers):
    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"prompt": ["a", "b"], "answer": pa.array(answers, pa.float64())}), path)
    with pytest.raises(UserError, match=r"table\.parquet:2: column 'answer' is a float \((12\.5|nan|3\.0)\)"):
        read_prompts(str(path), prompt_column="prompt", answer_column="answer")


def test_a_date_that_a_table_made_of_a_text_is_refused_with_its_type(tmp_path):
    import datetime

    path = tmp_path / "table.parquet"
    pq.write_table(pa.table({"prompt": ["a"], "answer": [datetime.datetime(2024, 1, 5)]}), path)
    with pytest.raises(UserError, match="column 'answer' is datetime, but must be a string"):
        read_prompts(str(path), prompt_column="prompt", answer_column="answer")
