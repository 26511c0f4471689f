"""`make_turn`: rows of any response after its own messages, with further turns; each wrong one is refused by name."""

import pytest

from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.select.check import check_selected
from evolve_ray.select.pairs import make_pair, make_turn, reject_draft

PROMPT = {"prompt_id": "p", "prompt": "q", "file": "f", "line": 1}
ASKED = ({"role": "user", "content": "q"}, {"role": "assistant", "content": "y"}, {"role": "user", "content": "check"})


def draft(name, messages=ASKED, kind="critique", **more):
    return {"draft_id": name, "parent_id": None, "sample": 0, "round": 2, "kind": kind, "text": f"text of {name}",
            "finish_reason": "stop", "score": None, "messages": messages} | more  # fmt: skip


A, B = draft("a"), draft("b")
VERDICT = draft("v", ASKED[:1], "verdict", token_ids=[5, 6], finish_reason="length")


def check(*rows, drafts=(A, B, VERDICT)):
    used = check_selected("own:plug", PROMPT, list(drafts), (list(rows), []))
    assert used == {one["draft_id"] for one in drafts}


def test_a_turn_stands_after_its_messages_over_another_answer_to_them():
    row = make_turn(PROMPT, A, {"weight": 0.5}, rejected=B)
    assert (row["context"], row["kind"], row["numbers"]) == (list(ASKED), "critique", {"weight": 0.5})
    assert (row["chosen_id"], row["rejected_id"], row["prompt"]) == ("a", "b", "q")
    check(row, drafts=(A, B))


def test_alone_both_sides_are_the_draft_and_an_answer_has_no_kind():
    row = make_turn(PROMPT, draft("c", kind="answer"))
    assert (row["chosen_id"], row["rejected_id"], "kind" in row, "turns" in row) == ("c", "c", False, False)


def test_its_id_depends_on_texts_context_and_further_turns():
    other = draft("a", ASKED[:1])
    rows = [
        make_turn(PROMPT, A), make_turn(PROMPT, other), make_turn(PROMPT, A, rejected=B), make_pair(PROMPT, A, A),
        *(make_turn(PROMPT, A, turns=turns) for turns in ({"v": VERDICT}, {"w": VERDICT}, {"v": None})),
    ]  # fmt: skip
    assert len({row["pair_id"] for row in rows}) == len(rows)
    assert make_turn(PROMPT, A)["pair_id"] == make_turn(PROMPT, dict(A, draft_id="z"))["pair_id"]


def test_further_turns_keep_their_own_messages_and_tokens():
    row = make_turn(PROMPT, A, rejected=B, turns={"chosen_2": VERDICT, "rejected_2": None})
    second, missing = row["turns"]
    assert (second["name"], second["context"], second["token_ids"], second["finished"]) == ("chosen_2", [ASKED[0]], [5, 6], False)
    assert (missing["name"], missing["context"], missing["text"], missing["draft_id"]) == ("rejected_2", None, "", None)
    check(row)


def test_sides_of_different_asks_are_refused():
    with pytest.raises(UserError, match="drafts a and v answer different messages"):
        make_turn(PROMPT, A, rejected=VERDICT)
    with pytest.raises(UserError, match="draft a has no messages"):
        make_turn(PROMPT, draft("a", None))


def test_a_draft_that_is_only_a_further_turn_is_used():
    row = make_turn(PROMPT, A, rejected=B, turns={"v": VERDICT})
    with pytest.raises(IntegrityError, match="has 3 drafts, but 3 are in pairs and 1 rejected"):
        check_selected("own:plug", PROMPT, [A, B, VERDICT], ([row], [reject_draft(PROMPT, VERDICT, "twice")]))


ROW = make_turn(PROMPT, A, rejected=B, turns={"v": VERDICT})
TURN = ROW["turns"][0]


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (ROW | {"context": "q"}, r"pair 1: context is 'q', but must be messages"),
        (ROW | {"kind": None}, r"pair 1: chosen_id is of kind 'critique', but the row of 'answer'; make it with .*make_turn"),
        (ROW | {"kind": 3}, r"kind is 3|of kind 'critique', but the row of 3"),
        (ROW | {"turns": [{"name": "v"}]}, r"turns is .*must be a list of turns; make it with .*make_turn"),
        (ROW | {"turns": [TURN | {"name": "chosen"}]}, r"a turn with the name 'chosen', but needs a plain one of its own"),
        (ROW | {"turns": [TURN | {"name": "a_after_b"}]}, r"a turn with the name 'a_after_b'"),
        (ROW | {"turns": [TURN, TURN]}, r"a turn with the name 'v'"),
        (ROW | {"turns": [TURN | {"text": "other"}]}, r"turn 'v' is not the draft 'v' after its messages"),
        (ROW | {"contxt": []}, r"has an unknown key 'contxt'; did you mean 'context'\?"),
        (make_pair(PROMPT, A, B), r"is of kind 'critique', but the row of 'answer'"),
    ],
)
def test_rows_that_are_not_as_make_turn_makes_them_are_refused(row, message):
    with pytest.raises(UserError, match=message):
        check_selected("own:plug", PROMPT, [A, B, VERDICT], ([row], []))
