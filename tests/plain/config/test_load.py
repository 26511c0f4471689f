"""A recipe is read strictly: every fault names the file, the line, the option and the way out."""

import dataclasses
import json
import typing
from pathlib import Path

import pytest

from evolve_ray.config import describe, options, resolve
from evolve_ray.config.load import from_json, load
from evolve_ray.config.parse import find_line
from evolve_ray.errors import UserError

GUESSING = 'engine.args.speculative_config={method = "ngram", num_speculative_tokens = 4}'
RECIPES = sorted((Path(__file__).parents[3] / "jobs" / "recipes").glob("*.toml"))
SECTIONS = [kind for kind in vars(options).values() if dataclasses.is_dataclass(kind) and kind.__module__ == options.__name__]


def text_of(key: str) -> str:
    """The line that says what an option is."""
    table, _, name = key.rpartition(".")
    kind = {name: kind for name, kind, _ in describe.tables()}[table]
    return next(field.metadata["text"] for field in describe.options_of(kind) if field.name == name)


def refusal(path: Path, *overrides: str) -> str:
    """The sentence with which a recipe is refused, without the path at its start."""
    with pytest.raises(UserError) as caught:
        load(path, overrides)
    return str(caught.value).removeprefix(str(path))


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_is_valid(path):
    assert load(path).name


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_shipped_recipe_has_a_plan(path, tmp_path):
    from evolve_ray.plan.plan import plan
    from evolve_ray.store.run import Run

    config = load(path)
    lines, _ = plan(config, Run(tmp_path))
    assert f"strategy   {config.strategy.name}" in lines
    assert ("reward_model (to do)" in lines) == (config.refresh is not None)


def test_recipes_are_shipped():
    tiny = (
        "iterative_dpo", "rule", "parallel", "reward_model", "reflect", "turns", "critique_gradient", "score_1", "score_2",
        "self_judge",
    )  # fmt: skip
    assert {path.stem for path in RECIPES} == {"tiny", *(f"tiny_{name}" for name in tiny), "llama31_8b", "llama31_8b_4nodes"}


def test_unknown_option_is_refused_with_its_line_and_the_nearest_name(recipe):
    path = recipe("\n[training]\nalpha = 0.5\nbeat = 0.1\n")
    assert refusal(path) == ":14: training.beat: unknown option; did you mean 'beta'?"


def test_unknown_table_is_refused_with_its_line_and_the_nearest_name(recipe):
    assert refusal(recipe("\n[enginee]\nactors = 2\n")) == ":12: enginee: unknown option; did you mean 'engine'?"


def test_unknown_option_without_a_near_name_lists_the_known_ones(recipe):
    assert (
        refusal(recipe("[verifier]\nzzzzzz = 1\n"))
        == ":12: verifier.zzzzzz: unknown option; the options here are name, pattern, tolerance, args"
    )


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed = 1.5", "seed: is 1.5 (a number), but must be a whole number"),
        ("seed = true", "seed: is True (true or false), but must be a whole number"),
        ('seed = "1"', "seed: is '1' (a string), but must be a whole number"),
        ("name = 3", "name: is 3 (a whole number), but must be a string"),
        ("training.beta = true", "training.beta: is True (true or false), but must be a number"),
        ('training.beta = "0.1"', "training.beta: is '0.1' (a string), but must be a number"),
        ("trainer.use_gpu = 1", "trainer.use_gpu: is 1 (a whole number), but must be true or false"),
        ("engine.args = []", "engine.args: is [] (a list), but must be a table"),
        ("training = 3", "training: is 3 (a whole number), but must be a table of options"),
    ],
)
def test_wrong_type_is_refused_with_what_it_must_be(recipe, line, message):
    key = line.partition(" = ")[0]
    said = refusal(recipe(whole=line + "\n" + recipe().read_text().replace('name = "small"\n', "")))
    assert said == f":1: {message}" + (f" ({text_of(key)})" if key != "training" else "")


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("seed = -1", "seed: is -1, but must be at least 0"),
        ("training.alpha = 1.01", "training.alpha: is 1.01, but must be at most 1.0"),
        ("training.beta = 0", "training.beta: is 0.0, but must be above 0.0"),
        ("training.beta = nan", "training.beta: is not a finite number"),
        ("sampling.top_p = 0.0", "sampling.top_p: is 0.0, but must be above 0.0"),
        ("prompts.max_rejected_fraction = 2", "prompts.max_rejected_fraction: is 2.0, but must be at most 1.0"),
    ],
)
def test_value_out_of_range_is_refused_with_its_bound(recipe, line, message):
    key, _, value = line.partition(" = ")
    assert refusal(recipe(), f"{key}={value}") == f"command line: {message} ({text_of(key)})"


