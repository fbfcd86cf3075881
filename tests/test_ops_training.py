"""Fused operations of training against their plain forms: values and gradients, all dtypes, ragged block counts."""

import pytest
import torch
import torch.nn.functional as F

from ssmttm.mixers.mamba2 import GatedRMSNorm
from ssmttm.ops import conv, norm
from ssmttm.ops import cross_entropy as ce
from ssmttm.ops.conv import causal_conv, causal_conv_reference
from ssmttm.ops.cross_entropy import cross_entropy
from ssmttm.ops.ssd import chunked, ssd, ssd_reference

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5, torch.bfloat16: 2e-2}


@pytest.fixture(autouse=True)
def small_blocks(monkeypatch):
    """Several blocks of rows, the last one shorter."""
    monkeypatch.setattr(ce, "_BLOCK", 50)
    monkeypatch.setattr(conv, "_BLOCK", 60)
    monkeypatch.setattr(norm, "_BLOCK", 50)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_gated_norm_equals_the_plain_one(dtype):
    torch.manual_seed(0)
    module = GatedRMSNorm(16).to(torch.promote_types(dtype, torch.float32))
    torch.nn.init.normal_(module.weight)
    tall = torch.randn(2, 7, 40, dtype=dtype)  # z is a part of a projection, not contiguous
    grad = torch.randn(2, 7, 16, dtype=dtype)

    def run(fused):
        x, z = tall[..., :16].clone().requires_grad_(), tall.clone().requires_grad_()
        module.zero_grad()
        with pytest.MonkeyPatch.context() as patch:
            if not fused:
                patch.setattr(torch.compiler, "is_compiling", lambda: True)
            y = module(x, z[..., 16:32])
        y.backward(grad)
        assert ("GatedRMSNormFunction" in type(y.grad_fn.next_functions[0][0]).__name__) == fused
        return y.detach(), x.grad, z.grad, module.weight.grad.clone()

    for found, expected in zip(run(True), run(False), strict=True):
        assert found.dtype == expected.dtype
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_smoothed", [0, 6])
def test_cross_entropy_equals_log_softmax(dtype, n_smoothed):
    torch.manual_seed(0)
    logits, targets = (3 * torch.randn(23, 7)).to(dtype), torch.randint(7, (23,))
    weights = torch.randn(3, 23)

    def run(function):
        leaf = logits.clone().requires_grad_()
        parts = function(leaf)
        sum((weight * part).sum() for weight, part in zip(weights, parts, strict=True)).backward()
        return *(part.detach() for part in parts), leaf.grad

    def plain(leaf):
        log_p = F.log_softmax(leaf.float(), -1)
        mean = -log_p[:, :n_smoothed].mean(1) if n_smoothed else leaf.float().logsumexp(1)
        return -log_p.gather(1, targets[:, None])[:, 0], mean, leaf.float().logsumexp(1)

    for found, expected in zip(run(lambda leaf: cross_entropy(leaf, targets, n_smoothed)), run(plain), strict=True):
        torch.testing.assert_close(found, expected, atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


def test_cross_entropy_of_large_logits_is_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0]], requires_grad=True)
    plain, _, _ = cross_entropy(logits, torch.tensor([1]), 0)
    plain.sum().backward()
    assert plain.item() == 2e4 and torch.equal(logits.grad, torch.tensor([[1.0, -1.0, 0.0]]))


@pytest.mark.parametrize("length", [1, 2, 23])
@pytest.mark.parametrize("has_state", [False, True])
def test_convolution_in_blocks_equals_the_reference(length, has_state):
    """With gradients of the input, the state, weight and bias."""
    torch.manual_seed(0)
    wide = torch.randn(2, length, 30, dtype=torch.float64)
    leaves = [wide, torch.randn(10, 4, dtype=torch.float64), torch.randn(10, dtype=torch.float64)]
    leaves += [torch.randn(2, 10, 3, dtype=torch.float64)] if has_state else []
    grads = torch.randn(2, length, 10, dtype=torch.float64), torch.randn(2, 10, 3, dtype=torch.float64)

    def run(function):
        x, weight, bias, *state = own = [leaf.clone().requires_grad_() for leaf in leaves]
        results = function(x[..., 10:20], weight, bias, *state or [None], activation="silu")
        torch.autograd.backward(results, grads)
        return *(result.detach() for result in results), *(leaf.grad for leaf in own)

    for found, expected in zip(run(causal_conv), run(causal_conv_reference), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_scan_in_parts_of_the_heads_equals_the_reference(groups, monkeypatch):
    torch.manual_seed(0)
    b, t, h, p, n = 2, 11, 4, 3, 5
    x, dt = torch.randn(b, t, h, p, dtype=torch.float64), torch.rand(b, t, h, dtype=torch.float64)
    A, D = -torch.rand(h, dtype=torch.float64), torch.randn(h, dtype=torch.float64)
    B, C = (torch.randn(b, t, groups, n, dtype=torch.float64) for _ in range(2))
    leaves = [x, dt, A, B, C, D, torch.randn(b, h, p, n, dtype=torch.float64)]
    monkeypatch.setattr(chunked, "_STATES", 2 * 3 * n * p)  # of one head; 4 has 3 chunks of T = 11
    assert len(chunked._parts(x, B, 4)) == (4 if groups == 1 else groups)

    def run(function, **options):
        own = [leaf.clone().requires_grad_() for leaf in leaves]
        y, state = function(*own, **options)
        (y.sin().sum() + state.cos().sum()).backward()
        return y.detach(), state.detach(), *(leaf.grad for leaf in own)

    for found, expected in zip(run(ssd, chunk_size=4), run(ssd_reference), strict=True):
        torch.testing.assert_close(found, expected)
