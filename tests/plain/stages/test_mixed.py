"""Rows of earlier iterations and given ones in a training: counts, origins, bytes after a restart, and what is refused."""

import shutil
from pathlib import Path

import pytest

from evolve_ray.audit import conservation
from evolve_ray.config.load import load
from evolve_ray.errors import UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.refine.template import load_template
from evolve_ray.select.pairs import make_pair, make_turn
from evolve_ray.stages.mixed import mix
from evolve_ray.store import rows
from evolve_ray.store.run import Run, Stage

MESSAGES = [{"role": "user", "content": "q"}]
SHARES = ["training.replay=0.3", "training.given=0.2", "activation.path=triples.jsonl"]


def pair(name, **more):
    sides = [
        {"draft_id": f"{name} {side}", "round": 1, "text": side, "finish_reason": "stop", "messages": MESSAGES} for side in "ab"
    ]
    if more.pop("turn", False):
        return make_turn({"prompt_id": name, "prompt": "q"}, sides[0], rejected=sides[1])
    return make_pair({"prompt_id": name, "prompt": "q"}, *sides, **more)


def committed(folder, table, numbers=()):
    stage = Stage(folder, "pairs", f"key of {folder.name}")
    schema = rows.with_details(rows.PAIR, rows.TURN_DETAILS, table)
    rows.write_table(stage.start() / "pairs.parquet", rows.to_table(table, rows.numbered(schema, list(numbers))), rows.PAIR)
    return stage.commit(num_in=len(table), num_rows=len(table))


@pytest.fixture
def begun(recipe, tmp_path):
    """A run with pairs of some iterations, the last one being the present one; `mix` of it with its context."""

    def make(tables, *overrides, triples=(), numbers=()):
        config = load(recipe(), list(overrides))
        run, said = Run(tmp_path / "run"), []
        template = load_template("tiny", "conversation")
        context = Context(config, run, said.append, lambda: None, False, template, Policy(Path(), ""))
        for number, table in enumerate(tables, start=1):
            pairs = committed(run.iteration(number) / "pairs", table, numbers)
        if triples:
            context.triples["activation"] = committed(run.iteration(0) / "activation_pairs", list(triples))
        return context, pairs, said

    return make


def names(prefix, number):
    return [pair(f"{prefix}{place}") for place in range(number)]


def origins(manifest):
    return rows.read_table(manifest.path("origins.parquet"))


def test_nothing_is_made_where_nothing_is_mixed_in(begun):
    context, pairs, said = begun([names("x", 4), names("y", 4)])
    assert mix(context, 2, pairs) is pairs
    assert said == []
    assert not (context.run.iteration(2) / "mixed").exists()


def test_own_rows_come_first_then_equally_many_of_each_iteration_then_given_ones(begun):
    tables = [names("x", 6), names("y", 6), names("z", 10)]
    context, pairs, said = begun(tables, *SHARES, triples=names("t", 9))
    before = [(context.run.iteration(n) / "pairs" / "pairs.parquet").read_bytes() for n in (1, 2)]
    mixed = mix(context, 3, pairs)
    assert (mixed.stats["num_own"], mixed.stats["num_replayed"], mixed.stats["num_given"]) == (10, 6, 4)
    assert mixed.stats["replayed"] == {"1": 3, "2": 3}
    assert said[-1] == "  iteration 3: mixed: 10 own rows, 6 replayed from iterations 1-2, 4 given"
    table, found = rows.read_table(mixed.path("pairs.parquet")), origins(mixed)
    assert [row["prompt_id"][0] for row in table] == [*"z" * 10, *"x" * 3, *"y" * 3, *"t" * 4]
    assert [(row["origin"], row["iteration"], row["table"]) for row in found[9:]] == [
        ("own", 3, "pairs"), *[("replayed", 1, "pairs")] * 3, *[("replayed", 2, "pairs")] * 3,
        *[("given", 0, "activation_pairs")] * 4,
    ]  # fmt: skip
    assert [row["pair_id"] for row in table] == [row["pair_id"] for row in found]
    assert table[:10] == tables[2]
    assert [(context.run.iteration(n) / "pairs" / "pairs.parquet").read_bytes() for n in (1, 2)] == before
    sources = {"pairs": pairs, "activation_pairs": context.triples["activation"]}
    assert list(conservation.check(mixed, sources)) == []
    other = committed(context.run.iteration(3) / "other", names("z", 9))
    assert any("its own rows are not all pairs" in fault for fault in conservation.check(mixed, {"pairs": other}))


