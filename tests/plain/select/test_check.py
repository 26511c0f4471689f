"""What a selection returns is checked by key, type, id and text, and every draft is used or rejected once."""

import pytest

from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.select.check import check_selected
from evolve_ray.select.pairs import make_pair, reject_draft

PROMPT = {"prompt_id": "p1", "prompt": "q", "file": "f", "line": 1}


def draft(number, score=0.0):
    return {"draft_id": f"d{number}", "round": number, "text": f"y{number}", "finish_reason": "stop", "score": score}


DRAFTS = [draft(1), draft(2, 1.0), draft(3)]
PAIR = make_pair(PROMPT, DRAFTS[1], DRAFTS[0])
UNUSED = [reject_draft(PROMPT, DRAFTS[2], "not needed")]


def without(key):
    return {name: value for name, value in PAIR.items() if name != key}


def test_rows_as_the_helpers_make_them_pass():
    assert check_selected("mine:s", PROMPT, DRAFTS, ([PAIR], UNUSED)) == {"d1", "d2"}
    numbered = make_pair(PROMPT, DRAFTS[1], DRAFTS[0], numbers={"weight": 1})
    assert check_selected("mine:s", PROMPT, DRAFTS, ([numbered], UNUSED)) == {"d1", "d2"}


@pytest.mark.parametrize(
    ("selected", "message"),
    [
        (None, "returned None, but must return two lists: pairs, rejected drafts"),
        (([without("chosen")], UNUSED), "pair 1: has no 'chosen'; make it with evolve_ray.select.pairs.make_pair"),
        (([without("chosen_finished")], UNUSED), "pair 1: has no 'chosen_finished'"),
        (([PAIR | {"weight": 1.0}], UNUSED), r"has an unknown key 'weight'; numbers for the loss belong into make_pair\("),
        (([PAIR | {"choosen": "y"}], UNUSED), "has an unknown key 'choosen'; did you mean 'chosen'"),
        (([PAIR | {"chosen": 3}], UNUSED), "chosen is 3, but must be a text"),
        (([PAIR | {"chosen": None}], UNUSED), "chosen is None, but must be a text"),
        (([PAIR | {"chosen_finished": 1}], UNUSED), "chosen_finished is 1, but must be true or false"),
        (([PAIR | {"chosen_round": True}], UNUSED), "chosen_round is True, but must be a whole number"),
        (([PAIR | {"chosen": "other"}], UNUSED), "chosen is not the text of draft d2"),
        (([PAIR | {"rejected_id": "d9"}], UNUSED), "rejected_id is 'd9', which is no draft of the prompt"),
        (([PAIR | {"prompt": "other"}], UNUSED), "prompt is 'other', but must be the prompt's"),
        (([PAIR | {"numbers": {"weight": float("nan")}}], UNUSED), "numbers.weight is nan, but must be a finite number"),
        (([PAIR], [{"id": "d3"}]), "rejected row 1: has no id, stage and reason; make it with .*reject_draft"),
        (([PAIR], [UNUSED[0] | {"id": "d9"}]), "rejected row 1: has id 'd9', which is no draft of the prompt"),
    ],
)
def test_a_damaged_row_is_refused_with_plug_prompt_and_key(selected, message):
    with pytest.raises(UserError, match=r"^selection\.name: 'mine:s', prompt p1[,:]") as error:
        check_selected("mine:s", PROMPT, DRAFTS, selected)
    assert error.match(message)


def test_a_draft_that_is_lost_or_counted_twice_is_refused():
    for unused in ([], UNUSED * 2, [reject_draft(PROMPT, DRAFTS[0], "also in the pair")]):
        with pytest.raises(IntegrityError, match="prompt p1 has 3 drafts, but 2 are in pairs and"):
            check_selected("mine:s", PROMPT, DRAFTS, ([PAIR], unused))
