"""All options of a run, strict and frozen: a dataclass for each table of a recipe.

A recipe is a TOML file with the tables below. An unknown key, a wrong type or a value out of range is an error with the file,
the line and the nearest name, before anything heavy is imported.
"""

from dataclasses import dataclass, field

from evolve_ray.config.data_options import Model, Prompts, Template, Thinking, Toy
from evolve_ray.config.draft_options import Engine, Sampling, Scorer, Selection, Strategy, Verifier
from evolve_ray.config.option import option, section
from evolve_ray.config.run_options import Controller, Evaluation, Probe, RayOptions, Trackers
from evolve_ray.config.second_options import SecondModel
from evolve_ray.config.serve_options import Serve
from evolve_ray.config.training_options import Preferences, Refresh, Trainer, Training


@dataclass(frozen=True)
class Config:
    """A whole recipe."""

    prompts: Prompts
    model: Model
    name: str = option("name of the run, and of its folder in runs/", "run")
    seed: int = option("seed of all random choices", 0, low=0)
    iterations: int = option("iterations after the activation", 3, low=0, runtime=True)
    toy: Toy | None = None
    activation: Preferences | None = None
    offline: Preferences | None = None
    template: Template = section(Template)
    thinking: Thinking = section(Thinking)
    strategy: Strategy = section(Strategy)
    sampling: Sampling = section(Sampling)
    engine: Engine = section(Engine)
    scorer: Scorer = section(Scorer)
    verifier: Verifier | None = None
    refresh: Refresh | None = None
    selection: Selection = section(Selection)
    training: Training = section(Training)
    trainer: Trainer = section(Trainer)
    models: dict[str, SecondModel] = field(default_factory=dict, metadata={"later": True})
    evaluation: Evaluation = section(Evaluation)
    probe: Probe = section(Probe)
    controller: Controller = section(Controller)
    trackers: Trackers = field(default_factory=Trackers, metadata={"runtime": True})
    serve: Serve = field(default_factory=Serve, metadata={"runtime": True})
    ray: RayOptions = section(RayOptions)


def texts_in_view(strategy: Strategy) -> int:
    """The most responses in one context of a strategy, including the response that is generated."""
    return {"few_shot": strategy.shots + 1, "critique": 3, "feedback": 3}.get(strategy.name, 2)


def trainings(config: Config) -> list[tuple[str, Training]]:
    """(name of the table, training) of every training of a recipe."""
    parts = (("activation", config.activation), ("offline", config.offline), ("refresh", config.refresh))
    second = [(f"models.{name}.training", part.training) for name, part in config.models.items() if part.training]
    return [("training", config.training), *((f"{name}.training", part.training) for name, part in parts if part), *second]
