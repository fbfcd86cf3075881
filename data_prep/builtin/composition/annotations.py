"""The ground truth of a piece: what it is, and when its beats, bars and sections are."""

from itertools import groupby
from typing import Any

from data_prep.builtin.composition.arrangement import Bar, section_name
from data_prep.builtin.composition.plan import Plan
from data_prep.builtin.composition.score import TICKS, Piece, Track
from data_prep.builtin.composition.theory import tonic_name

_HEARD = 1.0  # seconds that an instrument must sound in an excerpt to be named


def title(plan: Plan) -> str:
    """A title in words."""
    key = f"{tonic_name(plan.key.tonic, plan.key.mode)} {plan.key.mode}"
    return f"{plan.mood.capitalize()} {plan.style.name} in {key} for {plan.lead.name}"


def describe_piece(identity: str, plan: Plan, tracks: tuple[Track, ...]) -> dict[str, Any]:
    """Style, tempo, key and instruments."""
    return {
        "piece": identity, "style": plan.style.name, "bpm": plan.bpm, "tempo_class": plan.tempo_class,
        "key": tonic_name(plan.key.tonic, plan.key.mode), "mode": plan.key.mode, "metre": plan.metre.name,
        "mood": plan.mood, "density": plan.density, "drums": plan.kit is not None,
        "swing": plan.manner.swing > 0 and not plan.metre.compound,
        "lead": {"name": plan.lead.name, "program": plan.lead.program, "family": plan.lead.family},
        "instruments": [{"name": t.name, "role": t.role, "program": t.program, "family": t.family} for t in tracks],
    }


def _sections(piece: Piece, plan: Plan, bars: list[Bar]) -> list[dict[str, Any]]:
    """The sections with label, name, start and end in seconds."""
    rows = []
    numbered = enumerate(bars)
    for section, run in groupby(numbered, key=lambda item: item[1].section):
        start = next(run)[0] * piece.metre.bar
        rows.append({"label": section.label, "name": section_name(section.label, plan.manner.build),
                     "start": round(piece.seconds(start), 4)})
    for row, following in zip(rows, [*rows[1:], {"start": piece.duration}], strict=True):
        row["end"] = following["start"]
    return rows


def timing(piece: Piece, plan: Plan, bars: list[Bar], last: int) -> dict[str, Any]:
    """Form, sections, times of the beats and bar lines up to the final chord, and the ritardando.

    The tempo is exactly `bpm` but for the seconds from `ritardando` (null where there is none) to the final chord.
    """
    beats = [round(piece.seconds(tick), 4) for tick in range(0, last + 1, TICKS)]
    slows = piece.ritardando
    return {
        "form": " ".join(section.label for section, _ in groupby(bar.section for bar in bars)),
        "duration": piece.duration,
        "beats": beats,
        "bars": beats[:: piece.metre.beats],
        "sections": _sections(piece, plan, bars),
        "ritardando": round(piece.seconds(slows.first), 4) if slows else None,
        "final": round(piece.seconds(last), 4),
    }


def _is_sounding(piece: Piece, track: Track, start: float, stop: float) -> bool:
    """Whether a track sounds long enough between two times; the hits of drums count as a tenth of a second."""
    total = 0.0
    for note in track.notes:
        onset, release = piece.onset(note), piece.release(note)
        if track.role == "drums":
            total += 0.1 if start <= onset < stop else 0.0
        else:
            total += max(0.0, min(release, stop) - max(onset, start))
    return total >= _HEARD


def _opening(piece: Piece, named: list[dict[str, Any]], start: float, stop: float) -> list[str]:
    """The instruments that sound before the lead in an excerpt, where it enters 1.5 s or more after its start."""
    lead = min((piece.onset(n) for t in piece.tracks if t.role == "lead" for n in t.notes
                if piece.release(n) > start), default=stop)
    if lead < start + 1.5:
        return []
    before = {t.name for t in piece.tracks for n in t.notes if start - 0.01 <= piece.onset(n) < lead - 0.3}
    return [part["name"] for part in named if part["role"] != "lead" and part["name"] in before]


def excerpt(piece: Piece, start: float, stop: float) -> dict[str, Any]:
    """The truth of an excerpt: the instruments sounding in it, and times in seconds from its start."""
    truth = piece.truth
    sounding = {t.role for t in piece.tracks if t.role == "lead" or _is_sounding(piece, t, start, stop)}
    named = [part for part in truth["instruments"] if part["role"] in sounding]

    def inside(times: list[float]) -> list[float]:
        return [round(time - start, 4) for time in times if start <= time < stop]

    def clipped(time: float) -> float:
        return round(min(max(time, start), stop) - start, 4)

    sections = [row | {"start": clipped(row["start"]), "end": clipped(row["end"])}
                for row in truth["sections"] if row["start"] < stop and row["end"] > start]
    slows = truth["ritardando"]
    final = inside([truth["final"]])
    return truth | {
        "instruments": named, "drums": "drums" in sounding, "start": start, "duration": round(stop - start, 4),
        "beats": inside(truth["beats"]), "bars": inside(truth["bars"]), "sections": sections,
        "ritardando": round(slows - start, 4) if slows is not None and start <= slows < stop else None,
        "final": final[0] if final else None,
        "opening": _opening(piece, named, start, stop),
    }
