"""The built-in corpus as music: scales, grid, form, variety and captions, all checked against the stated truth."""

import re
from functools import cache
from itertools import pairwise
from random import Random

import pytest

from data_prep.builtin import compose, write_captions
from data_prep.builtin.captions import tags
from data_prep.builtin.composition.annotations import excerpt
from data_prep.builtin.composition.harmony import harmonise, plan_form
from data_prep.builtin.composition.instruments import LEADS
from data_prep.builtin.composition.score import TICKS, Note, Piece
from data_prep.builtin.composition.styles import STYLES
from data_prep.builtin.composition.theory import CHARACTERISTIC, MODES, Key, pitch_class
from data_prep.builtin.words import BACKING_WORDS, FAMILY_WORDS, INSTRUMENTS, MOODS, TEMPO

COUNT = 300


@cache
def pieces() -> tuple[Piece, ...]:
    return tuple(compose(11, index) for index in range(COUNT))


def pitched(piece: Piece) -> list[Note]:
    return [note for track in piece.tracks if track.role != "drums" for note in track.notes]


def key_of(piece: Piece) -> Key:
    return Key(pitch_class(piece.truth["key"]), piece.truth["mode"])


def test_compose_is_deterministic() -> None:
    assert compose(3, 5) == compose(3, 5)
    assert compose(3, 5) != compose(4, 5)
    assert compose(3, 5) != compose(3, 6)


def test_compose_notes_lie_in_stated_mode() -> None:
    for piece in pieces():
        key = key_of(piece)
        scale = {(key.tonic + step) % 12 for step in MODES[key.mode]}
        notes = pitched(piece)
        assert sum(note.pitch % 12 in scale for note in notes) >= 0.95 * len(notes), piece.title
        lead = next(track for track in piece.tracks if track.role == "lead")
        assert all(note.pitch % 12 in scale for note in lead.notes), piece.title


def test_compose_every_segment_identifies_its_mode() -> None:
    """Every segment holds the tonic, the third and the characteristic degree; the tonic ends the piece."""
    for piece in pieces():
        key = key_of(piece)
        wanted = {key.pitch(degree) % 12 for degree in (0, 2, CHARACTERISTIC[key.mode])}
        notes, end = pitched(piece), max(note.start for note in pitched(piece))
        for half in range(2):
            found = {n.pitch % 12 for n in notes if half * end / 2 <= n.start < (half + 1) * end / 2}
            assert wanted <= found, (piece.title, half)
        assert {n.pitch % 12 for n in notes if n.start == end} >= {key.tonic}, piece.title
        bass = next(track for track in piece.tracks if track.role == "bass")
        assert bass.notes[-1].pitch % 12 == key.tonic


