"""Checks of options that must fit together, which no single option can check."""

import difflib
import re

from evolve_ray.config.options import Config, Selection, Training, texts_in_view, trainings
from evolve_ray.config.parse import Reader, describe, pattern_fault

RESERVED = ("policy", "initial", "base", "activation", "offline", "reward")  # of models, and of folders in a run
TRACKERS = ("tensorboard", "mlflow", "wandb")
SECRET = re.compile(r"(?i)(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key)(_|$)")
# Options that the objective does not use.
IGNORED: dict[str, tuple[str, ...]] = {
    "reward": ("nll", "length_normalised"),
    **dict.fromkeys(("sft", "policy_gradient", "turns_dpo", "turns_sft"), ("label_smoothing",)),
}


def check_together(config: Config, reader: Reader) -> None:
    """Raises `UserError` with the name of the first option that does not fit the others."""
    if config.scorer.name == "reward_model" and not config.scorer.model:
        reader.fail("scorer.model", "must name a reward model when scorer.name is 'reward_model'")
    for member in config.scorer.members:
        if not isinstance(member, str) or not re.fullmatch(r"verifier|reward_model=.+|[\w.]+:\w+", member):
            allowed = "'verifier', 'module:Name' or 'reward_model=FOLDER_OR_NAME'"
            reader.fail("scorer.members", f"holds {describe(member)}, but each member must be {allowed}")
    if bool(config.scorer.members) != (config.scorer.name in ("mean", "minimum")):
        reader.fail("scorer.members", "must be set when scorer.name is 'mean' or 'minimum', and only then")
    if "verifier" in (config.scorer.name, *config.scorer.members) and config.verifier is None:
        reader.fail("verifier", "must be set when the verifier is the scorer; add a [verifier] table")
    if config.scorer.name == "strategy":
        if config.strategy.name != "self_judge" and ":" not in config.strategy.name:
            fault = f"is 'strategy', but strategy {config.strategy.name!r} gives no scores; use self_judge, or one of your own"
            reader.fail("scorer.name", fault)
        if config.evaluation.splits and config.verifier is None:
            fault = "must be set when scorer.name is 'strategy': chains of an evaluation are scored by the verifier"
            reader.fail("verifier", f"{fault}; add a [verifier] table")
    if config.verifier is not None and bool(config.verifier.pattern) != (config.verifier.name == "regex"):
        reader.fail("verifier.pattern", "must be set when verifier.name is 'regex', and only then")
    if config.refresh is not None:
        if config.verifier is None or config.scorer.name != "reward_model":
            reader.fail("refresh", "needs scorer.name 'reward_model' and a [verifier] table; set both, or remove [refresh]")
        if config.refresh.training.objective != "reward":
            reader.fail("refresh.training.objective", "must be 'reward'")
    for name, training in trainings(config):
        if training.objective == "reward" and name != "refresh.training":
            reader.fail(
                f"{name}.objective", "is 'reward', which trains a reward model and not a policy; use it in [refresh] only"
            )
        if training.objective == "policy_gradient" and training.reference != "iteration":
            reader.fail(f"{name}.reference", "must be 'iteration' with objective 'policy_gradient': it wrote the answers")
        for field_name in ("temperature", "top_p") if name == "training" and training.objective == "policy_gradient" else ():
            if (value := getattr(config.sampling, field_name)) != 1.0:
                fault = (
                    f"is {value:g}, but objective 'policy_gradient' compares probabilities at 1.0, of which these are no samples"
                )
                reader.fail(f"sampling.{field_name}", f"{fault}; set it to 1.0")
        truncates = training.objective == "policy_gradient" and training.objective_args.get("mismatch") == "truncate"
        if truncates and not config.sampling.logps:
            reader.fail(f"{name}.objective_args.mismatch", "needs the engine's log-probabilities; set sampling.logps = true")
        for objective, ignored in IGNORED.items():
            for field_name in ignored if training.objective == objective else ():
                if getattr(training, field_name):
                    reader.fail(f"{name}.{field_name}", f"has no effect with objective {objective!r}; remove it")
    check_lineage(config, reader)
    check_rows_of_turns(config.selection, config.training, "", reader)
    check_models(config, reader)
    strategy = config.strategy
    width = {"chain": 1, "few_shot": 1, "feedback": 1, "critique": strategy.critiques}.get(strategy.name, strategy.samples)
    alone = width == 1 and ":" not in strategy.name
    if config.selection.name == "advantages" and alone and config.selection.args.get("baseline") != "none":
        reader.fail(
            "selection.args.baseline",
            f"strategy {strategy.name!r} gives one answer a round, so each is its own baseline and every advantage is 0; use "
            "strategy 'parallel' or 'chains' with several samples, or baseline 'none'",
        )
    if config.verifier is not None and not config.prompts.answer_column:
        reader.fail("prompts.answer_column", "must name the column with the answers that [verifier] checks")
    if config.verifier is not None and config.evaluation.splits and not config.evaluation.answer_column:
        reader.fail("evaluation.answer_column", "must name the column with the answers that [verifier] checks")
    for table, part in (("prompts", config.prompts), ("evaluation", config.evaluation)):
        if part.answer_pattern and (fault := pattern_fault(part.answer_pattern, bool(part.answer_column))):
            reader.fail(f"{table}.answer_pattern", f"{part.answer_pattern!r} {fault}")
        for column in part.columns:
            if not isinstance(column, str) or not column:
                reader.fail(f"{table}.columns", f"holds {describe(column)}, but each must be the name of a column")
    for name, path in config.evaluation.splits.items():
        if not isinstance(path, str):
            reader.fail(f"evaluation.splits.{name}", f"is {describe(path)}, but must be a string: a file or dataset")
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
            reader.fail(f"evaluation.splits.{name}", "the name of a split must consist of letters, digits, - and _; rename it")
    if config.controller.name in ("plateau", "guard") and not config.evaluation.splits:
        reader.fail("controller.name", f"is {config.controller.name!r}, which needs held-out prompts; add [evaluation.splits]")
    if config.controller.split and config.controller.split not in config.evaluation.splits:
        splits = ", ".join(config.evaluation.splits) or "none"
        reader.fail("controller.split", f"is {config.controller.split!r}, but must be one of evaluation.splits ({splits})")
    if config.controller.max_kl and not config.probe.prompts:
        reader.fail("controller.max_kl", "needs the probe, which is off; set probe.prompts above 0")
    for place, name in enumerate(config.trackers.use):
        if name not in TRACKERS:
            nearest = difflib.get_close_matches(str(name), TRACKERS, n=1)
            hint = f"did you mean {nearest[0]!r}?" if nearest else f"the trackers are {', '.join(TRACKERS)}"
            reader.fail("trackers.use", f"holds {describe(name)}, which is not a tracker; {hint}")
        if name in config.trackers.use[:place]:
            reader.fail("trackers.use", f"names {name!r} twice; name each tracker once")
    if not config.trackers.project.strip():
        reader.fail("trackers.project", "is empty; name a project")
    for name in ("stop_unchanged", "stop_right"):
        if getattr(config.strategy, name) and config.strategy.name != "chain" and ":" not in config.strategy.name:
            reader.fail(f"strategy.{name}", f"has no effect with strategy {config.strategy.name!r}; remove it")
    if config.strategy.stop_right and config.verifier is None:
        reader.fail("strategy.stop_right", "needs a verifier, and there is none; add a [verifier] table")
    if config.strategy.name == "feedback" and config.verifier is None:
        reader.fail("strategy.name", "is 'feedback', which shows the verifier's words, and there is no verifier; add [verifier]")
    if config.evaluation.pick and not config.evaluation.splits:
        reader.fail("evaluation.pick", "needs held-out prompts; add [evaluation.splits]")
    texts = texts_in_view(config.strategy)
    if texts * config.sampling.max_tokens >= config.model.context_tokens:
        reader.fail(
            "sampling.max_tokens",
            f"is {config.sampling.max_tokens}, but strategy {config.strategy.name!r} has up to {texts} responses in one context: "
            f"{texts} times it must be below model.context_tokens ({config.model.context_tokens}); lower it, or raise "
            "model.context_tokens",
        )
    sampled = [name for name in ("sampling", "evaluation") if getattr(config, name).temperature > 0]
    if "speculative_config" in config.engine.args and not config.engine.gpus_per_actor and sampled:
        reader.fail(
            "engine.args.speculative_config",
            "changes the distribution of responses on a CPU: at a temperature above 0, vLLM accepts speculative tokens there "
            f"that it must reject; remove it, or set {' and '.join(f'{name}.temperature' for name in sampled)} to 0",
        )
    for table, env in (("engine.env", config.engine.env), ("trainer.env", config.trainer.env)):
        for name in env:
            if SECRET.search(name):
                reader.fail(f"{table}.{name}", "looks like a secret, but the recipe is stored in the run directory; set it in "
                            "the environment in which Ray is started")  # fmt: skip
    if config.toy is None:
        paths = [config.model.path, config.prompts.path, config.scorer.model, *config.evaluation.splits.values()]
        paths += [part.path for part in (config.activation, config.offline) if part]
        paths += [member.removeprefix("reward_model=") for member in config.scorer.members]
        paths += [model.path for model in config.models.values()]
        for path in paths:
            if path.startswith("toy:"):
                reader.fail("toy", f"{path!r} is part of the tiny world; add a [toy] table to the recipe")


