"""Options that must fit together: what no single field of the configuration can say."""

import difflib
import re

from evolve_ray.config.options import Config, texts_in_view, trainings
from evolve_ray.config.parse import Reader, describe, pattern_fault

TRACKERS = ("tensorboard", "mlflow", "wandb")
SECRET = re.compile(r"(?i)(^|_)(token|secret|password|passwd|credentials?|api_?key|access_?key)(_|$)")
IGNORED = {"sft": ("label_smoothing",), "reward": ("nll", "length_normalised")}  # options that could only be ignored


def check_together(config: Config, reader: Reader) -> None:
    """Refuses a configuration by the name of the option that does not fit the others."""
    if config.scorer.name == "reward_model" and not config.scorer.model:
        reader.fail("scorer.model", "must name a reward model when scorer.name is 'reward_model'")
    for member in config.scorer.members:
        if not isinstance(member, str) or not re.fullmatch(r"verifier|reward_model=.+|[\w.]+:\w+", member):
            known = "'verifier', 'module:Name' or 'reward_model=FOLDER_OR_NAME'"
            reader.fail("scorer.members", f"holds {describe(member)}, but each must be {known}")
    if bool(config.scorer.members) != (config.scorer.name in ("mean", "minimum")):
        reader.fail("scorer.members", "must be given when scorer.name is 'mean' or 'minimum', and only then")
    if "verifier" in (config.scorer.name, *config.scorer.members) and config.verifier is None:
        reader.fail("verifier", "must be set when the verifier is the scorer; add a [verifier] table")
    if config.verifier is not None and bool(config.verifier.pattern) != (config.verifier.name == "regex"):
        reader.fail("verifier.pattern", "must be given when verifier.name is 'regex', and only then")
    if config.refresh is not None:
        if config.verifier is None or config.scorer.name != "reward_model":
            reader.fail("refresh", "needs scorer.name 'reward_model' and [verifier]")
        if config.refresh.training.objective != "reward":
            reader.fail("refresh.training.objective", "must be 'reward'")
    for name, training in trainings(config):
        if training.objective == "reward" and name != "refresh.training":
            reader.fail(f"{name}.objective", "is 'reward', which trains a reward model and no policy; it belongs to [refresh]")
        for objective, ignored in IGNORED.items():
            for field_name in ignored if training.objective == objective else ():
                if getattr(training, field_name):
                    reader.fail(f"{name}.{field_name}", f"means nothing to objective {objective!r}; leave it out")
    if config.verifier is not None and not config.prompts.answer_column:
        reader.fail("prompts.answer_column", "must name the column with the answers that [verifier] checks")
    if config.verifier is not None and config.evaluation.splits and not config.evaluation.answer_column:
        reader.fail("evaluation.answer_column", "must name the column with the answers that [verifier] checks")
    for table, part in (("prompts", config.prompts), ("evaluation", config.evaluation)):
        if part.answer_pattern and (fault := pattern_fault(part.answer_pattern, bool(part.answer_column))):
            reader.fail(f"{table}.answer_pattern", f"{part.answer_pattern!r} {fault}")
    for name, path in config.evaluation.splits.items():
        if not isinstance(path, str):
            reader.fail(f"evaluation.splits.{name}", f"is {describe(path)}, but must be a string: a file or dataset")
        if not re.fullmatch(r"[A-Za-z0-9_\-]+", name):
            reader.fail(f"evaluation.splits.{name}", "a split's name may hold letters, digits, - and _ only")
    if config.controller.name in ("plateau", "guard") and not config.evaluation.splits:
        reader.fail("controller.name", f"is {config.controller.name!r}, which needs held-out prompts; add [evaluation.splits]")
    if config.controller.split and config.controller.split not in config.evaluation.splits:
        known = ", ".join(config.evaluation.splits) or "none"
        reader.fail("controller.split", f"is {config.controller.split!r}, but must be one of evaluation.splits ({known})")
    if config.controller.max_kl and not config.probe.prompts:
        reader.fail("controller.max_kl", "needs the probe, which is off; set probe.prompts")
    for place, name in enumerate(config.trackers.use):
        if name not in TRACKERS:
            near = difflib.get_close_matches(str(name), TRACKERS, n=1)
            hint = f"did you mean {near[0]!r}?" if near else f"known are {', '.join(TRACKERS)}"
            reader.fail("trackers.use", f"holds {describe(name)}; {hint}")
        if name in config.trackers.use[:place]:
            reader.fail("trackers.use", f"names {name!r} twice; name each tracker once")
    if not config.trackers.project.strip():
        reader.fail("trackers.project", "is empty; name a project")
    for name in ("stop_unchanged", "stop_right"):
        if getattr(config.strategy, name) and config.strategy.name != "chain" and ":" not in config.strategy.name:
            reader.fail(f"strategy.{name}", f"means nothing to strategy {config.strategy.name!r}; leave it out")
    if config.strategy.stop_right and config.verifier is None:
        reader.fail("strategy.stop_right", "asks the verifier, and there is none; add a [verifier] table")
    texts = texts_in_view(config.strategy)
    if texts * config.sampling.max_tokens >= config.model.context_tokens:
        reader.fail(
            "sampling.max_tokens",
            f"is {config.sampling.max_tokens}; strategy {config.strategy.name!r} has up to {texts} responses in one context, "
            f"and {texts} times that must be below model.context_tokens ({config.model.context_tokens})",
        )
    sampled = [name for name in ("sampling", "evaluation") if getattr(config, name).temperature > 0]
    if "speculative_config" in config.engine.args and not config.engine.gpus_per_actor and sampled:
        reader.fail(
            "engine.args.speculative_config",
            "gives other answers than the model's on a CPU, where vLLM takes guesses wrongly at a temperature above 0; leave it "
            f"out, or set {' and '.join(f'{name}.temperature' for name in sampled)} to 0",
        )
    for table, env in (("engine.env", config.engine.env), ("trainer.env", config.trainer.env)):
        for name in env:
            if SECRET.search(name):
                reader.fail(f"{table}.{name}", "looks like a secret, but a recipe is stored in the run directory; set it in the "
                            "environment that Ray is started in")  # fmt: skip
    if config.toy is None:
        named = [config.model.path, config.prompts.path, config.scorer.model, *config.evaluation.splits.values()]
        named += [part.path for part in (config.activation, config.offline) if part]
        named += [member.removeprefix("reward_model=") for member in config.scorer.members]
        for path in named:
            if path.startswith("toy:"):
                reader.fail("toy", f"{path!r} is part of the tiny world; add a [toy] table to the recipe")
