"""The plugs of a recipe, loaded and checked by kind before anything runs: names, signatures, options, needs."""

import importlib.util
from typing import Any

from evolve_ray.config.options import Config, trainings
from evolve_ray.config.plugs import check_call, find_plug, with_args
from evolve_ray.errors import UserError
from evolve_ray.evaluate.controller import CONTROLLERS
from evolve_ray.refine.named_models import named_models, unknown_model
from evolve_ray.refine.strategies import ALL_STRATEGIES
from evolve_ray.score.combined import JUDGES, build_scorer
from evolve_ray.score.verifiers import VERIFIERS, build_verifier
from evolve_ray.select.selections import SELECTIONS

SCORER = ("prompts", "answers", "responses")


def check_plugs(config: Config) -> None:
    """Raises `UserError` if a plug of the recipe cannot be loaded or called, or a package of the recipe is missing."""
    strategy, controller = config.strategy, config.controller
    selections = {"selection": config.selection}
    selections |= {f"models.{name}.selection": part.selection for name, part in config.models.items() if part.selection}
    functions: tuple[tuple[str, str, dict, dict[str, Any], tuple[str, ...], tuple[str, ...]], ...] = (
        ("strategy", strategy.name, strategy.args, ALL_STRATEGIES, ("prompt", "template", "options"), ("row",)),
        *(
            (table, selection.name, selection.args, SELECTIONS, ("prompt", "drafts", "options"), ("others",))
            for table, selection in selections.items()
        ),
        ("controller", controller.name, controller.args, CONTROLLERS, ("models", "options"), ()),
    )
    for table, name, args, shipped, arguments, extras in functions:
        plug = find_plug(shipped, name, f"{table}.name")
        check_call(f"{table}.name", name, plug, arguments, extras=extras)
        with_args(f"{table}.args", name, plug, args)
    for named, place in named_models(find_plug(ALL_STRATEGIES, strategy.name, "strategy.name")):
        if unknown := unknown_model(named, config.models):
            raise UserError(f"strategy.name: {strategy.name!r} {unknown}; see {place}")
    for table, selection in selections.items():
        if selection.whole:
            whole = find_plug({}, selection.whole, f"{table}.whole")
            check_call(f"{table}.whole", selection.whole, whole, ("rows", "options"))
            with_args(f"{table}.whole_args", selection.whole, whole, selection.whole_args)
    if ":" in config.engine.name:
        check_call("engine.name", config.engine.name, find_plug({}, config.engine.name, "engine.name"), ("spec", "chat"))
    check_scorers(config)
    for name, training in trainings(config):
        if ":" in training.objective or training.objective_args:
            from evolve_ray.train import objectives  # loads torch, so only where there is something to check

            objective = objectives.find(training, name)
            needs = [*objective.numbers, *(name for name in objective.sequences if name not in objective.needs)]
            if training.given and needs:
                raise UserError(
                    f"training.given: triples have no numbers and no turns, but objective {training.objective!r} needs "
                    f"{', '.join(needs)}; set training.given = 0"
                )
    if config.trainer.lora_rank and importlib.util.find_spec("peft") is None:
        raise UserError(
            "trainer.lora_rank: needs the package peft; pip install -e '.[lora]', or remove the option to train all weights"
        )


def check_scorers(config: Config) -> None:
    """Checks scorer, members and verifier: how they are made, and how they are called."""
    field = "scorer.members" if config.scorer.members else "scorer.name"
    plugs = [
        name for name in (config.scorer.name, *config.scorer.members) if ":" in name and not name.startswith("reward_model=")
    ]
    if config.scorer.name in (*JUDGES, "vote"):
        build_scorer(config.scorer, {}, None)
    elif config.scorer.args and not plugs:
        raise UserError(f"scorer.args: has no effect with scorer {config.scorer.name!r}; remove it")
    named = [(field, "scorer.args", name, config.scorer.args) for name in plugs]
    if config.verifier and config.verifier.name in VERIFIERS:
        build_verifier(config.verifier)
    elif config.verifier:
        named.append(("verifier.name", "verifier.args", config.verifier.name, config.verifier.args))
    for field, table, name, args in named:
        plug = find_plug({}, name, field)
        check_call(field, name, plug, (), "no arguments when it is made, beside `args`: ")
        with_args(table, name, plug, args)
        if isinstance(plug, type):
            if "__call__" not in dir(plug):
                raise UserError(f"{field}: {name!r} has no method __call__({', '.join(SCORER)}); add it")
            check_call(field, name, getattr(plug, "__call__"), ("self", *SCORER), "in __call__ ")  # noqa: B004, B009
