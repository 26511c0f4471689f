"""Prompts are read as they are; every fault of a file is named with its line, all faults at once."""

import json

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from evolve_ray.data.prompts import read_prompts
from evolve_ray.data.read import count_rows
from evolve_ray.errors import UserError
from evolve_ray.store import rows

ODD_TEXTS = {
    "emoji": "\U0001f469\u200d\U0001f680 go",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202eabc\u202c",
    "NUL": "a\0b",
    "line separators": "a\u2028b\u2029c\x85d\x0be",
    "composed": "caf\u00e9",
    "decomposed": "cafe\u0301",
    "white space around": "  a \n\n",
    "byte order mark inside": "a\ufeffb",
}


@pytest.fixture
def jsonl(tmp_path):
    """Writes lines as bytes and reads them as prompts with answers."""

    def read(*lines, end=b"\n", **columns):
        path = tmp_path / "prompts.jsonl"
        path.write_bytes(end.join(line if isinstance(line, bytes) else json.dumps(line).encode() for line in lines) + end)
        return read_prompts(str(path), **{"prompt_column": "prompt", **columns})

    return read


def faults(jsonl, *lines, **columns):
    with pytest.raises(UserError) as caught:
        jsonl(*lines, **columns)
    return str(caught.value)


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (b'{"prompt": "\xff"}', "is not UTF-8 at byte 12 of the line"),
        (b'{"prompt": "a"', "is not a JSON object: "),
        (b'{"prompt": "a", "prompt": "b"}', "is not a JSON object: an object has the same key twice"),
        (b'{"prompt": "a", "more": {"x": 1, "x": 2}}', "is not a JSON object: an object has the same key twice"),
        (b'{"prompt": NaN}', "is not a JSON object: NaN is not a JSON number"),
        (b'{"prompt": "a", "x": -Infinity}', "is not a JSON object: -Infinity is not a JSON number"),
        (b'["prompt"]', "is a JSON list, but must be a JSON object"),
        (b"3", "is a JSON int, but must be a JSON object"),
        (b"[" * 100_000, "is not a JSON object: "),
        (b'{"question": "a", "id": 1}', "has no column 'prompt'; its columns are: question, id"),
        (b"{}", "has no column 'prompt'; its columns are: none"),
        (b'{"prompt": ""}', "column 'prompt' is empty"),
        (b'{"prompt": " \\n\\t"}', "column 'prompt' is empty"),
        (b'{"prompt": "a\\ud83d"}', "column 'prompt' contains half of a surrogate pair"),
        (b'{"prompt": true}', "column 'prompt' is bool, but must be a string"),
        (b'{"prompt": null}', "column 'prompt' is NoneType, but must be a string"),
        (b'{"prompt": ["a"]}', "column 'prompt' is list, but must be a string"),
    ],
)
def test_faulty_line_is_named_with_file_line_and_reason(jsonl, tmp_path, line, message):
    said = faults(jsonl, {"prompt": "fine"}, b"", line, {"prompt": "fine too"})
    assert said.startswith(f"{tmp_path / 'prompts.jsonl'}: 1 unusable row: {tmp_path / 'prompts.jsonl'}:3: {message}")


def test_all_faults_are_counted_and_the_first_twenty_shown(jsonl, tmp_path):
    said = faults(jsonl, *[{"prompt": "fine"} if number % 2 else {"prompt": ""} for number in range(50)])
    shown = [number for number in range(1, 51) if f"prompts.jsonl:{number}: " in said]
    assert shown == list(range(1, 41, 2))
    assert ": 25 unusable rows: " in said
    assert said.endswith("; and 5 more")


def test_faults_of_all_columns_are_found_in_one_reading(jsonl):
    said = faults(jsonl, {"prompt": "", "answer": "x"}, {"prompt": "a"}, answer_column="answer")
    assert "prompts.jsonl:1: column 'prompt' is empty" in said
    assert "prompts.jsonl:2: has no column 'answer'" in said


