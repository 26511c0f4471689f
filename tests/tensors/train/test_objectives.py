"""Objectives against numbers worked out with plain math, and their gradients against finite differences of those."""

import math

import numpy as np
import pytest
import torch

from evolve_ray.config.options import Training
from evolve_ray.errors import UserError
from evolve_ray.store.rows import REFERENCE
from evolve_ray.train import objectives

NAMES = [name for name in REFERENCE.names if name != "pair_id"]
POLICY = [-4.0, -7.5, -3.0, -6.0, -1.0, -8.0]
REF = [-5.0, -7.0, -3.5, -5.5, -1.25, -6.5]
BETA = 0.3
LENGTHS = {"chosen": 8.0, "rejected": 5.0}

# Every objective in every form; each again with label smoothing, length normalisation and nll, where they apply.
PLAIN = [
    {"objective": "sft"},
    {"objective": "sft", "refine_weight": 0.0},
    {"objective": "sft", "refine_weight": 0.4},
    {"objective": "dpo"},
    {"objective": "ipo"},
    {"objective": "reward"},
    *(
        {"refine_form": form, **kind}
        for form in ("squared", "logistic")
        for kind in ({"objective": "srpo"}, *({"objective": "evolve", "alpha": alpha} for alpha in (0.0, 0.25, 0.8, 1.0)))
    ),
]
SMOOTHED = [case | {"label_smoothing": e} for case in PLAIN if case["objective"] != "sft" for e in (0.1, 0.5)]
MIXED = [
    case | more
    for case in PLAIN + SMOOTHED
    if case["objective"] != "reward" and case.get("label_smoothing") != 0.5
    for more in ({"length_normalised": True}, {"length_normalised": True, "nll": 0.2})
]
ALL = PLAIN + SMOOTHED + MIXED


def name_of(case):
    return "-".join(f"{value}" if key in ("objective", "refine_form") else f"{key}={value}" for key, value in case.items())


def by_hand(policy, reference, lengths, case):
    """The loss of one pair, from formulas of this file's own: dictionaries of floats in, a float out."""
    training = {"alpha": 0.5, "refine_form": "squared", "refine_weight": 1.0, "label_smoothing": 0.0, "nll": 0.0} | case
    e, kind = training["label_smoothing"], training["objective"]
    if training.get("length_normalised"):
        per = {name: lengths["rejected" if name.startswith("rejected") else "chosen"] for name in NAMES}
    else:
        per = dict.fromkeys(NAMES, 1.0)

    def h(better, worse):
        return (policy[better] - reference[better]) / per[better] - (policy[worse] - reference[worse]) / per[worse]

    def cross_entropy(margin):
        return math.log(1 + math.exp(margin)) - (1 - e) * margin

    def squares(value, target):
        """A target that is the wrong way round with probability e; less the variance, which no policy can change."""
        return (1 - e) * (value - target) ** 2 + e * (value + target) ** 2 - 4 * e * (1 - e) * target**2

    def refinement():
        margins = [BETA * h(f"chosen_after_{draft}", f"rejected_after_{draft}") for draft in ("rejected", "chosen")]
        return sum(squares(m, 0.5) if training["refine_form"] == "squared" else cross_entropy(m) for m in margins)

    loss = training["nll"] * -policy["chosen"] / lengths["chosen"] if training["nll"] else 0.0
    if kind == "sft":
        after = policy["chosen_after_rejected"] / per["chosen_after_rejected"]
        return loss - policy["chosen"] / per["chosen"] - training["refine_weight"] * after
    if kind == "reward":
        return cross_entropy(policy["chosen"] - policy["rejected"])
    if kind == "ipo":
        return loss + squares(h("chosen", "rejected"), 1 / (2 * BETA))
    alpha = {"dpo": 0.0, "srpo": 1.0, "evolve": training["alpha"]}[kind]
    return loss + (1 - alpha) * cross_entropy(BETA * h("chosen", "rejected")) + alpha * refinement()


