"""Balanced design of a listening test: order of systems and of the two clips of a pair."""

import random
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

from ssmttm.audio import WRITERS
from ssmttm.errors import UserError
from ssmttm.generation.output import read_sidecar

KINDS = ("mos", "pairs", "both")


@dataclass(frozen=True)
class Trial:
    """One trial of the page."""

    kind: str  # mos, a rating of one clip, or pair, a preference between two
    prompt: str
    clips: list[str]  # blind names, in presentation order


def check_kind(kind: str) -> None:
    """Raise UserError for an unknown kind of test."""
    if kind not in KINDS:
        raise UserError(f"--kind must be one of {', '.join(KINDS)}, got {kind}")


def find_systems(
    folders: dict[str, Path], n_prompts: int | None = None
) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Each system's clips by prompt, for the prompts that all systems have: all, or the first in alphabetical order.

    A clip's prompt is that of its metadata sidecar (FILE.json), or else its file name.

    Returns:
        {prompt: {system: file}}, and notes on skipped prompts and files.
    """
    if len(folders) < 2:
        raise UserError("a listening test needs at least two systems: give --systems NAME=FOLDER NAME=FOLDER ...")
    found: dict[str, dict[str, Path]] = {}
    duplicates = []
    for system, folder in folders.items():
        files = sorted(p for p in folder.glob("**/*") if p.suffix.lower() in WRITERS) if folder.is_dir() else []
        if not files:
            raise UserError(f"no audio in {folder}: give a folder of {', '.join(WRITERS)} files")
        for path in files:
            clips = found.setdefault(read_sidecar(path).get("prompt", path.stem), {})
            if clips.setdefault(system, path) != path:
                duplicates.append(f"{path}: {clips[system].name} has the same prompt")
    common = {prompt: clips for prompt, clips in sorted(found.items()) if len(clips) == len(folders)}
    skipped = [f"{prompt}: only of {', '.join(clips)}" for prompt, clips in found.items() if len(clips) < len(folders)]
    if not common:
        raise UserError(f"{', '.join(folders)} have no prompt in common: generate all from the same prompts")
    if n_prompts is not None and not 1 <= n_prompts <= len(common):
        raise UserError(f"--prompts must be 1 to {len(common)}, the prompts that all systems have, got {n_prompts}")
    return dict(list(common.items())[:n_prompts]), [*skipped, *duplicates]


def williams(n: int) -> list[list[int]]:
    """A Williams design: each of n treatments is in each position, and follows each other treatment, equally often.

    n rows for even n, 2 n for odd n. Source: Williams, Australian Journal of Scientific Research 2 (1949).
    """
    first = [0]
    for i in range(1, n):
        first.append((i + 1) // 2 if i % 2 else n - i // 2)
    rows = [[(x + shift) % n for x in first] for shift in range(n)]
    return rows if n % 2 == 0 else rows + [row[::-1] for row in rows]


def plan(prompts: Sequence[str], names: dict[str, dict[str, str]], kind: str, listener: int) -> list[Trial]:
    """The trials of one listener.

    The order of the prompts is random for each listener. Within a prompt, the order of the systems is a row of a
    Williams design; the order of a pair alternates between listeners. `names`: {prompt: {system: blind name}}.
    """
    systems = list(names[prompts[0]])
    rows = williams(len(systems))
    order = list(range(len(prompts)))
    random.Random(listener).shuffle(order)
    pairs = list(combinations(range(len(systems)), 2))
    trials = []
    for place in order:
        prompt = prompts[place]
        blind = [names[prompt][system] for system in systems]
        if kind in ("mos", "both"):
            row = rows[(listener + place) % len(rows)]
            trials += [Trial("mos", prompt, [blind[i]]) for i in row]
        if kind in ("pairs", "both"):
            for which in range(len(pairs)):
                a, b = pairs[(which + place) % len(pairs)]
                swap = (listener + place + which) % 2
                trials.append(Trial("pair", prompt, [blind[b], blind[a]] if swap else [blind[a], blind[b]]))
    return trials
