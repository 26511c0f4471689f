"""The story of a run: prompts -> drafts -> scores -> pairs -> reference -> checkpoint -> evaluation, again and again.

Every arrow is one stage: committed for these inputs -> returned as it is; otherwise computed, and committed as a whole.
"""

import dataclasses
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from evolve_ray import card, generate, measure, report, score, train
from evolve_ray import probe as logprob_probe
from evolve_ray.config import options
from evolve_ray.config.plugs import find_plug
from evolve_ray.config.resolve import resolved
from evolve_ray.errors import IntegrityError, UserError
from evolve_ray.evaluate.figures import add_best_of, summarise
from evolve_ray.inputs import Context, Policy
from evolve_ray.pipeline import EVALUATION_SCOPE, Asked, generate_and_score, generate_spec, run_steps, scores_loss
from evolve_ray.pools.actors import call_all
from evolve_ray.pools.dispatch import Step
from evolve_ray.select import pairs
from evolve_ray.store import rows, shards
from evolve_ray.store.files import full_disk_named
from evolve_ray.store.manifest import Manifest
from evolve_ray.store.run import Stage


def iterate(context: Context) -> dict[str, Any]:
    """Runs activation, then iterations until the controller or their number ends the run; returns the report.

    A roll-back ends the run with the policy before: its iteration stays on disk and in the report, marked `rolled_back`.
    """
    config, policy = context.config, context.policy
    models = [evaluate(context, 0, policy, "base", folder="base_evaluation")]
    context.trackers.evaluated(models[-1])
    if config.activation or config.offline:
        policy = activate(context, policy)
        models.append(evaluate(context, 0, policy, "activation"))
        context.trackers.evaluated(models[-1])
        card.write(context.run, resolved(config), models)
    context.collect_rejected(0)
    context.initial, reward_models, aside = policy, context.reward_models, report.Aside()
    for iteration in range(1, config.iterations + 1):
        prompts = context.prompts[iteration]
        asked = Asked(iteration, "generations", policy, prompts, config.strategy, config.sampling, iteration, reward_models)
        folder = context.run.iteration(iteration)
        if config.refresh:
            drafts, _ = generate_and_score(context, asked, folder, scored=False)
            judges, reward_models = reward_models, refresh(context, iteration, reward_models, prompts, drafts)
            asked = dataclasses.replace(asked, reward_models=reward_models, judges=judges)
        drafts, scores = generate_and_score(context, asked, folder)
        assert scores is not None
        chosen = select(context, iteration, prompts, drafts, scores)
        before, policy = policy, fit(context, iteration, policy, chosen, config.training, "checkpoint")
        probed = probe(context, iteration, policy, before)  # first: an engine that is not the policy evaluates nothing
        evaluated = evaluate(context, iteration, policy, f"iteration {iteration}") | {"probe": probed}
        made = {"generations": drafts, "scores": scores, "pairs": chosen}
        evaluated["drift"] = measure.measure_drift(context, iteration, made, evaluated["probe"], models)
        models.append(evaluated)
        evaluated |= measure.decide(context, iteration, models)
        context.collect_rejected(iteration)
        context.trackers.evaluated(evaluated)
        card.write(context.run, resolved(config), models)
        report.write(context.run, resolved(config), models, aside)
        if evaluated["decision"]["action"] != "continue":
            break
    aside.wait()
    return report.write(context.run, resolved(config), models)


def activate(context: Context, policy: Policy) -> Policy:
    """Iteration 0: SFT on given triples, then preference training on given pairs, where the recipe has them."""
    config = context.config
    if config.activation:
        name = "activation" if config.offline else "checkpoint"
        policy = fit(context, 0, policy, context.given["activation"], config.activation.training, name)
    if config.offline:
        policy = fit(context, 0, policy, context.given["offline"], config.offline.training, "checkpoint")
    return policy


