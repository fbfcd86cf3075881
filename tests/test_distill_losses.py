"""Distillation losses and their weighting: gradients, independent references, limits."""

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from ssmttm.distill.hidden_states import HiddenStateProjections
from ssmttm.distill.losses import (
    DIVERGENCES,
    SoftTarget,
    _merge_rest,
    divergence,
    hidden_state_distance,
    output_error,
    soft_target,
    student_log_probs,
)
from ssmttm.distill.weighting import LossWeighting
from ssmttm.errors import UserError

V = 7


def logits(*shape, seed=0, scale=2.0):
    return scale * torch.randn(*shape, V, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def loss(student, teacher, kind="forward", skew=0.0, temperature=1.0, k=None):
    target = soft_target(teacher, temperature, k)
    target = SoftTarget(target.log_p.double(), target.ids)
    log_q = student_log_probs(student, target, temperature)
    return divergence(log_q.double(), target.log_p, kind, skew)


# --- divergences ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("skew", [0.0, 0.1, 0.5])
def test_divergence_gradients_match_finite_differences(kind, skew):
    log_p = logits(2, 3, seed=1).log_softmax(-1)
    x = logits(2, 3).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: divergence(x.log_softmax(-1), log_p, kind, skew), (x,))
    top = soft_target(logits(2, 3, seed=1), 1.0, 3)
    top = SoftTarget(top.log_p.double(), top.ids)
    top_k_loss = lambda x: divergence(_merge_rest(x.log_softmax(-1), top.ids), top.log_p, kind, skew)  # noqa: E731
    assert torch.autograd.gradcheck(top_k_loss, (x,))


@pytest.mark.parametrize("which", ["hidden", "output"])
def test_distance_gradients_match_finite_differences(which):
    teacher, x = torch.randn(2, 3, 4).double(), torch.randn(2, 3, 4).double().requires_grad_()
    function = {"hidden": hidden_state_distance, "output": output_error}[which]
    assert torch.autograd.gradcheck(lambda x: function(x, teacher), (x,))


