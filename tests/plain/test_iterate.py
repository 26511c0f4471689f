"""Drift and decision as stages of a whole loop: a world of tables in which each training makes answers longer."""

import dataclasses
import json
from pathlib import Path

import pytest

from evolve_ray import iterate
from evolve_ray.config.load import load
from evolve_ray.config.options import Controller
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.evaluate import controller, drift
from evolve_ray.evaluate.controller import Decision
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.refine.template import load_template
from evolve_ray.report import report
from evolve_ray.stages import drafting, evaluation, measures
from evolve_ray.store import rows, shards
from evolve_ray.store.manifest import commit, read_manifest
from evolve_ray.store.run import Run, Stage

NUM_PROMPTS = 80
HELD_OUT = [
    "evaluation.splits.held=held.jsonl", "evaluation.splits.also=also.jsonl", "evaluation.rounds=2",
    "evaluation.answer_column=a", "prompts.answer_column=a", "verifier.name=exact",
]  # fmt: skip
# How many prompts in 80 each model answers right in y1 and y2, and the length of y1: the scorer rewards length, so the second
# training is rewarded for answers that are longer and wrong. The third undoes it, but nobody gets there under a guard.
HACKABLE = {0: (30, 32, 10), 1: (45, 50, 12), 2: (44, 20, 30), 3: (45, 50, 12)}
CONVERGED = {0: (30, 32, 10), 1: (45, 50, 12), 2: (45, 50, 12), 3: (45, 50, 12)}


class World:
    """Stands in for engines and trainers: a policy's hash is how often it was trained."""

    def __init__(self, models):
        self.models = models
        self.made = 0

    def generate_and_score(self, context, job, folder):
        drafts = context.stage(folder / "generations", "generations", {"model": job.policy.hash, "label": job.label}, {})
        scores = context.stage(folder / "scores", "scores", {"key": drafts.key}, {})
        if not (drafts.committed() and scores.committed()):
            self.made += 1
            written, values = [], []
            for prompt_number, prompt in enumerate(rows.read_table(job.prompts.path("prompts.parquet"))):
                for number in (1, 2):
                    row = self.answer(int(job.policy.hash), prompt_number % NUM_PROMPTS, number)
                    name = f"{prompt['prompt_id']}-{number}"
                    parent = f"{prompt['prompt_id']}-1" if number == 2 else None
                    written.append({
                        "draft_id": name, "prompt_id": prompt["prompt_id"], "split": prompt["split"], "sample": 0,
                        "round": number, "kind": "answer", "parent_id": parent, "text": row["text"], "finish_reason": "stop",
                        "num_prompt_tokens": 1, "num_tokens": len(row["text"]), "seed": 0, "model": "m",
                    })  # fmt: skip
                    length = float(len(row["text"]))
                    values.append(
                        {"draft_id": name, "prompt_id": prompt["prompt_id"], "score": length, "correct": row["correct"]}
                    )
            num_in = job.prompts.stats["num_rows"]
            self.commit(drafts, written, rows.GENERATION, num_in, num_answers=len(written))
            self.commit(scores, values, rows.SCORE, len(written))
        return drafts.committed(), scores.committed()

    def answer(self, trained, prompt_number, number):
        *right, length = self.models[trained]
        text = f"{prompt_number:02d}" + "abcdefgh"[prompt_number % 8] * (length + number - 1)
        return {"text": text, "correct": float(prompt_number < right[number - 1])}

    def commit(self, stage, table, schema, num_in, **stats):
        aside = stage.resume() / ".0"
        aside.mkdir()
        rows.write_table(aside / "rows.parquet", table, schema)
        rows.write_jsonl(aside / "rejected.jsonl", [])
        totals = {"num_rows": len(table), **dict.fromkeys(("num_tokens", "num_prompt_tokens", "num_cached_tokens", "num_cut"), 1)}
        commit(aside, stage.work / shards.shard_name(0), stage="shard", key="k", num_in=num_in, **totals, **stats)
        shards.finish(stage, 1, num_in)

    def train(self, context, iteration, policy, pairs, training, name):
        stage = context.stage(context.run.iteration(iteration) / name, name, {"model": policy.hash}, {"pairs": pairs.identity})
        if not stage.committed():
            self.made += 1
            stage.start()
            stage.commit(num_in=1, num_rows=1, num_steps=1)
        return Policy(stage.final, str(int(policy.hash) + 1))


def commit_prompts(stage, splits, num_rows):
    table = [
        {"prompt_id": f"{split}-{n}", "prompt": f"q{n}", "answer": "a", "split": split, "file": "f", "line": n, "num_tokens": 1}
        for split in splits
        for n in range(num_rows)
    ]
    if not stage.committed():
        rows.write_table(stage.start() / "prompts.parquet", table, rows.PROMPT)
        stage.commit(num_in=len(table), num_rows=len(table))
    return stage.committed()