def drawn(num_pairs, dtype, seed=0):
    """Random log-probs of policy and reference near each other, and lengths, as `{name: tensor_B}`."""
    draw = np.random.default_rng(seed)
    reference = {name: draw.uniform(-40, -5, num_pairs) for name in NAMES}
    policy = {name: values + draw.normal(0, 3, num_pairs) for name, values in reference.items()}
    lengths = {name: draw.integers(1, 40, num_pairs).astype(float) for name in LENGTHS}
    return [{name: torch.tensor(values, dtype=dtype) for name, values in part.items()} for part in (policy, reference, lengths)]


def compute(case, policy, reference, lengths):
    """The code's own loss and metrics, with the sequences and the reference that its objective asks for and no others."""
    training = Training(**{"beta": BETA} | case)
    found = objectives.find(training)
    policy = {name: policy[name] for name in found.needs}
    reference = {name: reference[name] for name in found.needs} if found.reference else {}
    return objectives.total(found, policy, reference, {} if found.scores else lengths, training)


def pair(part, index):
    return {name: values[index].item() for name, values in part.items()}


def logps(values):
    return {name: torch.tensor([value], dtype=torch.float64) for name, value in zip(NAMES, values, strict=True)}


def loss_of(kind, policy=POLICY, reference=REF, **more):
    """Loss and metrics of the one worked example below."""
    lengths = {name: torch.tensor([value], dtype=torch.float64) for name, value in LENGTHS.items()}
    loss, metrics = compute({"objective": kind} | more, logps(policy), logps(reference), lengths)
    return loss.item(), {name: value.item() for name, value in metrics.items()}


def r(name):
    """log pi - log pi_ref of the example."""
    return POLICY[NAMES.index(name)] - REF[NAMES.index(name)]


DPO = math.log(1 + math.exp(-BETA * (r("chosen") - r("rejected"))))
IMPROVE = (BETA * (r("chosen_after_rejected") - r("rejected_after_rejected")) - 0.5) ** 2
KEEP = (BETA * (r("chosen_after_chosen") - r("rejected_after_chosen")) - 0.5) ** 2


def test_names_are_the_columns_of_the_reference_table():
    assert [*objectives.DIRECT, *objectives.AFTER_REJECTED, *objectives.AFTER_CHOSEN] == NAMES


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_loss_is_that_of_separate_formulas_in_float64(case):
    policy, reference, lengths = drawn(16, torch.float64)
    loss, _ = compute(case, policy, reference, lengths)
    expected = [by_hand(pair(policy, i), pair(reference, i), pair(lengths, i), case) for i in range(16)]
    assert loss.shape == (16,)
    assert loss.tolist() == pytest.approx(expected, rel=0, abs=1e-10)


@pytest.mark.parametrize("case", ALL, ids=name_of)
def test_gradients_are_the_finite_differences_of_separate_formulas(case):
    policy, reference, lengths = drawn(4, torch.float64, seed=1)
    for values in policy.values():
        values.requires_grad_()
    compute(case, policy, reference, lengths)[0].sum().backward()
    step = 1e-5
    for name in NAMES:
        for index in range(4):
            at, others = pair(policy, index), (pair(reference, index), pair(lengths, index), case)
            up, down = (by_hand(at | {name: at[name] + sign * step}, *others) for sign in (1, -1))
            found = 0.0 if policy[name].grad is None else policy[name].grad[index].item()
            assert found == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-7), name


def test_dpo_of_the_worked_example():
    loss, metrics = loss_of("dpo")
    assert loss == pytest.approx(DPO, abs=1e-12)
    assert metrics["margin"] == pytest.approx(BETA * 1.5, abs=1e-12)  # (-4 + 5) - (-7.5 + 7) = 1.5
    assert metrics["accuracy"] == 1.0
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == pytest.approx((BETA * 1.0, BETA * -0.5), abs=1e-12)
    assert (metrics["chosen_shift"], metrics["rejected_shift"]) == (1.0, -0.5)


def test_conservative_dpo_of_the_worked_example():
    # margin 0.45: log sigmoid(0.45) = -0.49325, log sigmoid(-0.45) = -0.94325; 0.9 * 0.49325 + 0.1 * 0.94325 = 0.53825
    assert loss_of("dpo", label_smoothing=0.1)[0] == pytest.approx(0.53825, abs=1e-5)


