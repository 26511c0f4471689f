"""One plug of each kind from a file of the user's own, with options, in the loop on a real Ray with a fake engine."""

import json
import shutil
import sys

import pytest
import ray

from evolve_ray.config import plugs
from evolve_ray.config.load import load
from evolve_ray.errors import UserError
from evolve_ray.inputs.prepare import prepare
from evolve_ray.plan.plan import stages
from evolve_ray.pools.actors import Pools
from evolve_ray.stages import generations, measures
from evolve_ray.stages.pairs import Owner, select, select_for
from evolve_ray.store import rows, shards
from evolve_ray.store.run import Run
from tests.wiring.test_pipeline import ROOT, make_folder, recipe_text

PLUGS = '''
from dataclasses import dataclass

from evolve_ray.config.option import option
from evolve_ray.evaluate.controller import Decision
from evolve_ray.refine.asks import Ask, Verdict, Verify
from evolve_ray.select.pairs import make_pair, make_turn, reject_draft
from plug_helpers import WORDS


@dataclass(frozen=True)
class Tries:
    times: int = option("answers at most", 2, low=1)


def until_right(prompt, template, options, args: Tries):
    """Asks for a critique and another answer while the verifier is not content."""
    draft = yield Ask(template.direct(prompt), 0, 1)
    for number in range(2, args.times + 1):
        verdict = yield Verify(draft)
        if verdict == 1.0:
            break
        critique = yield Ask(template.direct(verdict.text), 0, number, parent_id=draft.draft_id, kind="critique")
        draft = yield Ask(template.refinement(prompt, critique.text), 0, number, parent_id=draft.draft_id)


def two_models(prompt, template, options, args: Tries):
    """A draft of the policy, and critiques of it by another model, all in one list."""
    draft = yield Ask(template.direct(prompt), 0, 1)
    asks = [
        Ask(template.direct(draft.text), sample, 2, parent_id=draft.draft_id, kind="critique", model="critic")
        for sample in range(args.times)
    ]
    critiques = yield [*asks, Ask(template.refinement(prompt, draft.text), 0, 2, parent_id=draft.draft_id)]
    return [draft, critiques[-1]]


def misnamed(prompt, template, options):
    name = "critique"  # where the source names the model itself, the recipe is refused before anything runs
    return [(yield Ask(template.direct(prompt), 0, 1, model=name))]


def critiques(prompt, drafts, options, others):
    """The critique that comes first by its text over the last one."""
    ordered = sorted(others, key=lambda d: (d["text"], d["draft_id"]))
    used = ordered[:1] + ordered[-1:]
    unused = [*drafts, *(d for d in others if d not in used)]
    return [make_turn(prompt, used[0], rejected=used[1])], [reject_draft(prompt, d, "not used") for d in unused]


class FirstLetter:
    def __init__(self, args):
        self.letters = args["letters"]

    def __call__(self, prompts, answers, responses):
        return [Verdict(1.0) if r[0] in self.letters else Verdict(0.0, WORDS + r[0]) for r in responses]


class Value:
    def __init__(self, args):
        self.scale = args["scale"]

    def __call__(self, prompts, answers, responses):
        import numpy

        return numpy.array([int(r, 16) * self.scale for r in responses], dtype=numpy.float32)


def weighted(prompt, drafts, options, args):
    ordered = sorted(drafts, key=lambda d: (-d["score"], d["draft_id"]))
    if len(ordered) < 2:
        return [], [reject_draft(prompt, d, "alone") for d in ordered]
    best, *others, worst = ordered
    numbers = {"weight": args["weight"], "remarks": len(worst["remarks"]) + len(best["remarks"])}
    return [make_pair(prompt, best, worst, numbers)], [reject_draft(prompt, d, "between") for d in others]


def once(models, options, args):
    return Decision("stop", args["why"])


def broken(prompt, template, options):
    yield Ask(template.direct(prompt), 0, 1)
    raise LookupError("the plan is empty")


class Broken:
    def __call__(self, prompts, answers, responses):
        for response in responses:
            if response.startswith("3"):
                raise LookupError("no three")
        return [0.0] * len(responses)
'''


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    """A folder with the plugs, on the Python path of this process and of the actors."""
    folder = tmp_path_factory.mktemp("plugs")
    (folder / "own_plugs.py").write_text(PLUGS)
    (folder / "plug_helpers.py").write_text('WORDS = "begins with "\n')
    sys.path.insert(0, str(folder))
    ray.init(
        address="local", num_cpus=4, include_dashboard=False, log_to_driver=False,
        runtime_env={"env_vars": {"PYTHONPATH": f"{folder}:{ROOT}"}},
    )  # fmt: skip
    yield make_folder(folder, 20)
    ray.shutdown()
    sys.path.remove(str(folder))


def context_of(place, run, *overrides):
    recipe = run.parent / "recipe.toml"
    recipe.write_text(recipe_text(place))
    run.mkdir(exist_ok=True)
    config = load(recipe, ["prompts.answer_column=answer", *overrides])
    context = prepare(config, Run(run), lambda line: None, lambda: None, rerun_changed=False)
    context.pools = Pools()
    return context


OWN = (
    "strategy.name=own_plugs:until_right", "strategy.args.times=3",
    "verifier.name=own_plugs:FirstLetter", 'verifier.args.letters="0123"',
    "scorer.name=own_plugs:Value", "scorer.args.scale=0.5",
    "selection.name=own_plugs:weighted", "selection.args.weight=0.25",
    "controller.name=own_plugs:once", 'controller.args.why="enough"',
)  # fmt: skip


