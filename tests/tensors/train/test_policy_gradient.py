"""The clipped policy gradient against numbers by hand, REINFORCE, finite differences, and its options."""

import math

import pytest
import torch

from evolve_ray.config.options import Training
from evolve_ray.errors import UserError
from evolve_ray.train.objectives import find, total
from evolve_ray.train.tokens import Tokens

LENGTHS = {"chosen": torch.tensor([2, 4, 5]), "rejected": torch.tensor([2, 4, 5])}


def loss_of(policy, advantages, refined=None, reference=None, **options):
    """The loss and metrics of a batch; the reference is the policy itself unless it is given."""
    training = Training(objective="policy_gradient", **options)
    size = len(advantages)
    reference = reference or {name: values.detach().clone() for name, values in policy.items()}
    numbers = {"advantage": torch.tensor(advantages, dtype=torch.float64), "refined": torch.tensor(refined or [0.0] * size)}
    lengths = {name: values[:size] for name, values in LENGTHS.items()}
    return total(find(training), policy, reference, lengths, training, numbers)


def logps(*values):
    return torch.tensor(values, dtype=torch.float64, requires_grad=True)


def test_before_the_first_update_it_is_reinforce_with_the_same_advantages():
    policy = {"chosen": logps(-3.0, -2.0, -7.0)}
    advantages = [-1.2, 0.5, 0.7]
    loss, metrics = loss_of(policy, advantages, refine_weight=0.0)
    assert loss.tolist() == pytest.approx([1.2, -0.5, -0.7])
    assert metrics["ratio"].tolist() == [1.0, 1.0, 1.0], "exactly: the reference comes from the same forwards"
    (gradient,) = torch.autograd.grad(loss.sum(), policy["chosen"])
    assert gradient.tolist() == pytest.approx([-value for value in advantages])


@pytest.mark.parametrize(
    ("ratio", "advantage", "expected", "moves"),
    [(1.5, 0.5, -0.6, False), (0.5, -1.0, 0.8, False), (1.5, -1.0, 1.5, True), (0.5, 1.0, -0.5, True), (1.1, 1.0, -1.1, True)],
)
def test_the_ratio_is_clipped_on_the_side_that_goes_too_far(ratio, advantage, expected, moves):
    policy = {"chosen": torch.tensor([ratio], dtype=torch.float64).log().requires_grad_()}
    reference = {"chosen": torch.zeros(1, dtype=torch.float64)}
    loss, metrics = loss_of(policy, [advantage], reference=reference, refine_weight=0.0)
    assert loss.item() == pytest.approx(expected)
    (gradient,) = torch.autograd.grad(loss.sum(), policy["chosen"])
    assert (gradient.item() != 0) is moves
    assert metrics["clipped"].item() == float(not moves)


def test_clip_and_kl_are_options():
    args = {"clip_low": 0.1, "clip_high": 1.0, "kl": 2.0}
    policy = {"chosen": torch.tensor([1.8], dtype=torch.float64).log().requires_grad_()}
    loss, metrics = loss_of(policy, [1.0], reference={"chosen": torch.zeros(1)}, refine_weight=0.0, objective_args=args)
    kl = 1 / 1.8 - 1 + torch.tensor(1.8, dtype=torch.float64).log().item()
    assert metrics["kl"].item() == pytest.approx(kl)
    assert loss.item() == pytest.approx(-1.8 + 2 * kl)
    with pytest.raises(UserError, match=r"training\.objective_args\.cliplow: unknown option; did you mean 'clip_low'\?"):
        find(Training(objective="policy_gradient", objective_args={"cliplow": 0.1}))


def test_refined_answers_are_read_after_their_draft():
    """SCoRe's second turn: reward 11, log pi(y2 | x, y1, z) = -2: the gradient is -11 on it, and 0 on log pi(y2 | x)."""
    policy = {"chosen": logps(-3.0, -5.0), "chosen_after_rejected": logps(-9.0, -2.0)}
    loss, _ = loss_of(policy, [1.0, 11.0], refined=[0.0, 1.0])
    gradients = torch.autograd.grad(loss.sum(), list(policy.values()))
    assert [gradient.tolist() for gradient in gradients] == [[-1.0, 0.0], [0.0, -11.0]]


def test_length_normalised_is_the_mean_over_tokens():
    """GSPO: log-ratio 1.2 over 4 tokens is a ratio of exp(0.3)."""
    policy = {"chosen": logps(0.0, 1.2)}
    reference = {"chosen": torch.zeros(2, dtype=torch.float64)}
    args = {"clip_high": 1.0}
    loss, metrics = loss_of(
        policy, [1.0, 1.0], reference=reference, refine_weight=0.0, length_normalised=True, objective_args=args
    )
    assert metrics["ratio"].tolist() == pytest.approx([1.0, 1.349858807576])
    assert loss.tolist() == pytest.approx([-1.0, -1.349858807576])


