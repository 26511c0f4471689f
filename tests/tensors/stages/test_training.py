"""A training whose rows lack a turn is refused before anything is loaded, with the pair and the name."""

import pyarrow as pa
import pytest

from evolve_ray.config.options import Training
from evolve_ray.errors import UserError
from evolve_ray.select.pairs import make_pair, make_turn
from evolve_ray.stages.training import check_numbers
from evolve_ray.store import rows
from evolve_ray.store.run import Stage
from evolve_ray.train.objectives import DIRECT, Objective

PROMPT = {"prompt_id": "p", "prompt": "q"}
OWN = Objective(lambda policy, reference, training: (policy["again"], {}), DIRECT, reference=False, turns=("again",))
MISNAMED = Objective(lambda policy, reference, training: (policy["again"], {}), DIRECT, reference=False, turns="again")


def draft(name):
    return {"draft_id": name, "round": 1, "text": name, "finish_reason": "stop", "messages": [{"role": "user", "content": "q"}]}


A, B = draft("a"), draft("b")
SECOND = {"chosen_2": A, "rejected_2": None}


def committed(tmp_path, *table):
    stage = Stage(tmp_path / "pairs", "pairs", "k")
    details = [field for field in rows.TURN_DETAILS if any(row.get(field.name) is not None for row in table)]
    rows.write_table(stage.start() / "pairs.parquet", rows.to_table(list(table), pa.schema([*rows.PAIR, *details])), rows.PAIR)
    return stage.commit(num_rows=len(table))


def test_rows_with_all_turns_pass(tmp_path):
    pairs = committed(tmp_path, make_turn(PROMPT, A, rejected=B, turns=SECOND), make_turn(PROMPT, B, rejected=A, turns=SECOND))
    check_numbers(pairs, Training(objective="turns_dpo"), "own:plug")
    check_numbers(pairs, Training(objective="dpo"), "own:plug")


@pytest.mark.parametrize("objective", ["turns_dpo", f"{__name__}:OWN"])
def test_row_without_a_turn_is_named_with_the_turn(tmp_path, objective):
    lacking = make_turn(PROMPT, B, rejected=A, turns={"chosen_3": A})
    pairs = committed(tmp_path, make_turn(PROMPT, A, rejected=B, turns=SECOND | {"again": A}), lacking)
    name = "chosen_2" if objective == "turns_dpo" else "again"
    wanted = rf"needs the turn '{name}', but pair {lacking['pair_id']} has chosen_3; selection 'own:plug' must give"
    with pytest.raises(UserError, match=wanted):
        check_numbers(pairs, Training(objective=objective), "own:plug")


def test_table_without_turns_is_refused_by_its_first_pair(tmp_path):
    pair = make_pair(PROMPT, A, B)
    with pytest.raises(UserError, match=rf"needs the turn 'chosen_2', but pair {pair['pair_id']} has none; selection 'rule'"):
        check_numbers(committed(tmp_path, pair), Training(objective="turns_dpo"), "rule")


def test_turns_that_are_no_names_are_refused_when_the_plug_is_loaded(tmp_path):
    with pytest.raises(UserError, match=r"MISNAMED' has turns 'again', but must have a tuple of plain names"):
        check_numbers(committed(tmp_path, make_pair(PROMPT, A, B)), Training(objective=f"{__name__}:MISNAMED"), "own:plug")
