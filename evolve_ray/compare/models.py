"""Runs several models on the same prompts with the same seeds: refinement chains, and probes that separate skill from luck.

prompts -> for each model drafts and scores of its chain and of each probe -> figures. Every arrow is a stage as in a run: a
stage that is committed for the same inputs is reused. The figures are computed from the committed tables alone.
"""

import dataclasses
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow.parquet as pq

from evolve_ray.compare.figures import Rows, add_probes, add_strategies, model_differences, model_figures
from evolve_ray.compare.strategies import Measured, is_chain
from evolve_ray.config.options import Config, Strategy
from evolve_ray.config.resolve import resolved
from evolve_ray.data.read import has_column
from evolve_ray.errors import UserError
from evolve_ray.inputs.context import Context, Policy
from evolve_ray.inputs.prepare import begin, check_model, policy_need
from evolve_ray.inputs.prompts import Prompter
from evolve_ray.inputs.reader import DataReader, evaluation_id
from evolve_ray.models.checkpoints import Named
from evolve_ray.refine.strategies import REFINE_GIVEN
from evolve_ray.score.verifiers import same_answer
from evolve_ray.stages import generations
from evolve_ray.store import rows, shards
from evolve_ray.store.files import sha256_file
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Run
from evolve_ray.watch.terminal import say

# Entries of a model's config.json that do not change what an engine computes.
INCIDENTAL = ("transformers_version", "_name_or_path")
USAGE = ("num_rows", "num_tokens", "num_prompt_tokens", "num_cached_tokens", "num_cut", "num_rejected")


@dataclass(frozen=True)
class Plan:
    """What to compare: the configuration, the models in order, the probes, and the source of the drafts to refine."""

    config: Config
    models: list[Named]
    probes: tuple[str, ...]
    foreign: Named | None
    draft_column: str | None
    measured: tuple[Measured, ...] = ()


def compare(plan: Plan, folder: Run, start_ray: Callable[[], None], *, rerun_changed: bool, changed: str = "") -> dict[str, Any]:
    """Runs the chain and the probes of every model; returns the content of evaluation.json."""
    config = plan.config
    tokenizer = str(plan.models[0].folder)  # it checks the prompt lengths; other models reject what is too long for them
    context, toy = begin(config, folder, say, start_ray, rerun_changed=rerun_changed, changed=changed, model=tokenizer)
    for model in [*plan.models, *([plan.foreign] if plan.foreign else [])]:
        need = policy_need(config, context.template.rendering, f"MODEL {model.name}")
        check_model(Policy(model.folder, model.hash), need, folder, say)
    prompter = Prompter(context, toy)
    probe_drafts = ProbeDrafts(plan, prompter.reader)
    held_out = context.held_out = prompter.held_out(folder.root / "prompts")
    table = rows.read_table(held_out.path("prompts.parquet"))
    runner = ModelRunner(context)
    prompts_with_drafts = {}
    if probe_drafts.gold_answers:
        prompts_with_drafts["keep"] = with_drafts(context, "keep", table, probe_drafts.gold_answers, {})
    if probe_drafts.drafts:
        prompts_with_drafts["foreign"] = with_drafts(context, "foreign", table, probe_drafts.drafts, {})
    elif probe_drafts.author:
        author = probe_drafts.author
        drafts, _ = runner.chain(author) if author in plan.models else runner.chain(author, "first", rounds=1)
        texts = {draft["prompt_id"]: draft["text"] for draft in shards.read_rows(drafts) if draft["round"] == 1}
        prompts_with_drafts["foreign"] = with_drafts(context, "foreign", table, texts, {"generations": drafts.identity})
    models: list[dict[str, Any]] = []
    chains: dict[str, dict] = {}
    parts: dict[str, dict] = {}
    for model in plan.models:
        tables = runner.run_all(model, prompts_with_drafts, plan.probes, plan.measured)
        usage = {part: {name: drafts.stats[name] for name in USAGE} for part, (drafts, _) in tables.items()}
        rows_by_part = {part: read_both(*manifests) for part, manifests in tables.items()}
        chain_rows = rows_by_part.pop("chain")
        splits, chains[model.name] = model_figures(table, chain_rows)
        add_strategies(splits, table, chain_rows, rows_by_part, plan.measured, same_answer(config.verifier))
        parts[model.name] = rows_by_part
        models.append({"name": model.name, "given": model.given, "model": model.hash, "path": str(model.folder),
                       "splits": splits, "usage": usage})  # fmt: skip
    figures = {model["name"]: model["splits"] for model in models}
    same_answers = same_answer(config.verifier)
    add_probes(figures, chains, parts, table, plan.probes, same_answers, longer_tokens=runner.longer_tokens())
    return {
        "models": models,
        "differences": model_differences(chains),
        "foreign": probe_drafts.source,
        "prompts": {"identity": held_out.identity, "num_rejected": held_out.stats["num_rejected"]},
        "reward_models": {name: model.hash for name, model in context.reward_models.items()},
        "template": context.template.hash,
        "config": resolved(config),
    }


