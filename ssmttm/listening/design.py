"""Who hears what, and in which order: every system as often in every place, every pair both ways round."""

import random
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path

from ssmttm.audio import WRITERS
from ssmttm.errors import UserError
from ssmttm.generation.output import read_sidecar

KINDS = ("mos", "pairs", "both")


@dataclass(frozen=True)
class Trial:
    """One question of the page.

    Attributes:
        kind: mos, one clip to be rated, or pair, two to choose from.
        prompt: what the clips should sound like.
        clips: their blind names, in the order heard.
    """

    kind: str
    prompt: str
    clips: list[str]

    def document(self) -> dict[str, object]:
        """As the page holds it."""
        return asdict(self)


def check_kind(kind: str) -> None:
    """Raises UserError for a kind of test that there is not."""
    if kind not in KINDS:
        raise UserError(f"--kind {kind} is unknown: there are {', '.join(KINDS)}")


def find_systems(folders: dict[str, Path]) -> tuple[dict[str, dict[str, Path]], list[str]]:
    """Each system's clips by prompt, for the prompts that all systems have.

    A clip's prompt stands in the record beside it (FILE.json, as sample.py and `ssmttm evaluate` write), or is its
    file's name.

    Returns:
        {prompt: {system: file}}, and what was left out.

    Raises:
        UserError: fewer than two systems, an empty folder, or no prompt in common.
    """
    if len(folders) < 2:
        raise UserError("a listening test compares systems: give --systems NAME=FOLDER NAME=FOLDER ...")
    found: dict[str, dict[str, Path]] = {}
    again = []
    for system, folder in folders.items():
        files = sorted(p for p in folder.glob("**/*") if p.suffix.lower() in WRITERS) if folder.is_dir() else []
        if not files:
            raise UserError(f"there is no audio in {folder}: give a folder of {', '.join(WRITERS)} files")
        for path in files:
            clips = found.setdefault(read_sidecar(path).get("prompt", path.stem), {})
            if clips.setdefault(system, path) != path:
                again.append(f"{path}: {clips[system].name} has the same prompt")
    whole = {prompt: clips for prompt, clips in sorted(found.items()) if len(clips) == len(folders)}
    left = [f"{prompt}: only of {', '.join(clips)}" for prompt, clips in found.items() if len(clips) < len(folders)]
    if not whole:
        raise UserError(f"{', '.join(folders)} have no prompt in common: sample all of them from the same prompts")
    return whole, [*left, *again]


def williams(n: int) -> list[list[int]]:
    """A Williams design: in its rows, each of n treatments has each place, and follows each other, equally often.

    n rows for an even n, 2 n for an odd one. Source: Williams, Australian Journal of Scientific Research 2 (1949).
    """
    first = [0]
    for i in range(1, n):
        first.append((i + 1) // 2 if i % 2 else n - i // 2)
    rows = [[(x + shift) % n for x in first] for shift in range(n)]
    return rows if n % 2 == 0 else rows + [row[::-1] for row in rows]


def plan(prompts: Sequence[str], names: dict[str, dict[str, str]], kind: str, listener: int) -> list[Trial]:
    """The trials of one listener.

    Prompts come in an order of their own for each listener; within a prompt, systems follow the row of a Williams
    design that this listener and prompt have, and every second listener hears a pair the other way round.

    Args:
        prompts: of the test.
        names: {prompt: {system: blind name}}.
        kind: of KINDS.
        listener: from 1.
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
