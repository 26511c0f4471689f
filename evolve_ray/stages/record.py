"""What a run has come to: every evaluated model in order, told to trackers, model cards and the report."""

from typing import Any

from evolve_ray.config.resolve import resolved
from evolve_ray.inputs.context import Context
from evolve_ray.report import card, report


class Record:
    """The models of a run as report.json lists them; each one is written down as soon as all is known of it."""

    def __init__(self, context: Context):
        self.context, self.config = context, resolved(context.config)
        self.models: list[dict[str, Any]] = []
        self.pages = report.PageWriter()

    def add(self, model: dict[str, Any]) -> None:
        """A model with its evaluation; of an iteration also with `probe`, `drift` and `decision`."""
        context, iteration = self.context, model["iteration"]
        self.models.append(model)
        context.trackers.evaluated(model)
        if model["name"] != "base":
            card.write(context.run, self.config, self.models)
        if iteration:
            report.write(context.run, self.config, self.models, self.pages)

    def finish(self) -> dict[str, Any]:
        """The report of the whole run, written."""
        self.pages.wait()
        return report.write(self.context.run, self.config, self.models)