def draft(context):
    config, prompts = context.config, context.prompts[1]
    job = generations.GenerationJob(1, "generations", context.policy, prompts, config.strategy, config.sampling, 1, {})
    try:
        drafts, scores = generations.generate_and_score(context, job, context.run.iteration(1))
        return drafts, scores, select(context, 1, drafts, scores)
    finally:
        context.pools.close_all(but="")


def test_one_plug_of_each_kind_runs_with_its_options_and_its_source_is_in_the_keys(place, tmp_path, monkeypatch):
    context = context_of(place, tmp_path / "run", *OWN)
    drafts, scores, pairs = draft(context)
    table = list(shards.read_rows(drafts))
    critiques = [row for row in table if row["kind"] == "critique"]
    assert critiques, "no answer was wrong"
    assert {row["messages"][0]["content"][-13:-1] for row in critiques} == {"begins with "}
    answers = {row["draft_id"]: row["text"] for row in table if row["kind"] == "answer"}
    for row in shards.read_rows(scores):
        text = answers[row["draft_id"]]
        assert (row["score"], row["correct"]) == (int(text, 16) * 0.5, float(text[0] in "0123"))
    found = rows.read_table(pairs.path("pairs.parquet"))
    assert {pair["numbers"]["weight"] for pair in found} == {0.25}
    assert max(pair["numbers"]["remarks"] for pair in found) >= 1
    models = [{"name": name, "iteration": number, "evaluation": None, "path": ""} for number, name in enumerate("ab")]
    assert measures.decide(context, 1, models)["decision"]["reason"] == "enough"
    # The same command with another helper beside the plugs: nothing stale is returned.
    (place / "plug_helpers.py").write_text('WORDS = "starts with "\n')
    plugs.source_hash.cache_clear()
    with pytest.raises(UserError, match=r"generations: .*--rerun-changed"):
        draft(context_of(place, tmp_path / "run", *OWN))


TWO = ("strategy.name=own_plugs:two_models", "strategy.args.times=3", "models.critic.cpus_per_actor=0.5")
TRAINED = ("models.critic.selection.name=own_plugs:critiques", "models.critic.training.objective=dpo",
           "models.critic.training.refine_weight=0.0")  # fmt: skip


@pytest.fixture(scope="module")
def critic(place):
    """A model like the policy, but another one."""
    folder = place / "critic"
    shutil.copytree(place / "model", folder)
    settings = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps(settings | {"temperature": 0.5, "do_sample": True}))
    return folder


def test_a_further_model_answers_the_asks_that_name_it_and_is_counted_and_trained_by_its_name(place, critic, tmp_path):
    path = f"models.critic.path={critic}"
    context = context_of(place, tmp_path / "run", *TWO, path, *TRAINED)
    drafts, scores, _ = draft(context)
    table = list(shards.read_rows(drafts))
    policy, second = context.policy.hash, context.models["critic"].hash
    assert policy != second
    assert {(row["kind"], row["model"]) for row in table} == {("answer", policy), ("critique", second)}
    of_critic = [row for row in table if row["model"] == second]
    assert (len(of_critic), drafts.stats["num_asks_of_critic"]) == (60, 60)
    assert drafts.stats["num_tokens_of_critic"] == sum(row["num_tokens"] for row in of_critic)
    assert drafts.stats["num_tokens"] == sum(row["num_tokens"] for row in table)
    first = {row["draft_id"]: row["text"] for row in table if row["round"] == 1}
    for row in of_critic:
        assert row["messages"][-1]["content"].endswith(first[row["parent_id"]])
    owner = Owner(context.models["critic"], context.template.rendering, own=True)
    pairs = select_for(context, 1, drafts, scores, context.config.models["critic"].selection, "critic_pairs", owner)
    assert {pair["chosen_id"] for pair in rows.read_table(pairs.path("pairs.parquet"))} < {row["draft_id"] for row in of_critic}
    names = stages(context.config, 1)
    of_training = ["checkpoint", "critic_pairs", "critic_reference", "critic_checkpoint"]
    assert names[names.index("checkpoint") :][:4] == of_training
    # Another model under that name is another stage; nothing stale is returned.
    (critic / "generation_config.json").write_text("{}")
    with pytest.raises(UserError, match=r"generations: .*--rerun-changed"):
        draft(context_of(place, tmp_path / "run", *TWO, path, *TRAINED))


def test_an_ask_for_a_model_that_the_recipe_lacks_is_refused_with_the_nearest_name(place, critic, tmp_path):
    named = ("strategy.name=own_plugs:misnamed", f"models.critic.path={critic}", "models.critic.cpus_per_actor=0.5")
    with pytest.raises(UserError, match=r"prompt \w+: asks the model 'critique'; did you mean 'critic'\?; see own_plugs\.py:\d+"):
        draft(context_of(place, tmp_path / "run", *named))


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["strategy.name=own_plugs:broken"], r"^strategy\.name: 'own_plugs:broken' raised LookupError: the plan is empty, at "
                                             r"own_plugs\.py:\d+, for prompt \w+; fix the plug"),
        (["scorer.name=own_plugs:Broken"], r"^scorer: 'own_plugs:Broken' raised LookupError: no three, at own_plugs\.py:\d+, for "
                                           r"the response '3\w+' to the prompt 'question \d+'; fix the plug"),
    ],
)  # fmt: skip
def test_an_error_inside_an_actor_is_one_sentence_with_the_plugs_traceback(place, tmp_path, overrides, message):
    with pytest.raises(UserError, match=message) as raised:
        draft(context_of(place, tmp_path / "run", *overrides))
    assert "\n" not in str(raised.value)
    assert "own_plugs.py" in raised.value.log
    json.dumps(raised.value.log)
