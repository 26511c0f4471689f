"""Several models on the same prompts with the same seeds: chains of refinement, and probes that tell skill from luck.

prompts -> for each model drafts and scores of its chain and of each probe -> figures. Every arrow is a stage as in a run:
committed for these inputs -> returned as it is. The figures are made of the committed tables alone.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.compare.figures import Rows, add_probes, every_two, model_figures
from evolve_ray.config.options import Config, Evaluation, Strategy
from evolve_ray.config.resolve import resolved
from evolve_ray.data.prompts import read_prompts
from evolve_ray.data.read import has_column
from evolve_ray.errors import UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.inputs.prepare import begin
from evolve_ray.inputs.prompts import Prompter, evaluation_id
from evolve_ray.models.checkpoints import Named
from evolve_ray.models.folders import check_policy
from evolve_ray.refine.strategies import REFINE_GIVEN
from evolve_ray.score.verifiers import same_answer
from evolve_ray.stages import generations
from evolve_ray.store import rows, shards
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Run
from evolve_ray.watch.terminal import say

INCIDENTAL = ("transformers_version", "_name_or_path")  # entries of a model's config.json that no engine computes with
USAGE = ("num_rows", "num_tokens", "num_prompt_tokens", "num_cached_tokens", "num_cut", "num_rejected")


@dataclass(frozen=True)
class Plan:
    """What is compared: the configuration, the models in their order, the probes, and where given drafts come from."""

    config: Config
    models: list[Named]
    probes: tuple[str, ...]
    foreign: Named | None
    draft_column: str | None


def compare(plan: Plan, folder: Run, start_ray: Callable[[], None], *, rerun_changed: bool, changed: str = "") -> dict[str, Any]:
    """Runs every model through its chain and the probes; returns what evaluation.json says."""
    config = plan.config
    for model in [*plan.models, *([plan.foreign] if plan.foreign else [])]:
        check_policy(model.folder, config.model.context_tokens)
    first = str(plan.models[0].folder)  # its tokenizer counts the prompts; what is too long for another model, that one rejects
    context, toy = begin(config, folder, say, start_ray, rerun_changed=rerun_changed, changed=changed, model=first)
    given = GivenDrafts(plan, toy)
    held_out = context.held_out = Prompter(context, toy).held_out(folder.root / "prompts")
    table = rows.read_table(held_out.path("prompts.parquet"))
    ask = Asker(context)
    shown = {}
    if given.answers:
        shown["keep"] = with_drafts(context, "keep", table, given.answers, {})
    if given.drafts:
        shown["foreign"] = with_drafts(context, "foreign", table, given.drafts, {})
    elif given.writer:
        drafts, _ = ask.chain(given.writer) if given.writer in plan.models else ask.chain(given.writer, "first", rounds=1)
        texts = {draft["prompt_id"]: draft["text"] for draft in shards.read_rows(drafts) if draft["round"] == 1}
        shown["foreign"] = with_drafts(context, "foreign", table, texts, {"generations": drafts.identity})
    models: list[dict[str, Any]] = []
    chains: dict[str, dict] = {}
    parts: dict[str, dict] = {}
    for model in plan.models:
        tables = ask.everything(model, shown, plan.probes)
        usage = {part: {name: drafts.stats[name] for name in USAGE} for part, (drafts, _) in tables.items()}
        found = {part: read_both(*manifests) for part, manifests in tables.items()}
        splits, chains[model.name] = model_figures(table, found.pop("chain"), seed=config.seed)
        parts[model.name] = found
        models.append({"name": model.name, "given": model.given, "model": model.hash, "path": str(model.folder),
                       "splits": splits, "usage": usage})  # fmt: skip
    figures = {model["name"]: model["splits"] for model in models}
    same = same_answer(config.verifier)
    add_probes(figures, chains, parts, table, plan.probes, same, seed=config.seed, longest=ask.longest())
    return {
        "models": models,
        "differences": every_two(chains, seed=config.seed),
        "foreign": given.told,
        "prompts": {"identity": held_out.identity, "num_rejected": held_out.stats["num_rejected"]},
        "reward_models": {name: model.hash for name, model in context.reward_models.items()},
        "template": context.template.hash,
        "config": resolved(config),
    }


def read_both(drafts: Manifest, scores: Manifest) -> Rows:
    return list(shards.read_rows(drafts)), list(shards.read_rows(scores))


class GivenDrafts:
    """Where the drafts of the probes come from: columns of the data by prompt id, or another model."""

    def __init__(self, plan: Plan, toy: dict[str, str]):
        part = plan.config.evaluation
        self.drafts: dict[str, str] = {}
        self.answers: dict[str, str] = {}
        self.writer: Named | None = None
        if "foreign" in plan.probes and plan.foreign is None:
            for split, path in part.splits.items():
                source = toy.get(path, path)
                if plan.draft_column or has_column(source, "draft", part.split):
                    self.drafts |= read_column(part, source, split, plan.draft_column or "draft")
        if "foreign" in plan.probes and not self.drafts:
            several = plan.models[0] if len(plan.models) > 1 else None  # a single model's own drafts tell nothing new
            foreign = plan.foreign
            self.writer = next((model for model in plan.models if foreign and model.hash == foreign.hash), foreign or several)
        if "keep" in plan.probes and part.answer_column:
            for split, path in part.splits.items():
                self.answers |= read_column(part, toy.get(path, path), split, part.answer_column)
        column = f"column {plan.draft_column or 'draft'}"
        self.told = column if self.drafts else f"y1 of {self.writer.name}" if self.writer else None


def read_column(part: Evaluation, path: str, split: str, column: str) -> dict[str, str]:
    """`{prompt id of the evaluation: text in column}` of one split."""
    found, _ = read_prompts(
        path, prompt_column=part.prompt_column, answer_column=part.answer_column, answer_pattern=part.answer_pattern,
        draft_column=column, source_split=part.split, split=split,
    )  # fmt: skip
    return {evaluation_id(split, row["prompt_id"]): row["draft"] for row in found}


def with_drafts(context: Context, name: str, table: list[dict], texts: dict[str, str], inputs_of: dict[str, str]) -> Manifest:
    """The prompts with a draft beside each, committed; a prompt without one is rejected."""
    assert context.held_out is not None
    key = {"drafts": rows.digest(texts)}
    stage = context.stage(
        context.run.root / f"{name}_drafts", "prompts", key, {"prompts": context.held_out.identity, **inputs_of}
    )
    manifest = stage.committed()
    if manifest is None:
        kept = [{**row, "draft": texts[row["prompt_id"]]} for row in table if row["prompt_id"] in texts]
        lost = [rows.reject(row, name, "has no draft to refine") for row in table if row["prompt_id"] not in texts]
        if not kept:
            raise UserError(f"--probes {name}: no prompt has a draft; name another column with --draft-column, or leave it out")
        rows.write_table(stage.start() / "prompts.parquet", kept, rows.PROMPT_WITH_DRAFT)
        manifest = stage.commit(lost, num_in=len(table), num_rows=len(kept))
    return manifest


class Asker:
    """Asks one model after the other; engines stay where the next model has the same shape, and take its weights in place."""

    def __init__(self, context: Context):
        self.context = context
        self.shape: str | None = None

    def everything(
        self, model: Named, shown: dict[str, Manifest], wanted: tuple[str, ...]
    ) -> dict[str, tuple[Manifest, Manifest]]:
        """Drafts and scores of the chain, of one refinement of each given draft, and of what is sampled beside the chain."""
        config = self.context.config
        found = {"chain": self.chain(model)}
        for name, prompts_of in shown.items():
            strategy = Strategy(name=REFINE_GIVEN, rounds=2)
            found[name] = self.ask(model, name, prompts_of, strategy, scope=name)
        if "parallel" in wanted:  # twice as many as the chain has rounds: short first drafts buy more of them at equal tokens
            samples = max(config.evaluation.parallel, 2 * config.evaluation.rounds)
            strategy = Strategy(name="parallel", samples=samples)
            found["parallel"] = self.ask(model, "parallel", self.held_out, strategy)
        if "longer" in wanted:
            strategy = Strategy(name="chain", rounds=1)
            found["longer"] = self.ask(model, "longer", self.held_out, strategy, max_tokens=self.longest())
        return found

    def longest(self) -> int:
        """Tokens of one answer that may have those of all rounds, as far as the context has room after every prompt."""
        config = self.context.config
        prompts_of = pq.read_table(self.held_out.path("prompts.parquet"), columns=["num_tokens"])["num_tokens"].to_pylist()
        room = config.model.context_tokens - max(prompts_of, default=0)
        return min(config.evaluation.rounds * config.sampling.max_tokens, room)

    @property
    def held_out(self) -> Manifest:
        assert self.context.held_out is not None
        return self.context.held_out

    def chain(self, model: Named, part: str = "chain", rounds: int | None = None) -> tuple[Manifest, Manifest]:
        """The very chain of a run's own evaluation: the same prompts and seeds."""
        config = self.context.config
        strategy = Strategy(name="chain", rounds=rounds or config.evaluation.rounds)
        return self.ask(model, part, self.held_out, strategy)

    def ask(
        self, model: Named, part: str, prompts_of: Manifest, strategy: Strategy,
        scope: str = generations.EVALUATION_SCOPE, max_tokens: int | None = None,
    ) -> tuple[Manifest, Manifest]:  # fmt: skip
        """Drafts and scores of one part, at the evaluation's temperature."""
        context = self.context
        sampling = dataclasses.replace(
            context.config.sampling,
            temperature=context.config.evaluation.temperature,
            max_tokens=max_tokens or context.config.sampling.max_tokens,
        )
        policy = Policy(model.folder, model.hash)
        job = generations.GenerationJob(
            None, f"{model.name}: {part}", policy, prompts_of, strategy, sampling, scope, context.reward_models
        )
        shape = model_shape(model.folder)
        if self.shape not in (None, shape):
            context.pools.close("engines")
        self.shape = shape
        drafts, scores = generations.generate_and_score(context, job, context.run.root / "models" / model.slug / part)
        return drafts, scores


def model_shape(folder: Path) -> str:
    """Digest of configuration and tokenizer: engines hold both, and only weights are replaced in place."""
    config = json.loads((folder / "config.json").read_bytes())
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")]
    hashes = [sha256_file(file) if file.is_file() else None for file in files]
    return rows.digest([{name: value for name, value in config.items() if name not in INCIDENTAL}, hashes])
