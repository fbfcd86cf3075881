"""Codebook patterns: build and revert are inverses, and every code has the position of the paper."""

import re
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ssmttm.errors import UserError
from ssmttm.patterns import PATTERNS, Pattern, get_pattern

SPECIAL = 10_000
DOCS = (Path(__file__).parent.parent / "docs/patterns.md").read_text()
POSITIONS = {
    "delay": lambda K, T: T + K - 1,
    "parallel": lambda K, T: T,
    "flatten": lambda K, T: K * T,
    "coarse_first": lambda K, T: 2 * T if K > 1 else T,
}

over_all_patterns = given(
    name=st.sampled_from(PATTERNS),
    batch=st.integers(1, 3),
    n_codebooks=st.integers(1, 9),
    frames=st.integers(1, 30),
    leading=st.integers(0, 2),
)


def numbered(batch, n_codebooks, frames):
    """Distinct codes."""
    return torch.arange(batch * n_codebooks * frames).view(batch, n_codebooks, frames)


def steps(name, n_codebooks, frames):
    """Reference: the codes (codebook, frame) of each position, as in the paper."""
    ks, ts = range(n_codebooks), range(frames)
    if name == "parallel":
        return [[(k, t) for k in ks] for t in ts]
    if name == "flatten":
        return [[(k, t)] for t in ts for k in ks]
    if name == "coarse_first":
        return [[(0, t)] for t in ts] + [[(k, t) for k in ks[1:]] for t in ts if n_codebooks > 1]
    return [[(k, s - k) for k in ks if s - k in ts] for s in range(frames + n_codebooks - 1)]


@settings(max_examples=150, deadline=None, derandomize=True)
@over_all_patterns
def test_build_equals_the_paper_and_revert_inverts_it(name, batch, n_codebooks, frames, leading):
    codes = numbered(batch, n_codebooks, frames)
    pattern = get_pattern(name, n_codebooks=n_codebooks, leading=leading)
    wanted = torch.full((batch, n_codebooks, leading + POSITIONS[name](n_codebooks, frames)), SPECIAL)
    for position, coordinates in enumerate(steps(name, n_codebooks, frames), start=leading):
        for k, t in coordinates:
            wanted[:, k, position] = codes[:, k, t]
    sequence = pattern.build(codes, SPECIAL)
    assert torch.equal(sequence, wanted)
    assert pattern.sequence_length(frames) == wanted.shape[-1]
    assert torch.equal(pattern.revert(sequence), codes)


@settings(max_examples=100, deadline=None, derandomize=True)
@over_all_patterns
def test_mask_marks_each_code_once(name, batch, n_codebooks, frames, leading):
    codes = numbered(batch, n_codebooks, frames)
    pattern = get_pattern(name, n_codebooks=n_codebooks, leading=leading)
    sequence, mask = pattern.build(codes, SPECIAL), pattern.mask(frames)
    assert torch.equal(sequence[:, mask].sort().values.flatten(), codes.flatten())
    assert torch.equal(sequence == SPECIAL, ~mask.expand_as(sequence))
    assert not mask[:, :leading].any() and mask.any(0)[leading:].all()
    with_codes_in_padding = torch.where(mask, sequence, 0)
    assert torch.equal(pattern.revert(with_codes_in_padding), codes)


@settings(max_examples=100, deadline=None, derandomize=True)
@over_all_patterns
def test_codes_follow_the_codes_they_depend_on(name, batch, n_codebooks, frames, leading):
    pattern = get_pattern(name, n_codebooks=n_codebooks, leading=leading)
    S = pattern.sequence_length(frames)
    position = pattern.revert(torch.arange(S).expand(1, n_codebooks, S))[0]  # [K, T] positions
    assert (position.diff(dim=1) > 0).all()  # a codebook runs forward in time
    coarser_first = position.diff(dim=0)
    if name in ("delay", "flatten"):
        assert (coarser_first > 0).all()  # a code depends on the coarser codes of its frame
    else:
        assert (coarser_first >= 0).all()
    if name == "flatten":
        assert position.T.flatten().diff().eq(1).all()  # a frame ends before the next begins
    if name == "coarse_first" and n_codebooks > 1:
        assert position[1:].min() == position[0].max() + 1  # every finer code depends on all of codebook 0


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    offsets=st.lists(st.integers(0, 5), min_size=1, max_size=5),
    passes=st.lists(st.integers(0, 2), min_size=5, max_size=5),
    stride=st.integers(1, 4),
    frames=st.integers(1, 20),
)
def test_revert_inverts_build_for_any_offsets_passes_and_stride(offsets, passes, stride, frames):
    pattern = Pattern(tuple(offsets), tuple(passes[: len(offsets)]), stride)
    codes = numbered(2, len(offsets), frames)
    assert torch.equal(pattern.revert(pattern.build(codes, SPECIAL)), codes)


