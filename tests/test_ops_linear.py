"""The linear layer of a decoding step against torch's."""

import pytest
import torch
import torch.nn.functional as F

from ssmttm.ops import linear as module
from ssmttm.ops.linear import Linear, linear


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("rows", [1, 2, 3, 4, 5, 8, 17])
def test_linear_equals_torch(rows, dtype, bias):
    torch.manual_seed(0)
    x, weight = torch.randn(rows, 24, dtype=dtype), torch.randn(40, 24, dtype=dtype)
    offset = torch.randn(40, dtype=dtype) if bias else None
    with torch.no_grad():
        y = linear(x, weight, offset)
    assert y.is_contiguous()
    torch.testing.assert_close(y, F.linear(x, weight, offset))


def test_linear_row_has_same_bits_in_any_batch():
    torch.manual_seed(0)
    x, weight = torch.randn(12, 512), torch.randn(2320, 512)
    with torch.no_grad():
        whole = linear(x, weight)
        assert torch.equal(linear(x[:4], weight), whole[:4])
        assert torch.equal(linear(x[[5, 0, 7, 9, 1, 2, 3, 4]], weight)[1], whole[0])


def test_linear_fast_path_runs_only_in_decoding_steps(monkeypatch):
    usual = []
    monkeypatch.setattr(module.F, "linear", lambda x, *_: usual.append(tuple(x.shape)) or x)
    layer = Linear(8, 8)
    layer(torch.zeros(2, 8))  # gradients are recorded
    with torch.no_grad():
        for shape in [(2, 8), (8, 8), (1, 8), (2, 3, 8)]:
            layer(torch.zeros(shape))
    assert usual == [(2, 8), (1, 8), (2, 3, 8)]
