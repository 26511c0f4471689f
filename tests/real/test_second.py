"""Two models in one loop through the real command: one writes and refines answers, the other one criticises, both are trained."""

import json
import subprocess
import sys

import pytest

from evolve_ray.models.folders import content_hash
from evolve_ray.store import rows
from evolve_ray.store.manifest import read_manifest
from tests.real.conftest import ROOT, SMALL, start

pytestmark = pytest.mark.long

PLUGS = '''
from evolve_ray.refine.asks import Ask
from evolve_ray.select.pairs import make_turn, reject_draft


def criticised(prompt, template, options):
    """A draft, two critiques of it by the other model, and a refinement."""
    draft = yield Ask(template.direct(prompt), 0, 1)
    place = {"round": 2, "parent_id": draft.draft_id}
    yield [Ask(template.refinement(prompt, draft.text), n, kind="critique", model="critic", **place) for n in (0, 1)]
    refined = yield Ask(template.refinement(prompt, draft.text), sample=0, **place)
    return [draft, refined]


def shorter(prompt, drafts, options, others):
    """The shorter of two critiques over the longer one."""
    short, *_, long = sorted(others, key=lambda d: (len(d["text"]), d["draft_id"]))
    rows = [make_turn(prompt, short, rejected=long)] if len(short["text"]) < len(long["text"]) else []
    unused = [*drafts, *(d for d in others if not rows)]
    return rows, [reject_draft(prompt, d, "is not shorter or longer") for d in unused]
'''


@pytest.fixture(scope="module")
def run(place):
    folder = place / "two-models"
    (place / "criticised_plugs.py").write_text(PLUGS)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", f"{place}:{ROOT}")
        overrides = [
            *SMALL, "prompts.per_iteration=32", "strategy.name=criticised_plugs:criticised", "evaluation.pick=returned",
            "evaluation.parallel=0", "models.critic.path=toy:base", "models.critic.selection.name=criticised_plugs:shorter",
            "models.critic.training.objective=dpo", "models.critic.training.refine_weight=0.0",
            "models.critic.training.batch_pairs=8", "models.critic.training.micro_pairs=8", "selection.margin=0.0",
        ]  # fmt: skip
        assert start(folder, *overrides, "--iterations", "2").wait() == 0
        command = [sys.executable, str(ROOT / "jobs/verify.py"), str(folder)]
        assert subprocess.run(command, cwd=ROOT).returncode == 0
    return folder


def drafts(run, iteration):
    files = sorted((run / f"iteration-{iteration:02d}").glob("generations/*/rows.parquet"))
    return [row for file in files for row in rows.read_table(file)]


def test_critiques_are_those_of_the_newest_critic_and_answers_those_of_the_policy(run):
    critics = []
    for iteration in (1, 2):
        table, before = drafts(run, iteration), run / f"iteration-{iteration - 1:02d}"
        by_kind = {kind: {row["model"] for row in table if row["kind"] == kind} for kind in ("answer", "critique")}
        assert by_kind["answer"] == {content_hash(before / "checkpoint")}
        (critic,) = by_kind["critique"]
        critics.append(critic)
        assert critic not in by_kind["answer"]
    assert critics[1] == content_hash(run / "iteration-01/critic_checkpoint")
    assert critics[0] != critics[1]


def test_tokens_of_the_critic_are_counted_by_its_name_in_manifest_and_ledger(run):
    critiques = [row for row in drafts(run, 1) if row["kind"] == "critique"]
    stats = read_manifest(run / "iteration-01/generations").stats
    assert (stats["num_asks_of_critic"], len(critiques)) == (64, 64)
    assert stats["num_tokens_of_critic"] == sum(row["num_tokens"] for row in critiques) < stats["num_tokens"]
    lines = json.loads((run / "report.json").read_text())["ledger"]["stages"]
    (line,) = [line for line in lines if (line["iteration"], line["stage"]) == (1, "generations")]
    assert line["by_model"]["critic"]["num_tokens"] == stats["num_tokens_of_critic"]


def test_critic_is_trained_on_its_critiques_after_their_asks_from_its_own_reference(run):
    here = run / "iteration-01"
    pairs = rows.read_table(here / "critic_pairs/pairs.parquet")
    log = rows.read_jsonl(here / "critic_checkpoint/training_log.jsonl")
    critiques = {row["draft_id"]: row for row in drafts(run, 1) if row["kind"] == "critique"}
    assert pairs
    for pair in pairs:
        assert pair["context"] == critiques[pair["chosen_id"]]["messages"]
        assert len(pair["chosen"]) < len(pair["rejected"])
    assert log[0]["loss_dpo"] == pytest.approx(0.693147, abs=1e-5)
    base = read_manifest(here / "critic_reference").stats["model"]
    assert base == critiques[pairs[0]["chosen_id"]]["model"]
    assert read_manifest(run / "iteration-02/critic_reference").stats["model"] == content_hash(here / "critic_checkpoint")
