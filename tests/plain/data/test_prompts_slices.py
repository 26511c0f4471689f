"""Which prompts an iteration gets, which are left out, and what given triples become."""

import json
import random

import pyarrow as pa
import pytest

from evolve_ray.data.prompts import (
    HeldOut,
    drop_held_out,
    drop_repeated,
    fresh_order,
    fresh_slice,
    order_again,
    with_token_counts,
)
from evolve_ray.data.read import count_rows
from evolve_ray.data.triples import read_triples
from evolve_ray.errors import UserError
from evolve_ray.store.rows import PROMPT, derive_seed, write_table

ROWS = [
    {"prompt_id": f"p{n}", "prompt": f"text {n}", "answer": None, "split": "train", "file": "f", "line": n} for n in range(40)
]


def ids(rows):
    return [row["prompt_id"] for row in rows]


def slices(rows, seed=0):
    table = pa.Table.from_pylist(rows)
    order = fresh_order(table["prompt_id"], seed=seed)
    parts = [fresh_slice(table, order, iteration=number, per_iteration=13) for number in (1, 2, 3)]
    return [ids(part.to_pylist()) for part in parts]


def test_iterations_get_disjoint_prompts():
    one, two, three = slices(ROWS)
    assert [len(part) for part in (one, two, three)] == [13, 13, 13]
    assert len({*one, *two, *three}) == 39


def test_prompts_of_an_iteration_do_not_depend_on_the_order_of_the_file():
    shuffled = random.Random(1).sample(ROWS, len(ROWS))
    assert slices(shuffled) == slices(ROWS)


def test_prompts_of_an_iteration_depend_on_the_seed():
    assert slices(ROWS, seed=1)[0] != slices(ROWS)[0]


def again(rows, per_iteration, iterations, seed=0):
    table = pa.Table.from_pylist(rows)
    order = fresh_order(table["prompt_id"], seed=seed)
    order = order_again(table, order, seed=seed, per_iteration=per_iteration, needed=per_iteration * iterations)
    numbers = range(1, iterations + 1)
    parts = [fresh_slice(table, order, iteration=number, per_iteration=per_iteration) for number in numbers]
    return [ids(part.to_pylist()) for part in parts]


def test_prompts_that_come_again_are_new_until_all_are_used_up_and_never_twice_in_an_iteration():
    parts = again(ROWS, 13, 9)
    assert parts[:3] == slices(ROWS)
    assert all(len(part) == len(set(part)) == 13 for part in parts)
    asked = [name for part in parts for name in part]
    assert [len(set(asked[first : first + 40])) for first in (0, 40)] == [40, 40], "a pass has every prompt"
    assert asked[:40] != asked[40:80], "the second pass has an order of its own"


def test_order_of_prompts_that_come_again_does_not_depend_on_how_many_iterations_there_are_or_on_the_file():
    assert again(ROWS, 13, 9)[:5] == again(ROWS, 13, 5)
    assert again(random.Random(1).sample(ROWS, len(ROWS)), 13, 9) == again(ROWS, 13, 9)
    assert again(ROWS, 13, 9, seed=1)[4] != again(ROWS, 13, 9)[4]


def test_an_iteration_of_all_prompts_is_a_pass():
    assert [sorted(part) for part in again(ROWS, 40, 3)] == [sorted(ids(ROWS))] * 3


def test_order_is_by_derived_seed_and_then_by_id():
    names = ["p2", "\N{PILE OF POO}", "\N{FULLWIDTH LATIN SMALL LETTER A}", "p10", "p1"]
    expected = sorted(names, key=lambda name: (derive_seed("order", 3, name), name))
    order = fresh_order(pa.chunked_array([names]), seed=3)
    assert [names[place] for place in order.to_pylist()] == expected


def test_slice_of_a_table_is_written_with_the_bytes_of_its_rows(tmp_path):
    table = [{**row, "num_tokens": 3} for row in ROWS]
    streamed = pa.concat_tables([pa.Table.from_pylist(table[first : first + 7], schema=PROMPT) for first in range(0, 40, 7)])
    order = fresh_order(streamed["prompt_id"], seed=0)
    part = fresh_slice(streamed.combine_chunks(), order, iteration=2, per_iteration=13)
    write_table(tmp_path / "streamed", part, PROMPT, group_rows=4096)
    write_table(tmp_path / "rows", part.to_pylist(), PROMPT)
    assert (tmp_path / "streamed").read_bytes() == (tmp_path / "rows").read_bytes()


def test_order_is_not_that_of_the_file():
    assert slices(ROWS)[0] != ids(ROWS[:13])


def held_out(*texts, **more):
    return HeldOut([{"prompt": text, "split": "long"} for text in texts], **more)


def test_training_prompt_that_is_held_out_is_dropped_by_its_text_and_named():
    kept, rejected = drop_held_out(ROWS[:3], held_out("text 1", "elsewhere"))
    assert ids(kept) == ["p0", "p2"]
    assert [(row["id"], row["line"], row["reason"]) for row in rejected] == [
        ("p1", 1, "is also a prompt of evaluation split 'long'")
    ]
    assert drop_held_out(ROWS, HeldOut()) == (ROWS, [])


