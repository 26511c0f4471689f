"""Scorers without a model: the votes of a prompt's drafts, and the scores that the strategy gave itself."""

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

from evolve_ray.config import options
from evolve_ray.config.option import option
from evolve_ray.errors import UserError
from evolve_ray.score.verifiers import same_answer
from evolve_ray.store.turns import as_text


@dataclass(frozen=True)
class VoteArgs:
    """Options of `vote`, `[scorer.args]`."""

    reward: str = option("`share` of the drafts with the same answer, or 1 for the `majority` answer and 0 for others", "share",
                         choices=("share", "majority"))  # fmt: skip


class Vote:
    """The share of the responses to one prompt that give the same answer (LMSI, arXiv 2210.11610), or whether most do (SRT,
    2505.21444). Of equally many, the majority has the text that sorts first.

    The recipe's verifier reads the answers; without one, equal texts are the same answer.
    """

    def __init__(self, verifier: options.Verifier | None, args: VoteArgs):
        self.same, self.reward = same_answer(verifier), args.reward

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
        by_prompt: dict[str, list[str]] = defaultdict(list)
        for prompt, response in zip(prompts, responses, strict=True):
            by_prompt[as_text(prompt)].append(response)
        groups = [by_prompt[as_text(prompt)] for prompt in prompts]
        if self.reward == "majority":
            majority = {
                prompt: max(sorted(group), key=lambda text: self.share(text, group)) for prompt, group in by_prompt.items()
            }
            pairs = zip(prompts, responses, strict=True)
            return [float(self.same(response, majority[as_text(prompt)])) for prompt, response in pairs]
        return [self.share(response, group) for response, group in zip(responses, groups, strict=True)]

    def majority(self, group: list[str]) -> str:
        """The text whose answer most responses of a group give."""
        return max(sorted(group), key=lambda text: self.share(text, group))

    def share(self, response: str, group: list[str]) -> float:
        """The share of a group of responses with the same answer as `response`."""
        return sum(self.same(response, other) for other in group) / len(group)


class StrategyScores:
    """Stands for the scores in the rows of the drafts; a strategy that gives scores cannot ask for them."""

    def __call__(self, prompts: list[Any], answers: list[str | None], responses: list[str]) -> list[float]:
        raise UserError(
            "scorer.name: is 'strategy', so there is no scorer that a strategy or a preview could ask; use another scorer"
        )