def test_ipo_of_the_worked_example():
    loss, metrics = loss_of("ipo")
    assert loss == pytest.approx((1.5 - 1 / 0.6) ** 2, abs=1e-12)  # h = 1.5, 1 / (2 * 0.3) = 1 / 0.6
    assert metrics["loss_ipo"] == loss
    assert metrics["margin"] == pytest.approx(BETA * 1.5, abs=1e-12)
    # over 8 and 5 tokens: 1/8 - (-0.5/5) = 0.225
    assert loss_of("ipo", length_normalised=True)[0] == pytest.approx((0.225 - 1 / 0.6) ** 2, abs=1e-12)


def test_refinement_of_the_worked_example():
    loss, metrics = loss_of("srpo")
    assert loss == pytest.approx(IMPROVE + KEEP, abs=1e-12)
    assert metrics["loss_improve"] == pytest.approx((BETA * 1.0 - 0.5) ** 2, abs=1e-12)  # 0.5 - (-0.5) = 1
    assert metrics["loss_keep"] == pytest.approx((BETA * 1.75 - 0.5) ** 2, abs=1e-12)  # 0.25 - (-1.5) = 1.75
    assert (metrics["margin_improve"], metrics["margin_keep"]) == pytest.approx((BETA * 1.0, BETA * 1.75), abs=1e-12)


def test_logistic_refinement_of_the_worked_example():
    loss, metrics = loss_of("srpo", refine_form="logistic")
    assert metrics["loss_improve"] == pytest.approx(math.log(1 + math.exp(-0.3)), abs=1e-12)
    assert metrics["loss_keep"] == pytest.approx(math.log(1 + math.exp(-0.525)), abs=1e-12)
    assert loss == metrics["loss_improve"] + metrics["loss_keep"]


def test_evolve_of_the_worked_example():
    assert loss_of("evolve", alpha=0.3)[0] == pytest.approx(0.7 * DPO + 0.3 * (IMPROVE + KEEP), abs=1e-12)


def test_activation_of_the_worked_example():
    loss, metrics = loss_of("sft")
    assert loss == 4.0 + 3.0
    assert (metrics["loss_direct"], metrics["loss_refine"]) == (4.0, 3.0)
    assert loss_of("sft", refine_weight=0.5)[0] == 4.0 + 1.5
    assert loss_of("sft", refine_weight=0.0) == (4.0, {"loss_direct": 4.0})


def test_reward_model_of_the_worked_example():
    loss, metrics = loss_of("reward", [2.0, 0.5, *POLICY[2:]])
    assert loss == pytest.approx(math.log(1 + math.exp(-1.5)), abs=1e-12)
    assert metrics == {"loss_reward": loss, "margin": 1.5, "accuracy": 1.0}
    assert loss_of("reward", [0.5, 2.0, *POLICY[2:]])[1]["accuracy"] == 0.0
    assert loss_of("reward", [3.0, 3.0, *POLICY[2:]])[0] == pytest.approx(math.log(2), abs=1e-12)


@pytest.mark.parametrize(
    ("after_chosen", "squared", "logistic"),
    [
        # beta 0.5; log pi_ref(y_w | x, y_w, z) = -3, log pi_ref(y_l | x, y_w, z) = -4; the improving margin stays 0.
        ((-3.0, -4.0), 0.25 + 0.25, 0.693147 + 0.693147),  # as the reference: margin 0
        ((-2.5, -4.5), 0.25 + 0.0, 0.693147 + 0.474077),  # y_w is kept more often: 0.5 * (0.5 - -0.5) = 0.5
        ((-3.5, -3.5), 0.25 + 1.0, 0.693147 + 0.974077),  # y_l spoils it more often: 0.5 * (-0.5 - 0.5) = -0.5
    ],
)
def test_correct_draft_is_to_be_kept(after_chosen, squared, logistic):
    reference = [-5.0, -7.0, -3.5, -5.5, -3.0, -4.0]
    policy = [*reference[:4], *after_chosen]
    assert loss_of("srpo", policy, reference, beta=0.5)[0] == pytest.approx(squared, abs=1e-12)
    assert loss_of("srpo", policy, reference, beta=0.5, refine_form="logistic")[0] == pytest.approx(logistic, abs=1e-6)