def test_gradient_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(3)
    reference = {name: torch.randn(3, generator=generator, dtype=torch.float64) for name in ("chosen", "chosen_after_rejected")}
    start = [values + 0.05 * torch.randn(3, generator=generator, dtype=torch.float64) for values in reference.values()]

    def loss(first, second):
        policy = {"chosen": first, "chosen_after_rejected": second}
        values, _ = loss_of(policy, [0.5, -1.0, 2.0], [0.0, 1.0, 1.0], reference, objective_args={"kl": 0.3})
        return values

    assert torch.autograd.gradcheck(loss, [values.requires_grad_() for values in start])


def by_token(args, policy, reference, advantages, lengths, refined=None, engine=None, **options):
    """The loss at the level of tokens; the rows of `policy` and `reference` are padded with 0."""
    training = Training(objective="policy_gradient", refine_weight=0.0, objective_args={"level": "token", **args}, **options)
    found = find(training)
    mask = torch.arange(policy.shape[1]) < torch.tensor(lengths)[:, None]
    mean = {"chosen": sum(lengths) / len(lengths)}
    tokens = Tokens(
        {"chosen": policy}, {"chosen": reference}, {"chosen": mask}, mean, {} if engine is None else {"chosen": engine}
    )
    numbers = {"advantage": torch.tensor(advantages, dtype=torch.float64), "refined": torch.zeros(len(lengths))}
    sums = [{"chosen": values.sum(1)} for values in (policy, reference)]
    return total(found, *sums, {"chosen": torch.tensor(lengths)}, training, numbers, tokens)


@pytest.mark.parametrize(
    ("args", "divisors"),
    [({}, (2, 4)), ({"length": "constant", "length_constant": 10}, (10, 10)), ({"length": "batch"}, (3, 3))],
    ids=["answer", "constant", "batch"],
)
def test_by_token_it_is_reinforce_before_the_first_update(args, divisors):
    """The gradient of -A log pi(y) over the divisor, on each token of the answer and on no other."""
    policy = logps(*[-0.5] * 8).view(2, 4)
    policy = policy.detach().clone().requires_grad_()
    loss, metrics = by_token(args, policy, policy.detach().clone(), [1.5, -0.5], [2, 4])
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    expected = torch.tensor([[-1.5] * 2 + [0.0] * 2, [0.5] * 4], dtype=torch.float64) / torch.tensor(divisors)[:, None]
    assert (gradient - expected).abs().max() < 1e-9
    assert metrics["ratio"].tolist() == [1.0, 1.0]


def test_by_answer_the_gradient_is_that_of_reinforce_to_1e_9():
    policy = {"chosen": logps(-3.0, -2.0, -7.0)}
    loss, _ = loss_of(policy, [-1.2, 0.5, 0.7], refine_weight=0.0)
    again = logps(-3.0, -2.0, -7.0)
    reinforce = -(torch.tensor([-1.2, 0.5, 0.7], dtype=torch.float64) * again)
    ours, theirs = (torch.autograd.grad(part.sum(), values)[0] for part, values in ((loss, policy["chosen"]), (reinforce, again)))
    assert (ours - theirs).abs().max() < 1e-9


def test_by_token_each_ratio_is_clipped_alone():
    """Ratios 1.5, 1 and (0.5 | 1.1), advantages 1 and -2, clip 0.2; the mean over 3 and 1 tokens."""
    ratios = torch.tensor([[1.5, 1.0, 0.5], [1.1, 1.0, 1.0]], dtype=torch.float64)
    policy, reference = ratios.log().requires_grad_(), torch.zeros(2, 3, dtype=torch.float64)
    loss, metrics = by_token({}, policy, reference, [1.0, -2.0], [3, 1])
    assert loss.tolist() == pytest.approx([-(1.2 + 1.0 + 0.5) / 3, 2.2])
    assert metrics["clipped"].tolist() == pytest.approx([1 / 3, 0.0])
    assert metrics["ratio"].tolist() == pytest.approx([1.0, 1.1])
    (gradient,) = torch.autograd.grad(loss.sum(), policy)
    assert gradient[0, 0] == 0, "it went too far already"
    assert (gradient[0, 1:] != 0).all()


def test_by_token_the_gradient_agrees_with_finite_differences():
    generator = torch.Generator().manual_seed(4)
    reference = torch.randn(3, 5, generator=generator, dtype=torch.float64)
    start = reference + 0.05 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    engine = reference + 0.3 * torch.randn(3, 5, generator=generator, dtype=torch.float64)
    args = {"kl": 0.3, "length": "batch", "mismatch": "truncate"}

    def loss(policy):
        return by_token(args, policy, reference, [0.5, -1.0, 2.0], [5, 2, 3], engine=engine)[0]

    assert torch.autograd.gradcheck(loss, [start.requires_grad_()])