@pytest.mark.parametrize("text", ODD_TEXTS.values(), ids=ODD_TEXTS.keys())
@pytest.mark.parametrize("escaped", [True, False])
def test_text_is_byte_equal_through_reading_and_parquet(jsonl, tmp_path, text, escaped):
    line = json.dumps({"prompt": text, "answer": text, "id": text}, ensure_ascii=escaped).encode()
    (row,), _ = jsonl(line, answer_column="answer", id_column="id")
    rows.write_table(tmp_path / "t.parquet", [{**row, "num_tokens": 1}], rows.PROMPT)
    (back,) = rows.read_table(tmp_path / "t.parquet")
    assert [back[name].encode() for name in ("prompt", "answer", "prompt_id")] == [text.encode()] * 3


def test_composed_and_decomposed_spelling_are_two_prompts(jsonl):
    table, rejected = jsonl({"prompt": ODD_TEXTS["composed"]}, {"prompt": ODD_TEXTS["decomposed"]})
    assert (len({row["prompt_id"] for row in table}), rejected) == (2, [])


def test_byte_order_mark_crlf_and_blank_lines_change_nothing(jsonl):
    plain, _ = jsonl(b'{"prompt": "a"}', b'{"prompt": "b"}')
    marked, _ = jsonl(b'\xef\xbb\xbf{"prompt": "a"}', b"", b"  ", b'{"prompt": "b"}', b"", end=b"\r\n")
    assert [row["line"] for row in marked] == [1, 4]
    assert [{**row, "line": 0} for row in marked] == [{**row, "line": 0} for row in plain]


def test_last_line_needs_no_newline(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"prompt": "a"}\n{"prompt": "b"}')
    table, _ = read_prompts(str(tmp_path / "p.jsonl"), prompt_column="prompt")
    assert [row["prompt"] for row in table] == ["a", "b"]


@pytest.mark.parametrize(("answer", "text"), [(b"42", "42"), (b"-1.5", "-1.5"), (b"0", "0")])
def test_number_serves_as_an_answer(jsonl, answer, text):
    (row,), _ = jsonl(b'{"prompt": "a", "answer": ' + answer + b"}", answer_column="answer")
    assert row["answer"] == text


def test_number_beyond_every_float_is_refused(jsonl):
    assert "1e400" in faults(jsonl, b'{"prompt": "a", "answer": 1e400}', answer_column="answer")


def test_rows_keep_order_file_and_line(jsonl, tmp_path):
    table, _ = jsonl({"prompt": "b"}, {"prompt": "a"}, split="heldout")
    assert [(row["prompt"], row["line"]) for row in table] == [("b", 1), ("a", 2)]
    assert {(row["file"], row["split"], row["answer"]) for row in table} == {(str(tmp_path / "prompts.jsonl"), "heldout", None)}


def test_duplicates_become_one_prompt_and_are_counted(jsonl):
    table, rejected = jsonl({"prompt": "a"}, {"prompt": "b"}, {"prompt": "a"}, {"prompt": "a"})
    assert [row["prompt"] for row in table] == ["a", "b"]
    assert [(row["line"], row["reason"]) for row in rejected] == [(3, "duplicate of line 1"), (4, "duplicate of line 1")]


def test_same_id_with_another_text_names_both_lines(jsonl):
    said = faults(jsonl, {"prompt": "a", "id": 7}, {"prompt": "b", "id": 8}, {"prompt": "c", "id": 7}, id_column="id")
    assert "prompts.jsonl:3: id '7' is also on line 1, with another text" in said


def test_same_id_with_another_answer_is_a_conflict(jsonl):
    lines = [{"prompt": "a", "id": "x", "answer": answer} for answer in ("1", "2")]
    assert "id 'x' is also on line 1" in faults(jsonl, *lines, id_column="id", answer_column="answer")


def test_same_id_with_the_same_text_is_a_duplicate(jsonl):
    table, rejected = jsonl({"prompt": "a", "id": "x"}, {"prompt": "a", "id": "x"}, id_column="id")
    assert ([row["prompt_id"] for row in table], len(rejected)) == (["x"], 1)


@pytest.mark.parametrize("data", [b"", b"\n\n", b"\xef\xbb\xbf", b"  \r\n"])
def test_file_without_rows_is_refused(tmp_path, data):
    (tmp_path / "p.jsonl").write_bytes(data)
    with pytest.raises(UserError, match=r"p\.jsonl: contains no prompts"):
        read_prompts(str(tmp_path / "p.jsonl"), prompt_column="prompt")


