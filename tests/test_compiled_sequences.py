"""Convolution and scan of Mamba-2 over sequences in the compiled library, against torch's."""

from pathlib import Path

import pytest
import small_denoisers
import torch
from small_denoisers import denoiser
from small_stores import small_codec
from small_token_lms import K, captions, randomised, small_token_lm
from torch.nn import functional as F

from ssmttm.diffusion.samplers import SamplerSettings
from ssmttm.generation.engine import CodeSampler, TextConditions
from ssmttm.generation.engines import library, sequences
from ssmttm.generation.engines.fused import FusedEngine
from ssmttm.generation.engines.library import Pool, Unavailable
from ssmttm.generation.engines.reference import TorchEngine
from ssmttm.generation.engines.sequences import compiled_sequences
from ssmttm.generation.request import Sampling
from ssmttm.generation.second_stage import SecondStage, SecondStageConfig, SecondStageInputs
from ssmttm.mixers import Mamba2
from ssmttm.ops import backend
from ssmttm.ops.ssd import ssd_reference
from ssmttm.patterns import get_pattern

T, CPU = 21, torch.device("cpu")


@pytest.fixture(scope="module", autouse=True)
def compiled():
    try:
        library.library()
    except Unavailable as error:
        pytest.skip(f"the compiled library: {error}")


@pytest.fixture
def calls(monkeypatch):
    """The names of the compiled operations that ran."""
    names = []
    for name in ("convolve", "scan"):
        monkeypatch.setattr(sequences, name, _counted(names, name, getattr(sequences, name)))
    return names


def _counted(names, name, function):
    return lambda *operands: names.append(name) or function(*operands)


def in_two_parts(mixer, x, mask=None):
    """Outputs of a sequence [B, T, D] in two parts, and the final state."""
    state = mixer.init_state(len(x))
    parts = [slice(0, 8), slice(8, T)]
    y = torch.cat([mixer(x[:, part], state, None if mask is None else mask[:, part]) for part in parts], 1)
    return y, state.conv_state, state.ssm_state


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("sizes", [
    {}, {"d_state": 7, "headdim": 6, "d_conv": 3, "conv_bias": False}, {"ngroups": 3, "d_state": 32},
])  # fmt: skip
@torch.no_grad()
def test_compiled_sequences_equal_torchs(sizes, masked, calls):
    torch.manual_seed(0)
    mixer = randomised(Mamba2(**{"d_model": 18, "d_state": 16, "headdim": 12} | sizes))
    x, mask = torch.randn(2, T, 18), torch.arange(T) < torch.tensor([[T], [10]]) if masked else None
    expected = in_two_parts(mixer, x, mask)
    assert not calls
    with compiled_sequences(CPU):
        found = in_two_parts(mixer, x, mask)
    assert calls == ["convolve", "scan"] * 2
    torch.testing.assert_close(found, expected, rtol=0, atol=2e-5)


def test_row_has_the_same_bits_alone_and_in_a_batch():
    torch.manual_seed(0)
    x, dt, A, D = torch.randn(3, T, 2, 6), torch.rand(3, T, 2), -torch.rand(2), torch.rand(2)
    B, C, state = torch.randn(3, T, 1, 16), torch.randn(3, T, 1, 16), torch.randn(3, 2, 6, 16)
    pool = Pool(library.library(), 1)
    rows = sequences.scan(pool, x, dt, A, B, C, D, state)
    alone = sequences.scan(pool, x[1:2], dt[1:2], A, B[1:2], C[1:2], D, state[1:2])
    assert all(torch.equal(row, all_rows[1:2]) for row, all_rows in zip(alone, rows, strict=True))
    weight, bias, past = torch.randn(12, 4), torch.randn(12), torch.randn(3, 3, 12)
    own = past[1:2].clone()
    y = sequences.convolve(pool, x.flatten(2), weight, bias, past)
    assert torch.equal(sequences.convolve(pool, x[1:2].flatten(2), weight, bias, own), y[1:2])
    assert torch.equal(own, past[1:2])


@pytest.mark.parametrize(("heads", "groups", "length"), [(3, 3, 250), (70, 1, 40)])
def test_scan_has_the_same_bits_with_any_number_of_threads(heads, groups, length):
    """Of more than 2^20 multiply-adds, so that it is shared; rows and heads are fewer, or more, than the threads."""
    torch.manual_seed(0)
    width, n = 23, 64
    x, dt, A, D = (
        torch.randn(2, length, heads, width),
        torch.rand(2, length, heads),
        -torch.rand(heads),
        torch.rand(heads),
    )
    B, C, state = torch.randn(2, length, groups, n), torch.randn(2, length, groups, n), torch.randn(2, heads, width, n)
    one, *others = (sequences.scan(Pool(library.library(), k), x, dt, A, B, C, D, state) for k in (1, 2, 3, 8))
    torch.testing.assert_close(one, ssd_reference(x, dt, A, B, C, D, state), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(y, one[0]) and torch.equal(last, one[1]) for y, last in others)


