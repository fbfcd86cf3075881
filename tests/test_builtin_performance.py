"""The built-in corpus over time: arrangement, performance, parts, and the times in the truth."""

from dataclasses import replace
from functools import cache
from itertools import pairwise
from random import Random
from statistics import fmean, pstdev

import pytest

from data_prep.builtin import compose
from data_prep.builtin.composition.annotations import excerpt
from data_prep.builtin.composition.arrangement import Bar, arrange
from data_prep.builtin.composition.harmony import Section, plan_form
from data_prep.builtin.composition.instruments import BACKING
from data_prep.builtin.composition.parts.bass import bass_tones, play_bass
from data_prep.builtin.composition.parts.chords import candidates, motion, voice_chords
from data_prep.builtin.composition.parts.drums import play_drums
from data_prep.builtin.composition.performance import metrical_accent, perform, warp
from data_prep.builtin.composition.score import METRES, TICKS, Note, Piece, Ritardando
from data_prep.builtin.composition.styles import STYLES
from data_prep.builtin.composition.styles.manners import MANNERS
from data_prep.builtin.composition.theory import Chord, Key

FOUR = METRES["4/4"]
EVERYTHING = frozenset({"chords", "bass", "drums", "second", "pad", "counter"})


@cache
def pieces() -> tuple[Piece, ...]:
    return tuple(compose(23, index) for index in range(200))


def part(piece: Piece, role: str) -> tuple[Note, ...]:
    return next((track.notes for track in piece.tracks if track.role == role), ())


def bars_of(n: int, energy: float = 0.75, parts: frozenset[str] = EVERYTHING) -> list[Bar]:
    return [Bar(Section("A", 0, n), place, parts, energy) for place in range(n)]


def eighths(n_bars: int) -> list[Note]:
    return [Note(tick, 6, 60, 90) for tick in range(0, n_bars * FOUR.bar, 6)]


def test_styles_all_have_manners_of_known_kits() -> None:
    assert set(MANNERS) == set(STYLES)
    for manner in MANNERS.values():
        assert set(manner.kits) <= {0, 8, 16, 24, 25, 32, 40, 48} and set(manner.colours) <= set(BACKING)


def test_swing_delays_offbeat_eighths_to_triplets() -> None:
    assert [warp(tick, 1.0, 0.0) for tick in (0, 3, 6, 9, 12, 18)] == [0, 4, 8, 10, 12, 20]
    assert [warp(tick, 0.0, 1.0) for tick in (0, 3, 6, 9)] == [0, 4, 6, 10]
    bar = bars_of(8)
    swung = perform("x", "chords", eighths(8), bar, FOUR, 120, MANNERS["jazz swing"])
    straight = perform("x", "chords", eighths(8), bar, FOUR, 120, replace(MANNERS["jazz swing"], swing=0.0))
    gained = [a.late - b.late for a, b in zip(swung, straight, strict=True)]
    assert all(g == 0 for n, g in zip(swung, gained, strict=True) if n.start % TICKS == 0)
    offbeat = fmean(g for n, g in zip(swung, gained, strict=True) if n.start % TICKS)
    assert offbeat == pytest.approx(0.9 * 0.083, rel=0.2)  # of a sixth of a beat at 120


def test_performance_timing_is_human_but_bounded() -> None:
    played = perform("x", "chords", eighths(16), bars_of(16), FOUR, 120, MANNERS["classical"])
    lates = [note.late for note in played]
    assert 0.003 < pstdev(lates) < 0.012 and max(map(abs, lates)) <= 0.022
    machine = perform("x", "chords", eighths(16), bars_of(16), FOUR, 120, MANNERS["techno"])
    assert {note.late for note in machine} == {0.0}


def test_performance_habits_return_every_bar() -> None:
    played = perform("x", "bass", eighths(16), bars_of(16), FOUR, 120, MANNERS["classical"])
    places = [[note.late for note in played if note.start % FOUR.bar == place] for place in range(0, FOUR.bar, 6)]
    assert fmean(map(pstdev, places)) < 0.6 * pstdev([note.late for note in played])


