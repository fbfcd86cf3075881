"""Analysis of a listening test: mean ratings with intervals, Bradley-Terry strengths of paired preferences."""

import csv
import json
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.bootstrap import Interval, bootstrap
from ssmttm.reports.tables import markdown_table

_MAX_ITERATIONS, _TOLERANCE = 10_000, 1e-10


@dataclass(frozen=True)
class Rating:
    """A rating from 1 to 5."""

    listener: str
    system: str
    axis: str
    value: int


@dataclass(frozen=True)
class Preference:
    """A preference; `score` is 1 for the first system, 0 for the second, 0.5 for a tie."""

    listener: str
    first: str
    second: str
    score: float


@dataclass(frozen=True)
class Answers:
    """All valid answers, and notes on skipped files."""

    ratings: list[Rating]
    preferences: list[Preference]
    notes: list[str]


def read_answers(files: Sequence[Path], key_file: Path) -> Answers:
    """Read the answer files of the page, JSON or CSV, one for each listener."""
    try:
        key = json.loads(key_file.read_text(encoding="utf-8"))
        test_id, systems = key["test"], {name: clip["system"] for name, clip in key["clips"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key_file} is not the key of a listening test: give the key.json of the page") from error
    ratings, preferences, notes = [], [], []
    listeners: set[str] = set()
    for file in files:
        try:
            test, listener, answers = _read(file)
            rated, preferred = _parse(answers, listener, systems) if test == test_id else ([], [])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            notes.append(f"{file}: skipped, not a file of answers ({type(error).__name__}: {error})")
            continue
        if test != test_id:
            notes.append(f"{file}: skipped, answers of another test")
        elif listener in listeners:
            notes.append(f"{file}: skipped, listener {listener} has already answered")
        else:
            listeners.add(listener)
            ratings += rated
            preferences += preferred
    if not listeners:
        raise UserError(f"no answers to this test in {len(files)} files{': ' + notes[0] if notes else ''}")
    counts = Counter(r.listener for r in ratings) + Counter(p.listener for p in preferences)
    most = max(counts.values(), default=0)
    notes += [f"listener {who} answered {n} of {most} questions" for who, n in counts.items() if n < most]
    return Answers(ratings, preferences, notes)


def mean_ratings(ratings: Sequence[Rating], seed: int = 0) -> dict[tuple[str, str], tuple[float, float, float, int]]:
    """Mean, 95 % interval and number of ratings by (system, axis).

    The interval is a bootstrap over listeners, whose answers are dependent; NaN for a single listener.
    """
    listeners = sorted({rating.listener for rating in ratings})
    found = {}
    for system, axis in dict.fromkeys((r.system, r.axis) for r in ratings):
        values = [r for r in ratings if (r.system, r.axis) == (system, axis)]
        sums, counts = np.zeros(len(listeners)), np.zeros(len(listeners))
        for rating in values:
            sums[listeners.index(rating.listener)] += rating.value
            counts[listeners.index(rating.listener)] += 1

        def mean(weights: Tensor, sums: np.ndarray = sums, counts: np.ndarray = counts) -> list[float]:
            total = weights.numpy() @ counts
            return [weights.numpy() @ sums / total if total else math.nan]

        (interval,) = bootstrap(mean, len(listeners), draws=1_000, seed=seed, centred=False)
        low, high = interval[1:] if (counts > 0).sum() > 1 else (math.nan, math.nan)
        found[system, axis] = interval.value, low, high, len(values)
    return found


def bradley_terry(systems: Sequence[str], preferences: Sequence[Preference]) -> np.ndarray:
    """Log strengths with mean 0: a is preferred to b with odds exp(strength a - strength b). [systems]

    Maximum likelihood by minorisation-maximisation (Hunter, Annals of Statistics 32, 2004); a tie counts as half a win
    for both. Half a tie is added for every two systems that were compared, so that strengths are finite.
    """
    return _fit(_win_matrix(systems, preferences))


def strengths(preferences: Sequence[Preference], seed: int = 0) -> dict[str, Interval]:
    """Bradley-Terry strength and 95 % interval by system, in descending order.

    The interval is a bootstrap over listeners; NaN for a single listener.
    """
    systems = sorted({p.first for p in preferences} | {p.second for p in preferences})
    listeners = sorted({p.listener for p in preferences})
    wins = np.stack([_win_matrix(systems, [p for p in preferences if p.listener == who]) for who in listeners])

    def statistic(weights: Tensor) -> np.ndarray:
        return _fit(np.tensordot(weights.numpy(), wins, 1))

    intervals = bootstrap(statistic, len(listeners), draws=200, seed=seed, centred=False)
    if len(listeners) == 1:
        intervals = [Interval(interval.value, math.nan, math.nan) for interval in intervals]
    found = dict(zip(systems, intervals, strict=True))
    return dict(sorted(found.items(), key=lambda item: -item[1].value))


def _win_matrix(systems: Sequence[str], preferences: Sequence[Preference]) -> np.ndarray:
    """Wins of each system against each other, a tie counting half. [systems, systems]"""
    wins = np.zeros((len(systems), len(systems)))
    for p in preferences:
        a, b = systems.index(p.first), systems.index(p.second)
        wins[a, b] += p.score
        wins[b, a] += 1 - p.score
    return wins


def _fit(wins: np.ndarray) -> np.ndarray:
    """Bradley-Terry log strengths of a matrix of wins."""
    wins = wins + 0.25 * ((wins + wins.T) > 0)
    games = wins + wins.T
    strength = np.ones(len(wins))
    for _ in range(_MAX_ITERATIONS):
        expected = (games / (strength[:, None] + strength[None])).sum(1)
        new = np.where(expected > 0, wins.sum(1) / np.where(expected > 0, expected, 1), 1.0)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / strength)).max() < _TOLERANCE:
            break
        strength = new
    return np.log(new)


