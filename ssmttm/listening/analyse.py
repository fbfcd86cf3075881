"""What listeners said: mean opinions with intervals, and Bradley-Terry strengths of paired preferences."""

import csv
import json
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ssmttm.errors import UserError
from ssmttm.evaluation.metrics.metric import markdown
from ssmttm.evaluation.metrics.statistics import binomial_tail

_DRAWS, _ROUNDS, _TOLERANCE = 1_000, 10_000, 1e-10


@dataclass(frozen=True)
class Rating:
    """One answer on a scale from 1 to 5."""

    listener: str
    system: str
    axis: str
    value: int


@dataclass(frozen=True)
class Preference:
    """One choice; `share` is 1 if the first was preferred, 0 if the second, 0.5 for neither."""

    listener: str
    first: str
    second: str
    share: float


@dataclass(frozen=True)
class Answers:
    """All usable answers, and what was left out."""

    ratings: list[Rating]
    preferences: list[Preference]
    notes: list[str]


def read_answers(files: Sequence[Path], key_file: Path) -> Answers:
    """Read what the page has saved, JSON or CSV; a listener counts once.

    Raises:
        UserError: the key cannot be read, or there is no answer to this test.
    """
    try:
        key = json.loads(key_file.read_text(encoding="utf-8"))
        known, systems = key["test"], {name: clip["system"] for name, clip in key["clips"].items()}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"{key_file} is no key of a listening test: give the key.json made with the page") from error
    ratings, preferences, notes = [], [], []
    seen: Counter[str] = Counter()
    for file in files:
        try:
            test, listener, given = _read(file)
            rated, preferred = _taken(given, listener, systems) if test == known else ([], [])
        except (OSError, ValueError, KeyError, TypeError, IndexError) as error:
            notes.append(f"{file}: left out, not a file of answers ({type(error).__name__}: {error})")
            continue
        if test != known:
            notes.append(f"{file}: left out, of another test")
        elif seen[listener]:
            notes.append(f"{file}: left out, listener {listener} has answered already")
        else:
            seen[listener] += 1
            ratings += rated
            preferences += preferred
    if not seen:
        raise UserError(f"no answers to this test in {len(files)} files{': ' + notes[0] if notes else ''}")
    counts = Counter(r.listener for r in ratings) + Counter(p.listener for p in preferences)
    most = max(counts.values(), default=0)
    notes += [f"listener {who} answered {n} of {most} questions" for who, n in counts.items() if n < most]
    return Answers(ratings, preferences, notes)


def mean_opinions(ratings: Sequence[Rating], seed: int = 0) -> dict[tuple[str, str], tuple[float, float, float, int]]:
    """Mean, 95 % interval and number of ratings by (system, axis).

    The interval is a bootstrap over listeners: one listener's answers belong together, and one listener has none (NaN).
    """
    listeners = sorted({rating.listener for rating in ratings})
    rng = np.random.default_rng(seed)
    drawn = rng.integers(len(listeners), size=(_DRAWS, len(listeners)))
    weights = np.stack([(drawn == i).sum(1) for i in range(len(listeners))], 1)  # [draws, listeners]
    found = {}
    for system, axis in dict.fromkeys((r.system, r.axis) for r in ratings):
        mine = [r for r in ratings if (r.system, r.axis) == (system, axis)]
        sums, counts = np.zeros(len(listeners)), np.zeros(len(listeners))
        for rating in mine:
            place = listeners.index(rating.listener)
            sums[place] += rating.value
            counts[place] += 1
        totals = weights @ counts
        means = (weights @ sums)[totals > 0] / totals[totals > 0]
        low, high = np.quantile(means, (0.025, 0.975)) if (counts > 0).sum() > 1 else (np.nan, np.nan)
        found[system, axis] = float(sums.sum() / counts.sum()), float(low), float(high), len(mine)
    return found


def bradley_terry(systems: Sequence[str], preferences: Sequence[Preference]) -> np.ndarray:
    """Strengths, as logarithms with mean 0: a is preferred to b with odds exp(strength a - strength b). [systems]

    Maximum likelihood by minorisation (Hunter, Annals of Statistics 32, 2004); a tie is half a win for both. Half a tie
    is added between every two systems that met, so that one that always wins stays finite.
    """
    wins = np.zeros((len(systems), len(systems)))
    for p in preferences:
        a, b = systems.index(p.first), systems.index(p.second)
        wins[a, b] += p.share
        wins[b, a] += 1 - p.share
    met = (wins + wins.T) > 0
    wins = wins + 0.25 * met
    games = wins + wins.T
    strength = np.ones(len(systems))
    for _ in range(_ROUNDS):
        shared = (games / (strength[:, None] + strength[None])).sum(1)
        new = wins.sum(1) / np.where(shared > 0, shared, 1)
        new = np.where(shared > 0, new, 1.0)
        new /= np.exp(np.log(new).mean())
        if np.abs(np.log(new / strength)).max() < _TOLERANCE:
            break
        strength = new
    return np.log(new)


