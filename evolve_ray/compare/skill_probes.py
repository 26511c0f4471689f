"""Probes that tell refinement skill from luck: the same drafts for every model, correct drafts, fixed quality, equal cost.

Figures are pure functions of `{prompt id: {round: draft with its score}}` of one split, as `evaluate.whole_chains` gives it.
A draft is right where the verifier gives it exactly 1.0.
"""

from collections.abc import Callable, Iterable
from typing import Any

import numpy as np

from evolve_ray.evaluate.figures import changes, differences, values_of
from evolve_ray.evaluate.intervals import interval

Chains = dict[str, dict[int, dict]]  # prompt id -> round -> draft with its score
Same = Callable[[str, str], bool]  # whether two responses give the same answer
PROBES = ("foreign", "keep", "quality", "majority", "parallel", "longer")
LAST_ROUNDS = 3  # that vote


def is_right(draft: dict) -> bool:
    return draft["correct"] == 1.0


def is_verified(chains: Chains) -> bool:
    """Whether a verifier has graded these drafts."""
    return any(draft["correct"] is not None for chain in chains.values() for draft in chain.values())


def foreign(chains: Chains, seed: int) -> dict[str, Any]:
    """What a model makes of drafts that are the same for every model: quality before and after one refinement."""
    pairs = [(chain[1], chain[max(chain)]) for chain in chains.values()]
    if not pairs:
        return {"n": 0}
    before, after = ([pair[place] for pair in pairs] for place in (0, 1))
    figures = {"n": len(pairs), "before": values_of(before, seed), "after": values_of(after, seed)}
    return {**figures, "difference": differences(pairs, seed), "moves": changes(pairs)}


def keep(chains: Chains, seed: int) -> dict[str, Any]:
    """Whether correct drafts stay correct, and as they are. With a verifier only drafts count that it finds right."""
    verified = is_verified(chains)
    pairs = [(chain[1], chain[max(chain)]) for chain in chains.values() if not verified or is_right(chain[1])]
    figures: dict[str, Any] = {"num_shown": len(chains), "n": len(pairs)}
    if not pairs:
        return figures
    figures["unchanged"] = interval([float(before["text"] == after["text"]) for before, after in pairs], seed)
    if verified:
        figures["kept"] = interval([float(is_right(after)) for _, after in pairs], seed)
    return figures


def tercile_bounds(rewards: Iterable[float]) -> tuple[float, float]:
    """The two rewards that part all first drafts into thirds."""
    low, high = np.quantile(list(rewards), [1 / 3, 2 / 3])
    return float(low), float(high)