@pytest.mark.parametrize("name", ["none.jsonl", "none.json", "none.parquet"])
@pytest.mark.parametrize("read", [count_rows, lambda path: read_prompts(path, prompt_column="prompt")])
def test_missing_file_is_named(tmp_path, name, read):
    with pytest.raises(UserError, match=r"none.*: no such file"):
        read(str(tmp_path / name))


def test_parquet_is_read_with_row_numbers(tmp_path):
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table({"q": ["a", "b", "a"], "a": [1, 2, 1]}), path)
    table, rejected = read_prompts(str(path), prompt_column="q", answer_column="a")
    assert [(row["prompt"], row["answer"], row["line"]) for row in table] == [("a", "1", 1), ("b", "2", 2)]
    assert [row["line"] for row in rejected] == [3]


def test_faults_in_parquet_are_named_by_row(tmp_path):
    pq.write_table(pa.table({"q": ["a", None, ""]}), tmp_path / "p.parquet")
    with pytest.raises(UserError, match=r"p\.parquet:2: .* is NoneType.*p\.parquet:3: .* is empty"):
        read_prompts(str(tmp_path / "p.parquet"), prompt_column="q")


def test_damaged_parquet_is_refused(tmp_path):
    (tmp_path / "p.parquet").write_bytes(b"PAR1 nothing")
    with pytest.raises(UserError, match="cannot be read as a Parquet file"):
        read_prompts(str(tmp_path / "p.parquet"), prompt_column="q")


def test_folder_saved_by_datasets_is_read_with_its_split(tmp_path):
    datasets = pytest.importorskip("datasets")
    one = datasets.Dataset.from_dict({"prompt": ["a", "b"]})
    one.save_to_disk(tmp_path / "one")
    datasets.DatasetDict({"train": one, "test": one.select([1])}).save_to_disk(tmp_path / "both")
    read = {name: read_prompts(str(tmp_path / name), prompt_column="prompt", source_split="test")[0] for name in ("one", "both")}
    assert {name: [row["prompt"] for row in table] for name, table in read.items()} == {"one": ["a", "b"], "both": ["b"]}
    with pytest.raises(UserError, match=r"both: is not a file, and `datasets` cannot load it \(split 'dev'\)"):
        read_prompts(str(tmp_path / "both"), prompt_column="prompt", source_split="dev")


def test_further_columns_and_drafts_of_a_row_are_kept_as_they_are(jsonl, tmp_path):
    lines = ({"prompt": "a", "hint": "é", "level": 1.50, "steps": [1, {"x": None}], "draft": "b"},)
    (row,), _ = jsonl(*lines, columns=["hint", "level", "steps"], draft_column="draft")
    assert json.loads(row["columns"]) == {"hint": "é", "level": 1.5, "steps": [1, {"x": None}]}
    assert row["draft"] == "b"
    schema = rows.prompt_schema(draft=True, columns=True)
    rows.write_table(tmp_path / "t.parquet", [{**row, "num_tokens": 1}], schema)
    assert rows.read_table(tmp_path / "t.parquet") == [{**row, "num_tokens": 1}]
    (plain,), _ = jsonl(*lines)
    assert plain.keys() == set(rows.PROMPT.names) - {"num_tokens"}


def test_a_missing_further_column_is_refused_with_the_nearest_name(jsonl):
    said = faults(jsonl, {"prompt": "a", "hint": "x"}, {"prompt": "b", "hnt": "x"}, columns=["hint"])
    assert "prompts.jsonl:2: has no column 'hint'; did you mean 'hnt'?" in said
    assert "has no column 'level'; its columns are: prompt" in faults(jsonl, {"prompt": "a"}, columns=["level"])


def test_a_cell_that_is_no_json_is_refused(tmp_path):
    table = pa.table({"prompt": ["a"], "hint": pa.array([b"\xff"])})
    pq.write_table(table, tmp_path / "t.parquet")
    with pytest.raises(UserError, match=r"t.parquet:1: column 'hint' cannot be written as JSON: .*; convert it"):
        read_prompts(str(tmp_path / "t.parquet"), prompt_column="prompt", columns=["hint"])
