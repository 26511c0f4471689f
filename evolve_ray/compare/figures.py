"""Figures of models side by side: each by round, and every two of them paired by prompt."""

import itertools
from typing import Any

from rapidfuzz.distance import Levenshtein

from evolve_ray.compare import skill_probes
from evolve_ray.compare.skill_probes import Chains, Same, is_right
from evolve_ray.evaluate.figures import by_prompt, differences, distinct, summarise, whole_chains
from evolve_ray.evaluate.intervals import interval

Rows = tuple[list[dict], list[dict]]  # drafts, scores


def model_figures(prompts: list[dict], rows: Rows, *, seed: int) -> tuple[dict[str, Any], dict[str, Chains]]:
    """`{split: {"num_prompts", "rounds": {round: figures}, "gain"}}` and the whole chains of each split."""
    summary = summarise(prompts, *rows, seed=seed)
    chains = whole_chains(prompts, *rows)
    for split, found in chains.items():
        for number, figures in summary[split]["rounds"].items():
            figures |= more_figures(list(found.values()), int(number), figures)
    return summary, chains


def more_figures(chains: list[dict[int, dict]], number: int, have: dict[str, Any]) -> dict[str, Any]:
    """What one round says beyond what its summary has: diversity, cost, and how alike the drafts of a chain are (0..1)."""
    here = [chain[number] for chain in chains]
    figures: dict[str, Any] = {
        "distinct_1": distinct([draft["text"] for draft in here], 1),
        "mean_prompt_tokens": sum(draft["num_prompt_tokens"] for draft in here) / len(here),
    }
    if number > 1:
        figures["no_change"] = have["against_previous"]["same_text"] / len(here)
        figures["similarity_previous"] = mean([alike(chain[number - 1], chain[number]) for chain in chains])
        figures["similarity_chain"] = mean([mean_pairwise(chain, number) for chain in chains])
    return figures


def alike(one: dict, other: dict) -> float:
    """1 - edit distance / length of the longer text."""
    return Levenshtein.normalized_similarity(one["text"], other["text"])


def mean_pairwise(chain: dict[int, dict], number: int) -> float:
    """Mean similarity of every two of a chain's first `number` drafts: like self-BLEU, high where a chain stands still."""
    return mean([alike(chain[one], chain[other]) for one, other in itertools.combinations(range(1, number + 1), 2)])


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def paired(one: Chains, other: Chains, *, seed: int) -> dict[str, Any]:
    """`other` minus `one` at each round and in gain, on the prompts that both have answered in every round."""
    common = [prompt_id for prompt_id in one if prompt_id in other]
    figures: dict[str, Any] = {"n": len(common), "rounds": {}}
    if not common:
        return figures
    rounds = min(len(one[common[0]]), len(other[common[0]]))
    for number in range(1, rounds + 1):
        figures["rounds"][str(number)] = differences([(one[p][number], other[p][number]) for p in common], seed)
    gains = [(gain(one[prompt_id], rounds), gain(other[prompt_id], rounds)) for prompt_id in common]
    figures["gain"] = {name: interval([there[name] - here[name] for here, there in gains], seed) for name in gains[0][0]}
    return figures


def gain(chain: dict[int, dict], rounds: int) -> dict[str, float]:
    """Last round minus first of one prompt."""
    first, last = chain[1], chain[rounds]
    figures = {"reward": last["score"] - first["score"]}
    if first["correct"] is not None:
        figures["exact_match"] = float(is_right(last)) - float(is_right(first))
    return figures


def every_two(chains: dict[str, dict[str, Chains]], *, seed: int) -> list[dict[str, Any]]:
    """Paired differences of every model against every earlier one; `chains`: {model: {split: chains}}."""
    found = []
    for one, other in itertools.combinations(chains, 2):
        splits = {split: paired(chains[one][split], chains[other][split], seed=seed) for split in chains[one]}
        found.append({"model": other, "against": one, "splits": splits})
    return found


def add_probes(
    models: dict[str, dict[str, Any]], chains: dict[str, dict[str, Chains]], parts: dict[str, dict[str, Rows]],
    prompts: list[dict], wanted: tuple[str, ...], same: Same, *, seed: int, longest: int = 0,
) -> None:  # fmt: skip
    """Adds `probes` to each split of each model's figures; `parts`: {model: {"foreign", "keep", ...: its rows}}.

    `longest`: tokens that the answers of the part `longer` could have.
    """
    for split in next(iter(chains.values())):
        firsts = [chain[1]["score"] for found in chains.values() for chain in found[split].values()]
        bounds = skill_probes.tercile_bounds(firsts) if firsts else None
        for name, figures in models.items():
            here, made = chains[name][split], figures[split].setdefault("probes", {})
            for part, measure in (("foreign", skill_probes.foreign), ("keep", skill_probes.keep)):
                if part in parts[name]:
                    made[part] = measure(whole_chains(prompts, *parts[name][part]).get(split, {}), seed)
            if "longer" in parts[name]:
                answers = whole_chains(prompts, *parts[name]["longer"]).get(split, {})
                made["longer"] = skill_probes.longer(here, answers, longest, seed)
            if "quality" in wanted:
                made["quality"] = skill_probes.quality(here, bounds, seed)
            if "majority" in wanted:
                made["majority"] = skill_probes.majority(here, same, seed)
            if "parallel" in parts[name]:
                samples = by_prompt(*parts[name]["parallel"], "sample", [split, *figures])[split]
                made["parallel"] = skill_probes.parallel(here, samples, same, seed)
