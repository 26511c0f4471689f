"""The evaluated models of a run, in order; they go to the trackers, the model cards and the report."""

from typing import Any

from evolve_ray.config.resolve import resolved
from evolve_ray.inputs.context import Context
from evolve_ray.report import card, report


class Record:
    """The models of a run as report.json lists them; each is written as soon as its figures are complete."""

    def __init__(self, context: Context):
        self.context, self.config = context, resolved(context.config)
        self.models: list[dict[str, Any]] = []
        self.pages = report.PageWriter()

    def add(self, model: dict[str, Any]) -> None:
        """Adds a model with its evaluation; the model of an iteration also has `probe`, `drift` and `decision`."""
        context, iteration = self.context, model["iteration"]
        self.models.append(model)
        context.trackers.log_evaluation(model)
        if model["name"] != "base":
            card.write(context.run, self.config, self.models)
        if iteration:
            report.write(context.run, self.config, self.models, self.pages)

    def finish(self) -> dict[str, Any]:
        """Writes the report of the whole run and returns it."""
        self.pages.wait()
        return report.write(self.context.run, self.config, self.models)