def read_both(drafts: Manifest, scores: Manifest) -> Rows:
    return list(shards.read_rows(drafts)), list(shards.read_rows(scores))


class ProbeDrafts:
    """The drafts that the probes `foreign` and `keep` refine: columns of the data by prompt id, or first drafts of a model."""

    def __init__(self, plan: Plan, reader: DataReader):
        evaluation = plan.config.evaluation
        self.drafts: dict[str, str] = {}
        self.gold_answers: dict[str, str] = {}
        self.author: Named | None = None
        if "foreign" in plan.probes and plan.foreign is None:
            for split, path in evaluation.splits.items():
                if plan.draft_column or has_column(reader.toy.get(path, path), "draft", evaluation.split):
                    self.drafts |= read_column(reader, split, plan.draft_column or "draft")
        if "foreign" in plan.probes and not self.drafts:
            # A single model's chain refines its own first drafts already, so the probe would add nothing.
            first_model = plan.models[0] if len(plan.models) > 1 else None
            foreign = plan.foreign
            self.author = next((model for model in plan.models if foreign and model.hash == foreign.hash), foreign or first_model)
        if "keep" in plan.probes and evaluation.answer_column:
            for split in evaluation.splits:
                self.gold_answers |= read_column(reader, split, evaluation.answer_column)
        column = f"column {plan.draft_column or 'draft'}"
        self.source = column if self.drafts else f"y1 of {self.author.name}" if self.author else None


def read_column(reader: DataReader, split: str, column: str) -> dict[str, str]:
    """Returns `{prompt id of the evaluation: text of the column}` of one split."""
    prompts, _ = reader.split_rows(split, column)
    return {evaluation_id(split, row["prompt_id"]): row["draft"] for row in prompts}


def with_drafts(context: Context, name: str, table: list[dict], texts: dict[str, str], other_inputs: dict[str, str]) -> Manifest:
    """Commits the prompts with their drafts in the column `draft`; a prompt without a draft is rejected."""
    assert context.held_out is not None
    key = {"drafts": rows.digest(texts)}
    stage = context.stage(
        context.run.root / f"{name}_drafts", "prompts", key, {"prompts": context.held_out.identity, **other_inputs}
    )
    manifest = stage.committed()
    if manifest is None:
        known = [{name: row[name] for name in rows.PROMPT.names} for row in table if row["prompt_id"] in texts]
        with_draft = [{**row, "draft": texts[row["prompt_id"]]} for row in known]
        rejected = [rows.reject(row, name, "has no draft to refine") for row in table if row["prompt_id"] not in texts]
        if not with_draft:
            raise UserError(
                f"--probes {name}: no prompt has a draft; give another column with --draft-column, or leave this probe out"
            )
        rows.write_table(stage.start() / "prompts.parquet", with_draft, rows.PROMPT_WITH_DRAFT)
        manifest = stage.commit(rejected, num_in=len(table), num_rows=len(with_draft))
    return manifest


