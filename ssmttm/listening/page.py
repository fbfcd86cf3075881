"""The page of a listening test: one self-contained HTML file that works offline and does not name the systems."""

import json
import random
from dataclasses import asdict
from pathlib import Path

from tqdm import tqdm

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.listening.design import check_kind, find_systems, plan
from ssmttm.reports.page import embed_audio, write_page

AXES = ("quality", "musicality", "adherence")
LOUDNESS = -20.0  # LUFS of every clip, so that loudness does not bias the answers


def make_test(
    folders: dict[str, Path],
    out: Path,
    kind: str = "both",
    axes: tuple[str, ...] = AXES,
    listeners: int = 24,
    seed: int = 0,
    n_prompts: int | None = None,
) -> tuple[list[Path], list[str]]:
    """Write OUT/test.html for the listeners, and OUT/key.json with the systems of the clips.

    Args:
        kind: mos (ratings from 1 to 5), pairs (preferences) or both.
        listeners: number of different orders; listener n + 1 gets the first again.
        n_prompts: prompts of the test; None: all that the systems have in common.

    Returns:
        The files, and notes on skipped clips and differences between systems.
    """
    check_kind(kind)
    if listeners < 1:
        raise UserError(f"--listeners must be at least 1, got {listeners}")
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UserError(f"--axes must be among {', '.join(AXES)}, got {unknown[0]}")
    found, skipped = find_systems(folders, n_prompts)
    clips, formats, unreadable = _encode_all(found)
    usable = {prompt: systems for prompt, systems in found.items() if all(path in clips for path in systems.values())}
    if not usable:
        raise UserError(f"no prompt has a usable clip of every system; first error: {unreadable[0]}")
    rng = random.Random(seed)
    names: dict[str, dict[str, str]] = {prompt: {} for prompt in usable}
    key: dict[str, dict[str, str]] = {}
    blind: dict[str, str] = {}
    for prompt, systems in usable.items():
        for system, path in systems.items():
            name = names[prompt][system] = f"{rng.getrandbits(48):012x}"
            key[name] = {"system": system, "prompt": prompt, "file": str(path)}
            blind[name] = clips[path]
    plans = [plan(list(usable), names, kind, listener) for listener in range(1, listeners + 1)]
    test = {
        "id": f"{rng.getrandbits(32):08x}",
        "axes": list(axes),
        "trials": len(plans[0]),
        "clips": dict(sorted(blind.items())),
        "plans": [[asdict(trial) for trial in trials] for trials in plans],
    }
    write_page(out / "test.html", "listening_test.html", title="Listening test", test=test)
    document = {"test": test["id"], "kind": kind, "clips": key}
    write_text(out / "key.json", json.dumps(document, indent=1, ensure_ascii=False) + "\n")
    notes = [f"skipped: {what}" for what in [*skipped, *unreadable]]
    return [out / "test.html", out / "key.json"], [*notes, *_format_differences(formats)]


Formats = dict[str, set[tuple[int, int]]]  # sample rates and channels by system


def _encode_all(found: dict[str, dict[str, Path]]) -> tuple[dict[Path, str], Formats, list[str]]:
    """Readable clips as data URIs, the formats of each system, and the errors of unreadable clips."""
    clips: dict[Path, str] = {}
    formats: Formats = {}
    unreadable = []
    pairs = [pair for systems in found.values() for pair in systems.items()]
    for system, path in tqdm(pairs, desc="clips", unit="clip"):
        try:
            wav, rate = audio.read_music(path, mono=False)
        except UserError as error:
            unreadable.append(str(error))
            continue
        formats.setdefault(system, set()).add((rate, len(wav)))
        clips[path] = embed_audio(audio.normalise_loudness(wav, rate, LOUDNESS), rate)
    return clips, formats, unreadable


def _format_differences(formats: Formats) -> list[str]:
    """A note if systems differ in sample rate or channels."""
    listed = {system: ", ".join(f"{rate} Hz x {n}" for rate, n in sorted(kinds)) for system, kinds in formats.items()}
    channels = {n for kinds in formats.values() for _, n in kinds}
    rates = {rate for kinds in formats.values() for rate, _ in kinds}
    if len(channels) > 1 or len(rates) > 1:
        systems = "; ".join(f"{system} {kinds}" for system, kinds in listed.items())
        return [f"sample rates or channels differ, which listeners may notice: {systems}"]
    return []