def check_lineage(config: Config, reader: Reader) -> None:
    """Raises `UserError` if what a training starts from, or the rows that are mixed in, do not fit the recipe."""
    for name, training in trainings(config):
        for field_name in ("start", "replay", "given") if name != "training" else ():
            if getattr(training, field_name) != getattr(Training(), field_name):
                reader.fail(f"{name}.{field_name}", "is for the trainings of the iterations alone; set it in [training]")
    training = config.training
    if training.replay + training.given >= 1:
        fault = f"is {training.replay:g}, and training.given {training.given:g}: together they must be below 1; lower one of them"
        reader.fail("training.replay", fault)
    if training.objective == "policy_gradient":
        for field_name, why in (
            ("start", "has to be 'iteration' with objective 'policy_gradient': it starts from the policy that wrote the answers"),
            ("replay", "must be 0 with objective 'policy_gradient': answers of earlier iterations come from other policies"),
        ):
            if getattr(training, field_name) not in (0, "iteration"):
                reader.fail(f"training.{field_name}", f"{why}; remove it")
    if training.given and training.objective in ("policy_gradient", "turns_dpo", "turns_sft"):
        fault = f"must be 0 with objective {training.objective!r}: triples have no advantages and no turns; remove it"
        reader.fail("training.given", fault)
    if training.given and config.activation is None:
        reader.fail("training.given", "takes rows of the [activation] triples, and there is no such table; add it")