def test_another_start_writes_the_same_bytes_and_a_committed_table_is_returned(begun):
    context, pairs, _ = begun([names("x", 6), names("z", 5)], *SHARES, triples=names("t", 9))
    first = mix(context, 2, pairs)
    contents = {path.name: path.read_bytes() for path in first.folder.iterdir()}
    assert mix(context, 2, pairs).identity == first.identity
    shutil.rmtree(first.folder)  # as after a kill before the commit
    Stage(first.folder, "mixed", first.key).start()
    assert {path.name: path.read_bytes() for path in mix(context, 2, pairs).folder.iterdir()} == contents


def test_what_there_is_is_taken_and_the_lack_is_said(begun):
    context, pairs, said = begun([names("x", 2), names("z", 10)], *SHARES, triples=names("t", 1))
    stats = mix(context, 2, pairs).stats
    assert (stats["num_replayed"], stats["wanted_replayed"], stats["num_given"], stats["wanted_given"]) == (2, 6, 1, 4)
    assert said[-1] == (
        "  iteration 2: mixed: 10 own rows, 2 replayed from iteration 1 (there are no more; the share is 6), "
        "1 given (there are no more; the share is 4)"
    )


def test_first_iteration_has_nothing_to_replay(begun):
    context, pairs, said = begun([names("z", 7)], "training.replay=0.3")
    assert mix(context, 1, pairs).stats["num_rows"] == 7
    assert said[-1] == "  iteration 1: mixed: 7 own rows, 0 replayed (there are no more; the share is 3)"


def test_a_row_that_comes_again_with_its_prompt_is_trained_once(begun):
    again = names("x", 4)
    context, pairs, _ = begun([again, again[:3], [*again[:2], *names("z", 2)]], "training.replay=0.5")
    mixed = mix(context, 3, pairs)
    ids = [row["pair_id"] for row in rows.read_table(mixed.path("pairs.parquet"))]
    assert len(ids) == len(set(ids)) == 6
    assert mixed.stats["replayed"] == {"1": 2, "2": 0}


def test_rows_of_turns_and_pairs_are_one_table(begun):
    context, pairs, _ = begun([names("x", 4), [pair(f"z{n}", turn=True) for n in range(4)]], "training.replay=0.5")
    table = rows.read_table(mix(context, 2, pairs).path("pairs.parquet"))
    assert [row["context"] is None for row in table] == [False] * 4 + [True] * 4


def test_a_triple_of_two_equal_answers_is_not_given_to_a_loss_that_compares_them(begun):
    same = pair("s")
    same |= {"rejected": same["chosen"]}
    for objective, number in (("dpo", 1), ("sft", 2)):
        overrides = [*SHARES[1:], f"training.objective={objective}"]
        context, pairs, _ = begun([names("z", 8)], *overrides, triples=[same, pair("t")])
        assert mix(context, 1, pairs).stats["num_given"] == number
        shutil.rmtree(context.run.root)


def test_rows_with_other_numbers_are_refused(begun, tmp_path):
    weighted = [pair(f"x{n}", numbers={"weight": 1.0}) for n in range(3)]
    context, _, _ = begun([weighted], "training.replay=0.5", numbers=("weight",))
    pairs = committed(context.run.iteration(2) / "pairs", names("z", 3))
    wanted = r"training\.replay: the rows of iteration 1 have the numbers weight, but those of this iteration none"
    with pytest.raises(UserError, match=wanted):
        mix(context, 2, pairs)