def test_performance_copies_repeated_bars_in_songs() -> None:
    bars = [Bar(Section("A", 0, 2), i % 2, EVERYTHING, 0.75) for i in range(8)]
    played = perform("x", "chords", eighths(8), bars, FOUR, 120, MANNERS["rock"])
    by_bar = [[(n.late, n.velocity) for n in played if n.start // FOUR.bar == bar] for bar in range(8)]
    assert by_bar[0] == by_bar[2] == by_bar[6] != by_bar[1]


def test_performance_chord_notes_share_their_timing() -> None:
    notes = [Note(tick, 6, pitch, 80) for tick in range(0, 96, 12) for pitch in (60, 64, 67)]
    played = perform("x", "chords", notes, bars_of(2), FOUR, 120, MANNERS["classical"])
    assert all(len({n.late for n in played if n.start == tick}) == 1 for tick in range(0, 96, 12))


def test_performance_accents_follow_metre() -> None:
    assert [metrical_accent(tick, FOUR) for tick in (0, 24, 12, 6)] == sorted(
        (metrical_accent(tick, FOUR) for tick in (0, 24, 12, 6)), reverse=True)
    played = perform("x", "lead", eighths(8), bars_of(8), FOUR, 120, MANNERS["classical"])
    down = fmean(n.velocity for n in played if n.start % FOUR.bar == 0)
    assert down > fmean(n.velocity for n in played if n.start % TICKS) + 6


def test_performance_energy_and_phrase_shape_velocity() -> None:
    def mean(energy: float, place: int) -> float:
        played = perform("x", "lead", eighths(8), bars_of(8, energy), FOUR, 120, MANNERS["techno"])
        return fmean(n.velocity for n in played if n.start // FOUR.bar == place)

    assert mean(1.0, 4) > mean(0.5, 4) + 8
    assert mean(0.75, 4) > mean(0.75, 0) + 4 and mean(0.75, 4) > mean(0.75, 7) + 4


def test_arrangement_adds_parts_and_chorus_is_fuller_than_verse() -> None:
    verse, chorus = Section("A", 0, 4), Section("B", 4, 4)
    sections = [verse, chorus, Section("end", 8, 1)]
    bars = arrange(Random(1), sections, EVERYTHING, "song")
    assert bars[0].parts < bars[4].parts | {"light"} and bars[4].energy > bars[0].energy + 0.2
    for seed in range(30):
        twice = [verse, replace(verse, first_bar=4, label="A'"), sections[-1]]
        growing = arrange(Random(seed), twice, EVERYTHING, "layers")
        assert len(growing[0].parts) < len(growing[7].parts)


def test_arrangement_intro_enters_one_by_one_and_breaks_are_thin() -> None:
    for seed in range(30):
        sections = [Section("intro", 0, 2), *(Section("A", 2 + 4 * i, 4) for i in range(3)), Section("break", 14, 1),
                    Section("B", 15, 4), Section("end", 19, 1)]
        bars = arrange(Random(seed), sections, EVERYTHING, "song")
        assert len(bars[0].parts) < len(bars[15].parts) and bars[0].parts <= bars[1].parts
        assert len(bars[14].parts) <= 3 < len(bars[15].parts)


def test_form_has_intros_and_breaks_that_are_short() -> None:
    seen = set()
    for seed in range(300):
        for n_bars, seconds in ((11, 3.6), (17, 2.3), (20, 2.0), (24, 1.6)):
            sections = plan_form(Random(seed), n_bars, seconds)
            seen |= {section.label for section in sections}
            assert all(s.n_bars * seconds <= 4.6 for s in sections if s.label in ("intro", "break"))
    assert {"intro", "break", "coda", "A'", "B"} <= seen


def test_fills_come_before_new_sections() -> None:
    bars = [replace(bar, fill=bar.place == 3) for bar in bars_of(4)]
    pattern = "k x.......x.......|s ....x.......x...|h x.x.x.x.x.x.x.x."
    filled = play_drums("x", bars, pattern, FOUR, False, 0)
    toms = [note for note in filled if note.pitch in (43, 45, 48, 50) or (note.pitch == 38 and note.start % TICKS)]
    assert toms and min(note.start for note in toms) >= 3 * FOUR.bar
    plain = play_drums("x", bars_of(4), pattern, FOUR, False, 0)
    assert not [note for note in plain if note.pitch in (43, 48, 50)]
    with_fill = [p for p in pieces() if len({n.pitch for n in part(p, "drums")} & {43, 45, 48, 50}) > 1]
    assert len(with_fill) > 0.3 * sum(bool(part(p, "drums")) for p in pieces())


def test_drums_are_lighter_in_light_bars() -> None:
    pattern = "k x.......x.......|s ....x.......x...|h x.x.x.x.x.x.x.x."
    full = play_drums("x", bars_of(4), pattern, FOUR, False, 0)
    light = play_drums("x", bars_of(4, parts=frozenset({"light"})), pattern, FOUR, False, 0)
    assert len(light) < 0.8 * len(full) and 38 in {n.pitch for n in full} and 38 not in {n.pitch for n in light}
    assert not play_drums("x", bars_of(4, parts=frozenset({"chords"})), pattern, FOUR, False, 0)


def test_voicings_move_smoothly_and_use_inversions() -> None:
    key, chords = Key(0, "major"), [Chord(root) for root in (0, 3, 4, 5, 1, 4, 0)]
    keys = [str(i) for i in range(len(chords))]
    voiced = voice_chords(chords, keys, key, 50, "close")
    rooted = [candidates(chord, key, 50, "close")[0] for chord in chords]

    def travelled(line: list[tuple[int, ...]]) -> float:
        return sum(motion(a, b) for a, b in pairwise(line))

    assert travelled(voiced) < 0.6 * travelled(rooted)
    assert any(v[0] % 12 != chord.pitch_classes(key)[0] for v, chord in zip(voiced, chords, strict=True))
    spread = voice_chords(chords, keys, key, 50, "spread")
    assert min(v[-1] - v[0] for v in spread) > 12 > min(v[-1] - v[0] for v in voiced)
    shell = voice_chords([Chord(4, sevenths=True)], ["0"], key, 50, "shell")[0]
    assert len(shell) == 3 and 7 not in {pitch % 12 for pitch in shell}


def test_bass_leads_into_chords_by_step() -> None:
    key, who = Key(0, "major"), BACKING["acoustic bass"]
    chords = [Chord(root) for root in (0, 3, 4, 0) * 8]
    bars, keys = bars_of(32), [str(i) for i in range(32)]
    tones = bass_tones(Random(1), chords, keys, key, who, 0.0, set())

    def led(approach: float) -> float:
        manner = replace(MANNERS["folk"], approach=approach)
        notes = play_bass("x", bars, chords, tones, key, "1--- ---- 5--- ----", FOUR, FOUR.bar, who, manner)
        pairs = [(a.pitch, b.pitch) for a, b in pairwise(notes) if b.start % FOUR.bar == 0]
        return fmean(0 < abs(a - b) <= 2 for a, b in pairs)

    assert led(1.0) > led(0.0) + 0.4


def test_bass_inversions_move_by_step() -> None:
    key, who = Key(0, "major"), BACKING["acoustic bass"]
    chords = [Chord(root) for root in (0, 4, 5, 2, 3, 0, 1, 4)]
    keys = [str(i) for i in range(8)]
    plain = bass_tones(Random(1), chords, keys, key, who, 0.0, set())
    inverted = bass_tones(Random(1), chords, keys, key, who, 1.0, set())
    assert plain != inverted
    assert sum(abs(a - b) for a, b in pairwise(inverted)) < sum(abs(a - b) for a, b in pairwise(plain))


def test_pickups_lead_into_phrases() -> None:
    found = 0
    for piece in pieces():
        starts = {round(row["start"], 3) for row in piece.truth["sections"] if row["label"][0] in "ABC"}
        intro = piece.truth["sections"][0]
        if intro["label"] == "intro" and round(intro["end"], 3) in starts:
            first = part(piece, "lead")[0]
            found += piece.seconds(first.start) < intro["end"] - 0.05
    assert found > 15


def test_stops_silence_the_accompaniment() -> None:
    quiet = 0
    for piece in pieces():
        for row in piece.truth["sections"][:-1]:
            stop = row["end"] - 0.45 * piece.metre.beats * 60 / piece.bpm
            notes = [n for role in ("chords", "bass") for n in part(piece, role)]
            sounding = [n for n in notes if piece.seconds(n.start) < row["end"] - 0.01
                        and piece.seconds(n.start + n.duration) > stop + 0.01]
            quiet += bool(row["label"][0] in "ABC" and not sounding)
    assert quiet > 15


def test_counter_melody_is_of_another_family_than_lead() -> None:
    with_counter = [piece for piece in pieces() if part(piece, "counter")]
    assert len(with_counter) > 15
    for piece in with_counter:
        families = {track.role: track.family for track in piece.tracks}
        assert families["counter"] not in (families["lead"], families["chords"])


def test_truth_beats_are_of_stated_tempo_until_ritardando() -> None:
    slowed = 0
    for piece in pieces():
        truth = piece.truth
        stop = truth["ritardando"] if truth["ritardando"] is not None else truth["final"]
        gaps = [(a, b - a) for a, b in pairwise(truth["beats"])]
        assert all(gap == pytest.approx(60 / truth["bpm"], abs=2e-4) for a, gap in gaps if a < stop - 0.01)
        assert truth["bars"] == truth["beats"][:: piece.metre.beats]
        late = [gap for a, gap in gaps if a >= stop - 0.01]
        assert (truth["ritardando"] is None) == (not late)
        assert all(b > a for a, b in pairwise([60 / truth["bpm"], *late])), "it slows down steadily"
        slowed += bool(late)
    assert 10 < slowed < 120


def test_ritardando_delays_smoothly() -> None:
    slow = Ritardando(48, 96)
    assert slow.delay(40) == slow.delay(48) == 0 and slow.delay(96) == slow.delay(120) > slow.delay(72) > 0


def test_truth_sections_cover_the_piece_and_start_on_bar_lines() -> None:
    for piece in pieces():
        rows = piece.truth["sections"]
        assert rows[0]["start"] == 0 and rows[-1]["end"] == piece.duration
        assert all(a["end"] == b["start"] for a, b in pairwise(rows))
        assert all(row["start"] in piece.truth["bars"] for row in rows)
        assert piece.truth["form"] == " ".join(row["label"] for row in rows)


def test_truth_of_excerpt_counts_from_its_start() -> None:
    for piece in pieces()[:60]:
        whole, parts = piece.truth, [excerpt(piece, start, start + 20) for start in (0.0, 20.0)]
        for name in ("beats", "bars"):
            joined = parts[0][name] + [round(time + 20, 4) for time in parts[1][name]]
            assert joined == pytest.approx(whole[name])
        for truth in parts:
            assert truth["sections"][0]["start"] == 0 and truth["sections"][-1]["end"] == 20
            assert truth["lead"] == whole["lead"] and truth["instruments"][0]["role"] == "lead"
        assert parts[0]["final"] is None and parts[1]["final"] == pytest.approx(whole["final"] - 20)


def test_truth_of_excerpt_names_who_is_heard() -> None:
    late = 0
    for piece in pieces():
        for start in (0.0, 20.0):
            truth = excerpt(piece, start, start + 20)
            roles = {part["role"] for part in truth["instruments"]}
            for track in piece.tracks:
                heard = [n for n in track.notes if start <= piece.onset(n) < start + 20]
                assert heard or track.role not in roles or piece.onset(track.notes[0]) < start
                late += track.role not in roles
            assert truth["drums"] == ("drums" in roles)
    assert late > 20, "some parts enter in the second half only"


def test_accompaniment_repeats_bars_and_varies_some() -> None:
    shares = []
    for piece in pieces()[:60]:
        bars: dict[int, list[tuple[int, int]]] = {}
        for note in part(piece, "chords"):
            bars.setdefault(note.start // piece.metre.bar, []).append((note.start % piece.metre.bar, note.pitch))
        shares.append(1 - len({tuple(notes) for notes in bars.values()}) / len(bars))
    assert 0.45 < fmean(shares) < 0.95