@pytest.mark.parametrize(
    "text",
    [
        "What is 2+2? ", "\n What  is\t2+2?\r\n", "What is\u00a02+2?", "\ufeffWhat is 2+2?",
        "What\u200b is 2+2?", "What is 2+\u00ad2?",
    ],
)  # fmt: skip
def test_held_out_prompt_is_found_in_other_white_space_and_invisible_characters(text):
    assert held_out("What is 2+2?").split(text) == "long"
    assert held_out(text).split("What is 2+2?") == "long"


def test_held_out_prompt_is_found_in_another_form_of_unicode():
    assert held_out("caf\u00e9").split("cafe\u0301") == "long"
    assert held_out("cafe\u0301").split("caf\u00e9") == "long"


@pytest.mark.parametrize("text", ["What is 2+ 2?", "What is 22?", "What is 2+2", "What is 2\u00b2?", "what is 2+2?"])
def test_other_prompts_are_not_held_out(text):
    assert held_out("What is 2+2?", "What is 22 ?").split(text) is None


def test_held_out_prompt_is_found_where_the_model_is_asked_the_same():
    assert held_out("What is 2+2?", asked=str.lower).split("WHAT is 2+2?") == "long"
    assert held_out("What is 2+2?", asked=str.lower).split("WHAT is 2+3?") is None


def test_row_that_asks_the_same_as_an_earlier_one_is_dropped_with_its_line_unless_its_gold_answer_differs():
    texts = [("a", "1"), ("b", "1"), ("A", "1"), ("A", "2"), ("a", "2"), ("B", "1")]
    table = [{**ROWS[n], "prompt": text, "answer": answer} for n, (text, answer) in enumerate(texts)]
    line_of = {}
    kept, rejected = drop_repeated(table[:4], str.lower, line_of)
    more, also_rejected = drop_repeated(table[4:], str.lower, line_of)
    assert ids(kept + more) == ["p0", "p1", "p3"]
    assert [(row["line"], row["reason"]) for row in rejected + also_rejected] == [
        (2, "asks the model the same as line 0"), (4, "asks the model the same as line 3"),
        (5, "asks the model the same as line 1"),
    ]  # fmt: skip


def test_prompt_at_the_limit_is_kept_and_one_token_more_is_rejected_whole():
    table = [{**ROWS[0], "prompt": "x" * 10}, {**ROWS[1], "prompt": "x" * 11}]
    kept, rejected = with_token_counts(table, len, 10, field="model.context_tokens")
    assert [(row["prompt"], row["num_tokens"]) for row in kept] == [("x" * 10, 10)]
    assert rejected[0]["reason"] == "prompt has 11 tokens, limit 10 (model.context_tokens)"
    assert (rejected[0]["file"], rejected[0]["line"], rejected[0]["num_tokens"], rejected[0]["limit"]) == ("f", 1, 11, 10)


def test_ten_megabyte_prompt_is_rejected_with_its_tokens_and_a_short_reason():
    _, rejected = with_token_counts([{**ROWS[0], "prompt": "x" * 10**7}], len, 4096, field="limit")
    assert "has 10000000 tokens, limit 4096" in rejected[0]["reason"]
    assert len(json.dumps(rejected)) < 1000


def test_rows_of_a_file_are_counted_without_blank_lines(tmp_path):
    (tmp_path / "p.jsonl").write_bytes(b'{"a": 1}\r\n\r\n{"a": 2}\n   \n{"a": 3}')
    assert count_rows(str(tmp_path / "p.jsonl")) == 3


def test_rows_of_a_folder_are_not_counted_before_it_is_loaded(tmp_path):
    assert count_rows(str(tmp_path)) is None


@pytest.fixture
def triples(tmp_path):
    def read(*lines, **more):
        path = tmp_path / "triples.jsonl"
        path.write_text(
            "".join(json.dumps(dict(zip(("prompt", "chosen", "rejected"), line, strict=True))) + "\n" for line in lines)
        )
        return read_triples(str(path), prompt_column="prompt", chosen_column="chosen", rejected_column="rejected", **more)

    return read


def test_triples_become_finished_pairs_of_the_schema(triples):
    (pair,), rejected = triples(("x", "good", "bad"))
    assert set(pair) == set(prompts_schema())
    assert (pair["prompt"], pair["chosen"], pair["rejected"]) == ("x", "good", "bad")
    assert (pair["chosen_finished"], pair["rejected_finished"], pair["chosen_id"], rejected) == (True, True, None, [])


def prompts_schema():
    from evolve_ray.store.rows import PAIR

    return PAIR.names


def test_ties_are_kept_because_they_teach_to_keep_a_draft(triples):
    pairs, _ = triples(("x", "same", "same"))
    assert len(pairs) == 1


def test_every_triple_is_a_pair_or_rejected_with_a_reason(triples):
    lines = [("x", "1", "2"), ("y", "1", "2"), ("x", "1", "2"), ("z", "1", "2"), ("z", "2", "1")]
    pairs, rejected = triples(*lines, limit=2)
    assert [pair["prompt"] for pair in pairs] == ["x", "y"]
    assert [(row["line"], row["reason"]) for row in rejected] == [
        (3, "duplicate"), (4, "beyond the limit of 2"), (5, "beyond the limit of 2"),
    ]  # fmt: skip


def test_faulty_triples_are_named_by_line_and_column(triples):
    with pytest.raises(UserError, match=r"2 unusable rows: .*:1: column 'chosen' is empty; .*:2: column 'rejected' is empty"):
        triples(("x", " ", "b"), ("x", "a", ""))
