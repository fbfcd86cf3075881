"""Codebook interleaving: build and revert are inverses, tail included, and fill stands where it is said to."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmttm.errors import UserError
from ssmttm.patterns import PATTERNS, get_pattern

SPECIAL = 1024


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    name=st.sampled_from(PATTERNS),
    batch=st.integers(1, 3),
    n_codebooks=st.integers(1, 9),
    frames=st.integers(1, 30),
    leading=st.integers(0, 2),
)
def test_revert_undoes_build(name, batch, n_codebooks, frames, leading):
    codes = torch.randint(SPECIAL, (batch, n_codebooks, frames))
    pattern = get_pattern(name, n_codebooks=n_codebooks, leading=leading)
    sequence = pattern.build(codes, SPECIAL)
    assert sequence.shape[-1] == pattern.sequence_length(frames)
    assert torch.equal(pattern.revert(sequence), codes)
    mask = pattern.mask(frames)
    assert torch.equal((sequence == SPECIAL), ~mask.expand_as(sequence))
    assert (mask.sum(-1) == frames).all()
    with_codes_in_the_fill = torch.where(mask, sequence, 0)
    assert torch.equal(pattern.revert(with_codes_in_the_fill), codes)


def test_delay_is_the_published_one():
    codes = torch.arange(8).view(1, 2, 4)
    assert get_pattern("delay", n_codebooks=2).build(codes, 99).tolist() == [[[0, 1, 2, 3, 99], [99, 4, 5, 6, 7]]]
    assert get_pattern("parallel", n_codebooks=2).build(codes, 99).tolist() == codes.tolist()


def test_one_leading_position_gives_the_released_sequence():
    """arXiv 2601.14786's code: row i is [1024] * (i + 1) and then codes, cut at 6; here the tail is kept."""
    codes = torch.randint(SPECIAL, (1, 4, 6))
    sequence = get_pattern("delay", n_codebooks=4, leading=1).build(codes, SPECIAL)
    for i in range(4):
        assert sequence[0, i, :6].tolist() == [SPECIAL] * (i + 1) + codes[0, i, : 5 - i].tolist()


def test_codes_keep_their_dtype_and_are_not_changed():
    codes = torch.randint(SPECIAL, (1, 3, 5), dtype=torch.int32)
    before = codes.clone()
    assert get_pattern("delay", n_codebooks=3).build(codes, SPECIAL).dtype == torch.int32
    assert torch.equal(codes, before)


def test_mistakes_are_said_clearly():
    with pytest.raises(UserError, match="unknown pattern 'zigzag'"):
        get_pattern("zigzag", n_codebooks=2)
    with pytest.raises(UserError, match="3 codebooks, the pattern is for 2"):
        get_pattern("delay", n_codebooks=2).build(torch.zeros(1, 3, 5, dtype=torch.long), SPECIAL)
    with pytest.raises(UserError, match="no whole sequence"):
        get_pattern("delay", n_codebooks=4).revert(torch.zeros(1, 4, 2, dtype=torch.long))
