"""Reads what a recipe names as data into rows: held-out prompts, preference triples, training prompts; commits nothing.

`inputs/prompts.py` commits the rows of a run; `jobs/preview.py` shows them.
"""

import functools
import itertools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa

from evolve_ray.config.options import Config, Evaluation, Preferences, Prompts, texts_in_view
from evolve_ray.data import triples as data_triples
from evolve_ray.data.prompts import HeldOut, drop_held_out, drop_repeated, read_prompts, scan_prompts, with_token_counts
from evolve_ray.data.read import BLOCK_ROWS, MAX_SHOWN
from evolve_ray.data.shapes import Shape
from evolve_ray.errors import UserError, first_line
from evolve_ray.models.same_tokens import bare
from evolve_ray.refine.template import Template
from evolve_ray.score.verifiers import gold_check
from evolve_ray.store import rows
from evolve_ray.store.turns import Messages, Prompt, turns

LIMIT_FIELD = "model.context_tokens - the responses in view * sampling.max_tokens - the template"


class DataReader:
    """Reads the data of a recipe with the policy's tokenizer. `toy` has the paths of the tiny world's parts by name.

    `say` prints one line for each table: what it was taken for.
    """

    def __init__(self, config: Config, template: Template, policy: Path, toy: dict[str, str], say: Callable[[str], None]):
        self.config, self.template, self.policy, self.toy, self.say = config, template, policy, toy, say
        self.shapes: dict[str, Shape] = {}  # by the table of the recipe: "prompts", "evaluation.splits.NAME", "activation"
        self.fault_of_roles: dict[tuple[str, ...], str] = {}
        # The tokens of a prompt are asked for up to three times, while its block is read.
        self.read_ask = functools.lru_cache(maxsize=BLOCK_ROWS)(self.read_first_ask)

    @functools.cached_property
    def gold_fault(self) -> Callable[[str], str] | None:
        """What is wrong with a gold answer, if the verifier can say it."""
        return gold_check(self.config.verifier)

    @functools.cached_property
    def chat(self) -> Any:
        from evolve_ray.models.chat import Chat

        return Chat(self.policy, rendering=self.template.rendering)

    def read_first_ask(self, key: bytes) -> tuple[int, str]:
        """(number of tokens of a prompt's first ask, an id of these tokens); `key` is the canonical JSON of the prompt."""
        ids = self.chat.context_ids(self.template.direct(rows.from_canonical(key)))
        return len(ids), rows.content_id("ask", ids)

    def count(self, prompt: Prompt) -> int:
        return self.read_ask(rows.canonical(prompt))[0]

    def asked(self, prompt: Prompt) -> str:
        return self.read_ask(rows.canonical(prompt))[1]

    def prompt_fault(self, prompt: Prompt) -> str:
        """What is wrong if the chat template cannot render the turns of a prompt; "" if nothing is."""
        if isinstance(prompt, str):
            return ""
        roles = tuple(message["role"] for message in turns(prompt))
        if roles not in self.fault_of_roles:
            self.fault_of_roles[roles] = self.render_fault(self.template.refinement(prompt, "draft"), roles)
        return self.fault_of_roles[roles]

    def render_fault(self, messages: Messages, roles: tuple[str, ...]) -> str:
        try:
            self.chat.context_ids(messages)
        except Exception as error:  # a template can raise any type
            way_out = "write the system prompt into the first user turn" if "system" in roles else "use prompts of one turn"
            return f"the model's chat template cannot render its turns ({', '.join(roles)}): {first_line(error)}; {way_out}"
        return ""

    @functools.cached_property
    def limit(self) -> int:
        """The most tokens that a first ask may have, so that the longest context of the strategy still fits."""
        config, template = self.config, self.template
        longest_ask = {
            "few_shot": template.after_several("", [""] * config.strategy.shots),
            "critique": template.revision("", "", ""),
        }.get(config.strategy.name, template.refinement("", ""))
        asks = [longest_ask, *([template.judgement("", "", 1, 10)] if config.strategy.name == "self_judge" else [])]
        room = config.model.context_tokens - texts_in_view(config.strategy) * config.sampling.max_tokens
        return room - max(len(self.chat.context_ids(ask)) for ask in asks)

    def fitting(self, table: list[dict]) -> tuple[list[dict], list[dict]]:
        """(rows that fit the context, with their `num_tokens`; rejected rows)."""
        return with_token_counts(table, self.count, self.limit, field=LIMIT_FIELD)

    def check_loss(self, too_long: list[dict], num_rows: int, path: str) -> None:
        """Raises `UserError` if more than `prompts.max_rejected_fraction` of the prompts are too long."""
        if len(too_long) > self.config.prompts.max_rejected_fraction * num_rows:
            shown = "; ".join(f"{row['file']}:{row['line']}: {row['reason']}" for row in too_long[:MAX_SHOWN])
            raise UserError(
                f"{path}: {len(too_long)} of {num_rows} prompts are too long: {shown}; raise model.context_tokens, lower "
                "sampling.max_tokens, or allow the loss with prompts.max_rejected_fraction"
            )

    def taken_for(self, table: str, shape: Shape) -> None:
        """Prints what a table was taken for."""
        self.shapes[table] = shape
        self.say(f"  {table}: {shape}")

    def split_rows(self, split: str, draft_column: str = "") -> tuple[list[dict], list[dict]]:
        """(prompt rows of an evaluation split in the order of the file, rejected duplicates)."""
        part, shape = self.config.evaluation, Shape()
        path = part.splits[split]
        prompts, duplicates = read_prompts(
            self.toy.get(path, path), prompt_column=part.prompt_column, answer_column=part.answer_column,
            answer_pattern=part.answer_pattern, draft_column=draft_column or part.draft_column, columns=part.columns,
            source_split=part.split, split=split,
            system=self.config.prompts.system, gold_fault=self.gold_fault, prompt_fault=self.prompt_fault, shape=shape,
        )  # fmt: skip
        if not draft_column:
            self.taken_for(f"evaluation.splits.{split}", shape)
        return prompts, duplicates

    def held_out(self) -> tuple[list[dict], list[dict], int]:
        """(the prompts of every evaluation split, rejected rows, number of rows read)."""
        part = self.config.evaluation
        table, rejected, num_in = [], [], 0
        for split, path in part.splits.items():
            prompts, duplicates = self.split_rows(split)
            num_in += len(prompts) + len(duplicates)
            beyond = prompts[part.limit :] if part.limit else []
            rejected += duplicates + [rows.reject(row, "held_out", f"beyond evaluation.limit {part.limit}") for row in beyond]
            usable, repeated = drop_repeated(prompts[: part.limit or None], self.asked, {})
            fitting, too_long = self.fitting(usable)
            self.check_loss(too_long, len(fitting) + len(too_long), path)
            rejected += repeated + too_long
            table += [{**row, "prompt_id": evaluation_id(split, row["prompt_id"])} for row in fitting]
        return table, rejected, num_in

    def triples(self, name: str, part: Preferences, held_out: HeldOut) -> tuple[list[dict], list[dict]]:
        """(the preference triples of `[activation]` or `[offline]` as pairs, rejected rows)."""
        shape = Shape()
        pairs, rejected = data_triples.read_triples(
            self.toy.get(part.path, part.path), prompt_column=part.prompt_column, chosen_column=part.chosen_column,
            rejected_column=part.rejected_column, source_split=part.split, limit=part.limit, held_out=held_out,
            system=self.config.prompts.system, same=self.same_tokens if compares_answers(part) else None,
            prompt_fault=self.prompt_fault, shape=shape,
        )  # fmt: skip
        self.taken_for(name, shape)
        return pairs, rejected

    def same_tokens(self, first: str, second: str) -> bool:
        """Whether two answers are trained as the same tokens: equal texts, or texts that the tokenizer makes equal."""
        return bare(first) == bare(second) and self.chat.text_ids(first) == self.chat.text_ids(second)

    def training(self, held_prompts: HeldOut) -> tuple[pa.Table, list[dict]]:
        """(the usable training prompts as one table, which needs far less memory than dicts; the rejected rows)."""
        part, shape = self.config.prompts, Shape()
        line_of: dict[tuple[str, str | None], int] = {}
        duplicates: list[dict] = []
        overlap: list[dict] = []
        too_long: list[dict] = []
        tables: list[pa.Table] = []
        prompts = scan_prompts(
            self.toy.get(part.path, part.path), duplicates, prompt_column=part.prompt_column, answer_column=part.answer_column,
            answer_pattern=part.answer_pattern, id_column=part.id_column, draft_column=part.draft_column, columns=part.columns,
            source_split=part.split, system=part.system,
            gold_fault=self.gold_fault, prompt_fault=self.prompt_fault, shape=shape,
        )  # fmt: skip
        while block := list(itertools.islice(prompts, BLOCK_ROWS)):
            usable, held_out = drop_held_out(block, held_prompts)
            # Ids of the user's own say which prompts differ.
            usable, repeated = (usable, []) if part.id_column else drop_repeated(usable, self.asked, line_of)
            usable, beyond = self.fitting(usable)
            overlap += held_out + repeated
            too_long += beyond
            tables.append(rows.to_table(usable, prompt_schema(part)))
        table = pa.concat_tables(tables, promote_options="default").combine_chunks()
        self.taken_for("prompts", shape)
        self.check_loss(too_long, len(table) + len(too_long), part.path)
        return table, duplicates + overlap + too_long


def prompt_schema(part: Prompts | Evaluation) -> pa.Schema:
    """The columns of the prompts of a table of the recipe."""
    return rows.prompt_schema(draft=bool(part.draft_column), columns=bool(part.columns))


def compares_answers(part: Preferences) -> bool:
    """Whether the training on triples compares their answers; SFT learns from two equal answers to keep a good draft."""
    return part.training.objective != "sft"


def evaluation_id(split: str, prompt_id: str) -> str:
    """The id of a held-out prompt; it contains the split, since two splits may read the same file."""
    return rows.content_id("evaluation", split, prompt_id)