@pytest.mark.parametrize("leading", [0, 2])
@pytest.mark.parametrize("n_codebooks", [1, 4])
@pytest.mark.parametrize("name", PATTERNS)
def test_revert_rejects_invalid_lengths(name, n_codebooks, leading):
    pattern = get_pattern(name, n_codebooks, leading)
    frames_of = {leading + POSITIONS[name](n_codebooks, frames): frames for frames in range(1, 41)}
    for length in range(41):
        sequence = torch.zeros(1, n_codebooks, length, dtype=torch.long)
        if length in frames_of:
            assert pattern.revert(sequence).shape[-1] == frames_of[length]
        else:
            following = min(valid for valid in frames_of if valid > length)
            with pytest.raises(UserError, match=f"{length} positions does not fit .* length is {following}$"):
                pattern.revert(sequence)


@pytest.mark.parametrize("name", PATTERNS)
def test_docs_show_the_patterns(name):
    picture = re.search(rf"^{name} +(.*) positions\n((?:[0-3. ]+\n){{4}})", DOCS, re.MULTILINE)
    assert picture is not None
    length, rows = picture.groups()
    built = get_pattern(name, n_codebooks=4).build(torch.arange(4).expand(1, 4, 4), -1)[0]
    assert [line.split() for line in rows.splitlines()] == [
        ["." if x < 0 else str(x) for x in row] for row in built.tolist()
    ]
    assert built.shape[-1] == eval(length, {"K": 4, "T": 4})
    row = re.search(rf"^\| `{name}` \| ([\d,]+) \|", DOCS, re.MULTILINE)
    assert int(row[1].replace(",", "")) == get_pattern(name, n_codebooks=8).sequence_length(250)


def test_leading_position_gives_the_released_sequence():
    """arXiv 2601.14786's code: row i is [1024] * (i + 1) and then codes, cut at 6; the tail is kept here."""
    codes = torch.randint(1024, (1, 4, 6))
    sequence = get_pattern("delay", n_codebooks=4, leading=1).build(codes, 1024)
    for i in range(4):
        assert sequence[0, i, :6].tolist() == [1024] * (i + 1) + codes[0, i, : 5 - i].tolist()


@pytest.mark.parametrize("name", PATTERNS)
def test_build_and_revert_keep_dtype_and_do_not_modify_codes(name):
    codes = torch.randint(SPECIAL, (1, 3, 5), dtype=torch.int32)
    before, pattern = codes.clone(), get_pattern(name, n_codebooks=3)
    sequence = pattern.build(codes, SPECIAL)
    assert sequence.dtype == pattern.revert(sequence).dtype == torch.int32
    pattern.revert(sequence).zero_()
    sequence.zero_()
    assert torch.equal(codes, before)


def test_pattern_errors_are_clear():
    with pytest.raises(UserError, match="unknown pattern 'zigzag': choose from delay, parallel, flatten, coarse_first"):
        get_pattern("zigzag", n_codebooks=2)
    for name in PATTERNS:
        for method in ("build", "revert"):
            with pytest.raises(UserError, match="3 codebooks, the pattern is for 2"):
                arguments = (SPECIAL,) if method == "build" else ()
                getattr(get_pattern(name, n_codebooks=2), method)(torch.zeros(1, 3, 5, dtype=torch.long), *arguments)
