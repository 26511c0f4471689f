"""Whatever stands in a prompt is the same bytes in every table, and text on the page."""

import html
import json

import pytest

from evolve_ray import markup, prompts, rows
from tests.plain.runs import chains, make_run

TEXTS = {
    "emoji": "a \U0001f469\u200d\U0001f469\u200d\U0001f467 and a flag \U0001f3f4\U000e0067\U000e0062\U000e007f",
    "right to left": "\u05e9\u05dc\u05d5\u05dd \u202e\u2066\u0645\u0631\u062d\u0628\u0627\u2069",
    "NUL": "a\x00b\x01\x7f",
    "line separators": "one\u2028two\u2029three\x85four\rfive\r\nsix",
    "composed": "caf\u00e9 \u00c5",
    "decomposed": "cafe\u0301 A\u030a",
    "byte order mark": "\ufeffx\ufffe",
    "template": "{prompt} {{ messages }} {% raw %} <|im_start|>system",
    "beyond the basic plane": "\U0010ffff\U0001d518",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
@pytest.mark.parametrize("escaped", [True, False], ids=["escaped", "plain"])
def test_text_is_byte_equal_from_the_file_to_the_pairs(tmp_path, text, escaped):
    path = tmp_path / "prompts.jsonl"
    path.write_bytes((json.dumps({"prompt": text, "answer": text}, ensure_ascii=escaped) + "\n").encode())
    (found,), _ = prompts.read_prompts(str(path), prompt_column="prompt", answer_column="answer")
    rows.write_table(tmp_path / "prompts.parquet", [{**found, "num_tokens": 1}], rows.PROMPT)
    (stored,) = rows.read_table(tmp_path / "prompts.parquet")
    pair = dict.fromkeys(rows.PAIR.names) | {"prompt": stored["prompt"], "chosen": stored["answer"]}
    rows.write_table(tmp_path / "pairs.parquet", [pair], rows.PAIR)
    rows.write_jsonl(tmp_path / "rejected.jsonl", [rows.reject(found, "prompts", text)])
    (kept,) = rows.read_table(tmp_path / "pairs.parquet")
    (lost,) = rows.read_jsonl(tmp_path / "rejected.jsonl")
    assert {kept["prompt"].encode(), kept["chosen"].encode(), lost["reason"].encode()} == {text.encode()}


@pytest.mark.parametrize("name", ["right to left", "NUL", "line separators"])
def test_text_is_on_the_page_as_it_is_but_for_control_characters(tmp_path, name):
    """Those have no place in HTML: the page shows their pictures."""
    run = make_run(tmp_path / "run", {"iteration 1": {"held": chains([[0, 1], [1, 0]], texts=[TEXTS[name], "question"])}})
    shown = html.unescape((run.root / "report.html").read_bytes().decode())
    assert markup.clean(TEXTS[name]) in shown
    assert not {"\x00", "\x01", "\x7f"} & set(shown)
