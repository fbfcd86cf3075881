"""The same test for webMUSHRA 1.4: a YAML of its pages, and the clips as WAV files under blind names."""

import random
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from ssmttm import audio
from ssmttm.files import write_text
from ssmttm.listening.design import find_systems
from ssmttm.listening.page import AXES, LOUDNESS

_SCALE = [{"value": str(i), "label": word} for i, word in enumerate(("bad", "poor", "fair", "good", "excellent"), 1)]


def export(folders: dict[str, Path], out: Path, kind: str = "both", seed: int = 0) -> list[Path]:
    """Write OUT/listening.yaml, for webMUSHRA's configs folder, OUT/listening/*.wav, and OUT/key.yaml.

    Ratings are likert_single_stimulus pages, one a clip and axis; preferences paired_comparison pages of the first two
    systems, then the next, without a reference; webMUSHRA shuffles both itself.

    Raises:
        UserError: systems that cannot be compared, or a clip that cannot be read.
    """
    found, _ = find_systems(folders)
    rng = random.Random(seed)
    key: dict[str, dict[str, str]] = {}
    ratings: list[Any] = ["random"]
    pairs: list[Any] = ["random"]
    for prompt, systems in tqdm(found.items(), desc="clips", unit="prompt"):
        names = {}
        for system, path in systems.items():
            name = f"{rng.getrandbits(48):012x}"
            wav, rate = audio.read(path, mono=False)
            audio.write(out / "listening" / f"{name}.wav", audio.normalise(wav, rate, LOUDNESS), rate)
            names[system] = f"configs/resources/listening/{name}.wav"
            key[name] = {"system": system, "prompt": prompt, "file": str(path)}
        if kind in ("mos", "both"):
            ratings += [_rating(prompt, file, axis) for file in names.values() for axis in AXES]
        if kind in ("pairs", "both"):
            listed = list(names.values())
            pairs += [_pair(prompt, a, b) for i, a in enumerate(listed) for b in listed[i + 1 :]]
    pages: list[Any] = [
        {"type": "generic", "id": "welcome", "name": "Welcome", "content": "You will hear short pieces of music."},
        {
            "type": "volume", "id": "volume", "name": "Volume", "content": "Play this until it is comfortable.",
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
    return [out / "listening.yaml", out / "listening", out / "key.yaml"]


def _rating(prompt: str, file: str, axis: str) -> dict[str, Any]:
    name = Path(file).stem
    return {
        "type": "likert_single_stimulus", "id": f"{axis}_{name}", "name": axis.capitalize(), "content": prompt,
        "mustPlayback": "ended", "stimuli": {name: file}, "response": _SCALE,
    }  # fmt: skip


def _pair(prompt: str, a: str, b: str) -> dict[str, Any]:
    names = Path(a).stem, Path(b).stem
    return {
        "type": "paired_comparison", "id": f"pair_{names[0]}_{names[1]}", "name": "Which do you prefer?",
        "content": prompt, "unforced": "no preference", "showWaveform": False, "enableLooping": False,
        "reference": a, "stimuli": dict(zip(names, (a, b), strict=True)),
    }  # fmt: skip