@pytest.fixture
def loop(recipe, tmp_path, monkeypatch):
    """Runs the story of a run in a world of tables; returns its report and the world."""

    def run(models, *overrides, rerun_changed=False, held_out=True):
        world, root = World(models), Run(tmp_path / "run")
        root.root.mkdir(exist_ok=True)
        for module in (drafting, evaluation):
            monkeypatch.setattr(module, "generate_and_score", world.generate_and_score)
        monkeypatch.setattr(iterate, "train", world.train)
        monkeypatch.setattr(report, "write_page", lambda *_: None)  # it costs seconds, and its own tests look at it
        monkeypatch.setattr(iterate, "probe", lambda *_: {"kl_iteration": 0.25, "kl_initial": 0.5})
        config = load(recipe(), [*(HELD_OUT if held_out else ()), "iterations=3", *overrides])
        said: list[str] = []
        policy, template = Policy(tmp_path / "base", "0"), load_template("tiny", "conversation")
        context = Context(config, root, said.append, lambda: None, rerun_changed, template, policy)
        for iteration in range(1, config.iterations + 1):
            stage = Stage(root.iteration(iteration) / "prompts", "prompts", f"prompts {iteration}")
            context.prompts[iteration] = commit_prompts(stage, ["train"], 12)
        if held_out:
            context.held_out = commit_prompts(
                Stage(root.iteration(0) / "held_out", "prompts", "held"), ["held", "also"], NUM_PROMPTS
            )
        return iterate.iterate(context), world, said

    return run


def names(report):
    return [model["name"] for model in report["models"]]


def test_guard_ends_a_hackable_run_with_the_policy_before(loop, tmp_path):
    report, _, said = loop(HACKABLE, "controller.name=guard", "controller.max_length_ratio=9")
    assert names(report) == ["base", "iteration 1", "iteration 2"]
    assert [model["rolled_back"] for model in report["models"][1:]] == [False, True]
    assert report["checkpoint"] == str(tmp_path / "run" / "iteration-01" / "checkpoint")
    decision = report["models"][-1]["decision"]
    assert (decision["action"], decision["controller"], decision["split"]) == ("roll_back", "guard", "held")
    assert "reward of y_last +18.000 [18.000, 18.000] while exact match -37.5 [" in decision["reason"]
    assert said[-1] == f"  iteration 2: roll back: {decision['reason']}"
    assert (tmp_path / "run" / "iteration-02" / "checkpoint").is_dir(), "what was rolled back stays on disk"
    assert json.loads((tmp_path / "run" / "report.json").read_bytes()) == report


def test_guard_that_keeps_the_iteration_ends_with_its_policy(loop, tmp_path):
    report, *_ = loop(HACKABLE, "controller.name=guard", "controller.on_breach=stop")
    assert names(report)[-1] == "iteration 2"
    assert report["models"][-1]["rolled_back"] is False
    assert report["checkpoint"] == str(tmp_path / "run" / "iteration-02" / "checkpoint")


def test_an_iteration_1_that_is_rolled_back_leaves_the_policy_that_was_given(loop, tmp_path):
    report, *_ = loop({0: HACKABLE[1], 1: HACKABLE[2]}, "controller.name=guard")
    assert (names(report), report["checkpoint"]) == (["base", "iteration 1"], str(tmp_path / "base"))


def test_fixed_runs_on_through_the_hack(loop, tmp_path):
    report, *_ = loop(HACKABLE)
    assert names(report)[-1] == "iteration 3"
    assert {model["decision"]["action"] for model in report["models"][1:]} == {"continue"}
    assert report["checkpoint"] == str(tmp_path / "run" / "iteration-03" / "checkpoint")


@pytest.mark.parametrize(("patience", "last"), [(1, "iteration 2"), (2, "iteration 3")])
def test_plateau_ends_a_run_that_has_converged(loop, patience, last):
    report, *_ = loop(CONVERGED, "controller.name=plateau", f"controller.patience={patience}")
    assert names(report)[-1] == last
    assert report["models"][-1]["decision"]["action"] == "stop"
    assert "y_last +0.0 [-4.6, 4.6] points" in report["models"][-1]["decision"]["reason"]


def test_changes_against_the_model_before_are_paired_on_every_split(loop):
    report, *_ = loop(HACKABLE)
    assert "against_previous" not in report["models"][0]
    found = report["models"][1]["against_previous"]
    assert list(found) == ["held", "also"]
    assert found["held"]["first"]["mean"] == pytest.approx(15 / 80)
    assert found["held"]["last"]["mean"] == pytest.approx(18 / 80)
    assert found["held"]["reward"]["last"] == {"mean": 2.0, "low": 2.0, "high": 2.0}
    assert report["models"][2]["against_previous"]["held"]["last"]["mean"] == pytest.approx(-30 / 80)


