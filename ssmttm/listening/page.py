"""The listener's page: one HTML file that holds everything, works without a network, and knows no system's name."""

import base64
import json
import random
import tempfile
from pathlib import Path

from tqdm import tqdm

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.listening.design import check_kind, find_systems, plan

AXES = ("quality", "musicality", "adherence")
LOUDNESS = -20.0  # LUFS of every clip, so that louder does not win
_TEMPLATE = Path(__file__).parents[1] / "assets" / "listening" / "page.html"


def make_test(
    folders: dict[str, Path],
    out: Path,
    kind: str = "both",
    axes: tuple[str, ...] = AXES,
    listeners: int = 24,
    seed: int = 0,
) -> tuple[list[Path], list[str]]:
    """Write OUT/test.html, for the listeners, and OUT/key.json, which stays with the experimenter.

    Args:
        folders: each system's clips.
        kind: mos (ratings from 1 to 5), pairs (preferences) or both.
        axes: of the ratings, out of AXES.
        listeners: how many different orders are made; listener n + 1 starts over.
        seed: of the blind names.

    Returns:
        What was written, and notes on what was left out or differs between systems.

    Raises:
        UserError: an unknown kind or axis, no listener, or systems that cannot be compared.
    """
    check_kind(kind)
    if listeners < 1:
        raise UserError(f"--listeners {listeners}: give 1 or more")
    if unknown := [axis for axis in axes if axis not in AXES]:
        raise UserError(f"--axes {unknown[0]} is unknown: there are {', '.join(AXES)}")
    found, left = find_systems(folders)
    clips, formats, unreadable = _encode_all(found)
    usable = {prompt: systems for prompt, systems in found.items() if all(path in clips for path in systems.values())}
    if not usable:
        raise UserError(f"no prompt has a readable clip of every system; the first: {unreadable[0]}")
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
        "plans": [[trial.document() for trial in trials] for trials in plans],
    }
    page = _TEMPLATE.read_text(encoding="utf-8").replace("{{TEST}}", json.dumps(test).replace("</", "<\\/"))
    write_text(out / "test.html", page)
    kept = {"test": test["id"], "kind": kind, "clips": key}
    write_text(out / "key.json", json.dumps(kept, indent=1, ensure_ascii=False) + "\n")
    notes = [f"left out: {what}" for what in [*left, *unreadable]]
    return [out / "test.html", out / "key.json"], [*notes, *_differences(formats)]


Formats = dict[str, set[tuple[int, int]]]  # sample rates and channels by system


def _encode_all(found: dict[str, dict[str, Path]]) -> tuple[dict[Path, str], Formats, list[str]]:
    """Every readable clip as a data URI, the formats of each system, and what cannot be read."""
    clips: dict[Path, str] = {}
    formats: Formats = {}
    unreadable = []
    pairs = [pair for systems in found.values() for pair in systems.items()]
    for system, path in tqdm(pairs, desc="clips", unit="clip"):
        try:
            wav, rate = audio.read(path, mono=False)
        except UserError as error:
            unreadable.append(str(error))
            continue
        formats.setdefault(system, set()).add((rate, len(wav)))
        with tempfile.TemporaryDirectory() as folder:
            file = audio.write(Path(folder) / "clip.mp3", audio.normalise(wav, rate, LOUDNESS), rate)
            clips[path] = f"data:audio/mpeg;base64,{base64.b64encode(file.read_bytes()).decode()}"
    return clips, formats, unreadable


def _differences(formats: Formats) -> list[str]:
    """What listeners could hear besides the systems."""
    told = {system: ", ".join(f"{rate} Hz x {n}" for rate, n in sorted(kinds)) for system, kinds in formats.items()}
    channels = {n for kinds in formats.values() for _, n in kinds}
    rates = {rate for kinds in formats.values() for rate, _ in kinds}
    if len(channels) > 1 or len(rates) > 1:
        listed = "; ".join(f"{system} {kinds}" for system, kinds in told.items())
        return [f"rates or channels differ, which can be heard: {listed}"]
    return []