def check_models(config: Config, reader: Reader) -> None:
    """Raises `UserError` if a further model is one that nobody asks, or if its training does not fit."""
    for name, model in config.models.items():
        table = f"models.{name}"
        if name in RESERVED:
            reader.fail(table, "is the name of something else in a run; use another name")
        if ":" not in config.strategy.name:
            fault = f"is asked by no one: strategy {config.strategy.name!r} asks the policy alone; use a strategy of your own"
            reader.fail(table, fault)
        if (model.selection is None) != (model.training is None):
            missing = "selection" if model.selection is None else "training"
            reader.fail(f"{table}.{missing}", "is missing: a model is trained on rows that its selection makes; set both or none")
        if model.selection is None or model.training is None:
            continue
        if model.training.objective == "policy_gradient":
            reader.fail(f"{table}.training.objective", "is 'policy_gradient', which is for the policy alone; use another one")
        check_rows_of_turns(model.selection, model.training, f"{table}.", reader)


def check_rows_of_turns(selection: Selection, training: Training, table: str, reader: Reader) -> None:
    """Fails if a selection makes rows of turns that the objective would not learn as they are; `table` stands before both."""
    alone = selection.name == "reflections" and selection.args.get("form") == "alone" and ":" not in training.objective
    if alone and (training.objective != "sft" or training.refine_weight):
        reader.fail(
            f"{table}selection.args.form",
            "is 'alone', whose rows prefer nothing; set training.objective 'sft' with refine_weight 0",
        )
    turns = [part.get("turns", 2) for part in (selection.args, training.objective_args)]
    if (selection.name, training.objective) == ("trajectories", "turns_dpo") and turns[0] != turns[1]:
        reader.fail(
            f"{table}selection.args.turns", f"is {turns[0]}, but training.objective_args.turns is {turns[1]}; set both alike"
        )
    if selection.whole and ":" not in selection.whole:
        reader.fail(f"{table}selection.whole", f"is {selection.whole!r}, but must be 'module:Name'")
