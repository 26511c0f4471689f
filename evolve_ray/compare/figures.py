"""Figures of compared models: each model by round, and the differences of every two models, paired by prompt."""

import itertools
from typing import Any

from rapidfuzz.distance import Levenshtein

from evolve_ray.compare import skill_probes
from evolve_ray.compare.skill_probes import Chains, Same
from evolve_ray.compare.strategies import Measured
from evolve_ray.evaluate import intervals
from evolve_ray.evaluate.figures import by_prompt, differences, distinct, is_right, summarise, whole_chains
from evolve_ray.evaluate.final_answers import final_answers

Rows = tuple[list[dict], list[dict]]  # drafts, scores


def model_figures(prompts: list[dict], rows: Rows) -> tuple[dict[str, Any], dict[str, Chains]]:
    """Returns `{split: {"num_prompts", "rounds": {round: figures}, "gain"}}`, and the complete chains of each split."""
    summary = summarise(prompts, *rows)
    chains = whole_chains(prompts, *rows)
    for split, split_chains in chains.items():
        for round_number, round_figures in summary[split]["rounds"].items():
            round_figures |= extra_figures(list(split_chains.values()), int(round_number), round_figures)
    return summary, chains


def extra_figures(chains: list[dict[int, dict]], round_number: int, summary: dict[str, Any]) -> dict[str, Any]:
    """Returns what the summary of a round lacks: diversity, prompt tokens, and similarity within a chain (0..1)."""
    drafts = [chain[round_number] for chain in chains]
    figures: dict[str, Any] = {
        "distinct_1": distinct([draft["text"] for draft in drafts], 1),
        "mean_prompt_tokens": sum(draft["num_prompt_tokens"] for draft in drafts) / len(drafts),
    }
    if round_number > 1:
        figures["no_change"] = summary["against_previous"]["same_text"] / len(drafts)
        figures["similarity_previous"] = mean([similarity(chain[round_number - 1], chain[round_number]) for chain in chains])
        figures["similarity_chain"] = mean([mean_similarity(chain, round_number) for chain in chains])
    return figures


def similarity(first: dict, second: dict) -> float:
    """Returns 1 - edit distance / length of the longer text."""
    return Levenshtein.normalized_similarity(first["text"], second["text"])


def mean_similarity(chain: dict[int, dict], num_drafts: int) -> float:
    """Returns the mean similarity of every two of a chain's first `num_drafts`: like self-BLEU, high if drafts hardly change."""
    return mean(
        [similarity(chain[first], chain[second]) for first, second in itertools.combinations(range(1, num_drafts + 1), 2)]
    )


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired_differences(base_chains: Chains, model_chains: Chains) -> dict[str, Any]:
    """Returns model minus base for each round and for the gain, on the prompts that both answered in every round."""
    common = [prompt_id for prompt_id in base_chains if prompt_id in model_chains]
    figures: dict[str, Any] = {"n": len(common), "rounds": {}}
    if not common:
        return figures
    rounds = min(len(base_chains[common[0]]), len(model_chains[common[0]]))
    for round_number in range(1, rounds + 1):
        figures["rounds"][str(round_number)] = differences(
            [(base_chains[p][round_number], model_chains[p][round_number]) for p in common]
        )
    gains = [(gain(base_chains[prompt_id], rounds), gain(model_chains[prompt_id], rounds)) for prompt_id in common]
    figures["gain"] = {
        name: intervals.paired(*([gain[name] for gain in of_model] for of_model in zip(*gains, strict=True)))
        for name in gains[0][0]
    }
    return figures


def gain(chain: dict[int, dict], rounds: int) -> dict[str, float]:
    """Returns last round minus first round of one prompt."""
    first, last = chain[1], chain[rounds]
    figures = {"reward": last["score"] - first["score"]}
    if first["correct"] is not None:
        figures["exact_match"] = float(is_right(last) - is_right(first))
    return figures


def add_strategies(
    splits: dict[str, Any], prompts: list[dict], chain: Rows, parts: dict[str, Rows], measured: tuple[Measured, ...], same: Same
) -> None:  # fmt: skip
    """Adds `strategies` to each split: the final answers of every measured strategy, in their order."""
    for part in measured:
        names = {"name": part.label, "pick": part.pick}
        for split, figures in final_answers(list(splits), prompts, chain, parts[part.name], **names, same=same).items():
            splits[split].setdefault("strategies", []).append(figures)


def model_differences(chains: dict[str, dict[str, Chains]]) -> list[dict[str, Any]]:
    """Returns the paired differences of every model against every earlier one; `chains`: {model: {split: chains}}."""
    comparisons = []
    for base, model in itertools.combinations(chains, 2):
        splits = {split: paired_differences(chains[base][split], chains[model][split]) for split in chains[base]}
        comparisons.append({"model": model, "against": base, "splits": splits})
    return comparisons


def add_probes(
    models: dict[str, dict[str, Any]], chains: dict[str, dict[str, Chains]], parts: dict[str, dict[str, Rows]],
    prompts: list[dict], probe_names: tuple[str, ...], same_answer: Same, *, longer_tokens: int = 0,
) -> None:  # fmt: skip
    """Adds `probes` to the figures of each model and split; `parts`: {model: {"foreign", "keep", ...: its rows}}.

    `longer_tokens`: the limit of an answer in the part `longer`.
    """
    for split in next(iter(chains.values())):
        first_scores = [chain[1]["score"] for split_chains in chains.values() for chain in split_chains[split].values()]
        bounds = skill_probes.tercile_bounds(first_scores) if first_scores else None
        for name, figures in models.items():
            model_chains, probes = chains[name][split], figures[split].setdefault("probes", {})
            for part, measure in (("foreign", skill_probes.foreign), ("keep", skill_probes.keep)):
                if part in parts[name]:
                    probes[part] = measure(whole_chains(prompts, *parts[name][part]).get(split, {}))
            if "longer" in parts[name]:
                answers = whole_chains(prompts, *parts[name]["longer"]).get(split, {})
                probes["longer"] = skill_probes.longer(model_chains, answers, longer_tokens)
            if "quality" in probe_names:
                probes["quality"] = skill_probes.quality(model_chains, bounds)
            if "majority" in probe_names:
                probes["majority"] = skill_probes.majority(model_chains, same_answer)
            if "parallel" in parts[name]:
                samples = by_prompt(*parts[name]["parallel"], "sample", [split, *figures])[split]
                probes["parallel"] = skill_probes.parallel(model_chains, samples, same_answer)
