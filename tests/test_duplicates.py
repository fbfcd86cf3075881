"""Fingerprints and near-duplicate search: altered copies match, other music does not."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from small_music import clips

from data_prep.audio.duplicates import SAME, _candidates, _passes, groups, near_pairs
from ssmttm import audio
from ssmttm.audio.fingerprint import RATE, Fingerprinter, at_offset, bit_error_rate, fingerprint

HERTZ = 24_000
PIECES = 12


@pytest.fixture(scope="module")
def music():
    """Clips of PIECES pieces, 30 s each: float32 [S]."""
    wavs, _ = clips(0, PIECES)
    return [torch.cat(wavs[3 * i : 3 * i + 3], dim=1)[0].numpy() for i in range(PIECES)]


@pytest.fixture(scope="module")
def prints(music):
    return [fingerprint(wav, HERTZ) for wav in music]


def encoded(tmp_path, wav, extension, rate=HERTZ):
    path = audio.write(tmp_path / f"x.{extension}", torch.from_numpy(wav)[None], rate)
    return audio.read(path)[0][0].numpy()


def resampled(wav, rate):
    return audio.resample(torch.from_numpy(wav), HERTZ, rate).numpy()


@settings(max_examples=25, deadline=None)
@given(st.lists(st.integers(1, 90_000), max_size=9), st.sampled_from([8_000, 44_100, 96_000]), st.integers(0, 9))
def test_fingerprint_does_not_depend_on_blocks(cuts, rate, seed):
    rng = np.random.default_rng(seed)
    wav = rng.standard_normal(rng.integers(1, 13 * rate)).astype(np.float32) * np.float32(0.1)
    maker, at = Fingerprinter(rate), 0
    for cut in cuts:
        maker.add(wav[at : at + cut])
        at += cut
    maker.add(wav[at:])
    found = maker.finish()
    assert found.dtype == np.uint32
    assert np.array_equal(found, fingerprint(wav, rate))
    assert len(found) == max(0, int((len(wav) - round(0.74 * rate)) // (rate / RATE)) + 1 - 4)


@pytest.mark.parametrize("rate", [22_050, 11_127])
def test_fingerprint_words_are_aligned_with_time(rate):
    """Audio without its first 15 s has the same words without the first 150."""
    wav = np.random.default_rng(0).standard_normal(22 * rate).astype(np.float32) * np.float32(0.1)
    whole = fingerprint(wav, rate)
    assert whole.all()
    assert np.array_equal(whole[150:], fingerprint(wav[15 * rate :], rate))
    assert at_offset(whole, fingerprint(wav[2 * rate :], rate), 20).rate < 0.005


@pytest.mark.parametrize("rate", [1_000, 2_000, 7_999, 8_000, 384_000])
def test_fingerprint_accepts_any_rate(rate):
    wav = np.random.default_rng(0).standard_normal(3 * rate).astype(np.float32)
    assert len(fingerprint(wav, rate)) == 19


def test_fingerprint_of_empty_and_short_audio_is_empty():
    assert len(Fingerprinter(HERTZ).finish()) == 0
    assert len(fingerprint(np.zeros(HERTZ, np.float32), HERTZ)) == 0


TREATMENTS = {
    "mp3": lambda wav, folder: encoded(folder, wav, "mp3"),
    "ogg": lambda wav, folder: encoded(folder, wav, "ogg"),
    "louder, clipped": lambda wav, folder: np.clip(2 * wav, -1, 1),
    "much quieter": lambda wav, folder: np.round(0.05 * wav * 32767).astype(np.float32) / 32767,
    "trimmed by half a hop": lambda wav, folder: wav[HERTZ * 7 // 20 :],
    "trimmed on both sides": lambda wav, folder: encoded(folder, wav[12_345 : -3 * HERTZ], "mp3"),
    "its middle": lambda wav, folder: wav[10 * HERTZ : 21 * HERTZ],
    "with silence around": lambda wav, folder: np.pad(wav, (5 * HERTZ, 3 * HERTZ)),
    "dull": lambda wav, folder: audio.resample(torch.from_numpy(resampled(wav, 8_000)), 8_000, HERTZ).numpy(),
    "with noise": lambda wav, folder: wav + np.random.default_rng(0).normal(0, 0.005, len(wav)).astype(np.float32),
    "inverted": lambda wav, folder: -wav,
}


@pytest.mark.parametrize("treatment", TREATMENTS)
def test_near_pairs_finds_altered_copies(music, prints, treatment, tmp_path):
    copies = [fingerprint(TREATMENTS[treatment](wav, tmp_path), HERTZ) for wav in music[:4]]
    found = near_pairs([*prints, *copies])
    assert list(zip(found.a.tolist(), found.b.tolist(), strict=True)) == [(i, PIECES + i) for i in range(4)]
    assert (found.rate < 0.2).all()
    assert (found.overlap > 0.8 * min(map(len, copies)) - 80).all()


@pytest.mark.parametrize("rate", [8_000, 11_025, 44_100, 48_000])
def test_fingerprint_hardly_depends_on_sample_rate(music, prints, rate):
    for wav, found in zip(music[:3], prints, strict=False):
        match = bit_error_rate(fingerprint(resampled(wav, rate), rate), found, 100)
        assert match.offset == 0 and match.rate < 0.03


def test_near_pairs_finds_no_different_music(prints):
    worst = min(
        bit_error_rate(a, b, 100).rate for i, a in enumerate(prints) for b in prints[:i]
    )
    assert worst > 0.38
    assert len(near_pairs(prints)) == 0


def test_near_pairs_ignores_silence_and_drones():
    time = np.arange(30 * HERTZ) / HERTZ
    chord = sum(0.1 * np.sin(2 * np.pi * hertz * time) for hertz in (330, 440, 555, 1_234)).astype(np.float32)
    faint = np.random.default_rng(0).normal(0, 1e-5, len(time)).astype(np.float32)
    for steady in (np.zeros(30 * HERTZ, np.float32), faint, chord):
        found = fingerprint(steady, HERTZ)
        assert len(found) > 280 and not found.any()
        assert len(near_pairs([found] * 5)) == 0


def test_near_pairs_ignores_a_shared_intro(music, prints):
    """Five seconds in common are below the shortest overlap."""
    others = [np.concatenate([music[0][: 5 * HERTZ], music[i][: 20 * HERTZ]]) for i in (1, 2)]
    found = near_pairs([fingerprint(wav, HERTZ) for wav in others] + prints[:1])
    assert not (found.rate < SAME).any()


def test_near_pairs_finds_excerpt_of_a_loop(music):
    """Every word of a repeated bar occurs many times."""
    looped = np.tile(music[3][: 2 * HERTZ + 137], 20)
    cut = looped[13 * HERTZ + 501 : -9 * HERTZ]
    found = near_pairs([fingerprint(looped, HERTZ), fingerprint(cut, HERTZ)])
    assert len(found) == 1 and found.rate[0] < SAME


def test_near_pairs_finds_largest_overlap_of_a_loop():
    """Most votes are for an offset by one period."""
    rng = np.random.default_rng(0)
    period = rng.integers(1, 2**32, 100, dtype=np.uint32)
    later = period ^ np.uint32(0x00010001)
    a = np.concatenate([later, later, period, later, later])
    b = np.concatenate([period, later, later, later, later])
    found = near_pairs([a, b])
    assert (found.offset.tolist(), found.overlap.tolist()) == ([0], [500])


def test_bit_error_rate_of_small_example():
    a = np.array([9, 1, 2, 3, 4, 0, 6], np.uint32)
    b = np.array([2, 3, 4 + 8, 5, 6], np.uint32)
    match = bit_error_rate(a, b, 3)
    assert match == at_offset(a, b, 2) and match.offset == 2
    assert (match.overlap, match.rate) == (4, 1 / 128)
    assert bit_error_rate(b, a, 3)[0] == -2
    assert bit_error_rate(a, b, 7).rate == 1 == at_offset(a, b, 90).rate


def reference_score(a, b, least):
    """The best score of `bit_error_rate`, by trying every offset."""
    matches = [at_offset(a, b, offset) for offset in range(-len(b) + 1, len(a))]
    return max(((0.5 - m.rate) * m.overlap**0.5 for m in matches if m.overlap >= least), default=None)


@settings(max_examples=80, deadline=None)
@given(st.integers(0, 40), st.integers(0, 40), st.integers(1, 12), st.integers(0, 99))
def test_bit_error_rate_equals_reference(n, m, least, seed):
    rng = np.random.default_rng(seed)
    a, b = (rng.integers(0, 2**32, k, dtype=np.uint32) * (rng.random(k) < 0.8) for k in (n, m))
    a, b = a.astype(np.uint32), b.astype(np.uint32)
    found, best = bit_error_rate(a, b, least), reference_score(a, b, least)
    if best is None:
        assert found.rate == 1
    else:
        assert (0.5 - found.rate) * found.overlap**0.5 == pytest.approx(best, abs=1e-4)


def with_copies(seed, n, copies):
    """Random fingerprints; the last ones are copies with every tenth word corrupted."""
    rng = np.random.default_rng(seed)
    fingerprints = [rng.integers(1, 2**32, rng.integers(150, 300), dtype=np.uint32) for _ in range(n)]
    for _ in range(copies):
        words = fingerprints[rng.integers(n)].copy()
        words[::10] ^= np.uint32(rng.integers(1, 2**32))
        fingerprints.append(words)
    return fingerprints


@pytest.mark.parametrize("memory", [1 << 30, 1 << 16])
def test_near_pairs_does_not_depend_on_memory_and_order(memory):
    fingerprints = with_copies(0, 60, 20)
    found = near_pairs(fingerprints)
    pairs = set(zip(found.a.tolist(), found.b.tolist(), strict=True))
    assert {b for _, b in pairs} == set(range(60, 80))
    shuffled = np.random.default_rng(1).permutation(80)
    again = near_pairs([fingerprints[i] for i in shuffled], np.argsort(shuffled), memory=memory)
    for name in ("a", "b", "offset", "rate", "overlap"):
        assert np.array_equal(getattr(found, name), getattr(again, name))


@pytest.mark.parametrize("memory", [1 << 30, 1 << 16])
def test_passes_visit_every_shared_ngram_once(memory):
    """Against a dictionary. Repeated words, and words across the end of a recording, are not n-grams."""
    rng = np.random.default_rng(0)
    fingerprints = [np.repeat(rng.integers(1, 60, 150, dtype=np.uint32), rng.integers(1, 3, 150)) for _ in range(20)]
    first: dict[tuple[int, int], dict[int, int]] = {}
    for number, words in enumerate(fingerprints):
        grams = list(zip(words[:-4].tolist(), words[4:].tolist(), strict=True))
        for place, gram in enumerate(grams):
            if place == 0 or gram != grams[place - 1]:
                first.setdefault(gram, {}).setdefault(number, place)
    expected = sorted(where for places in first.values() if len(places) > 1 for where in places.items())
    found = []
    for grams in _passes(fingerprints, np.arange(20), memory):
        _, inverse, count = np.unique(grams.gram, return_inverse=True, return_counts=True)
        places = zip(grams.sound.tolist(), grams.place.tolist(), (count[inverse] > 1).tolist(), strict=True)
        found += [(sound, place) for sound, place, shared in places if shared]
    assert sorted(found) == expected and len(expected) > 100


def test_candidates_add_votes_of_neighbouring_offsets():
    pair = (3 << 23) | 5
    votes = np.array([(pair << 18) | (half + (1 << 17)) for half in (-4, -3, 7)], np.uint64)
    assert _candidates(votes) == ([pair], [-8], [True])
    assert _candidates(votes[:2]) == ([pair], [-8], [False])
    assert _candidates(votes[1:]) == ([], [], [])
    assert _candidates(votes[:0]) == ([], [], [])


def test_near_pairs_with_subset_and_empty_fingerprints():
    fingerprints = with_copies(3, 5, 0)
    prints = [fingerprints[0], np.empty(0, np.uint32), fingerprints[1], fingerprints[0]]
    found = near_pairs(prints, np.array([3, 1, 0]))
    assert (found.a.tolist(), found.b.tolist(), found.rate.tolist()) == ([0], [2], [0.0])
    assert len(near_pairs(prints, np.array([1, 2]))) == len(near_pairs([])) == 0


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 30), st.lists(st.tuples(st.integers(0, 29), st.integers(0, 29)), max_size=30), st.randoms())
def test_groups_are_connected_components(n, edges, random):
    edges = [(a, b) for a, b in edges if a < n and b < n]
    expected = list(range(n))
    for _ in range(n):
        for a, b in edges:
            expected[a] = expected[b] = min(expected[a], expected[b])
    for _ in range(2):
        a, b = np.array([*zip(*edges, strict=True)], int).reshape(2, -1) if edges else np.empty((2, 0), int)
        assert groups((a, b), n).tolist() == expected
        edges = [edge[::-1] for edge in random.sample(edges, len(edges))]