@pytest.mark.parametrize("kind", DIVERGENCES)
@pytest.mark.parametrize("skew", [0.0, 0.3])
@pytest.mark.parametrize("k", [None, 1, 3, V])
def test_divergence_and_gradient_are_zero_for_equal_logits(kind, skew, k):
    x = logits(4, 5).requires_grad_()
    value = loss(x, x.detach(), kind, skew, 1.7, k)
    torch.testing.assert_close(value, torch.zeros_like(value), rtol=0, atol=1e-6)
    (gradient,) = torch.autograd.grad(value.sum(), x)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), rtol=0, atol=1e-6)
    others = loss(logits(4, 5, seed=9), x.detach(), kind, skew, 1.7, k)
    assert (others > 1e-4).all()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_divergences_equal_torch_kl_div(temperature):
    student, teacher = logits(4, 5), logits(4, 5, seed=1)
    q, p = ((x / temperature).softmax(-1) for x in (student, teacher))

    def kl(a, b):  # F.kl_div takes the second argument first
        return F.kl_div(b.log(), a, reduction="none").sum(-1)

    close = dict(rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(loss(student, teacher, "forward", 0.0, temperature), kl(p, q), **close)
    torch.testing.assert_close(loss(student, teacher, "reverse", 0.0, temperature), kl(q, p), **close)
    both = (kl(p, q) + kl(q, p)) / 2
    torch.testing.assert_close(loss(student, teacher, "bidirectional", 0.0, temperature), both, **close)
    torch.testing.assert_close(loss(student, teacher, "forward", 0.2, temperature), kl(p, 0.2 * p + 0.8 * q), **close)
    torch.testing.assert_close(loss(student, teacher, "reverse", 0.2, temperature), kl(q, 0.2 * q + 0.8 * p), **close)


def test_skew_bounds_divergence_of_impossible_code():
    student, teacher = torch.zeros(V).double(), torch.zeros(V).double()
    student[0], teacher[0] = -1e4, 5.0
    assert loss(student, teacher, "forward", 0.0) > 1e3
    assert loss(student, teacher, "forward", 0.1) < -torch.tensor(0.1).log()


def test_top_k_target_is_a_distribution_and_a_lower_bound():
    teacher = logits(3, 4)
    target = soft_target(teacher, 1.3, 3)
    p = (teacher / 1.3).softmax(-1)
    assert target.log_p.shape == (3, 4, 4) and target.ids.shape == (3, 4, 3)
    torch.testing.assert_close(target.log_p.double().exp()[..., :3], p.topk(3).values, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(target.log_p.exp().sum(-1), torch.ones(3, 4), rtol=0, atol=1e-5)
    assert soft_target(teacher, 1.3, V).ids is None
    whole, part = (loss(logits(3, 4, seed=2), teacher, k=k) for k in (None, 3))
    assert (part <= whole + 1e-6).all() and (part < whole - 1e-3).any()  # merging codes cannot increase the divergence


@pytest.mark.parametrize("temperature", [0.0, -1.0, float("nan"), float("inf")])
def test_temperature_must_be_positive_and_finite(temperature):
    with pytest.raises(UserError, match=r"distill\.temperature"):
        soft_target(logits(2), temperature)


def test_invalid_divergence_skew_and_k_are_rejected():
    log_p = logits(2).log_softmax(-1)
    for kind, skew, message in [
        ("both", 0, r"unknown distill\.divergence"),
        ("forward", 1.0, r"distill\.skew must be in .*got 1\.0"),
    ]:
        with pytest.raises(UserError, match=message):
            divergence(log_p, log_p, kind, skew)
    with pytest.raises(UserError, match="k=0"):
        soft_target(logits(2), 1.0, 0)


# --- activations ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("width", "teacher_width"), [(6, 6), (4, 6), (6, 4)])
def test_hidden_state_projections_start_as_scale_invariant_identity(width, teacher_width):
    projections = HiddenStateProjections(2, width, teacher_width)
    hidden_states = [torch.randn(3, 5, width) for _ in range(2)]
    if width == teacher_width:
        near = projections([3.0 * s for s in hidden_states], [0.1 * s for s in hidden_states])
        torch.testing.assert_close(near, torch.zeros(3, 5), rtol=0, atol=1e-8)
    far = projections(hidden_states, [torch.randn(3, 5, teacher_width) for _ in range(2)])
    assert far.shape == (3, 5) and (far > 0.1).all()


def test_output_error_is_relative_to_each_items_energy():
    teacher = torch.randn(2, 3, 4) * torch.tensor([1.0, 100.0])[:, None, None]
    assert output_error(torch.zeros_like(teacher), teacher).tolist() == pytest.approx([1, 1])
    changed = teacher * torch.tensor([1.1, 1.2])[:, None, None]
    assert output_error(changed, teacher).tolist() == pytest.approx([0.01, 0.04], rel=1e-3)


# --- weighting ------------------------------------------------------------------------------------------------------


def test_static_weighting_is_the_weighted_sum():
    losses = {"a": torch.tensor(2.0), "b": torch.tensor(5.0), "other": torch.tensor(9.0)}
    weighting = LossWeighting("static", {"a": 1.0, "b": 0.5})
    assert weighting(losses).item() == 4.5 and not list(weighting.parameters())


def test_running_means_keep_ratio_of_base_weights():
    weighting = LossWeighting("magnitude", {"a": 1.0, "b": 3.0})
    assert weighting.weights().tolist() == [1, 3]  # nothing observed yet
    weighting.observe(torch.tensor([100.0, 0.2]))
    weighted = weighting.weights() * torch.tensor([100.0, 0.2])
    assert (weighted[1] / weighted[0]).item() == pytest.approx(3)
    assert weighted.sum().item() == pytest.approx(100 + 3 * 0.2)  # the total of the base weights
    for _ in range(200):
        weighting.observe(torch.tensor([1.0, 1.0]))
    torch.testing.assert_close(weighting.weights(), torch.tensor([1.0, 3.0]), rtol=1e-3, atol=0)


@pytest.mark.parametrize("rule", ["magnitude", "gradient"])
@pytest.mark.parametrize("vanished", [0.0, 1e-7])
def test_vanished_loss_has_a_bounded_weight(rule, vanished):
    """The divergence of a student that equals its teacher is 0; its gradient may be too."""
    weighting = LossWeighting(rule, {"cross_entropy": 1.0, "kl": 0.5})
    for _ in range(3):
        weighting.observe(torch.tensor([6.0, vanished]))
    weights = weighting.weights()
    assert weights[0] <= 1.0 and weights[1] / weights[0] == pytest.approx(500)
    assert weighting({"cross_entropy": torch.tensor(6.0), "kl": torch.tensor(vanished)}).isfinite()
    for _ in range(100):
        weighting.observe(torch.tensor([6.0, 3.0]))  # it grows again
    torch.testing.assert_close(weighting.weights(), torch.tensor([5 / 6, 5 / 6]), rtol=1e-3, atol=0)


def test_uncertainty_scales_converge_to_loss_sizes():
    """At the optimum of exp(-s) L / 2 + s / 2 each s is log L and every weighted loss 1/2 (arXiv 1705.07115)."""
    weighting = LossWeighting("uncertainty", {"a": 1.0, "b": 0.1})
    sizes = {"a": torch.tensor(50.0), "b": torch.tensor(0.2)}
    optimizer = torch.optim.Adam(weighting.parameters(), lr=0.05)
    for _ in range(1500):
        optimizer.zero_grad()
        weighting(sizes).backward()
        optimizer.step()
    torch.testing.assert_close(weighting.log_variance.detach().exp(), torch.tensor([50.0, 0.2]), rtol=0.02, atol=0)


@pytest.mark.parametrize("rule", ["static", "magnitude", "uncertainty"])
def test_weighted_losses_of_batch_parts_add_up(rule):
    weighting = LossWeighting(rule, {"a": 1.0, "b": 0.5})
    if rule == "magnitude":
        weighting.observe(torch.tensor([2.0, 7.0]))
    if rule == "uncertainty":
        nn.init.constant_(weighting.log_variance, 0.7)
    whole = weighting({"a": torch.tensor(2.0), "b": torch.tensor(6.0)})
    parts = [weighting({"a": torch.tensor(2.0 * s), "b": torch.tensor(6.0 * s)}, s) for s in (0.25, 0.75)]
    assert sum(parts).item() == pytest.approx(whole.item())


def test_running_means_are_in_the_state_dict():
    first, second = (LossWeighting("magnitude", {"a": 1.0, "b": 3.0}) for _ in range(2))
    first.observe(torch.tensor([4.0, 9.0]))
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.weights(), second.weights())


def test_unknown_weighting_is_rejected():
    with pytest.raises(UserError, match=r"unknown distill\.weighting 'fair'"):
        LossWeighting("fair", {"a": 1.0})
