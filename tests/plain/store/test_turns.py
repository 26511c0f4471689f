"""A prompt in memory and in a table: a text, or a conversation that ends with a user turn."""

import hashlib

import pyarrow.parquet as pq
import pytest

from evolve_ray.store import rows, shards, turns

CONVERSATION = (turns.system("s"), turns.user("a"), turns.assistant("b"), turns.user("c"))


def row(prompt, number=1):
    place = {"answer": None, "split": "train", "file": "f", "line": number, "num_tokens": 1}
    return {"prompt_id": f"p{number}", "prompt": prompt, **place}


def test_one_user_turn_is_a_text():
    assert turns.as_prompt([turns.user("a")]) == "a"
    assert turns.turns("a") == (turns.user("a"),)
    assert turns.as_prompt(CONVERSATION) == CONVERSATION


def test_a_system_prompt_is_added_only_where_there_is_none():
    assert turns.with_system(CONVERSATION, "other") == CONVERSATION
    assert turns.with_system("a", "other") == (turns.system("other"), turns.user("a"))
    assert turns.with_system("a", "") == "a"


def test_earlier_turns_and_the_last_one():
    assert turns.earlier_turns(CONVERSATION) == CONVERSATION[:3]
    assert (turns.last_turn(CONVERSATION), turns.last_turn("a"), turns.earlier_turns("a")) == ("c", "a", ())


def test_a_reader_sees_who_says_what():
    assert turns.as_text("a") == "a"
    assert turns.as_text(CONVERSATION) == "[system]\ns\n\n[user]\na\n\n[assistant]\nb\n\n[user]\nc"


def test_texts_and_conversations_come_back_from_a_table(tmp_path):
    table = [row("a"), row(CONVERSATION, 2), row("", 3)]
    rows.write_table(tmp_path / "t.parquet", table, rows.PROMPT)
    assert rows.read_table(tmp_path / "t.parquet") == table
    assert shards.read_slice(tmp_path / "t.parquet", 1, 1) == [table[1]]


def test_a_table_of_texts_has_the_columns_and_the_bytes_that_it_always_had(tmp_path):
    table = [row("a"), row("b", 2)]
    rows.write_table(tmp_path / "t.parquet", table, rows.PROMPT)
    assert pq.read_schema(tmp_path / "t.parquet").equals(rows.PROMPT)
    pq.write_table(
        rows.pa.Table.from_pylist([row("a"), row("b", 2)], schema=rows.PROMPT), tmp_path / "u.parquet", compression="zstd"
    )
    assert len({hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("t.parquet", "u.parquet")}) == 1


@pytest.mark.parametrize("prompts", [["a", "b"], ["a", CONVERSATION]])
def test_pairs_of_prompts_with_conversations_have_the_column_of_messages(tmp_path, prompts):
    rows.write_table(tmp_path / "t.parquet", [row(prompt, number) for number, prompt in enumerate(prompts)], rows.PROMPT)
    schema = rows.with_messages(rows.PAIR, tmp_path / "t.parquet")
    assert ("messages" in schema.names) == (CONVERSATION in prompts)