@pytest.mark.parametrize("form", ["squared", "logistic"])
@pytest.mark.parametrize(("better", "worse"), [(2, 3), (4, 5)])
def test_loss_falls_as_the_chosen_gets_likelier_after_either_draft_and_rises_with_the_rejected(form, better, worse):
    def moved(place, by):
        return loss_of("srpo", [*REF[:place], REF[place] + by, *REF[place + 1 :]], refine_form=form)[0]

    assert moved(better, 0.5) < moved(better, 0.0) < moved(better, -0.5)
    assert moved(worse, 0.5) > moved(worse, 0.0) > moved(worse, -0.5)


LN2 = math.log(2)


@pytest.mark.parametrize(
    ("kind", "more", "expected"),
    [
        ("dpo", {}, LN2),
        ("dpo", {"label_smoothing": 0.2}, LN2),
        ("dpo", {"length_normalised": True}, LN2),
        ("ipo", {}, 1 / (2 * BETA) ** 2),
        ("srpo", {}, 0.5),
        ("srpo", {"label_smoothing": 0.2}, 2 * 0.3**2),
        ("srpo", {"refine_form": "logistic"}, 2 * LN2),
        ("evolve", {"alpha": 0.0}, LN2),
        ("evolve", {"alpha": 1.0}, 0.5),
        ("evolve", {"alpha": 0.5}, LN2 / 2 + 0.25),
    ],
)
def test_loss_where_policy_is_reference(kind, more, expected):
    loss, metrics = loss_of(kind, REF, REF, **more)
    assert loss == pytest.approx(expected, abs=1e-12)
    zeros = [value for name, value in metrics.items() if not name.startswith("loss")]
    assert len(zeros) >= 4
    assert set(zeros) == {0.0}  # margins, accuracies, implicit rewards and shifts


@pytest.mark.parametrize("more", [{}, {"label_smoothing": 0.1}, {"length_normalised": True}, {"nll": 0.3}], ids=name_of)
@pytest.mark.parametrize("form", ["squared", "logistic"])
@pytest.mark.parametrize(("alpha", "kind"), [(0.0, "dpo"), (1.0, "srpo")])
def test_evolve_at_both_ends_is_its_part_bit_for_bit(alpha, kind, form, more):
    found = []
    for case in ({"objective": "evolve", "alpha": alpha}, {"objective": kind}):
        policy, reference, lengths = drawn(64, torch.float32)
        for values in policy.values():
            values.requires_grad_()
        loss, metrics = compute(case | more | {"refine_form": form}, policy, reference, lengths)
        loss.sum().backward()
        found.append({"loss": loss} | metrics | {f"gradient {name}": v.grad for name, v in policy.items() if v.grad is not None})
    end, part = found
    assert end.keys() == part.keys()
    assert [name for name in end if not torch.equal(end[name], part[name])] == []


def gradients(kind, policy, **more):
    values = {name: value.requires_grad_() for name, value in logps(policy).items()}
    training = Training(objective=kind, beta=BETA, **more)
    objectives.find(training).loss(values, logps(REF), training)[0].sum().backward()
    return {name: value.grad.item() for name, value in values.items() if value.grad is not None}


def test_keeping_a_good_draft_is_rewarded_while_its_margin_is_below_a_half():
    below = gradients("evolve", REF, alpha=1.0)
    assert below["chosen_after_chosen"] < 0 < below["rejected_after_chosen"]
    assert below["chosen_after_rejected"] < 0 < below["rejected_after_rejected"]
    above = gradients("evolve", [*REF[:4], REF[4] + 10, REF[5]], alpha=1.0)
    assert above["rejected_after_chosen"] < 0 < above["chosen_after_chosen"]


