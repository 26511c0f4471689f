"""Selections that see every kind, and the second pass over all rows of an iteration, on committed shards."""

import pytest

from evolve_ray.audit import conservation
from evolve_ray.errors import UserError
from evolve_ray.select.pairs import make_pair, make_turn, reject_draft
from evolve_ray.stages import pairs as stages_pairs
from evolve_ray.store import rows
from tests.plain.stages.test_pairs import SCORES, tables

__all__ = ["tables"]
ALL_SCORED = SCORES | {"p2-2": 0.75}
SEEN: list = []


def critiques(prompt, drafts, options, others):
    """Trains each critique, with the revision that follows it as a further turn."""
    SEEN.append((drafts, others))
    (remark,) = others
    first, second = sorted(drafts, key=lambda d: d["draft_id"])
    return [make_turn(prompt, remark, turns={"first": first})], [reject_draft(prompt, second, "not needed")]


def as_before(prompt, drafts, options):
    """An own selection without `others` gets answers alone, with their messages."""
    assert {d["kind"] for d in drafts} == {"answer"}
    assert all(d["messages"] for d in drafts)
    first, second = sorted(drafts, key=lambda d: -(d["score"] or 0))
    return [make_pair(prompt, first, second, {"reward": 1.0})], []


def heaviest(rows, options, args):
    """Weights by the difference of scores; rows below a bound are left out."""
    values = {row["pair_id"]: row["chosen_score"] - row["rejected_score"] for row in rows}
    assert len(values) == len(list(rows)), "the rows can be read again"
    return {pair_id: value for pair_id, value in values.items() if value > args["bound"]}


def select(tables, *overrides, scores=ALL_SCORED):
    context, *inputs = tables(scores, *overrides)
    manifest = stages_pairs.select(context, 1, *inputs[1:])
    names = ("prompts", "generations", "scores")
    assert list(conservation.check(manifest, dict(zip(names, inputs, strict=True)))) == []
    return manifest, rows.read_table(manifest.path("pairs.parquet")), rows.read_jsonl(manifest.path("rejected.jsonl"))


def test_selection_with_others_gets_every_kind_with_the_messages_of_its_ask(tables):
    SEEN.clear()
    manifest, table, rejected = select(tables, f"selection.name={__name__}:critiques", "strategy.name=critique")
    (answers, others), *_ = SEEN
    assert [(d["kind"], d["correct"], d["score"]) for d in others] == [("critique", None, None)]
    assert [message["content"] for message in others[0]["messages"]] == ["q0", "y1", "check"]
    assert [message["content"] for message in answers[0]["messages"]] == ["q0"]
    assert [row["kind"] for row in table] == ["critique"] * 3
    assert [row["context"][-1]["content"] for row in table] == ["check"] * 3
    assert table[0]["turns"][0]["draft_id"] == "p0-1"
    assert {row["reason"] for row in rejected} == {"not needed"}
    assert manifest.stats == {"num_in": 9, "num_rows": 3, "num_used": 6, "num_rejected": 3}


def test_own_selection_without_others_sees_what_it_saw(tables):
    manifest, table, _ = select(tables, f"selection.name={__name__}:as_before")
    assert manifest.stats == {"num_in": 6, "num_rows": 3, "num_used": 6, "num_rejected": 0}
    assert list(table[0]) == [*rows.PAIR.names, "numbers"]


def test_top_share_leaves_out_rows_with_a_reason(tables):
    """Differences 1, 1 and .25: two thirds are two rows; the drafts of the third are in no row now."""
    manifest, table, rejected = select(tables, "selection.top_share=0.6")
    assert [row["prompt_id"] for row in table] == ["p0", "p1"]
    assert {(row["id"], row["line"], row["reason"]) for row in rejected} == {
        (name, 2, "its pair is not among the top 0.6 of the iteration (selection.top_share)") for name in ("p2-1", "p2-2")
    }
    assert manifest.stats == {"num_in": 6, "num_rows": 2, "num_used": 4, "num_rejected": 2, "num_left_out": 1}
    assert [path.name for path in manifest.folder.glob(".*")] == []


def test_own_function_weights_rows_after_the_top_share(tables):
    own = (f"selection.whole={__name__}:heaviest", "selection.whole_args.bound=0.5")
    manifest, table, rejected = select(tables, *own, "selection.top_share=0.99")
    assert [row["numbers"] for row in table] == [{"weight": 1.0}, {"weight": 1.0}]
    assert rejected[-1]["reason"] == f"its pair is left out by {__name__}:heaviest (selection.whole)"
    assert manifest.stats["num_left_out"] == 1


def test_weights_stand_beside_the_numbers_of_the_selection(tables):
    own = (f"selection.whole={__name__}:heaviest", "selection.whole_args.bound=0.5")
    _, numbered, _ = select(tables, *own, f"selection.name={__name__}:as_before")
    assert [row["numbers"] for row in numbered] == [{"reward": 1.0, "weight": 1.0}] * 2


def unknown(rows, options):
    return ["no such pair"]


def heavy(rows, options):
    return {row["pair_id"]: float("nan") for row in rows}


def nothing(rows, options):
    return None


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("unknown", "returned 'no such pair', which is the id of no row"),
        ("heavy", "the weight nan, but must give a finite number"),
        ("nothing", "returned None, but must return pair ids, or weights"),
    ],
)  # fmt: skip
def test_wrong_results_are_refused(tables, name, message):
    with pytest.raises(UserError, match=rf"^selection\.whole: '{__name__}:{name}' .*{message}"):
        select(tables, f"selection.whole={__name__}:{name}")