def test_the_deciding_split_may_be_named(loop):
    report, *_ = loop(HACKABLE, "controller.name=guard", "controller.split=also")
    assert report["models"][-1]["decision"]["split"] == "also"


def test_a_committed_decision_is_reused(loop, monkeypatch, tmp_path):
    first, *_ = loop(HACKABLE, "controller.name=guard")
    monkeypatch.setitem(controller.CONTROLLERS, "guard", lambda *_: pytest.fail("decided again"))
    monkeypatch.setattr(drift, "figures", lambda *_: pytest.fail("drift was computed again"))
    again, world, _ = loop(HACKABLE, "controller.name=guard")
    assert again == first
    assert world.made == 0
    manifest = read_manifest(tmp_path / "run" / "iteration-02" / "decision", verify=True)
    assert set(manifest.inputs) == {"evaluation", "previous"}
    assert json.loads(manifest.path("decision.json").read_bytes())["action"] == "roll_back"


def test_another_controller_needs_rerun_changed_and_trains_nothing_again(loop):
    stopped, *_ = loop(CONVERGED, "controller.name=plateau")
    with pytest.raises(UserError, match="decision: was made from other inputs or options"):
        loop(CONVERGED, "controller.name=plateau", "controller.patience=2")
    longer, world, _ = loop(CONVERGED, "controller.name=plateau", "controller.patience=2", rerun_changed=True)
    assert (names(stopped)[-1], names(longer)[-1]) == ("iteration 2", "iteration 3")
    assert world.made == 3, "iteration 3 alone: its drafts, its training, its evaluation"


def test_iterations_that_are_added_reuse_the_decisions_before(loop, monkeypatch):
    loop(HACKABLE, "iterations=2")
    decided = []
    monkeypatch.setitem(controller.CONTROLLERS, "fixed", lambda models, _: decided.append(models) or Decision("continue", "ok"))
    report, *_ = loop(HACKABLE, "iterations=3")
    assert names(report)[-1] == "iteration 3"
    assert [len(models) for models in decided] == [4]


def test_drift_of_an_iteration_is_in_the_report(loop):
    report, *_ = loop(HACKABLE)
    found = [model["drift"] for model in report["models"][1:]]
    assert "drift" not in report["models"][0]
    assert [figures["num_drafts"] for figures in found] == [24, 24, 24]
    # The drafts of iteration t are those of the policy before: the second training shows in iteration 3.
    assert [figures["rounds"]["1"]["mean_response_tokens"] for figures in found] == [12.0, 14.0, 32.0]
    assert [figures["rounds"]["1"]["tokens_ratio"] for figures in found] == pytest.approx([1.0, 14 / 12, 32 / 12])
    assert found[0]["winning_rounds"] == {"2": 12}
    assert (found[0]["kl_iteration"], found[0]["kl_initial"]) == (0.25, 0.5)


def test_without_a_probe_the_divergence_is_null(loop, monkeypatch, tmp_path):
    report, *_ = loop(HACKABLE, "iterations=1")
    assert report["models"][1]["drift"]["kl_initial"] == 0.5
    context = Context(load(tmp_path / "recipe.toml"), Run(tmp_path / "run"), print, print, False, None, None)
    inputs = [read_manifest(tmp_path / "run" / "iteration-01" / name) for name in ("generations", "scores", "pairs")]
    found = measures.measure_drift(context, 1, *inputs, None, [])
    assert (found["kl_iteration"], found["kl_initial"]) == (None, None)


def test_a_run_without_held_out_prompts_goes_on(loop):
    report, *_ = loop(HACKABLE, held_out=False)
    assert names(report)[-1] == "iteration 3"
    assert report["models"][1]["against_previous"] == {}
    assert report["models"][1]["evaluation"] is None


def never(models, given):
    """A user's controller: ends the run after the first iteration."""
    return Decision("stop", f"{len(models)} models, {given.split}, {models[-1]['drift']['num_drafts']} drafts")


def wrong(models, given):
    return "stop"


def unknown(models, given):
    return Decision("pause", "a word that nobody knows")


def test_a_users_controller_decides(loop):
    report, *_ = loop(HACKABLE, f"controller.name={__name__}:never")
    decision = report["models"][-1]["decision"]
    assert (names(report)[-1], decision["reason"]) == ("iteration 1", "2 models, held, 24 drafts")


@pytest.mark.parametrize("name", ["wrong", "unknown"])
def test_a_users_controller_must_give_a_decision(loop, name):
    with pytest.raises(UserError, match=r"controller\.name: .* must return a Decision: continue, stop, roll_back"):
        loop(HACKABLE, f"controller.name={__name__}:{name}")