def test_dpo_raises_the_chosen_and_lowers_the_rejected_whatever_the_margin():
    for policy in (REF, POLICY, [-50.0, *REF[1:]]):
        found = gradients("dpo", policy)
        assert found["chosen"] < 0 < found["rejected"]
        assert found["chosen"] == -found["rejected"]


@pytest.mark.parametrize("form", ["squared", "logistic"])
@pytest.mark.parametrize("kind", ["dpo", "ipo", "srpo", "evolve"])
def test_huge_margins_stay_finite_in_float32(kind, form):
    for extreme in ([-1e4, 0.0] * 3, [0.0, -1e4] * 3):
        policy = {name: torch.tensor([value], requires_grad=True) for name, value in zip(NAMES, extreme, strict=True)}
        reference = {name: torch.zeros(1) for name in NAMES}
        loss, _ = compute({"objective": kind, "refine_form": form, "label_smoothing": 0.1}, policy, reference, {})
        loss.backward()
        assert loss.isfinite()
        assert all(value.grad.isfinite() for value in policy.values() if value.grad is not None)


@pytest.mark.parametrize("case", [*PLAIN, {"objective": "evolve", "length_normalised": True, "nll": 0.2}], ids=name_of)
def test_pairs_do_not_influence_each_other(case):
    policy, reference, lengths = drawn(2, torch.float64)
    together, metrics = compute(case, policy, reference, lengths)
    for index in range(2):
        alone = [{name: values[index : index + 1] for name, values in part.items()} for part in (policy, reference, lengths)]
        assert compute(case, *alone)[0].item() == together[index].item()
    assert {value.shape for value in metrics.values()} == {(2,)}


SHARED = {"margin", "accuracy", "reward_chosen", "reward_rejected"}
SHIFTS = {"chosen_shift", "rejected_shift"}
REFINED = {f"{what}_{goal}" for what in ("loss", "margin", "accuracy") for goal in ("improve", "keep")}


@pytest.mark.parametrize(
    ("case", "expected"),
    [
        ({"objective": "sft"}, {"loss_direct", "loss_refine"}),
        ({"objective": "sft", "nll": 0.1}, {"loss_direct", "loss_refine", "loss_nll"}),
        ({"objective": "dpo"}, {"loss_dpo"} | SHARED | SHIFTS),
        ({"objective": "ipo"}, {"loss_ipo"} | SHARED | SHIFTS),
        ({"objective": "srpo"}, REFINED),
        ({"objective": "srpo", "nll": 0.1}, REFINED | {"loss_nll", "chosen_shift"}),
        ({"objective": "evolve"}, {"loss_dpo"} | SHARED | SHIFTS | REFINED),
        ({"objective": "evolve", "nll": 0.1}, {"loss_dpo", "loss_nll"} | SHARED | SHIFTS | REFINED),
        ({"objective": "reward"}, {"loss_reward", "margin", "accuracy"}),
    ],
    ids=lambda value: name_of(value) if isinstance(value, dict) else "",
)
def test_metrics_of_each_objective(case, expected):
    assert compute(case, *drawn(3, torch.float64))[1].keys() == expected


def test_accuracies_count_margins_above_zero():
    worse = [policy - 2 * (policy - reference) for policy, reference in zip(POLICY, REF, strict=True)]  # every margin negated
    for values, expected in ((POLICY, 1.0), (worse, 0.0), (REF, 0.0)):
        metrics = loss_of("evolve", values)[1]
        assert [metrics[name] for name in ("accuracy", "accuracy_improve", "accuracy_keep")] == [expected] * 3


