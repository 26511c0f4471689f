"""10,000 hostile prompts through the whole loop on real parts: each is answered or rejected by name, with its text as it was."""

import json
import random
import re

from evolve_ray.audit import verify
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import read_manifest
from tests.faults.harness import last_line
from tests.faults.hostile import prompts
from tests.real.conftest import start
from tests.real.test_foreign import foreign, overrides

__all__ = ["foreign"]  # a fixture

NUMBER, SEED = 10_000, 0


def asking_of(foreign, path):
    """The recipe for the prompts in `path`, all but how many an iteration takes: repeated and too long ones are rejected."""
    return (
        *overrides(foreign), f"prompts.path={path}", "prompts.max_rejected_fraction=0.2", 'prompts.id_column=""',
        "strategy.name=chain", "strategy.rounds=2", "template.layout=conversation", "sampling.max_tokens=8",
        "engine.shard_prompts=250", "training.objective=dpo", "training.batch_pairs=256", "training.micro_pairs=64",
        "--iterations", "1", "activation=none", "verifier=none", "toy=none",
    )  # fmt: skip


def test_every_hostile_prompt_is_accounted_for(foreign, place):
    asked, chance = prompts(NUMBER, SEED), random.Random(SEED)
    path = foreign / "hostile.jsonl"
    with open(path, "w", encoding="utf-8", newline="") as file:
        for number, text in enumerate(asked):
            file.write(json.dumps({"qid": f"h{number}", "question": text}, ensure_ascii=chance.random() < 0.5) + "\n")
    run, hostile = place / "hostile", asking_of(foreign, path)
    refused = start(place / "hostile-refused", *hostile, f"prompts.per_iteration={NUMBER}")
    assert refused.wait(300) == 2
    usable = int(re.search(rf"need {NUMBER}, but (\d+) are usable", last_line(refused))[1])
    command = start(run, *hostile, f"prompts.per_iteration={usable}")
    assert command.wait(3000) == 0

    iteration = run / "iteration-01"
    kept = {row["line"]: row for row in rows.read_table(iteration / "prompts" / "prompts.parquet")}
    lost = {row["line"]: row["reason"] for row in rows.read_jsonl(iteration / "prompts" / "rejected.jsonl")}
    assert sorted([*kept, *lost]) == list(range(1, NUMBER + 1)), "each line once"
    assert {line: row["prompt"] for line, row in kept.items()} == {line: asked[line - 1] for line in kept}
    reasons = {reason.split(" ")[0] for reason in lost.values()}
    assert len(kept) == usable
    assert len(lost) > 100
    print(f"{len(kept)} prompts, {len(lost)} rejected: {reasons}")

    drafts = list(shards.read_rows(read_manifest(iteration / "generations", verify=True)))
    rejected = {row["id"] for row in rows.read_jsonl(iteration / "generations" / "rejected.jsonl")}
    answered = {row["prompt_id"] for row in drafts}
    assert answered | rejected == {row["prompt_id"] for row in kept.values()}
    assert not answered & rejected
    found = verify.verify(run)
    assert (found.faults, found.missing) == ({}, {}), "drafts, scores and pairs obey the conservation law"
    page = (run / "report.html").read_text()
    assert "<script" not in page
    assert "<img" not in page
