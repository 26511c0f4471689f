"""Probes that separate refinement skill from luck: equal drafts for all models, correct drafts, fixed quality, equal cost.

All figures are pure functions of the chains of one split, `{prompt id: {round: draft with its score}}`, as
`evolve_ray.evaluate.figures.whole_chains` returns them. A draft is right if the verifier scores it exactly 1.0.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from evolve_ray.evaluate import intervals
from evolve_ray.evaluate.figures import changes, differences, is_right, values_of

Chains = dict[str, dict[int, dict]]  # prompt id -> round -> draft with its score
Same = Callable[[str, str], bool]  # whether two responses give the same answer
PROBES = ("foreign", "keep", "quality", "majority", "parallel", "longer")
LAST_ROUNDS = 3  # rounds that vote in the probe `majority`


def is_verified(chains: Chains) -> bool:
    """Returns whether a verifier scored these drafts."""
    return any(draft["correct"] is not None for chain in chains.values() for draft in chain.values())


def foreign(chains: Chains) -> dict[str, Any]:
    """Returns the quality before and after one refinement of drafts that are the same for every model."""
    pairs = [(chain[1], chain[max(chain)]) for chain in chains.values()]
    if not pairs:
        return {"n": 0}
    before, after = ([pair[place] for pair in pairs] for place in (0, 1))
    figures = {"n": len(pairs), "before": values_of(before), "after": values_of(after)}
    return {**figures, "difference": differences(pairs), "moves": changes(pairs)}


def keep(chains: Chains) -> dict[str, Any]:
    """Returns how often correct drafts stay correct, and stay unchanged. With a verifier, only right drafts count."""
    verified = is_verified(chains)
    pairs = [(chain[1], chain[max(chain)]) for chain in chains.values() if not verified or is_right(chain[1])]
    figures: dict[str, Any] = {"num_shown": len(chains), "n": len(pairs)}
    if not pairs:
        return figures
    figures["unchanged"] = intervals.mean([before["text"] == after["text"] for before, after in pairs])
    if verified:
        figures["kept"] = intervals.mean([is_right(after) for _, after in pairs])
    return figures


def tercile_bounds(rewards: Iterable[float]) -> tuple[float, float]:
    """Returns the two rewards that split all first drafts into thirds."""
    low, high = np.quantile(list(rewards), [1 / 3, 2 / 3])
    return float(low), float(high)


def quality(chains: Chains, bounds: tuple[float, float] | None) -> list[dict[str, Any]]:
    """Returns the gain from the first to the last round, grouped by the quality of the first draft.

    With a verifier the groups are wrong and right first drafts. Without one they are thirds by reward, split at `bounds`, which
    are the same for all models. Luck alone also improves a group of wrong drafts: compare with the same group of another model.
    """
    groups: dict[str, list[tuple[dict, dict]]] = {}
    if is_verified(chains):
        groups = {"y1 wrong": [], "y1 right": []}
    elif bounds:
        groups = {"y1 low": [], "y1 middle": [], "y1 high": []}
    for chain in chains.values() if groups else ():
        first, last = chain[1], chain[max(chain)]
        if first["correct"] is not None:
            name = "y1 right" if is_right(first) else "y1 wrong"
        else:
            assert bounds is not None
            name = "y1 low" if first["score"] <= bounds[0] else "y1 middle" if first["score"] <= bounds[1] else "y1 high"
        groups[name].append((first, last))
    return [{"group": name, "n": len(pairs), **({"gain": differences(pairs)} if pairs else {})} for name, pairs in groups.items()]


def vote(drafts: list[dict], same_answer: Same) -> dict:
    """Returns the latest draft with the most frequent answer; if answers are equally frequent, the one that occurs latest."""
    groups: list[list[int]] = []
    for index, draft in enumerate(drafts):
        group = next((group for group in groups if same_answer(drafts[group[0]]["text"], draft["text"])), None)
        if group is None:
            groups.append([index])
        else:
            group.append(index)
    return drafts[max(groups, key=lambda group: (len(group), group[-1]))[-1]]


def majority(chains: Chains, same_answer: Same) -> dict[str, Any]:
    """Compares the vote of the last `LAST_ROUNDS` rounds with the last round; `difference` is vote minus last."""
    if not chains:
        return {"n": 0}
    votes = [vote([chain[number] for number in sorted(chain)[-LAST_ROUNDS:]], same_answer) for chain in chains.values()]
    last = [chain[max(chain)] for chain in chains.values()]
    pairs = list(zip(last, votes, strict=True))
    return {
        "n": len(pairs),
        "rounds": min(LAST_ROUNDS, max(next(iter(chains.values())))),
        "vote": values_of(votes),
        "last": values_of(last),
        "difference": differences(pairs),
        "num_other_answer": sum(not same_answer(last_draft["text"], vote_draft["text"]) for last_draft, vote_draft in pairs),
    }


def parallel(chains: Chains, samples: dict[str, dict[int, dict]], same_answer: Same) -> dict[str, Any]:
    """Compares chains with independent samples, at equal numbers of responses and at equal generated tokens.

    `samples`: prompt id -> sample number -> draft; prompts with a missing sample are left out. At equal tokens a prompt gets as
    many samples as the generated tokens of its chain pay for, at least one; `num_capped` counts the prompts whose chain could
    pay for more samples than exist. Each side has the draft with the best score (if the verifier is the scorer: right if any
    draft is right), and the choice that needs no scorer: the chain's last round, the vote of the samples. Differences are
    chain minus parallel.
    """
    num_samples = max(map(len, samples.values()), default=0)
    prompt_ids = [prompt_id for prompt_id in chains if len(samples.get(prompt_id, ())) == num_samples and num_samples]
    figures: dict[str, Any] = {"n": len(prompt_ids)}
    if not prompt_ids:
        return figures
    drafts_of = {
        prompt_id: (
            [chains[prompt_id][number] for number in sorted(chains[prompt_id])],
            [samples[prompt_id][number] for number in sorted(samples[prompt_id])],
        )
        for prompt_id in prompt_ids
    }
    sample_counts = {
        "equal_samples": {prompt_id: min(len(chain), num_samples) for prompt_id, (chain, _) in drafts_of.items()},
        "equal_tokens": {prompt_id: affordable(chain, drawn) for prompt_id, (chain, drawn) in drafts_of.items()},
    }
    for budget, counts in sample_counts.items():
        chain = [drafts_of[prompt_id][0] for prompt_id in prompt_ids]
        drawn = [drafts_of[prompt_id][1][: counts[prompt_id]] for prompt_id in prompt_ids]
        best = [(best_of(sample_drafts), best_of(chain_drafts)) for chain_drafts, sample_drafts in zip(chain, drawn, strict=True)]
        without_scorer = [
            (vote(sample_drafts, same_answer), chain_drafts[-1]) for chain_drafts, sample_drafts in zip(chain, drawn, strict=True)
        ]
        figures[budget] = {
            "chain": {**cost(chain), "best": values_of([pair[1] for pair in best]),
                      "last": values_of([pair[1] for pair in without_scorer])},
            "parallel": {**cost(drawn), "best": values_of([pair[0] for pair in best]),
                         "vote": values_of([pair[0] for pair in without_scorer])},
            "difference": {"best": differences(best), "last_minus_vote": differences(without_scorer)},
        }  # fmt: skip
    spare_tokens = [tokens(chain) - tokens(drawn) for chain, drawn in drafts_of.values()]
    mean_costs = [tokens(drawn) / num_samples for _, drawn in drafts_of.values()]
    figures["equal_tokens"]["num_capped"] = sum(
        spare >= mean_cost for spare, mean_cost in zip(spare_tokens, mean_costs, strict=True)
    )
    return figures


def longer(chains: Chains, answers: Chains, max_tokens: int) -> dict[str, Any]:
    """Compares the last round with one direct answer that may use the tokens of all rounds; `difference` is chain minus answer.

    The answer has the prompt and seed of y1, so it differs from y1 only where y1 was cut. `mean_tokens` is what it really used.
    """
    prompt_ids = [prompt_id for prompt_id in chains if prompt_id in answers]
    if not prompt_ids:
        return {"n": 0}
    pairs = [(answers[prompt_id][1], chains[prompt_id][max(chains[prompt_id])]) for prompt_id in prompt_ids]
    direct, last = ([pair[side] for pair in pairs] for side in (0, 1))
    return {
        "n": len(prompt_ids),
        "max_tokens": max_tokens,
        "num_cut": sum(draft["finish_reason"] == "length" for draft in direct),
        "answer": {**cost([[draft] for draft in direct]), **values_of(direct)},
        "chain": {**cost([list(chains[prompt_id].values()) for prompt_id in prompt_ids]), **values_of(last)},
        "difference": differences(pairs),
    }


def affordable(chain: list[dict], samples: list[dict]) -> int:
    """Returns how many of `samples`, in order, cost no more generated tokens than `chain`; at least one."""
    tokens_left, count = tokens(chain), 0
    for draft in samples:
        tokens_left -= draft["num_tokens"]
        if tokens_left < 0:
            break
        count += 1
    return max(1, count)


def tokens(drafts: list[dict]) -> int:
    return sum(draft["num_tokens"] for draft in drafts)


def best_of(drafts: list[dict]) -> dict:
    """Returns the draft with the highest score; if scores are equal, the earliest."""
    return max(drafts, key=lambda draft: draft["score"])


def cost(groups: list[list[dict]]) -> dict[str, float]:
    """Returns means per prompt: responses, generated tokens, and prompt tokens read for them (cached ones included)."""
    return {
        "mean_responses": sum(map(len, groups)) / len(groups),
        "mean_tokens": sum(map(tokens, groups)) / len(groups),
        "mean_prompt_tokens": sum(draft["num_prompt_tokens"] for group in groups for draft in group) / len(groups),
    }