def refresh(
    context: Context, iteration: int, reward_models: dict[str, Policy], prompts: Manifest, drafts: Manifest
) -> dict[str, Policy]:
    """The reward model, trained further on the policy's own drafts of some prompts, in the order that the verifier gives."""
    config = context.config
    assert config.refresh is not None
    folder, size = context.run.iteration(iteration), config.engine.shard_prompts
    num_shards = -(-min(config.refresh.prompts, prompts.stats["num_rows"]) // size)
    judge = dataclasses.replace(config.scorer, name="verifier", model="")
    labels_key = {"version": score.VERSION, "verifier": resolved(config.verifier), "num_shards": num_shards}
    stage = context.stage(folder / "labels", "scores", labels_key, {"generations": drafts.identity})
    labels = stage.committed()
    if labels is None:
        with context.timed("labels", iteration):
            context.start_ray()
            spec = score.ScoreSpec(
                prompts=str(prompts.path("prompts.parquet")), drafts=str(drafts.folder), work=str(stage.resume()), key=stage.key,
                shard_prompts=size, scorer=judge, reward_models={}, verifier=config.verifier,
            )  # fmt: skip
            run_steps(context, "labels", iteration, [Step(stage, score.pool(config.scorer), spec)], num_shards)
            labels = shards.finish(stage, num_shards, shards.total(drafts, num_shards, "num_answers"), scores_loss(config))
    selection = options.Selection(max_pairs=config.refresh.max_pairs)
    inputs_of = {"prompts": prompts.identity, "generations": drafts.identity, "scores": labels.identity}
    pairs_stage = context.stage(folder / "reward_pairs", "pairs", {"refresh": config.refresh.prompts,
                                "selection": resolved(selection)}, inputs_of)  # fmt: skip
    chosen = pairs_stage.committed() or write_pairs(
        pairs_stage, pairs.reward_model, selection, prompts, drafts, labels, size, limit=config.refresh.prompts
    )
    check_some(pairs_stage, chosen)
    (name,) = reward_models
    return {name: fit(context, iteration, reward_models[name], chosen, config.refresh.training, "reward_model")}


def select(context: Context, iteration: int, prompts: Manifest, drafts: Manifest, scores: Manifest) -> Manifest:
    """Preference pairs of one iteration; one shard in memory at a time."""
    config = context.config
    key = {"selection": resolved(config.selection, runtime=False)}
    inputs_of = {"prompts": prompts.identity, "generations": drafts.identity, "scores": scores.identity}
    stage = context.stage(context.run.iteration(iteration) / "pairs", "pairs", key, inputs_of)
    manifest = stage.committed()
    if manifest is None:
        with context.timed("pairs", iteration):
            selection = find_plug(pairs.SELECTIONS, config.selection.name, "selection.name")
            size = config.engine.shard_prompts
            manifest = write_pairs(stage, selection, config.selection, prompts, drafts, scores, size)
    check_some(stage, manifest)
    return manifest


def check_some(stage: Stage, manifest: Manifest) -> None:
    if not manifest.stats["num_rows"]:
        raise UserError(
            f"{stage.final}: no pairs came out of {manifest.stats['num_in']} drafts (reasons are in its rejected.jsonl), "
            "and nothing is trained on nothing; lower selection.margin, raise sampling.temperature or give other prompts"
        )


def write_pairs(
    stage: Stage, selection: Any, given: options.Selection, prompts: Manifest, drafts: Manifest, scores: Manifest,
    size: int, limit: int | None = None,
) -> Manifest:  # fmt: skip
    """Pairs of every prompt (of the first `limit`) whose drafts have been scored, shard by shard."""
    work = stage.start()
    counts: dict[str, Any] = {"num_in": 0, "num_rows": 0, "num_used": 0, "num_rejected": 0}
    with (
        full_disk_named(work),  # also where the ends of the files are written, as they are closed
        pq.ParquetWriter(work / "pairs.parquet", rows.PAIR, compression="zstd") as writer,
        open(work / "rejected.jsonl", "wb") as rejected,
    ):
        for shard in range(scores.stats["num_shards"]):
            name = f"{shards.shard_name(shard)}/rows.parquet"
            score_of = {row["draft_id"]: row["score"] for row in rows.read_table(scores.path(name))}
            by_prompt: dict[str, list[dict]] = {}
            for draft in rows.read_table(drafts.path(name)):
                if draft["kind"] == "answer":
                    by_prompt.setdefault(draft["prompt_id"], []).append({**draft, "score": score_of.pop(draft["draft_id"], None)})
            if score_of:
                raise IntegrityError(
                    f"{scores.folder}: scores {len(score_of)} drafts that {drafts.folder} does not hold; delete both"
                )
            made: list[dict] = []
            lost: list[dict] = []
            here = shards.read_slice(prompts.path("prompts.parquet"), shard, size)
            for prompt in here[: None if limit is None else max(0, limit - shard * size)]:
                candidates = by_prompt.get(prompt["prompt_id"], [])
                found, unused = selection(prompt, candidates, given)
                used = {pair[member] for pair in found for member in ("chosen_id", "rejected_id")}
                if len(used) + len(unused) != len(candidates):
                    raise IntegrityError(
                        f"selection {given.name}: prompt {prompt['prompt_id']} has {len(candidates)} drafts, "
                        f"but {len(used)} used and {len(unused)} rejected; every draft must be accounted for"
                    )
                counts["num_in"] += len(candidates)
                counts["num_used"] += len(used)
                made += found
                lost += unused
            counts["num_rows"] += len(made)
            counts["num_rejected"] += len(lost)
            writer.write_table(pa.Table.from_pylist(made, schema=rows.PAIR))
            rejected.writelines(rows.canonical(row) + b"\n" for row in lost)
    return stage.commit(**counts)


def fit(context: Context, iteration: int, policy: Policy, given: Manifest, training: options.Training, name: str) -> Policy:
    """Reference log-probabilities and training, in one Ray Train worker group."""
    config = context.config
    folder = context.run.iteration(iteration)
    shared = {
        "version": train.VERSION,
        "dtype": config.model.dtype,
        "template": context.template.hash,
        "trainer": resolved(config.trainer, runtime=False),
        "seed": config.seed,
        "iteration": iteration,
    }
    from_pairs = {"pairs": given.identity}
    # What decides which sequences the reference holds and in which batches they are computed.
    order = {name: getattr(training, name) for name in ("batch_pairs", "micro_pairs", "objective", "alpha")}
    order["nll"] = bool(training.nll)
    start = context.initial if training.reference == "initial" and context.initial else policy
    reference = None
    if training.objective not in ("sft", "reward"):
        reference = context.stage(folder / "reference", "reference", shared | {"order": order, "model": start.hash}, from_pairs)
    key = {"model": policy.hash, "training": resolved(training, runtime=False), "reference": reference.key if reference else None}
    stage = context.stage(folder / name, "checkpoint", shared | key, from_pairs)
    manifest = stage.committed()
    if manifest is None:
        with context.timed(name, iteration):
            context.start_ray()
            if config.engine.release_for_training:
                for pool in ("engines", "scorers", "probers"):
                    context.pools.close(pool)
            spec = train.TrainSpec(
                pairs=str(given.path("pairs.parquet")), model=str(policy.folder), reference_model=str(start.folder),
                reference_hash=start.hash, dtype=config.model.dtype, template=context.template, training=training,
                trainer=config.trainer, seed=config.seed, iteration=iteration, run=context.run, reference=reference,
                checkpoint=stage,
            )  # fmt: skip

            def told(event: dict[str, Any]) -> str:
                context.trackers.training(stage.key, iteration, name, event["steps"])
                return f"    step {event['step'] + 1} of {event['num_steps']}, loss {event['loss']:.4f}"

            def progress() -> Any:
                return sorted((stage.work / "steps").glob("*")), sorted(folder.iterdir())

            advice = (
                "see its workers' logs in the Ray dashboard, allow it more time with trainer.stall_s, or submit the same command "
                "again: it continues from the last stored step"
            )
            context.trackers.begins(stage.key, iteration, name)
            deadline = context.deadline(name, config.trainer.stall_s, progress, advice)
            with context.followed("training", told), deadline:
                manifest = train.fit(spec, folder / f".ray-train-{name}")
    context.trackers.trained(manifest, iteration)
    return Policy.from_manifest(manifest)


def probe(context: Context, iteration: int, policy: Policy, before: Policy) -> dict[str, Any] | None:
    """The engines' log-probabilities against the checkpoint's, and how far the policy has moved; None where it is off."""
    config = context.config
    if not config.probe.prompts:
        return None
    prompts = context.prompts[iteration]
    models = {"policy": policy, "iteration": before, "initial": context.initial or before}
    key = {
        "version": logprob_probe.VERSION,
        "models": {name: model.hash for name, model in models.items()},
        "template": context.template.hash,
        "seed": config.seed,
        "options": [resolved(part, runtime=False) for part in (config.probe, config.model, config.engine, config.sampling)],
    }
    stage = context.stage(context.run.iteration(iteration) / "probe", "probe", key, {"prompts": prompts.identity})
    manifest = stage.committed()
    if manifest is None:
        with context.timed("probe", iteration):
            context.start_ray()
            free = dataclasses.replace(config.sampling, temperature=1.0, top_p=1.0)  # samples of the policy itself
            asked = Asked(iteration, "probe", policy, prompts, config.strategy, free, "probe", {})
            engines = context.pools.open(generate.pool(config.engine))
            few = shards.read_slice(prompts.path("prompts.parquet"), 0, config.probe.prompts)
            samples = call_all(engines, generate_spec(context, asked, stage), "probe", few)
            folders = {name: str(model.folder) for name, model in models.items()}
            found = logprob_probe.compare(context.pools, config.probe, config.model.dtype, folders, samples)
            if not found["mean_difference"] <= config.probe.tolerance:
                raise IntegrityError(
                    f"probe of iteration {iteration}: the engines' log-probabilities differ from the checkpoint's by "
                    f"{found['mean_difference']:.2g} nats a token (probe.tolerance is {config.probe.tolerance:g}): they may "
                    "still hold the weights or the cache of an older model; submit the same command again, for new engines"
                )
            rows.write_jsonl(stage.start() / "probe.jsonl", [found])
            manifest = stage.commit(num_in=len(few), num_rows=len(few))
    found = rows.read_jsonl(manifest.path("probe.jsonl"))[0]
    context.say(
        f"    engine and checkpoint agree to {found['mean_difference']:.1g} nats a token; KL to the iteration's start "
        f"{found['kl_iteration']:.2f}, to the initial policy {found['kl_initial']:.2f} nats a response"
    )
    return found


def evaluate(context: Context, iteration: int, policy: Policy, name: str, folder: str = "evaluation") -> dict[str, Any]:
    """Chains of refinement on the held-out prompts of every split, scored and summarised by round."""
    config = context.config
    model = {"name": name, "iteration": iteration, "model": policy.hash, "path": str(policy.folder), "evaluation": None}
    if context.held_out is None:
        return {**model, "splits": {}}
    chain = options.Strategy(name="chain", rounds=config.evaluation.rounds)
    sampling = dataclasses.replace(config.sampling, temperature=config.evaluation.temperature)
    key = {
        "version": 4,
        "seed": config.seed,
        "model": [policy.hash, config.model.dtype, config.model.context_tokens],
        "template": context.template.hash,
        "options": [resolved(part, runtime=False) for part in (chain, sampling, config.engine, config.scorer)],
        "parallel": config.evaluation.parallel,
        "verifier": resolved(config.verifier),
        "reward_models": {name: model.hash for name, model in context.reward_models.items()},
    }
    stage = context.stage(context.run.iteration(iteration) / folder, "evaluation", key, {"prompts": context.held_out.identity})
    manifest = stage.committed()
    if manifest is None:
        stage.work.mkdir(parents=True, exist_ok=True)
        asked = Asked(iteration, folder, policy, context.held_out, chain, sampling, EVALUATION_SCOPE, context.reward_models)
        parts = [generate_and_score(context, asked, stage.work)]
        if config.evaluation.parallel:
            side = dataclasses.replace(asked, strategy=options.Strategy(name="parallel", samples=config.evaluation.parallel))
            parts.append(generate_and_score(context, side, stage.work / "parallel"))
        held_out = rows.read_table(context.held_out.path("prompts.parquet"))
        tables = [[list(shards.read_rows(table)) for table in part if table] for part in parts]
        summary = summarise(held_out, *tables[0], seed=config.seed)
        for samples in tables[1:]:
            add_best_of(summary, tables[0], samples, seed=config.seed)
        rows.write_jsonl(stage.work / "summary.jsonl", [summary])
        rejected = [row for part in parts for table in part if table for row in rows.read_jsonl(table.path("rejected.jsonl"))]
        totals = {name: sum(drafts.stats[name] for drafts, _ in parts) for name in ("num_rows", "num_tokens", "num_prompt_tokens",
                  "num_cached_tokens", "num_cut")}  # fmt: skip
        manifest = stage.commit(rejected, num_in=context.held_out.stats["num_rows"], **totals)
    model["evaluation"] = str(manifest.folder.relative_to(context.run.root))
    return {**model, "splits": rows.read_jsonl(manifest.path("summary.jsonl"))[0]}