def test_lengths_divide_each_response_by_its_own_tokens_and_leave_shifts_and_nll_alone():
    loss, metrics = loss_of("evolve", alpha=0.4, length_normalised=True, nll=0.5)
    margins = [BETA * (1 / 8 + 0.5 / 5), BETA * (0.5 / 8 + 0.5 / 5), BETA * (0.25 / 8 + 1.5 / 5)]
    assert [metrics[name] for name in ("margin", "margin_improve", "margin_keep")] == pytest.approx(margins, abs=1e-12)
    assert (metrics["reward_chosen"], metrics["reward_rejected"]) == pytest.approx((BETA / 8, -BETA * 0.5 / 5), abs=1e-12)
    assert (metrics["chosen_shift"], metrics["rejected_shift"], metrics["loss_nll"]) == (1.0, -0.5, 4.0 / 8)
    parts = 0.6 * metrics["loss_dpo"] + 0.4 * (metrics["loss_improve"] + metrics["loss_keep"])
    assert loss == pytest.approx(parts + 0.5 * 0.5, abs=1e-12)


def test_nll_is_the_mean_over_the_tokens_of_the_chosen_answer():
    plain, metrics = loss_of("evolve")
    assert "loss_nll" not in metrics
    assert loss_of("evolve", nll=0.5)[0] == pytest.approx(plain + 0.5 * 4.0 / 8, abs=1e-12)
    assert loss_of("evolve", nll=0.25)[0] == pytest.approx(plain + 0.25 * 4.0 / 8, abs=1e-12)


REFINEMENT = objectives.AFTER_REJECTED + objectives.AFTER_CHOSEN


@pytest.mark.parametrize(
    ("options", "needs", "reference"),
    [
        ({"objective": "sft"}, ("chosen", "chosen_after_rejected"), False),
        ({"objective": "sft", "refine_weight": 0.0}, ("chosen",), False),
        ({"objective": "dpo"}, objectives.DIRECT, True),
        ({"objective": "dpo", "nll": 0.1}, objectives.DIRECT, True),
        ({"objective": "ipo"}, objectives.DIRECT, True),
        ({"objective": "srpo"}, REFINEMENT, True),
        ({"objective": "srpo", "nll": 0.1}, ("chosen", *REFINEMENT), True),
        ({"objective": "evolve", "alpha": 0.0}, objectives.DIRECT, True),
        ({"objective": "evolve", "alpha": 0.5}, tuple(NAMES), True),
        ({"objective": "evolve", "alpha": 1.0}, REFINEMENT, True),
        ({"objective": "evolve", "alpha": 1.0, "nll": 0.1}, ("chosen", *REFINEMENT), True),
        ({"objective": "reward"}, objectives.DIRECT, False),
    ],
)
def test_objective_needs_no_sequence_that_it_does_not_use(options, needs, reference):
    found = objectives.find(Training(**options))
    assert (found.needs, found.reference) == (needs, reference)
    assert found.scores == (options["objective"] == "reward")


def test_objective_of_a_users_own_module_is_found():
    assert objectives.find(Training(objective=f"{__name__}:OWN")) == OWN


def test_objective_of_a_users_own_module_is_given_what_nll_looks_at():
    found = objectives.find(Training(objective=f"{__name__}:OWN", nll=0.1))
    assert (found.loss, found.needs) == (objectives.refine, ("chosen", *REFINEMENT))


OWN = objectives.Objective(objectives.refine, REFINEMENT, reference=True)
OWN_SCORES = objectives.Objective(objectives.reward, objectives.DIRECT, reference=False, scores=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"objective": "none:Such"}, r"training\.objective: 'none:Such' cannot be loaded"),
        ({"objective": f"{__name__}:LN2"}, r"training\.objective: .*LN2' is of type float, but must be"),
        ({"objective": "reward", "nll": 0.1}, r"training\.nll: is 0\.1, but objective 'reward' does not use it; remove it"),
        ({"objective": f"{__name__}:OWN_SCORES", "nll": 0.1}, r"training\.nll: is 0\.1, but objective .* does not use it"),
        (
            {"objective": "reward", "length_normalised": True},
            r"training\.length_normalised: is True, but objective 'reward' does not",
        ),
        (
            {"objective": "sft", "label_smoothing": 0.2},
            r"training\.label_smoothing: is 0\.2, but objective 'sft' does not",
        ),
    ],
)
def test_objective_that_cannot_be_used_is_refused_by_field(options, message):
    with pytest.raises(UserError, match=message):
        objectives.find(Training(**options))
