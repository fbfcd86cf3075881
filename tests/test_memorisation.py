"""Memorisation: degraded copies are found at their position, new music is not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_stores import CODEBOOK_SIZE, write_codes_store

from ssmttm import audio
from ssmttm.audio.features import SAMPLE_RATE
from ssmttm.audio.fingerprint import RATE, fingerprint
from ssmttm.data.store import open_store
from ssmttm.errors import UserError
from ssmttm.evaluation.memorisation import MAX_COPY_RATE, QUERY, AudioIndex, CodeIndex


def music(seed, seconds=8.0):
    """Chords that change five times a second."""
    rng = np.random.default_rng(seed)
    time = np.arange(round(seconds * SAMPLE_RATE)) / SAMPLE_RATE
    wav = np.zeros_like(time)
    for start in np.arange(0, seconds, 0.2):
        chord = (time >= start) & (time < start + 0.2)
        for hertz in 110 * 2 ** (rng.integers(0, 48, 4) / 12):
            wav[chord] += 0.1 * np.sin(2 * np.pi * hertz * time[chord])
    return torch.from_numpy(wav).float()[None]


def fingerprints(wav):
    return fingerprint(wav[0].numpy(), SAMPLE_RATE)


@pytest.fixture(scope="module")
def index():
    parts = [fingerprints(music(seed)) for seed in range(60)]
    return AudioIndex([f"s{i}" for i in range(60)], np.cumsum([0, *map(len, parts)]), np.concatenate(parts))


DEGRADATIONS = {
    "unchanged": lambda wav: wav,
    "quieter": lambda wav: 0.05 * wav,
    "noise": lambda wav: wav + 0.005 * torch.randn(wav.shape, generator=torch.Generator().manual_seed(0)),
    "low-pass": lambda wav: audio.resample(audio.resample(wav, SAMPLE_RATE, 8000), 8000, SAMPLE_RATE),
    "clipped": lambda wav: (1.2 * wav).clamp(-0.4, 0.4),
}


@pytest.mark.parametrize("degrade", DEGRADATIONS.values(), ids=DEGRADATIONS)
def test_audio_index_finds_degraded_copy_at_its_position(index, degrade):
    for seed, start in ((3, 1.013), (41, 2.49)):
        cut = music(seed)[:, round(start * SAMPLE_RATE) :][:, : 5 * SAMPLE_RATE]
        found = index.nearest(degrade(cut))
        assert found.id == f"s{seed}" and found.score < MAX_COPY_RATE
        middle = start + (len(fingerprints(cut)) - QUERY) // 2 / RATE
        assert found.start == pytest.approx(middle, abs=1.5 / RATE)


def test_audio_index_does_not_match_new_music(index):
    assert min(index.nearest(music(seed)).score for seed in range(100, 110)) > MAX_COPY_RATE


def test_audio_match_is_within_one_segment(index):
    joined = torch.cat([music(7)[:, -2 * SAMPLE_RATE :], music(8)[:, : 2 * SAMPLE_RATE]], 1)
    found = index.nearest(joined)
    owner = int(found.id[1:])
    first = index.starts[owner] + round(found.start * RATE)
    assert first >= index.starts[owner] and first + QUERY <= index.starts[owner + 1]


def test_audio_copy_across_two_segments_is_no_match():
    """Two segments contain halves of the clip, each shorter than a query; the third is unrelated."""
    own, other = fingerprints(music(1)), fingerprints(music(2))[: QUERY + 1]
    cut = len(own) // 2
    middle = slice(cut - 2 * RATE, cut), slice(cut, cut + 2 * RATE)
    parts = [own[middle[0]], own[middle[1]], other]
    index = AudioIndex(["first", "second", "other"], np.cumsum([0, *map(len, parts)]), np.concatenate(parts))
    found = index.nearest(music(1))
    assert found.id == "other" and found.score > MAX_COPY_RATE


def test_audio_index_of_short_segments_raises_error():
    parts = [fingerprints(music(seed, 2.5)) for seed in range(3)]
    index = AudioIndex(["a", "b", "c"], np.cumsum([0, *map(len, parts)]), np.concatenate(parts))
    with pytest.raises(UserError, match="none of the 3 segments"):
        index.nearest(music(0))
    with pytest.raises(UserError, match="none of the 0 segments"):
        AudioIndex([], np.zeros(1, int), np.empty(0, np.uint32)).nearest(music(0))


def test_damaged_audio_index_raises_error(tmp_path):
    (tmp_path / "index.safetensors").write_bytes(b"damaged")
    for name in ("index.safetensors", "none.safetensors"):
        with pytest.raises(UserError, match=name):
            AudioIndex.load(tmp_path / name)


def test_audio_index_save_and_load(index, tmp_path):
    index.save(tmp_path / "index.safetensors")
    loaded = AudioIndex.load(tmp_path / "index.safetensors")
    assert loaded.ids == index.ids and loaded.nearest(music(5)) == index.nearest(music(5))


def test_audio_index_rejects_short_audio(index):
    with pytest.raises(UserError, match="4 s"):
        index.nearest(music(1, 1.0))


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return open_store(write_codes_store(tmp_path_factory.mktemp("store") / "store"))


def longest_by_loops(query, codes):
    best = 0
    for i in range(len(query)):
        for j in range(len(codes)):
            n = 0
            while i + n < len(query) and j + n < len(codes) and query[i + n] == codes[j + n]:
                n += 1
            best = max(best, n)
    return best


@given(st.integers(0, 23), st.integers(0, 6), st.integers(8, 12), st.integers(0, 1000))
@settings(max_examples=40, deadline=None)
def test_code_index_finds_planted_run(store, row, start, length, seed):
    rows = np.arange(len(store))
    codes = store.codes(row)[0]
    planted = codes[start : start + length]
    rng = np.random.default_rng(seed)
    query = np.concatenate([rng.integers(0, CODEBOOK_SIZE, 9), planted, rng.integers(0, CODEBOOK_SIZE, 9)])
    found = CodeIndex(store, rows).longest(query)
    longest = max(longest_by_loops(query.tolist(), store.codes(r)[0].tolist()) for r in rows)
    if longest < 8:
        assert found is None
    else:
        assert found.score * 25 == pytest.approx(longest)
        owner = store.ids(rows).index(found.id)
        run = store.codes(owner)[0][round(found.start * 25) :][: round(found.score * 25)]
        assert longest_by_loops(query.tolist(), run.tolist()) == len(run) == longest


def test_code_index_does_not_match_new_codes(store):
    query = np.random.default_rng(5).integers(0, CODEBOOK_SIZE, 60)
    assert CodeIndex(store, np.arange(len(store))).longest(query) is None
    assert CodeIndex(store, np.arange(len(store))).longest(query[:3]) is None