@pytest.mark.parametrize(("channels", "length"), [(38, 4000), (501, 300)])
def test_convolution_has_the_same_bits_with_any_number_of_threads(channels, length):
    """Of more than 2^20 multiply-adds; the channels are no multiple of a vector."""
    torch.manual_seed(0)
    x, past, weight, bias = (
        torch.randn(*shape) for shape in ((2, length, channels), (2, 3, channels), (channels, 4), (channels,))
    )
    found = []
    for threads in (1, 2, 3, 8):
        own = past.clone()
        found.append(sequences.convolve(Pool(library.library(), threads), x, weight, bias, own))
        assert torch.equal(own, x[:, -3:])
    expected = F.conv1d(torch.cat([past, x], 1).mT, weight[:, None], bias, groups=channels).mT
    torch.testing.assert_close(found[0], F.silu(expected), rtol=1e-4, atol=1e-4)
    assert all(torch.equal(y, found[0]) for y in found[1:])


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="counts threads as Linux lists them")
def test_threads_start_with_a_scan_that_is_worth_waking_them_and_end_with_the_pool():
    def n_threads():
        return len(list(Path("/proc/self/task").iterdir()))

    before, pool, counts = n_threads(), Pool(library.library(), 3), []
    for length in (10, 200):
        x, B = torch.randn(1, length, 8, 16), torch.randn(1, length, 1, 64)
        sequences.scan(pool, x, x[..., 0].abs(), -torch.rand(8), B, B, None, None)
        counts.append(n_threads() - before)
    assert counts == [0, 2]
    del pool
    assert n_threads() == before


def test_context_uses_as_many_threads_as_torch(monkeypatch):
    opened = []
    monkeypatch.setattr(sequences, "Pool", lambda lib, threads: opened.append(threads))
    monkeypatch.setattr(torch, "get_num_threads", lambda: 7)
    with compiled_sequences(CPU):
        assert opened == [7]


def test_gradients_and_other_dtypes_stay_with_torch(calls):
    mixer = Mamba2(16, d_state=8, headdim=8)
    with compiled_sequences(CPU):
        mixer(torch.randn(1, 4, 16)).sum().backward()
        with torch.no_grad():
            mixer.double()(torch.randn(1, 4, 16).double())
            with torch.autocast("cpu", dtype=torch.bfloat16):
                mixer.float()(torch.randn(1, 4, 16))
    assert not calls and backend.cpu_kernel("ssd") is None


@pytest.mark.parametrize("kind", [FusedEngine, TorchEngine])
def test_prefill_is_compiled_with_the_fused_engine(kind, calls):
    model = small_token_lm().eval()
    conditions, pattern = TextConditions([captions(3)], captions(2)), get_pattern("delay", n_codebooks=K)
    CodeSampler(model, conditions, pattern, 4, Sampling(), [0], engine=kind(model))
    assert calls == ["convolve", "scan"] * 2 * (kind is FusedEngine)


def test_second_stage_is_compiled(calls, tmp_path):
    settings = SecondStageConfig(SamplerSettings("regression"), window=16, overlap=4)
    stage = SecondStage(denoiser(), small_codec(tmp_path), settings)
    text = small_denoisers.captions(3, 1)
    coarse_codes = torch.zeros(2, small_denoisers.N_COARSE, 12, dtype=torch.long)
    stage.generate(coarse_codes, SecondStageInputs(text, small_denoisers.captions(1), [0, 1]))
    assert calls == ["convolve", "scan"] * 8  # items, layers, directions


def test_without_a_library_sequences_stay_with_torch(calls, monkeypatch):
    def missing():
        raise Unavailable("no compiler")

    monkeypatch.setattr(sequences, "library", missing)
    with compiled_sequences(CPU), torch.no_grad():
        Mamba2(16, d_state=8, headdim=8)(torch.randn(1, 4, 16))
    assert not calls


def test_scan_of_one_position_with_any_strides():
    """`contiguous()` leaves the stride of an axis of length 1 as it is; the library steps from row to row by it."""
    heads, width, n = 2, 4, 3
    x, B, C = (torch.randn(1, 3, *inner).transpose(0, 1) for inner in ((heads, width), (1, n), (1, n)))  # [3, 1, ...]
    dt, A = torch.rand(3, 1, heads), -torch.rand(heads)
    found, state = sequences.scan(Pool(library.library(), 1), x, dt, A, B, C, None, None)
    expected, last = ssd_reference(x, dt, A, B, C)
    torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(state, last, rtol=1e-5, atol=1e-5)
