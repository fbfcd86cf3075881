"""Export to webMUSHRA 1.4: a YAML of its pages, and the clips as WAV files under blind names.

webMUSHRA's paired comparison needs a reference and cannot ask for a preference between two clips; so a pair is one
page on which both clips are rated.
"""

import random
from html import escape
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.listening.design import check_kind, find_systems
from ssmttm.listening.page import AXES, LOUDNESS

_SCALE = [{"value": str(i), "label": word} for i, word in enumerate(("bad", "poor", "fair", "good", "excellent"), 1)]


def export(folders: dict[str, Path], out: Path, kind: str = "both", seed: int = 0) -> tuple[list[Path], list[str]]:
    """Write OUT/listening.yaml, for webMUSHRA's configs folder, OUT/listening/*.wav, and OUT/key.yaml.

    Ratings are likert_single_stimulus pages, one for each clip and axis; a pair is a likert_multi_stimulus page, where
    the clip with the higher rating is preferred. webMUSHRA shuffles the pages and the clips of a page.
    Returns the files, and notes on skipped clips.
    """
    check_kind(kind)
    found, skipped = find_systems(folders)
    rng = random.Random(seed)
    key: dict[str, dict[str, str]] = {}
    ratings: list[Any] = ["random"]
    pairs: list[Any] = ["random"]
    for prompt, systems in tqdm(found.items(), desc="clips", unit="prompt"):
        try:
            wavs = {system: audio.read_music(path, mono=False) for system, path in systems.items()}
        except UserError as error:
            skipped.append(str(error))
            continue
        names = {}
        for system, (wav, rate) in wavs.items():
            name = f"{rng.getrandbits(48):012x}"
            audio.write(out / "listening" / f"{name}.wav", audio.normalise_loudness(wav, rate, LOUDNESS), rate)
            names[system] = f"configs/resources/listening/{name}.wav"
            key[name] = {"system": system, "prompt": prompt, "file": str(systems[system])}
        if kind in ("mos", "both"):
            ratings += [_rating(prompt, file, axis) for file in names.values() for axis in AXES]
        if kind in ("pairs", "both"):
            listed = list(names.values())
            pairs += [_pair(prompt, a, b) for i, a in enumerate(listed) for b in listed[i + 1 :]]
    if not key:
        raise UserError(f"no prompt has a usable clip of every system; last error: {skipped[-1]}")
    pages: list[Any] = [
        {"type": "generic", "id": "welcome", "name": "Welcome", "content": "You will hear short clips of music."},
        {
            "type": "volume", "id": "volume", "name": "Volume", "content": "Set a comfortable volume.",
            "stimulus": f"configs/resources/listening/{next(iter(key))}.wav", "defaultVolume": 0.5,
        },
        *([ratings] if len(ratings) > 1 else []),
        *([pairs] if len(pairs) > 1 else []),
        {"type": "finish", "name": "Thank you", "content": "Your answers are sent.", "showResults": False,
         "writeResults": True},
    ]  # fmt: skip
    test = {
        "testname": "Listening test", "testId": f"listening-{seed}", "bufferSize": 2048, "stopOnErrors": True,
        "showButtonPreviousPage": False, "remoteService": "service/write.php", "pages": pages,
    }  # fmt: skip
    for path, document in ((out / "listening.yaml", test), (out / "key.yaml", key)):
        write_text(path, yaml.safe_dump(document, sort_keys=False, allow_unicode=True))
    notes = [f"skipped: {what}" for what in skipped]
    return [out / "listening.yaml", out / "listening", out / "key.yaml"], notes


def _rating(prompt: str, file: str, axis: str) -> dict[str, Any]:
    name = Path(file).stem
    return {
        "type": "likert_single_stimulus", "id": f"{axis}_{name}", "name": axis.capitalize(), "content": escape(prompt),
        "mustRate": True, "mustPlayback": "ended", "stimuli": {name: file}, "response": _SCALE,
    }  # fmt: skip


def _pair(prompt: str, a: str, b: str) -> dict[str, Any]:
    names = Path(a).stem, Path(b).stem
    return {
        "type": "likert_multi_stimulus", "id": f"pair_{names[0]}_{names[1]}", "name": "Which do you prefer?",
        "content": f"{escape(prompt)}<br>Rate the preferred clip higher, or both the same.", "mustRate": True,
        "mustPlayback": "ended", "stimuli": dict(zip(names, (a, b), strict=True)), "response": _SCALE,
    }  # fmt: skip