class ModelRunner:
    """Generates and scores with one model after the other.

    If the next model has the same shape, the engines stay and load its weights in place.
    """

    def __init__(self, context: Context):
        self.context = context
        self.shape: str | None = None

    def run_all(
        self, model: Named, prompts_with_drafts: dict[str, Manifest], probe_names: tuple[str, ...], measured: tuple[Measured, ...]
    ) -> dict[str, tuple[Manifest, Manifest]]:
        """Returns drafts and scores of the chain, of one refinement of each prepared draft, and of the sampling probes."""
        config = self.context.config
        tables = {"chain": self.chain(model)}
        for name, prompts in prompts_with_drafts.items():
            strategy = Strategy(name=REFINE_GIVEN, rounds=2)
            tables[name] = self.run_part(model, name, prompts, strategy, scope=name)
        if "parallel" in probe_names:
            # Twice the chain's rounds: first drafts are short, so the tokens of a chain pay for more of them.
            samples = max(config.evaluation.parallel, 2 * config.evaluation.rounds)
            strategy = Strategy(name="parallel", samples=samples)
            tables["parallel"] = self.run_part(model, "parallel", self.held_out, strategy)
        if "longer" in probe_names:
            strategy = Strategy(name="chain", rounds=1)
            tables["longer"] = self.run_part(model, "longer", self.held_out, strategy, max_tokens=self.longer_tokens())
        for part in measured:
            if is_chain(part.strategy, config.evaluation.rounds):
                tables[part.name] = tables["chain"]
            elif part.name not in tables:
                folder = f"strategy-{rows.digest(resolved(part.strategy))[:12]}"
                tables[part.name] = self.run_part(model, folder, self.held_out, part.strategy)
        return tables

    def longer_tokens(self) -> int:
        """Returns the token limit of one answer: the limits of all rounds together, but no more than fits after every prompt."""
        config = self.context.config
        prompt_tokens = pq.read_table(self.held_out.path("prompts.parquet"), columns=["num_tokens"])["num_tokens"].to_pylist()
        room = config.model.context_tokens - max(prompt_tokens, default=0)
        return min(config.evaluation.rounds * config.sampling.max_tokens, room)

    @property
    def held_out(self) -> Manifest:
        assert self.context.held_out is not None
        return self.context.held_out

    def chain(self, model: Named, part: str = "chain", rounds: int | None = None) -> tuple[Manifest, Manifest]:
        """Runs the same chain as the evaluation stage of a run: same prompts, same seeds."""
        config = self.context.config
        strategy = Strategy(name="chain", rounds=rounds or config.evaluation.rounds)
        return self.run_part(model, part, self.held_out, strategy)

    def run_part(
        self, model: Named, part: str, prompts: Manifest, strategy: Strategy,
        scope: str = generations.EVALUATION_SCOPE, max_tokens: int | None = None,
    ) -> tuple[Manifest, Manifest]:  # fmt: skip
        """Returns drafts and scores of one part (the chain or a probe), sampled at the evaluation's temperature."""
        context = self.context
        sampling = dataclasses.replace(
            context.config.sampling,
            temperature=context.config.evaluation.temperature,
            max_tokens=max_tokens or context.config.sampling.max_tokens,
            logps=False,
        )
        policy = Policy(model.folder, model.hash)
        job = generations.GenerationJob(
            None, f"{model.name}: {part}", policy, prompts, strategy, sampling, scope, context.reward_models
        )
        shape = model_shape(model.folder)
        if self.shape not in (None, shape):
            context.pools.close("engines")
        self.shape = shape
        drafts, scores = generations.generate_and_score(context, job, context.run.root / "models" / model.slug / part)
        return drafts, scores


def model_shape(folder: Path) -> str:
    """Returns a digest of configuration and tokenizer: engines hold both, and can replace only weights in place."""
    config = json.loads((folder / "config.json").read_bytes())
    files = [folder / name for name in ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "generation_config.json")]
    hashes = [sha256_file(file) if file.is_file() else None for file in files]
    return rows.digest([{name: value for name, value in config.items() if name not in INCIDENTAL}, hashes])