@pytest.mark.parametrize("option", ["training.learning_rate", "training.beta", "sampling.temperature", "selection.margin"])
def test_infinity_is_refused(recipe, option):
    assert option in refusal(recipe(), f"{option}=inf")


@pytest.mark.parametrize("value", ["1979-05-27", "nan", "[inf]"])
def test_what_json_cannot_hold_is_refused_inside_a_free_table(recipe, value):
    assert "engine.args.x" in refusal(recipe(), f"engine.args.x={value}")


def test_bound_itself_is_allowed(recipe):
    assert load(recipe(), ["training.alpha=1", "prompts.max_rejected_fraction=1"]).training.alpha == 1.0


def test_whole_number_serves_as_a_number(recipe):
    beta = load(recipe(), ["training.beta=2"]).training.beta
    assert (beta, type(beta)) == (2.0, float)


def test_unknown_choice_is_refused_with_the_nearest(recipe):
    path = recipe('[training]\nobjective = "dpoo"\n')
    known = (
        "one of sft, dpo, ipo, srpo, evolve, policy_gradient, turns_dpo, turns_sft, reward or module:Name; did you mean 'dpo'?"
    )
    assert refusal(path) == f":12: training.objective: is 'dpoo', but must be {known}"


def test_plug_of_a_users_own_module_is_accepted(recipe):
    assert load(recipe(), ["strategy.name=my.module:Tree"]).strategy.name == "my.module:Tree"


def test_module_name_is_refused_where_nothing_can_be_plugged(recipe):
    assert "must be one of float32, bfloat16" in refusal(recipe(), "model.dtype=my.module:Type")


def test_path_of_the_model_is_required_and_its_table_is_named(recipe):
    path = recipe(whole='[prompts]\npath = "p"\n[model]\ndtype = "float32"\n')
    assert refusal(path).startswith(":3: model.path: is missing and has no default")


def test_table_that_is_required_is_named(recipe):
    assert refusal(recipe(whole='[model]\npath = "m"\n')).startswith(": prompts: is missing and has no default")


@pytest.mark.parametrize(
    ("override", "read", "value"),
    [
        ("training.beta=0.25", lambda c: c.training.beta, 0.25),
        ("trainer.use_gpu=true", lambda c: c.trainer.use_gpu, True),
        ("name=bare-word", lambda c: c.name, "bare-word"),
        ('name="quoted word"', lambda c: c.name, "quoted word"),
        ("prompts.path=a=b.jsonl", lambda c: c.prompts.path, "a=b.jsonl"),
        ("engine.args.dtype=auto", lambda c: c.engine.args, {"dtype": "auto"}),
        (' seed = 7 ', lambda c: c.seed, 7),
    ],
)  # fmt: skip
def test_override_replaces_the_recipes_value(recipe, override, read, value):
    assert read(load(recipe(), [override])) == value


def test_last_override_of_an_option_wins(recipe):
    assert load(recipe(), ["seed=1", "seed=2"]).seed == 2


@pytest.mark.parametrize("override", ["training.beta", "=3", ""])
def test_override_without_key_or_value_is_refused(recipe, override):
    assert refusal(recipe(), override).startswith(f"command line: {override!r}: must have the form key=value")


def test_override_below_a_value_is_refused(recipe):
    assert (
        refusal(recipe(), "name.first=1")
        == "command line: name.first: name is a value, not a table; use a dotted name from --options"
    )


def test_fault_of_an_override_is_not_blamed_on_the_recipe(recipe):
    path = recipe("[training]\nbeta = 0.1\n")
    assert refusal(path, "training.beta=-1").startswith("command line: training.beta: ")