def test_compose_tempo_and_metre_match_grid() -> None:
    for piece in pieces():
        assert piece.metre.name == piece.truth["metre"] and piece.bpm == piece.truth["bpm"]
        assert piece.seconds(TICKS) == pytest.approx(60 / piece.bpm)
        low, high = {"slow": (50, 89), "medium": (90, 130), "fast": (131, 180)}[piece.truth["tempo_class"]]
        assert low <= piece.bpm <= high
        backing = [n for t in piece.tracks if t.role in ("chords", "bass", "drums") for n in t.notes]
        beats = {n.start // TICKS for n in backing if n.start % TICKS == 0}
        total = max(n.start for n in backing) // TICKS + 1
        assert len(beats) > 0.45 * total, (piece.title, len(beats), total)  # the beat is there to be found
        downbeats = {n.start // piece.metre.bar for n in backing if n.start % piece.metre.bar == 0}
        assert len(downbeats) > 0.6 * total / piece.metre.beats, piece.title
        assert 34 < piece.seconds(max(n.start for n in backing)) < 40
        assert min(n.duration for n in pitched(piece)) > 0
        assert max(piece.seconds(n.start + n.duration) for n in pitched(piece)) <= piece.duration + 0.02


def test_compose_lead_has_no_long_rests() -> None:
    for piece in pieces():
        lead = next(track for track in piece.tracks if track.role == "lead").notes
        assert piece.seconds(lead[0].start) < 5, piece.title
        gaps = [piece.onset(b) - piece.release(a) for a, b in pairwise(lead)]
        assert max(gaps) < 5, (piece.title, max(gaps))
        assert all(a.start + a.duration <= b.start for a, b in pairwise(lead)), "one voice"


def test_compose_backing_avoids_lead_family() -> None:
    for piece in pieces():
        family = piece.truth["lead"]["family"]
        assert all(t.family != family for t in piece.tracks if t.role != "lead"), piece.title


def test_compose_pieces_vary() -> None:
    truths = [piece.truth for piece in pieces()]
    assert len({t["style"] for t in truths}) >= 20
    assert len({t["lead"]["name"] for t in truths}) >= 40
    assert {t["mode"] for t in truths} == set(MODES)
    assert {t["metre"] for t in truths} == {"3/4", "4/4", "6/8"}
    assert len({pitch_class(t["key"]) for t in truths}) == 12
    assert min(t["bpm"] for t in truths) <= 58 and max(t["bpm"] for t in truths) >= 170
    for field, names in (("mode", MODES), ("tempo_class", TEMPO), ("density", ("sparse", "moderate", "dense"))):
        for name in names:
            share = sum(t[field] == name for t in truths) / COUNT
            assert abs(share - 1 / len(names)) < 0.09, (field, name, share)
    for family in LEADS:
        assert 0.06 < sum(t["lead"]["family"] == family for t in truths) / COUNT < 0.17
    for style in STYLES:  # no style is tied to a mode
        assert len({t["mode"] for t in truths if t["style"] == style}) >= 2, style


def test_form_fills_bars_and_shares_harmony() -> None:
    for n_bars in (6, 9, 13, 20, 29, 40):
        for seed in range(20):
            sections = plan_form(Random(seed), n_bars, 1.5)
            assert [s.first_bar for s in sections[1:]] == [s.first_bar + s.n_bars for s in sections[:-1]]
            assert sections[0].first_bar == 0 and sections[-1].first_bar == n_bars - 1
            for slots in (1, 2):
                chords = harmonise(Random(seed), sections, "dorian", False, slots)
                assert len(chords) == n_bars * slots and chords[-1].root == 0
                closed = [s for s in sections if s.closed and s.label[0] in "ABC"]
                assert all(chords[(s.first_bar + s.n_bars) * slots - 1].root == 0 for s in closed)


def captions():
    for piece in pieces():
        for segment in range(2):
            truth = excerpt(piece, 20.0 * segment, 20.0 * segment + 20)
            yield truth, write_captions(truth, f"{piece.id}-{segment}")


def words_in(words, text: str) -> set[str]:
    """Which of the words stand in the text as whole words."""
    return {word for word in words if re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", text)}


def test_captions_state_only_true_facts() -> None:
    all_tempo = {word for words in TEMPO.values() for word in words}
    vocabulary = (*INSTRUMENTS.values(), *BACKING_WORDS.values(), *FAMILY_WORDS.values())
    all_instruments = {word for words in vocabulary for word in words}
    all_moods = {word for mood, words in MOODS.items() for word in (mood, *words)} - {"still", "fun", "grand", "bright"}
    for truth, texts in captions():
        present = [i["name"] for i in truth["instruments"]]
        words = {w for name in present for w in (*INSTRUMENTS.get(name, ()), *BACKING_WORDS.get(name, (name,)))}
        words |= set(FAMILY_WORDS[truth["lead"]["family"]])
        longest = " ".join(words)
        moods = {truth["mood"], *MOODS.get(truth["mood"], ())}
        for text in texts:
            assert "{" not in text and "  " not in text and " ," not in text and text == text.strip(), text
            assert words_in(all_tempo, text) <= set(TEMPO[truth["tempo_class"]]), text
            assert words_in(MODES, text) <= {truth["mode"]}, text
            assert all(int(n) == truth["bpm"] for n in re.findall(r"(\d+) (?:bpm|BPM|beats)", text)), text
            assert all(m == truth["metre"] for m in re.findall(r"\d/\d", text)), text
            for tonic in re.findall(r"\b([A-G](?:[#b]|[ -](?:sharp|flat))?) (?:major|minor|dorian|mixolydian)", text):
                spelt = tonic.replace(" sharp", "#").replace("-sharp", "#").replace(" flat", "b").replace("-flat", "b")
                assert spelt == truth["key"], text
            found = words_in(all_instruments, re.sub("(no|without) drums", "", text))
            assert all(word in longest for word in found), (text, present)
            assert words_in(all_moods, text) <= moods, (text, truth["mood"])
            if "drum" in text or "percussion" in text:
                assert truth["drums"] == (not re.search(r"no drums|without drums", text)), text


def test_captions_vary_and_mention_main_attributes() -> None:
    rows = list(captions())
    assert all(4 <= len(texts) <= 6 and len(set(texts)) == len(texts) for _, texts in rows)
    flat = [(truth, text) for truth, texts in rows for text in texts]
    leads = [INSTRUMENTS[t["lead"]["name"]] + FAMILY_WORDS[t["lead"]["family"]] for t, _ in flat]
    lead = sum(bool(words_in(words, text)) for words, (_, text) in zip(leads, flat, strict=True))
    tempo = sum(bool(words_in(TEMPO[t["tempo_class"]], text)) or str(t["bpm"]) in text for t, text in flat)
    mode = sum(bool(words_in((t["mode"],), text)) for t, text in flat)
    assert lead > 0.85 * len(flat) and tempo > 0.6 * len(flat) and mode > 0.6 * len(flat), (lead, tempo, mode)
    assert len({text for _, text in flat}) > 0.98 * len(flat)
    assert write_captions(rows[0][0], "x") == write_captions(rows[0][0], "x") != write_captions(rows[0][0], "y")


def test_captions_can_write_plain_prompt() -> None:
    """ "A slow waltz in D minor on a music box" is a caption that the templates can write."""
    truth = {"piece": "p", "style": "waltz", "bpm": 70, "tempo_class": "slow", "key": "D", "mode": "minor",
             "metre": "3/4", "mood": "sad", "density": "moderate", "form": "A", "drums": False,
             "lead": {"name": "music box", "program": 10, "family": "mallets"},
             "instruments": [{"name": "music box", "role": "lead", "program": 10, "family": "mallets"},
                             {"name": "piano", "role": "chords", "program": 0, "family": "piano"}]}
    texts = {text.rstrip(".").lower() for seed in range(3000) for text in write_captions(truth, seed)}
    assert "a slow waltz in d minor on a music box" in texts


def test_tags_name_notes_of_scale() -> None:
    named = tags(compose(0, 0).truth | {"key": "D", "mode": "dorian"})
    assert {tag[5:] for tag in named if tag.startswith("note ")} == set("DEFGABC")
    assert "on D" in named and "D dorian" in named and "on A#" in tags(compose(0, 0).truth | {"key": "Bb"})
