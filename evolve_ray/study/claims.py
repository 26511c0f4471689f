"""The claims of the method, each with its effect and whether the runs reached it."""

from collections.abc import Callable
from typing import Any

from evolve_ray.config.run_options import MIN_PROMPTS
from evolve_ray.study.results import Result, Values, gain, grouped, minus, pooled, pooled_gain, share

Pool = Callable[[list[Values]], dict[str, float]]


def claims(results: list[Result], command: str) -> list[dict[str, Any]]:
    """The claims (a) to (e) of the tiny world and some further ones, each with its effect and whether it was reached.

    Effects are paired by prompt and pooled over seeds as in `results.pooled`. `reached` is null if the runs do not measure the
    claim, or on too few prompts; then `note` gives the reason.
    """
    all_claims: list[dict[str, Any]] = []
    names = ("tiny", "tiny_iterative_dpo", "tiny_rule", "tiny_reward_model")
    tiny, dpo, rule, trained = ({r.seed: r for r in results if r.recipe == name} for name in names)

    def add(
        name: str, statement: str, by_seed: dict[int, list[Values]], holds: Callable[[dict], bool],
        note: str = "not run", unit: str = "points", pool: Pool = pooled_gain, **more: Any,
    ) -> None:  # fmt: skip
        """Adds a claim. `by_seed`: the strata of each seed, usually one; empty if the claim was not measured."""
        scale = 1.0 if unit.startswith("tokens") else 100.0
        claim: dict[str, Any] = {"claim": name, "statement": statement, "reached": None, "effect": None, "interval": None}
        claim |= {"unit": unit, "seeds": sorted(by_seed), "per_seed": {}, "command": command, **more}
        if by_seed:
            strata = [stratum for seed in sorted(by_seed) for stratum in by_seed[seed]]
            figures, n = effect(strata, scale, pool), sum(map(len, strata))
            claim |= {**figures, "per_seed": {str(seed): effect(by_seed[seed], scale, pool) for seed in sorted(by_seed)}}
            if n < MIN_PROMPTS:
                claim["note"] = f"too few prompts: {n}, at least {MIN_PROMPTS} are needed"
            else:
                claim["reached"] = bool(holds(figures))
        else:
            claim["note"] = note
        all_claims.append(claim)

    def above_zero(figures: dict) -> bool:
        return figures["interval"][0] > 0

    def ten_points(figures: dict) -> bool:
        return figures["effect"] >= 10 and above_zero(figures)

    def growth(result: Result, other: Result, model: str) -> list[Values]:
        """The last round of the last model of `result`, minus the last round of `model` of `other`."""
        return [minus(result.outcomes("last").y(-1), other.outcomes(model).y(-1))]

    base = {seed: [gain(result.outcomes("base"))] for seed, result in tiny.items()}
    add("a", "before training, refining does not help (base: y4 - y1)", base, lambda figures: not above_zero(figures))
    iterations = [
        {"model": model, **effect([gain(result.outcomes(model)) for result in runs], 100.0)}
        for recipe, model, runs in grouped(results)
        if recipe == "tiny" and model.startswith("iteration ")
    ]
    last = {seed: [gain(result.outcomes("last"))] for seed, result in tiny.items()}
    statement = "after training, refining helps (y4 - y1: interval above 0 in at least two iterations; effect of the last one)"
    add("b", statement, last, lambda _: sum(map(above_zero, iterations)) >= 2, iterations=iterations)
    growths = {seed: growth(result, result, "activation") for seed, result in tiny.items()}
    add("c", "y4 grows by at least 10 points from activation to the last iteration", growths, ten_points)
    direct = {s: [minus(r.outcomes("last").y(1), r.outcomes("activation").y(1))] for s, r in tiny.items()}
    add("c_direct", "y1, the direct answer, grows from activation to the last iteration", direct, above_zero)
    iterated = {s: r for s, r in tiny.items() if "iteration 1" in r.models}
    gains = {s: [minus(gain(r.outcomes("last")), gain(r.outcomes("iteration 1")))] for s, r in iterated.items()}
    add("c_gain", "the gain y4 - y1 grows from iteration 1 to the last iteration", gains, above_zero)
    over_dpo = {seed: growth(result, dpo[seed], "last") for seed, result in tiny.items() if seed in dpo}
    add("d", "y4 of the last iteration is at least 10 points above that of iterative DPO", over_dpo, ten_points)

    last_models = {seed: result.outcomes("last") for seed, result in tiny.items()}
    picked = {s: [minus(o.picked("chain"), o.picked("parallel"))] for s, o in last_models.items() if o.picked("parallel")}
    best = {s: [minus(o.best("chain"), o.best("parallel"))] for s, o in last_models.items() if o.parallel}
    tokens = {s: [minus(o.tokens("chain"), o.tokens("parallel"))] for s, o in last_models.items() if o.parallel}
    note = "not measured" if tiny else "not run"
    statement = "the best of a chain of the last iteration is not below the best of the same number of parallel samples"
    add("e", f"{statement}, picked by the trained reward model", picked, lambda figures: figures["effect"] >= 0, note)
    add("e_verifier", f"{statement}, picked by the verifier, which knows the answer", best, lambda f: f["effect"] >= 0, note)
    statement = "a chain generates no more tokens than the same number of parallel samples, within the interval"
    add("e_tokens", statement, tokens, lambda figures: not above_zero(figures), note, "tokens per prompt")

    for split in ("long", "desc"):
        outside = {seed: [gain(result.outcomes("last", split))] for seed, result in tiny.items()}
        add(
            f"ood_{split}",
            f"refining helps on {split} in the last iteration; the iterations had no training prompts of that kind",
            outside,
            above_zero,
        )
    labels = {s: strata for s, r in rule.items() if (strata := [share(signs, 1) for signs in r.labels.values() if signs])}
    statement = (
        "selection by rule: chosen is the better draft by the verifier in more than half of the pairs (mean of iterations)"
    )
    add(
        "rule_label_accuracy",
        statement,
        labels,
        lambda f: f["interval"][0] > 50,
        "not measured" if rule else "not run",
        pool=pooled,
    )
    learned = {seed: growth(result, result, "activation") for seed, result in trained.items()}
    more: dict[str, Any] = {}
    if trained:
        more["gain"] = effect([gain(result.outcomes("last")) for result in trained.values()], 100.0)
    statement = "with a trained reward model, y4 grows from activation to the last iteration"
    add("trained_reward_model", statement, learned, above_zero, **more)
    return all_claims


def effect(strata: list[Values], scale: float, pool: Pool = pooled_gain) -> dict[str, Any]:
    """The pooled mean and interval, each times `scale`."""
    figures = pool(strata)
    mean, low, high = (round(figures[name] * scale, 4) + 0.0 for name in ("mean", "low", "high"))
    return {"effect": mean, "interval": [low, high]}
