"""Gathers the preview of a recipe as one dict of plain JSON values."""

import contextlib
import dataclasses
import functools
import re
import statistics
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from evolve_ray.config.options import Config
from evolve_ray.data.prompts import HeldOut, fresh_order, fresh_slice
from evolve_ray.errors import UserError
from evolve_ray.inputs.prepare import check_plugs, settle_rendering
from evolve_ray.inputs.reader import DataReader
from evolve_ray.models import folders, round_trip
from evolve_ray.preview import asks, checks, pairs
from evolve_ray.refine.template import Template, load_template
from evolve_ray.score.combined import reward_model_field, reward_model_names
from evolve_ray.store import rows
from evolve_ray.store.run import Run
from evolve_ray.store.turns import as_text, has_system
from evolve_ray.toy.parts import toy_parts

NEAR = 0.9  # share of the context from which a prompt is near it


class Preview:
    """Reads the data of a recipe and fills `content`; a fault in a table is noted, and the others are still read."""

    def __init__(self, config: Config, run: Run, num_prompts: int, say: Callable[[str], None]):
        check_plugs(config)
        self.config, self.num_prompts = config, num_prompts
        template = load_template(config.template.name, config.template.layout, config.strategy.name)
        self.toy = toy_parts(config, run, say) if config.toy else {}
        path = self.toy.get(config.model.path, config.model.path)
        self.policy = folders.resolve(path, "model.path", folders.WITHOUT_WEIGHTS)
        self.others = {
            name: folders.resolve(self.toy.get(other.path, other.path), f"models.{name}.path", folders.WITHOUT_WEIGHTS)
            for name, other in config.models.items()
        }
        rendering = settle_rendering(config, None, [self.policy, *self.others.values()])
        self.template: Template = dataclasses.replace(template, rendering=rendering)
        self.reader = DataReader(config, self.template, self.policy, self.toy, lambda line: None)
        self.faults: list[str] = []
        self.warnings: list[str] = []
        self.tables: list[dict[str, Any]] = []
        self.triples: dict[str, list[dict]] = {}

    def collect(self, *, scorer: bool) -> dict[str, Any]:
        """The whole preview."""
        config, chat = self.config, self.reader.chat
        faults, notes = round_trip.round_trip(chat, "model.path")
        self.warnings += faults + notes
        held_out = self.read_held_out()
        for name in ("activation", "offline"):
            if getattr(config, name):
                self.read_triples(name, held_out)
        prompts, lengths = self.read_prompts(held_out)
        all_prompts = [row["prompt"] for row in prompts] + [
            pair["prompt"] for table in self.triples.values() for pair in table[:1]
        ]
        self.warnings += checks.template_warnings(chat, systems=any(map(has_system, all_prompts)))
        shown = prompts[: self.num_prompts]
        content = {
            "name": config.name,
            "model": str(self.policy),
            "template": {"name": config.template.name, "layout": config.template.layout},
            "strategy": config.strategy.name,
            "thinking": type(chat.thinking).__name__.lower() if chat.thinking else "none",
            "context_tokens": config.model.context_tokens,
            "max_tokens": config.sampling.max_tokens,
            "tables": self.tables,
            "prompts": [self.show_prompt(row) for row in shown],
            "lengths": self.lengths(lengths, prompts),
            "pairs": pairs.show_pairs(config, self.template, chat, self.triples, shown[0] if shown else None),
            "triples": {
                name: pairs.triple_lengths(config, self.template, chat, table) for name, table in self.triples.items() if table
            },
            "verifier": self.verifier(prompts),
            "scorer": self.scorer(prompts) if scorer else None,
        }
        self.check_pairs(content)
        return {**content, "faults": self.faults, "warnings": list(dict.fromkeys(self.warnings))}

    @functools.cached_property
    def chats(self) -> dict[str, Any]:
        """The tokenizers and chat templates of the models of `[models]`."""
        from evolve_ray.models.chat import Chat

        rendering = self.template.rendering.for_reward_model
        return {name: Chat(folder, f"models.{name}.path", rendering) for name, folder in self.others.items()}

    @contextlib.contextmanager
    def noting(self) -> Iterator[None]:
        """Notes the fault of a table instead of raising it."""
        try:
            yield
        except UserError as error:
            self.faults.append(str(error))

    def add_table(self, name: str, path: str, num_rows: int, rejected: list[dict]) -> None:
        """Notes what a table was taken for, and its dropped rows by reason."""
        reasons: dict[str, dict[str, Any]] = {}
        for row in rejected:
            kind = re.sub(r"\d+", "N", row["reason"])
            entry = reasons.setdefault(kind, {"reason": row["reason"], "count": 0, "first": f"{row['file']}:{row['line']}"})
            entry["count"] += 1
        shape = str(self.reader.shapes.get(name, "not read"))
        dropped = sorted(reasons.values(), key=lambda entry: -entry["count"])
        self.tables.append({"table": name, "path": path, "taken_for": shape, "num_rows": num_rows, "dropped": dropped})

    def read_held_out(self) -> HeldOut:
        splits = self.config.evaluation.splits
        with self.noting():
            if splits:
                table, rejected, _ = self.reader.held_out()
                for split, path in splits.items():
                    part = [row for row in table if row["split"] == split]
                    self.add_table(
                        f"evaluation.splits.{split}", path, len(part), [row for row in rejected if of(row, path, self.toy)]
                    )
                return HeldOut(table, self.reader.asked)
        return HeldOut()

    def read_triples(self, name: str, held_out: HeldOut) -> None:
        part = getattr(self.config, name)
        with self.noting():
            self.triples[name], rejected = self.reader.triples(name, part, held_out)
            self.add_table(name, part.path, len(self.triples[name]), rejected)

    def read_prompts(self, held_out: HeldOut) -> tuple[list[dict], list[int]]:
        """(prompts of iteration 1 in their order, tokens of the first asks of all usable prompts)."""
        config, part = self.config, self.config.prompts
        with self.noting():
            table, rejected = self.reader.training(held_out)
            self.add_table("prompts", part.path, len(table), rejected)
            needed = part.per_iteration * config.iterations
            if part.again == "never" and len(table) < needed:
                self.warnings.append(
                    f"{config.iterations} iterations of {part.per_iteration} fresh prompts need {needed}, but {len(table)} are "
                    "usable; lower prompts.per_iteration or iterations, or add prompts"
                )
            order = fresh_order(table["prompt_id"], seed=config.seed)
            first = fresh_slice(table, order, iteration=1, per_iteration=part.per_iteration)
            return rows.from_table(first), table["num_tokens"].to_pylist()
        return [], []

    def show_prompt(self, row: dict) -> dict[str, Any]:
        place = {"prompt_id": row["prompt_id"], "place": f"{row['file']}:{row['line']}"}
        text = {"prompt": as_text(row["prompt"]), "answer": row["answer"]}
        return {**place, **text, "asks": asks.show_asks(self.config, self.template, self.reader.chat, row, self.chats)}

    def lengths(self, first_asks: list[int], prompts: list[dict]) -> list[dict[str, Any]]:
        """For each round the tokens of its ask, and with a response of `sampling.max_tokens`; for median and longest prompt."""
        if not first_asks:
            return []
        config = self.config
        median, longest = int(statistics.median(first_asks)), max(first_asks)
        lengths: list[dict[str, Any]] = []
        for part in asks.round_lengths(config, self.template, self.reader.chat, prompts[0]):
            others = part.extra_tokens + part.responses_in_view * config.sampling.max_tokens
            whole = longest + others + config.sampling.max_tokens
            lengths.append(
                {
                    "round": part.number,
                    "kind": part.kind,
                    "responses_in_view": part.responses_in_view,
                    "median_ask": median + others,
                    "longest_ask": longest + others,
                    "longest_whole": whole,
                    "share_of_context": round(whole / config.model.context_tokens, 3),
                }
            )
        fullest = max(part["longest_whole"] for part in lengths)
        if fullest > NEAR * config.model.context_tokens:
            self.warnings.append(
                f"the longest prompt ({longest} tokens) may fill {fullest} of the {config.model.context_tokens} tokens of the "
                "context; longer prompts are dropped"
            )
        return lengths

    def check_pairs(self, content: dict[str, Any]) -> None:
        """Warns of answers without an end token, and of triples that are longer than the context."""
        for pair in content["pairs"]:
            for sequence in pair["sequences"]:
                if sequence["trained"]["num_tokens"] and sequence["end_token"] is None:
                    self.warnings.append(f"{pair['training']}: the response of {sequence['name']} ends without an end token")
        for name, lengths in content["triples"].items():
            if lengths["num_beyond_context"]:
                self.warnings.append(
                    f"{name}: {lengths['num_beyond_context']} of {lengths['num_measured']} triples have a sequence longer than "
                    f"model.context_tokens ({self.config.model.context_tokens}); the longest has {lengths['sequence_max']}"
                )

    def verifier(self, prompts: list[dict]) -> dict[str, Any] | None:
        answered = [row for row in prompts if row["answer"] is not None]
        if not self.config.verifier or not answered:
            return None
        counts, warnings = checks.check_verifier(self.config, answered, checks.other_answer(answered))
        self.warnings += warnings
        return counts

    def scorer(self, prompts: list[dict]) -> list[dict[str, Any]]:
        """The scorer on the first triples, or on gold answers against those of other prompts."""
        scored = next((table[: self.num_prompts] for table in self.triples.values() if table), [])
        if not scored or self.config.scorer.name == "verifier":
            answered = [row for row in prompts if row["answer"] is not None]
            wrong = checks.other_answer(answered)
            scored = [
                {**row, "chosen": row["answer"], "rejected": other}
                for number, row in enumerate(answered[: self.num_prompts])
                if (other := wrong(number)) is not None
            ]
        if not scored:
            raise UserError("--scorer: needs preference triples or gold answers to score; add [activation] or an answer_column")
        names = reward_model_names(self.config.scorer)
        field = reward_model_field(self.config.scorer)
        models: dict[str, Path] = {name: folders.resolve(self.toy.get(name, name), field) for name in names}
        scores, warnings = checks.check_scorer(self.config, models, scored, self.template.rendering.day)
        self.warnings += warnings
        return [
            {"prompt": as_text(pair["prompt"]), "chosen": pair["chosen"], "rejected": pair["rejected"], "scores": score}
            for pair, score in zip(scored, scores, strict=True)
        ]


def of(row: dict, path: str, toy: dict[str, str]) -> bool:
    """Whether a rejected row comes from this file."""
    return row["file"] == toy.get(path, path)
