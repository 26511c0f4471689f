"""The results of the runs of a study: outcomes by prompt, and means over seeds with their intervals."""

import json
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from evolve_ray.errors import IntegrityError
from evolve_ray.evaluate import intervals
from evolve_ray.store import shards
from evolve_ray.store.manifest import read_manifest
from evolve_ray.store.rows import read_table
from evolve_ray.store.run import Run

Values = dict[str, float]  # one number by prompt id (or pair id)


class Answer(NamedTuple):
    right: bool
    num_tokens: int
    judged: float | None = None  # score of the trained reward model; None: it did not score this answer


@dataclass(frozen=True)
class Outcomes:
    """The answers of one model on one split, by prompt; only prompts with a verified answer in every round."""

    chain: dict[str, list[Answer]]  # y1 first
    parallel: dict[str, list[Answer]]  # as many independent samples as the chain has rounds; empty: not measured

    @property
    def rounds(self) -> int:
        return len(next(iter(self.chain.values())))

    def y(self, number: int) -> Values:
        """By prompt, 1.0 if the answer of a round is right; rounds count from 1, and -1 is the last."""
        return {key: float(answers[number - (number > 0)].right) for key, answers in self.chain.items()}

    def best(self, kind: str) -> Values:
        """By prompt, 1.0 if any answer of the `chain` or of the `parallel` samples is right."""
        return {key: float(any(answer.right for answer in answers)) for key, answers in getattr(self, kind).items()}

    def picked(self, kind: str) -> Values:
        """By prompt, 1.0 if the answer with the highest score of the reward model is right; the first one if scores are equal.

        Only prompts whose answers all have such a score.
        """
        judged = {
            key: [(answer.judged, answer.right) for answer in answers if answer.judged is not None]
            for key, answers in getattr(self, kind).items()
        }
        return {key: float(max(pairs, key=lambda pair: pair[0])[1]) for key, pairs in judged.items() if len(pairs) == self.rounds}

    def tokens(self, kind: str) -> Values:
        return {key: float(sum(answer.num_tokens for answer in answers)) for key, answers in getattr(self, kind).items()}


@dataclass(frozen=True)
class Result:
    """One finished run of the study."""

    recipe: str
    seed: int
    models: dict[str, dict[str, Outcomes]]  # by model and split, models in the order of training
    labels: dict[int, dict[str, int]]  # by iteration and pair: 1 if chosen is better by the verifier, 0 if equal, -1 if worse
    stages: list[dict[str, Any]]  # as in report.json

    def outcomes(self, model: str, split: str = "heldout") -> Outcomes:
        """The outcomes of a model by its name in the report; "last" is the last model."""
        return self.models[list(self.models)[-1] if model == "last" else model][split]


def minus(values: Values, others: Values) -> Values:
    """Differences of two results, paired by prompt. Raises `IntegrityError` if they have no prompt in common."""
    common = values.keys() & others.keys()
    if not common:
        raise IntegrityError(
            "two runs of a seed have no held-out prompt in common; delete the seed's folder and run the study again"
        )
    return {key: values[key] - others[key] for key in sorted(common)}


def gain(outcomes: Outcomes) -> Values:
    return minus(outcomes.y(-1), outcomes.y(1))


def share(signs: dict[str, int], wanted: int) -> Values:
    """By pair, 1.0 if its label is `wanted`."""
    return {key: float(sign == wanted) for key, sign in signs.items()}


def pooled(strata: list[Values], interval: Callable[..., dict[str, float]] = intervals.mean) -> dict[str, float]:
    """The mean over seeds of their means with its 95 % interval: of `intervals.mean`, or of `intervals.difference`.

    The prompts of all seeds are one sample in which every seed (stratum) has the same weight. So the interval covers other
    prompts for the same trained models; the values by seed show how much another seed may differ.
    """
    values = [value for stratum in strata for value in stratum.values()]
    largest = max(map(len, strata))  # weights of 1 where all strata have the same size: as exact as without weights
    return interval(values, weights=[largest / len(stratum) for stratum in strata for _ in stratum])