@pytest.mark.parametrize(
    ("text", "dotted", "line"),
    [
        ("a = 1\n[model]\npath = 2", "model.path", 3),
        ("model.path = 2", "model.path", 1),
        ("x = 1\nmodel = {path = 2}", "model.path", 2),
        ("[model]\n# path = 1\n\npath = 2", "model.path", 4),
        ('[evaluation]\n[evaluation."splits"]\n"held" = 1', "evaluation.splits.held", 3),
        ("[ activation . training ]\nbeta = 1", "activation.training.beta", 2),
        ("[model]\npath = 1", "model.dtype", 1),
        ("[model]\npath = 1", "prompts.path", 0),
        ("[model]\npath = 1\n[modelling]\ndtype = 1", "model.dtype", 1),
    ],
)
def test_line_of_an_option_is_found(text, dotted, line):
    assert find_line(text, dotted) == line


def test_unicode_line_separator_in_a_comment_does_not_shift_lines():
    assert find_line("# one\u2028comment\nseed = 1", "seed") == 2


@pytest.mark.parametrize(
    ("overrides", "option"),
    [
        (["scorer.model="], "scorer.model"),
        (["scorer.name=verifier"], "verifier"),
        (["verifier.name=exact"], "prompts.answer_column"),
        (["verifier.name=exact", "prompts.answer_column=a", "evaluation.splits.x=x.jsonl"], "evaluation.answer_column"),
        (["evaluation.splits.x=3"], "evaluation.splits.x"),
        (["prompts.answer_pattern=x(", "prompts.answer_column=a"], "prompts.answer_pattern"),
        (["prompts.answer_pattern=x", "prompts.answer_column=a"], "prompts.answer_pattern"),
        (["evaluation.answer_pattern=(x)"], "evaluation.answer_pattern"),
        (["evaluation.splits.a/b=x.jsonl"], "evaluation.splits.a/b"),
        (["model.context_tokens=100", "sampling.max_tokens=50"], "sampling.max_tokens"),
        (["prompts.path=toy:train"], "toy"),
        (["activation.path=toy:triples"], "toy"),
        (["evaluation.splits.x=toy:long"], "toy"),
        (["scorer.name=mean"], "scorer.members"),
        (["scorer.members=['verifier']"], "scorer.members"),
        (["scorer.name=mean", "scorer.members=['a reward model']"], "scorer.members"),
        (["scorer.name=mean", "scorer.members=[3]"], "scorer.members"),
        (["scorer.name=minimum", "scorer.members=['verifier']"], "verifier"),
        (["scorer.name=mean", "scorer.members=['reward_model=toy:reward_model']"], "toy"),
        (["verifier.name=regex", "prompts.answer_column=a"], "verifier.pattern"),
        (["verifier.pattern=x", "prompts.answer_column=a"], "verifier.pattern"),
        (["refresh.prompts=3"], "refresh"),
        (["verifier.name=exact", "prompts.answer_column=a", "refresh.training.objective=dpo"], "refresh.training.objective"),
        (["training.objective=reward"], "training.objective"),
        (
            ["activation.path=x", "activation.training.objective=sft", "activation.training.label_smoothing=0.1"],
            "activation.training.label_smoothing",
        ),
        (["model.context_tokens=200", "sampling.max_tokens=50", "strategy.name=few_shot"], "sampling.max_tokens"),
        (["strategy.name=parallel", "strategy.stop_unchanged=true"], "strategy.stop_unchanged"),
        (["strategy.stop_right=true"], "strategy.stop_right"),
        (["training.objective=policy_gradient", "training.objective_args.mismatch=truncate"], "training.objective_args.mismatch"),
        (["training.objective=policy_gradient", "sampling.temperature=0.7"], "sampling.temperature"),
        (["training.objective=policy_gradient", "sampling.top_p=0.9"], "sampling.top_p"),
        (["selection.name=advantages"], "selection.args.baseline"),
        (["selection.name=advantages", "strategy.name=chains", "strategy.samples=1"], "selection.args.baseline"),
        (["controller.name=plateau"], "controller.name"),
        (["controller.name=guard"], "controller.name"),
        (["controller.split=x"], "controller.split"),
        (["controller.split=y", "evaluation.splits.x=x.jsonl"], "controller.split"),
        (["controller.max_kl=1", "probe.prompts=0"], "controller.max_kl"),
        (["model.context_tokens=150", "sampling.max_tokens=50", "strategy.name=critique"], "sampling.max_tokens"),
        ([GUESSING], "engine.args.speculative_config"),
        ([GUESSING, "sampling.temperature=0"], "engine.args.speculative_config"),
        (["selection.name=reflections", "selection.args.form=alone"], "selection.args.form"),
        (["selection.name=reflections", "selection.args.form=alone", "training.objective=sft"], "selection.args.form"),
        (["selection.name=trajectories", "selection.args.turns=3", "training.objective=turns_dpo"], "selection.args.turns"),
        (["selection.whole=top_share"], "selection.whole"),
        (["engine.env.HF_TOKEN=x"], "engine.env.HF_TOKEN"),
        (["trainer.env.my_api_key=x"], "trainer.env.my_api_key"),
    ],
)
def test_options_that_do_not_fit_together_are_refused_by_name(recipe, overrides, option):
    assert f": {option}: " in refusal(recipe(), *overrides)


