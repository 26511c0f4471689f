"""The table of pairs: columns of turns are there only if a row needs them, and whenever it comes, the bytes are the same."""

import pyarrow.parquet as pq

from evolve_ray.select.pairs import make_pair, make_turn
from evolve_ray.stages.pair_table import PairWriter, row_groups
from evolve_ray.store import rows


def draft(name, kind="answer"):
    messages = [{"role": "user", "content": "q"}]
    return {"draft_id": name, "round": 1, "text": name, "finish_reason": "stop", "kind": kind, "messages": messages}


def prompt(number):
    return {"prompt_id": f"p{number}", "prompt": f"q{number}"}


PLAIN = [make_pair(prompt(0), draft("a"), draft("b"), {"weight": 1.0})]
CONTEXT = [make_turn(prompt(1), draft("c"), {"weight": 2.0})]
CRITIQUE = [make_turn(prompt(2), draft("d", "critique"), {"weight": 3.0}, turns={"again": draft("e")})]


def write(path, *shards, schema=rows.PAIR):
    writer = PairWriter(path, schema, "own:plug")
    for pairs in shards:
        writer.write(pairs)
    writer.close()
    return pq.read_schema(path).names


def test_columns_are_there_only_where_a_row_has_a_value(tmp_path):
    path = tmp_path / "pairs.parquet"
    assert write(path, PLAIN) == [*rows.PAIR.names, "numbers"]
    assert write(path, PLAIN, CONTEXT) == [*rows.PAIR.names, "context", "numbers"]
    assert write(path, CONTEXT, [], CRITIQUE) == [*rows.PAIR.names, "context", "kind", "turns", "numbers"]


def test_rows_before_a_further_column_are_kept_in_their_row_groups(tmp_path):
    path = tmp_path / "pairs.parquet"
    write(path, [], PLAIN, [], CONTEXT, CRITIQUE)
    groups = list(row_groups(path))
    assert [[row["prompt_id"] for row in group] for group in groups] == [[], ["p0"], [], ["p1"], ["p2"]]
    assert (groups[1][0]["context"], groups[3][0]["context"]) == (None, [{"role": "user", "content": "q"}])
    assert groups[4][0]["turns"][0]["text"] == "e"
    assert not list(tmp_path.glob(".*")), "the narrow file is left"


def test_conversations_and_contexts_stand_in_one_table(tmp_path):
    talk = ({"role": "system", "content": "s"}, {"role": "user", "content": "q"})
    row = make_turn({"prompt_id": "p", "prompt": talk}, draft("c"))
    write(tmp_path / "pairs.parquet", [row], schema=rows.PAIR.append(rows.MESSAGES))
    (back,) = rows.read_table(tmp_path / "pairs.parquet")
    assert (back["prompt"], back["context"]) == (talk, row["context"])
