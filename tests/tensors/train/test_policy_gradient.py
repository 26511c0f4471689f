"""The clipped policy gradient against numbers by hand, REINFORCE, finite differences, and its options."""

import pytest
import torch

from evolve_ray.config.options import Training
from evolve_ray.errors import UserError
from evolve_ray.train.objectives import find, total

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