def test_speculation_is_allowed_where_nothing_is_sampled_and_on_a_gpu(recipe):
    for allowed in (["sampling.temperature=0", "evaluation.temperature=0"], ["engine.gpus_per_actor=1"]):
        assert load(recipe(), [GUESSING, *allowed]).engine.args["speculative_config"]["method"] == "ngram"


def test_environment_that_is_no_secret_is_allowed(recipe):
    given = load(recipe(), ["engine.env.TOKENIZERS_PARALLELISM='false'", "engine.env.VLLM_MAX_TOKENS=3"])
    assert set(given.engine.env) == {"TOKENIZERS_PARALLELISM", "VLLM_MAX_TOKENS"}


def test_config_survives_json(recipe):
    for path in [*RECIPES, recipe('[activation]\npath = "x"\n[engine.args]\ndepth = {a = [1, 2.5]}\n')]:
        config = load(path)
        stored = json.loads(json.dumps(resolve.resolved(config)))
        assert from_json(stored, "config.json") == config


def test_stored_config_with_an_option_of_another_version_is_refused_by_name(recipe):
    stored = resolve.resolved(load(recipe()))
    stored["engine"]["turbo"] = True
    with pytest.raises(UserError, match=r"config\.json: engine\.turbo: unknown option"):
        from_json(stored, "config.json")


@pytest.mark.parametrize("section", SECTIONS, ids=lambda section: section.__name__)
def test_runtime_options_are_left_out_of_what_a_stage_is_keyed_by(section):
    hints = typing.get_type_hints(section)
    required = {f.name: "x" for f in dataclasses.fields(section) if f.default is dataclasses.MISSING and hints[f.name] is str}
    if section is options.Config:
        required = {"prompts": options.Prompts("p"), "model": options.Model("m")}
    part = section(**required)
    left_out = {f.name for f in dataclasses.fields(section) if f.metadata.get("runtime") or f.name == "models"}
    assert set(resolve.resolved(part)) - set(resolve.resolved(part, runtime=False)) == left_out


def test_runtime_options_of_nested_sections_are_left_out(recipe):
    keyed = resolve.flatten(resolve.resolved(load(recipe()), runtime=False))
    assert "engine.name" in keyed
    assert not {"engine.actors", "iterations", "ray.num_cpus", "trainer.max_failures"} & set(keyed)


def test_config_is_frozen(recipe):
    with pytest.raises(dataclasses.FrozenInstanceError):
        load(recipe()).training.beta = 1.0


def test_free_tables_are_not_shared_between_configs():
    assert options.Engine().args is not options.Engine().args


@pytest.mark.parametrize(
    ("data", "message"),
    [(b'name = "\xff"', "is not UTF-8 at byte 8"), (b"[model\n", "is not valid TOML"), (None, "is a folder")],
)
def test_file_that_is_no_recipe_is_refused(tmp_path, data, message):
    path = tmp_path / "recipe.toml"
    path.mkdir() if data is None else path.write_bytes(data)
    assert message in refusal(path)


def test_missing_recipe_is_refused_with_where_the_shipped_ones_are(tmp_path):
    assert "no such recipe; the shipped ones are in jobs/recipes/" in refusal(tmp_path / "none.toml")