def pairwise_wins(preferences: Sequence[Preference]) -> list[tuple[str, str, int, int, int, float]]:
    """For each pair of systems: wins of the first, wins of the second, ties, and the p-value of the sign test."""
    from scipy.stats import binomtest

    found: dict[tuple[str, str], list[float]] = {}
    for p in preferences:
        if p.first < p.second:
            found.setdefault((p.first, p.second), []).append(p.score)
        else:
            found.setdefault((p.second, p.first), []).append(1 - p.score)
    rows = []
    for (a, b), scores in sorted(found.items()):
        wins, losses = scores.count(1.0), scores.count(0.0)
        p_value = float(binomtest(wins, wins + losses).pvalue) if wins + losses else 1.0
        rows.append((a, b, wins, losses, len(scores) - wins - losses, p_value))
    return rows


def report(answers: Answers) -> str:
    """The results as Markdown."""
    parts = ["# Listening test"]
    if answers.ratings:
        means = mean_ratings(answers.ratings)
        axes = list(dict.fromkeys(axis for _, axis in means))
        rows = [["system", *axes]]
        for system in dict.fromkeys(system for system, _ in means):
            cells = [means.get((system, axis)) for axis in axes]
            rows.append([system, *(f"{c[0]:.2f} ({_range(*c[1:3])}), n {c[3]}" if c else "" for c in cells)])
        parts.append(f"Mean rating, 1 to 5, and 95 % interval (bootstrap over listeners):\n\n{markdown_table(rows)}")
    if answers.preferences:
        rows = [["system", "strength", "95 % interval"]]
        for system, (value, low, high) in strengths(answers.preferences).items():
            rows.append([system, f"{value:+.2f}", _range(low, high, "+.2f")])
        parts.append(f"Bradley-Terry strength (log odds; a tie is half a win):\n\n{markdown_table(rows)}")
        rows = [["pair", "first preferred", "second preferred", "ties", "p (sign test)"]]
        for a, b, wins, losses, ties, p in pairwise_wins(answers.preferences):
            rows.append([f"{a} / {b}", str(wins), str(losses), str(ties), f"{p:.2g}"])
        parts.append(markdown_table(rows))
    parts.append("\n".join(f"- {note}" for note in answers.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _range(low: float, high: float, form: str = ".2f") -> str:
    return "one listener" if np.isnan(low) else f"{low:{form}} to {high:{form}}"


def _read(file: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """Test id, listener and answers of one file."""
    text = file.read_text(encoding="utf-8-sig")
    if file.suffix.lower() != ".csv":
        found = json.loads(text)
        return found["test"], str(found["listener"]), found["answers"]
    rows = list(csv.DictReader(text.splitlines()))
    answers: dict[str, dict[str, Any]] = {}
    for row in rows:
        clips = [clip for clip in (row["clip_a"], row["clip_b"]) if clip]
        answer = answers.setdefault(row["trial"], {"kind": row["kind"], "clips": clips, "given": {}})
        answer["given"][row["question"]] = row["answer"]
    return rows[0]["test"], rows[0]["listener"], list(answers.values())


def _parse(
    answers: Sequence[dict[str, Any]], listener: str, systems: dict[str, str]
) -> tuple[list[Rating], list[Preference]]:
    """Ratings and preferences of one listener. Raises ValueError or KeyError for an invalid answer."""
    ratings: list[Rating] = []
    preferences: list[Preference] = []
    for answer in answers:
        presented = [systems[clip] for clip in answer["clips"]]
        if answer["kind"] == "mos":
            ratings += [Rating(listener, presented[0], axis, int(value)) for axis, value in answer["given"].items()]
        else:
            score = {"0": 1.0, "1": 0.0, "tie": 0.5}[str(answer["given"]["choice"])]
            preferences.append(Preference(listener, presented[0], presented[1], score))
    for rating in ratings:
        if not 1 <= rating.value <= 5:
            raise ValueError(f"ratings must be from 1 to 5, got {rating.value}")
    return ratings, preferences