def quality(chains: Chains, bounds: tuple[float, float] | None, seed: int) -> list[dict[str, Any]]:
    """The gain of the last round over the first among first drafts of like quality.

    With a verifier: first drafts that are wrong, and right. Without: thirds by reward, parted by `bounds`, which all models
    share. Within a group of wrong drafts luck alone also lifts, so the same group of another model is what to compare with.
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
    return [
        {"group": name, "n": len(pairs), **({"gain": differences(pairs, seed)} if pairs else {})}
        for name, pairs in groups.items()
    ]


def vote(drafts: list[dict], same: Same) -> dict:
    """The latest draft that gives the most frequent answer; of equally frequent answers the one given latest."""
    groups: list[list[int]] = []
    for place, draft in enumerate(drafts):
        group = next((group for group in groups if same(drafts[group[0]]["text"], draft["text"])), None)
        if group is None:
            groups.append([place])
        else:
            group.append(place)
    return drafts[max(groups, key=lambda group: (len(group), group[-1]))[-1]]


def majority(chains: Chains, same: Same, seed: int) -> dict[str, Any]:
    """The vote of the last `LAST_ROUNDS` rounds against the last round; `difference` is vote minus last."""
    if not chains:
        return {"n": 0}
    votes = [vote([chain[number] for number in sorted(chain)[-LAST_ROUNDS:]], same) for chain in chains.values()]
    last = [chain[max(chain)] for chain in chains.values()]
    pairs = list(zip(last, votes, strict=True))
    return {
        "n": len(pairs),
        "rounds": min(LAST_ROUNDS, max(next(iter(chains.values())))),
        "vote": values_of(votes, seed),
        "last": values_of(last, seed),
        "difference": differences(pairs, seed),
        "num_other_answer": sum(not same(one["text"], other["text"]) for one, other in pairs),
    }


def parallel(chains: Chains, samples: dict[str, dict[int, dict]], same: Same, seed: int) -> dict[str, Any]:
    """A chain against independent samples, at equal numbers of responses and at equal generated tokens.

    `samples`: prompt id -> sample number -> draft; prompts that lack one are left out. At equal tokens a prompt gets as many
    samples as its chain's generated tokens pay for, at least one; `num_capped` prompts could have paid for more than there are.
    Each side has the scorer's best (where the verifier is the scorer: right if any is) and what can be known without a scorer:
    the chain's last round, the samples' vote. Differences are chain minus parallel.
    """
    most = max(map(len, samples.values()), default=0)
    asked = [prompt_id for prompt_id in chains if len(samples.get(prompt_id, ())) == most and most]
    figures: dict[str, Any] = {"n": len(asked)}
    if not asked:
        return figures
    sides = {prompt_id: ([chains[prompt_id][n] for n in sorted(chains[prompt_id])],
                         [samples[prompt_id][n] for n in sorted(samples[prompt_id])]) for prompt_id in asked}  # fmt: skip
    counts = {
        "equal_samples": {prompt_id: min(len(chain), most) for prompt_id, (chain, _) in sides.items()},
        "equal_tokens": {prompt_id: affordable(chain, drawn) for prompt_id, (chain, drawn) in sides.items()},
    }
    for budget, sizes in counts.items():
        chain = [sides[prompt_id][0] for prompt_id in asked]
        drawn = [sides[prompt_id][1][: sizes[prompt_id]] for prompt_id in asked]
        best = [(best_of(right), best_of(left)) for left, right in zip(chain, drawn, strict=True)]
        known = [(vote(right, same), left[-1]) for left, right in zip(chain, drawn, strict=True)]
        figures[budget] = {
            "chain": {**cost(chain), "best": values_of([pair[1] for pair in best], seed),
                      "last": values_of([pair[1] for pair in known], seed)},
            "parallel": {**cost(drawn), "best": values_of([pair[0] for pair in best], seed),
                         "vote": values_of([pair[0] for pair in known], seed)},
            "difference": {"best": differences(best, seed), "last_minus_vote": differences(known, seed)},
        }  # fmt: skip
    spare = [tokens(chain) - tokens(drawn) for chain, drawn in sides.values()]
    means = [tokens(drawn) / most for _, drawn in sides.values()]
    figures["equal_tokens"]["num_capped"] = sum(left >= mean for left, mean in zip(spare, means, strict=True))
    return figures


def longer(chains: Chains, answers: Chains, max_tokens: int, seed: int) -> dict[str, Any]:
    """A chain's last round against one direct answer that may have the tokens of all rounds; `difference` is chain minus answer.

    The answer has the prompt and seed of y1, so it is another one only where y1 was cut: `mean_tokens` tells what it used.
    """
    asked = [prompt_id for prompt_id in chains if prompt_id in answers]
    if not asked:
        return {"n": 0}
    pairs = [(answers[prompt_id][1], chains[prompt_id][max(chains[prompt_id])]) for prompt_id in asked]
    one, last = ([pair[place] for pair in pairs] for place in (0, 1))
    return {
        "n": len(asked),
        "max_tokens": max_tokens,
        "num_cut": sum(draft["finish_reason"] == "length" for draft in one),
        "answer": {**cost([[draft] for draft in one]), **values_of(one, seed)},
        "chain": {**cost([list(chains[prompt_id].values()) for prompt_id in asked]), **values_of(last, seed)},
        "difference": differences(pairs, seed),
    }


def affordable(chain: list[dict], drawn: list[dict]) -> int:
    """How many of `drawn`, in their order, cost no more generated tokens than `chain`; at least one."""
    left, count = tokens(chain), 0
    for draft in drawn:
        left -= draft["num_tokens"]
        if left < 0:
            break
        count += 1
    return max(1, count)


def tokens(drafts: list[dict]) -> int:
    return sum(draft["num_tokens"] for draft in drafts)


def best_of(drafts: list[dict]) -> dict:
    """By the scorer; of equal scores the earliest."""
    return max(drafts, key=lambda draft: draft["score"])


def cost(groups: list[list[dict]]) -> dict[str, float]:
    """Means per prompt: responses, generated tokens, and prompt tokens that were read for them (cached ones included)."""
    return {
        "mean_responses": sum(map(len, groups)) / len(groups),
        "mean_tokens": sum(map(tokens, groups)) / len(groups),
        "mean_prompt_tokens": sum(draft["num_prompt_tokens"] for group in groups for draft in group) / len(groups),
    }
