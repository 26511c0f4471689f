"""Which model a judge of one's own is, how it is made, and that it is in the key of the scores."""

import dataclasses
from pathlib import Path

import pytest

from evolve_ray.config.load import load
from evolve_ray.config.options import Scorer, Strategy
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.refine.rendering import Rendering
from evolve_ray.refine.template import load_template
from evolve_ray.score.worker import scorer_pool
from evolve_ray.stages.generations import GenerationJob, judge_of, judge_spec, scorer_of, scores_key
from evolve_ray.store.run import Run
from tests.plain.processes import ROOT

POLICY, NOW, OTHER = (Policy(Path(f"/{name}"), f"{name} hash") for name in ("policy", "now", "other"))


def context(**args):
    config = load(ROOT / "jobs" / "recipes" / "tiny.toml", [])
    config = dataclasses.replace(config, scorer=Scorer(name="judge", args=args))
    template = dataclasses.replace(load_template("tiny", "conversation"), rendering=Rendering(chat_template="{{ own }}"))
    made = Context(config, Run(Path("/nowhere/run")), print, lambda: None, False, template, POLICY)
    made.initial, made.judge = POLICY, OTHER
    return made


@pytest.mark.parametrize(("name", "model", "rendered"), [("policy", NOW, True), ("initial", POLICY, True), ("m/n", OTHER, False)])
def test_the_judge_is_the_policy_of_the_job_the_initial_one_or_a_model_by_name(name, model, rendered):
    run = context(model=name)
    judge = judge_of(run, NOW)
    assert judge == {name: model}
    spec = judge_spec(run, judge)
    assert (spec.folder, spec.context_tokens, spec.max_num_seqs) == (str(model.folder), 128, run.config.engine.max_num_seqs)
    assert spec.args == run.config.engine.args
    assert bool(spec.rendering.chat_template) == rendered, "another model has a template of its own"
    assert scores_key(run.config, judge)["reward_models"] == {name: model.hash}


def test_a_judge_behind_a_server_has_no_engine_here_and_the_pools_environment_stays():
    run = context(model="m", url="http://h")
    assert judge_of(run, NOW) == {}
    assert judge_spec(run, {}) is None
    assert scorer_pool(run.config.scorer, run.config.engine).env == scorer_pool(run.config.scorer).env
    own = scorer_pool(context(model="policy").config.scorer, run.config.engine).env
    assert (own["VLLM_ENABLE_V1_MULTIPROCESSING"], own["OMP_NUM_THREADS"]) == ("0", "1")


def test_an_engine_of_ones_own_arguments():
    run = context(model="policy", engine={"enforce_eager": True})
    assert judge_spec(run, judge_of(run, NOW)).args == {"enforce_eager": True}


@pytest.mark.parametrize(("strategy", "scorer"), [("self_judge", "strategy"), ("mine:own", "strategy"), ("chain", "verifier")])
def test_a_strategy_without_scores_is_scored_by_the_verifier(strategy, scorer):
    run = context(model="m")
    config = dataclasses.replace(run.config, scorer=Scorer(name="strategy"))
    job = GenerationJob(1, "", POLICY, None, Strategy(name=strategy), config.sampling, 1, {})
    assert scorer_of(config, job).name == scorer