def pooled_gain(strata: list[Values]) -> dict[str, float]:
    """The same of paired differences."""
    return pooled(strata, intervals.difference)


def read_result(root: Path, recipe: str, seed: int, judged: dict[str, float] | None = None) -> Result:
    """Reads a finished run; `judged` are the scores of the reward model by draft id."""
    run = Run(root)
    report = json.loads((root / "report.json").read_bytes())
    models, labels = {}, {}
    for model in report["models"]:
        if model.get("rolled_back"):  # the run did not keep its policy
            continue
        folder = run.iteration(model["iteration"])
        models[model["name"]] = read_outcomes(
            folder / ("base_evaluation" if model["name"] == "base" else "evaluation"), judged or {}
        )
        if model["iteration"]:
            labels[model["iteration"]] = read_labels(folder)
    return Result(recipe, seed, models, labels, report["stages"])


def read_outcomes(folder: Path, judged: dict[str, float]) -> dict[str, Outcomes]:
    """`{split: outcomes}` from the tables of an evaluation; raises `IntegrityError` if a split has no verified chain."""
    chains = read_answers(folder, "round", judged)
    parallels = read_answers(folder / "parallel", "sample", judged)
    outcomes = {}
    for split, chain in chains.items():
        rounds = max(max(answers) for answers in chain.values())
        complete = complete_prompts(chain, range(1, rounds + 1))
        if not complete:
            raise IntegrityError(
                f"{folder}: no prompt of split {split} has a verified answer in every round; see its rejected.jsonl"
            )
        outcomes[split] = Outcomes(complete, complete_prompts(parallels.get(split, {}), range(rounds)))
    if not outcomes:
        raise IntegrityError(f"{folder}: is listed in report.json but holds no answers; delete the run and run the study again")
    return outcomes


def complete_prompts(answers: dict[str, dict[int, Answer | None]], numbers: range) -> dict[str, list[Answer]]:
    """`{prompt: answers}` of the prompts that have a verified answer at each of `numbers`."""
    complete = {}
    for key, by_number in answers.items():
        present = [answer for number in numbers if (answer := by_number.get(number)) is not None]
        if len(present) == len(numbers):
            complete[key] = present
    return complete


def read_answers(folder: Path, column: str, judged: dict[str, float]) -> dict[str, dict[str, dict[int, Answer | None]]]:
    """Answers by split, prompt and `column`; None for an answer that the verifier did not score."""
    drafts, scores = read_manifest(folder / "generations"), read_manifest(folder / "scores")
    answers: dict[str, dict[str, dict[int, Answer | None]]] = defaultdict(lambda: defaultdict(dict))
    if drafts and scores:
        correct = {row["draft_id"]: row["correct"] for row in shards.read_rows(scores)}
        for row in shards.read_rows(drafts):
            value = correct.get(row["draft_id"])
            answer = None if value is None else Answer(value == 1.0, row["num_tokens"], judged.get(row["draft_id"]))
            answers[row["split"]][row["prompt_id"]][row[column]] = answer
    return answers


def read_labels(folder: Path) -> dict[str, int]:
    """The labels of the pairs of an iteration whose drafts are both verified; see `Result.labels`."""
    pairs, scores = read_manifest(folder / "pairs"), read_manifest(folder / "scores")
    if not (pairs and scores):
        return {}
    correct = {row["draft_id"]: row["correct"] for row in shards.read_rows(scores) if row["correct"] is not None}
    return {
        pair["pair_id"]: int(np.sign(correct[pair["chosen_id"]] - correct[pair["rejected_id"]]))
        for pair in read_table(pairs.path("pairs.parquet"))
        if pair["chosen_id"] in correct and pair["rejected_id"] in correct
    }


def grouped(results: list[Result]) -> list[tuple[str, str, list[Result]]]:
    """(recipe, model, the runs with this model), in the order of recipes and models."""
    names = dict.fromkeys((result.recipe, model) for result in results for model in result.models)
    return [(r, m, [result for result in results if result.recipe == r and m in result.models]) for r, m in names]