def test_a_decision_is_an_event(loop, tmp_path):
    loop(HACKABLE, "controller.name=guard")
    events = [event for event in rows.read_jsonl(tmp_path / "run" / "events.jsonl") if event["event"] == "decision"]
    assert [(event["iteration"], event["action"]) for event in events] == [(1, "continue"), (2, "roll_back")]


def test_every_option_of_the_controller_is_in_the_key_of_the_decision():
    fields = {field.name for field in dataclasses.fields(Controller)}
    # Two are left out at their defaults: they came later.
    assert fields == set(resolved(Controller(min_prompts=1, args={"limit": 1}), runtime=False))


def test_evaluation_folder_of_every_model_is_in_the_report(loop, tmp_path):
    report, *_ = loop(HACKABLE)
    folders = [Path(tmp_path / "run" / model["evaluation"]) for model in report["models"]]
    assert [folder.parent.name for folder in folders] == ["iteration-00", "iteration-01", "iteration-02", "iteration-03"]
    assert all(read_manifest(folder / "generations") for folder in folders)


def test_evaluation_measures_the_recipes_strategy_beside_the_chain(loop):
    result, *_ = loop(CONVERGED, "iterations=1", "evaluation.pick=best", "strategy.name=parallel")
    figures = result["models"][-1]["splits"]["held"]
    assert (figures["strategy"]["name"], figures["strategy"]["pick"]) == ("parallel", "best")
    # The world of tables answers every strategy with its two rounds, of which the second is longer and so has the better score.
    assert figures["strategy"]["reward"] == figures["rounds"]["2"]["reward"]
    assert figures["strategy"]["difference"]["reward"]["mean"] == 0.0


def warmer(models, options):
    """After iteration 1 another temperature and step size, after iteration 2 another temperature again."""
    changes = {1: {"sampling.temperature": 0.5, "training.beta": 0.3}, 2: {"sampling.temperature": 0.25}}
    return Decision("continue", "it was too hot", changes.get(models[-1]["iteration"], {}))


def test_options_of_a_decision_hold_from_the_next_iteration_on_and_when_a_run_resumes(loop, tmp_path, monkeypatch):
    seen = []

    def spy(self, context, job, folder, original=World.generate_and_score):
        if job.label == "generations":
            seen.append((job.sampling.temperature, context.config.training.beta, context.config.sampling.max_tokens))
        return original(self, context, job, folder)

    monkeypatch.setattr(World, "generate_and_score", spy)
    first, _, said = loop(CONVERGED, f"controller.name={__name__}:warmer", "training.beta=0.1", "sampling.max_tokens=9")
    assert seen == [(1.0, 0.1, 9), (0.5, 0.3, 9), (0.25, 0.3, 9)]
    stored = [json.loads((tmp_path / f"run/iteration-0{n}/decision/decision.json").read_bytes()) for n in (1, 3)]
    assert stored[0]["options"] == {"sampling.temperature": 0.5, "training.beta": 0.3}
    assert "options" not in stored[1], "the file of a decision without options is what it was"
    assert "continue: it was too hot; from now on sampling.temperature = 0.5, training.beta = 0.3" in "\n".join(said)
    monkeypatch.setattr(iterate.decide.__globals__["controller"], "CONTROLLERS", {})
    again, world, _ = loop(CONVERGED, f"controller.name={__name__}:warmer", "training.beta=0.1", "sampling.max_tokens=9")
    assert (again, world.made, seen[3:]) == (first, 0, seen[:3])


WRONG: dict = {}


def changing(models, options):
    return Decision("continue", "r", WRONG)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sampling.temperatur": 0.5}, r"sampling\.temperatur: unknown option; did you mean 'temperature'\?"),
        ({"sampling.temperature": -1.0}, r"sampling\.temperature: is -1\.0, but must be"),
        ({"training.objective": "dpo"}, r"changes 'training\.objective', but a decision can change options of strategy, "),
        ({"engine.actors": 2}, r"changes 'engine\.actors', but a decision can change"),
        ({"sampling": {}}, r"changes 'sampling', but a decision can change"),
        ({"strategy.name": "own_plug:absent"}, r"strategy\.name: 'own_plug:absent' cannot be loaded"),
        ({"strategy.args": {"x": object()}}, r"options of the decision are not plain values"),
        (["sampling.temperature"], r"options of the decision are \['sampling\.temperature'\], but must be a dict"),
    ],
)
def test_options_that_a_recipe_could_not_have_are_refused_before_the_commit(loop, tmp_path, monkeypatch, changes, message):
    monkeypatch.setitem(globals(), "WRONG", changes)
    with pytest.raises(UserError, match=message) as raised:
        loop(CONVERGED, f"controller.name={__name__}:changing")
    assert not (tmp_path / "run/iteration-01/decision").exists()
    assert "\n" not in str(raised.value)
