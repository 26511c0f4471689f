"""Ids, seeds and tables depend on content alone."""

import hashlib
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evolve_ray.store import rows
from tests.plain.processes import run_python

CODE = """
import json
from evolve_ray.store import rows
ids = rows.content_id("prompt", "caf\\u00e9", None), rows.derive_seed(0, 1, "id", 0, 2), rows.digest({"b": 1, "a": [2.5]})
print(json.dumps(ids))
"""
PROMPT = {"prompt_id": "p1", "prompt": "a", "answer": None, "split": "train", "file": "f", "line": 1, "num_tokens": 3}
TEXT = st.text("ab \u00e9\u2028\U0001f600\0\n{")  # the whole of Unicode costs seconds to set up
PINNED = ["985f855e14e776dc", 52266857, "11cf70519f8728b23d43074ee65eaa0627c70a30bee4176227f66c95ba1af4dd"]


def test_ids_and_seeds_are_pinned():
    assert rows.content_id("prompt", "caf\u00e9", None) == PINNED[0]
    assert rows.derive_seed(0, 1, "id", 0, 2) == PINNED[1]
    assert rows.digest({"b": 1, "a": [2.5]}) == PINNED[2]


def test_ids_and_seeds_do_not_depend_on_the_hash_seed_of_the_process():
    assert json.loads(run_python(CODE, PYTHONHASHSEED="77")) == PINNED


@given(st.lists(st.one_of(TEXT, st.integers(), st.none()), max_size=4))
def test_seed_fits_what_engines_take(parts):
    assert 0 <= rows.derive_seed(*parts) < 2**31


@pytest.mark.parametrize(
    ("left", "right"),
    [(("a", "bc"), ("ab", "c")), ((None,), ("None",)), ((1,), ("1",)), (("a",), ("a", None)), (("\u00e9",), ("e\u0301",))],
)
def test_different_content_has_different_ids(left, right):
    assert rows.content_id(*left) != rows.content_id(*right)


def test_order_of_keys_does_not_change_the_canonical_form():
    assert rows.canonical({"b": 1, "a": "\u00e9"}) == rows.canonical({"a": "\u00e9", "b": 1}) == '{"a":"\u00e9","b":1}'.encode()


def test_canonical_form_has_no_spelling_for_what_is_no_number():
    with pytest.raises(ValueError):
        rows.canonical({"score": float("nan")})


def test_same_rows_give_the_same_parquet_bytes(tmp_path):
    table = [{**PROMPT, "line": line, "prompt": "x" * line} for line in range(300)]
    for name in ("one", "two"):
        rows.write_table(tmp_path / name, table, rows.PROMPT)
    assert (tmp_path / "one").read_bytes() == (tmp_path / "two").read_bytes()


def test_other_rows_give_other_parquet_bytes(tmp_path):
    rows.write_table(tmp_path / "one", [PROMPT], rows.PROMPT)
    rows.write_table(tmp_path / "two", [{**PROMPT, "prompt": "b"}], rows.PROMPT)
    hashes = {hashlib.sha256((tmp_path / name).read_bytes()).digest() for name in ("one", "two")}
    assert len(hashes) == 2


@pytest.mark.parametrize("schema", [rows.PROMPT, rows.GENERATION, rows.SCORE, rows.PAIR, rows.REFERENCE])
def test_empty_table_keeps_its_columns(tmp_path, schema):
    rows.write_table(tmp_path / "t", [], schema)
    assert rows.read_table(tmp_path / "t") == []
    assert rows.pq.read_schema(tmp_path / "t").names == schema.names


def test_table_comes_back_as_it_was_written(tmp_path):
    table = [PROMPT, {**PROMPT, "prompt_id": "p0", "answer": "yes"}]
    rows.write_table(tmp_path / "t", table, rows.PROMPT)
    assert rows.read_table(tmp_path / "t") == table


@pytest.mark.parametrize("row", [{**PROMPT, "extra": 1}, {k: v for k, v in PROMPT.items() if k != "line"}])
def test_row_with_other_columns_than_the_schema_is_refused(tmp_path, row):
    with pytest.raises(AssertionError, match=r"extra|line"):
        rows.write_table(tmp_path / "t", [row], rows.PROMPT)


@given(st.lists(st.dictionaries(TEXT, st.one_of(TEXT, st.integers(), st.none())), max_size=3))
def test_jsonl_comes_back_as_it_was_written(tmp_path_factory, table):
    path = tmp_path_factory.getbasetemp() / "rows.jsonl"
    rows.write_jsonl(path, table)
    assert rows.read_jsonl(path) == table


def test_rejected_row_keeps_where_it_came_from():
    record = rows.reject(PROMPT, "prompts", "too long", num_tokens=9)
    assert record == {"id": "p1", "file": "f", "line": 1, "stage": "prompts", "reason": "too long", "num_tokens": 9}
