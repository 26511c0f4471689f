"""The strategies that jobs/evaluate.py measures: read from the command line, and checked like those of a recipe."""

import dataclasses
from dataclasses import dataclass

from evolve_ray.config.options import Config, Strategy
from evolve_ray.config.parse import Reader, parse_value
from evolve_ray.config.plugs import check_call, find_plug, with_args
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import UserError
from evolve_ray.evaluate.final_answers import PICKS
from evolve_ray.refine.strategies import ALL_STRATEGIES
from evolve_ray.refine.template import load_template


@dataclass(frozen=True)
class Measured:
    """A strategy and how its final answer is picked; `label` is what the tables call it."""

    label: str
    strategy: Strategy
    pick: str

    @property
    def name(self) -> str:
        """Its name among the parts of a comparison."""
        return f"strategy {self.label}"


def read_strategies(texts: list[str], pick: str | None, config: Config) -> tuple[Measured, ...]:
    """The strategies of `--strategy NAME[,OPTION=VALUE...][,pick=PICK]`; `pick` is the default of their picks.

    Options that a text leaves out are those of the recipe. With `pick` alone it is the recipe's strategy.
    """
    if not texts and pick is not None:
        texts = [config.strategy.name]
    strategies = tuple(read_strategy(text, pick or "last", config) for text in texts)
    for number, measured in enumerate(strategies):
        if measured in strategies[:number]:
            raise UserError(f"--strategy {measured.label}: is given twice; give each once")
    return strategies


def read_strategy(text: str, pick: str, config: Config) -> Measured:
    name, *parts = text.split(",")
    own = resolved(config.strategy)
    table = own | {"name": name, "stop_unchanged": False, "stop_right": False}
    table["args"] = dict(own["args"]) if name == config.strategy.name else {}
    shown = []
    for part in parts:
        key, equals, value = part.partition("=")
        if not equals:
            raise UserError(f"--strategy {text}: {part!r} must have the form OPTION=VALUE, for example samples=8")
        if key == "pick":
            pick = value
            continue
        target, key = (table["args"], key.removeprefix("args.")) if key.startswith("args.") else (table, key)
        target[key] = parse_value(value)
        shown.append(part)
    if pick not in PICKS:
        raise UserError(f"--strategy {text}: pick {pick!r} is unknown; choose from {', '.join(PICKS)}")
    strategy = Reader(f"--strategy {text}", "", set()).build(Strategy, table, "strategy")
    plug = find_plug(ALL_STRATEGIES, name, "--strategy")
    check_call("--strategy", name, plug, ("prompt", "template", "options"), extras=("row",))
    with_args("strategy.args", name, plug, strategy.args)
    if (name == "feedback" or strategy.stop_right) and config.verifier is None:
        raise UserError(f"--strategy {text}: asks the verifier, and the recipe has none; add a [verifier] table")
    load_template(config.template.name, config.template.layout, name)  # says which part it lacks
    return Measured(",".join([name, *shown]), strategy, pick)


def is_chain(strategy: Strategy, rounds: int) -> bool:
    """Whether a strategy is the chain that every evaluation runs."""
    chain = Strategy(name="chain", rounds=rounds)
    return strategy == dataclasses.replace(chain, samples=strategy.samples, shots=strategy.shots, show=strategy.show)