def strengths(preferences: Sequence[Preference], seed: int = 0) -> dict[str, tuple[float, float, float]]:
    """Bradley-Terry strength and 95 % interval by system, the strongest first.

    The interval is a bootstrap over listeners; one listener has none (NaN).
    """
    systems = sorted({p.first for p in preferences} | {p.second for p in preferences})
    by_listener: dict[str, list[Preference]] = {}
    for preference in preferences:
        by_listener.setdefault(preference.listener, []).append(preference)
    groups = list(by_listener.values())
    rng = np.random.default_rng(seed)
    draws = np.array([
        bradley_terry(systems, [p for i in rng.integers(len(groups), size=len(groups)) for p in groups[i]])
        for _ in range(_DRAWS // 5)
    ])  # fmt: skip
    low, high = np.quantile(draws, (0.025, 0.975), axis=0) if len(groups) > 1 else np.full((2, len(systems)), np.nan)
    values = bradley_terry(systems, preferences)
    told = {s: (float(values[i]), float(low[i]), float(high[i])) for i, s in enumerate(systems)}
    return dict(sorted(told.items(), key=lambda item: -item[1][0]))


def pairwise_wins(preferences: Sequence[Preference]) -> list[tuple[str, str, int, int, int, float]]:
    """For every two systems: wins of the first, of the second, ties, and the two-sided sign test without ties."""
    found: dict[tuple[str, str], list[float]] = {}
    for p in preferences:
        pair = (p.first, p.second)
        share = p.share
        if pair[0] > pair[1]:
            pair, share = pair[::-1], 1 - share
        found.setdefault(pair, []).append(share)
    rows = []
    for (a, b), shares in sorted(found.items()):
        wins, losses = shares.count(1.0), shares.count(0.0)
        p_value = min(1.0, 2 * binomial_tail(max(wins, losses), wins + losses, 0.5)) if wins + losses else 1.0
        rows.append((a, b, wins, losses, len(shares) - wins - losses, p_value))
    return rows


def report(answers: Answers) -> str:
    """Everything as Markdown."""
    parts = ["# Listening test"]
    if answers.ratings:
        opinions = mean_opinions(answers.ratings)
        axes = list(dict.fromkeys(axis for _, axis in opinions))
        rows = [["system", *axes]]
        for system in dict.fromkeys(s for s, _ in opinions):
            cells = [opinions.get((system, axis)) for axis in axes]
            rows.append([system, *(f"{c[0]:.2f} ({_range(*c[1:3])}), n {c[3]}" if c else "" for c in cells)])
        parts.append(f"Mean opinion, 1 to 5, and 95 % interval (bootstrap over listeners):\n\n{markdown(rows)}")
    if answers.preferences:
        rows = [["system", "strength", "95 % interval"]]
        found = strengths(answers.preferences).items()
        rows += [[system, f"{value:+.2f}", _range(low, high, "+.2f")] for system, (value, low, high) in found]
        parts.append(f"Bradley-Terry strength (log odds; a tie is half a win):\n\n{markdown(rows)}")
        rows = [["pair", "first preferred", "second preferred", "ties", "p (sign test)"]]
        rows += [[f"{a} / {b}", str(w), str(x), str(t), f"{p:.2g}"] for a, b, w, x, t, p in pairwise_wins(answers.preferences)]
        parts.append(markdown(rows))
    parts.append("\n".join(f"- {note}" for note in answers.notes))
    return "\n\n".join(part for part in parts if part) + "\n"


def _range(low: float, high: float, form: str = ".2f") -> str:
    return "one listener" if np.isnan(low) else f"{low:{form}} to {high:{form}}"


def _read(file: Path) -> tuple[str, str, list[dict[str, Any]]]:
    """Test, listener and answers of one saved file."""
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


def _taken(
    answers: Sequence[dict[str, Any]], listener: str, systems: dict[str, str]
) -> tuple[list[Rating], list[Preference]]:
    """One listener's answers; a clip's name gives its system. Raises ValueError, KeyError for what is no answer."""
    ratings: list[Rating] = []
    preferences: list[Preference] = []
    for answer in answers:
        embeddings = [systems[clip] for clip in answer["clips"]]
        if answer["kind"] == "mos":
            ratings += [Rating(listener, embeddings[0], axis, int(value)) for axis, value in answer["given"].items()]
        else:
            share = {"0": 1.0, "1": 0.0, "tie": 0.5}[str(answer["given"]["choice"])]
            preferences.append(Preference(listener, embeddings[0], embeddings[1], share))
    if outside := [rating.value for rating in ratings if not 1 <= rating.value <= 5]:
        raise ValueError(f"{outside[0]} is not from 1 to 5")
    return ratings, preferences