def test_mismatch_multiplies_the_gain_and_not_the_divergence():
    """Trainer over engine: factors 0.5 and 4, of which 2 is the cap; ratio 1, so the divergence is 0."""
    reference = torch.zeros(1, 2, dtype=torch.float64)
    engine = -torch.tensor([[0.5, 4.0]], dtype=torch.float64).log()
    loss, metrics = by_token({"mismatch": "truncate"}, reference.clone(), reference, [1.0], [2], engine=engine)
    assert loss.item() == pytest.approx(-(0.5 + 2.0) / 2)
    assert metrics["mismatch"].item() == pytest.approx((math.log(2) + math.log(4)) / 2)
    assert metrics["largest_mismatch"].item() == pytest.approx(math.log(4))
    policy, other = reference + 0.1, {"mismatch": "truncate", "kl": 1.0}
    loss, _ = by_token(other, policy, reference, [0.0], [2], engine=engine)
    assert loss.item() == pytest.approx(math.exp(-0.1) - 1 + 0.1)


def test_mismatch_without_the_engines_numbers_is_refused():
    values = torch.zeros(1, 2, dtype=torch.float64)
    with pytest.raises(UserError, match=r"pairs have no log-probabilities of the engine; set sampling\.logps = true"):
        by_token({"mismatch": "truncate"}, values, values, [1.0], [2])


def test_an_answer_without_tokens_has_no_loss_and_no_nan():
    policy = torch.zeros(2, 0, dtype=torch.float64, requires_grad=True)
    loss, metrics = by_token({}, policy, policy.detach(), [1.0, -1.0], [0, 0])
    assert loss.tolist() == [0.0, 0.0]
    assert metrics["ratio"].tolist() == [0.0, 0.0]


def test_the_first_stage_of_score_holds_the_first_turn_and_moves_the_second():
    """Advantage 0 on turn 1: the gradient on log pi(y1) is the KL's alone; turn 2 has none of it with `kl_refined` 0."""
    policy = {"chosen": logps(-3.1, -9.0), "chosen_after_rejected": logps(-9.0, -2.0)}
    reference = {"chosen": torch.tensor([-3.0, -9.0]).double(), "chosen_after_rejected": torch.tensor([-9.0, -2.0]).double()}
    args = {"kl": 0.1, "kl_refined": 0.0}
    loss, _ = loss_of(policy, [0.0, 11.0], [0.0, 1.0], reference, objective_args=args)
    first, second = torch.autograd.grad(loss.sum(), list(policy.values()))
    assert first.tolist() == pytest.approx([0.1 * (1 - math.exp(0.1)), 0.0])  # d/dd [exp(-d) - 1 + d] at d = -0.1
    assert second.tolist() == pytest.approx([0.0, -11.0])


def test_the_segments_of_s2r():
    """Rewards -1, 1, 1 with baselines 0.2, 0.5, 0.3: the loss is 0 at ratio 1; ratio 1.5 of the second is clipped: -0.6."""
    advantages = [reward - baseline for reward, baseline in ((-1, 0.2), (1, 0.5), (1, 0.3))]
    assert advantages == pytest.approx([-1.2, 0.5, 0.7])
    loss, _ = loss_of({"chosen": logps(-3.0, -2.0, -7.0)}, advantages, refine_weight=0.0)
    assert loss.mean().item() == pytest.approx(0.0)
    reference = {"chosen": torch.tensor([-3.0, -2.0 - math.log(1.5), -7.0]).double()}
    loss, _ = loss_of({"chosen": logps(-3.0, -2.0, -7.0)}, advantages, reference=reference, refine_weight=0.0)
    assert loss[1].item() == pytest.approx(-0.6)


@pytest.mark.parametrize(
    ("args", "more", "message"),
    [
        ({"length": "batch"}, {}, r"objective_args\.length: is 'batch', which only level = \"token\" uses"),
        ({"level": "token", "length": "constant"}, {}, r"length_constant: is 0 with length = 'constant'; it must be above 0"),
        ({"level": "token", "length_constant": 8}, {}, r"length_constant: is 8 with length = 'answer'"),
        ({"level": "token"}, {"length_normalised": True}, r"training\.length_normalised: has no effect with level 'token'"),
        ({"kl_to": "initial"}, {}, r"objective_args\.kl_to: is 'initial', but the weight of the divergence, kl, is 0"),
        ({"level": "tokens"}, {}, r"level: .*'tokens'"),
    ],
)
def test_options_that_contradict_each_other_are_refused(args, more, message):
    with pytest.raises(UserError, match=message):
        find(Training(objective="policy_gradient", objective_args=args, **more))
