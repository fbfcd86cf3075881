"""Prompts of a built-in store, their true music, and clips of models for them, kept in a folder.

OUT/audio/true/       the first seconds of each prompt's own music
OUT/audio/codec/      the same, decoded by the codec
OUT/audio/MODEL/      clips of a model; MODEL-paraphrases for the free-form prompts
OUT/measured/         predictions and music metrics by set of clips; OUT/embeddings/ embeddings by file

Everything that exists is used again: it is found by the content of the files and the versions of the networks.
"""

import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from data_prep.builtin.paraphrases import TEMPLATES, write_paraphrases
from ssmttm import audio
from ssmttm.codecs import Codec
from ssmttm.data.store import Store
from ssmttm.errors import UserError
from ssmttm.evaluation.attributes.accuracy import ATTRIBUTES, annotations_of, expected_labels
from ssmttm.evaluation.attributes.classifiers import AttributeClassifiers, pitch_class
from ssmttm.evaluation.music.music_metrics import ClipMetrics, FolderMetrics, measure_files
from ssmttm.evaluation.protocol.balanced_prompts import balanced_prompts, names_key
from ssmttm.evaluation.protocol.decoded import decoded_files
from ssmttm.evaluation.protocol.embed_files import set_hash
from ssmttm.evaluation.protocol.generate import Decoding, generate
from ssmttm.files import write_text
from ssmttm.generation.output import write_with_sidecar
from ssmttm.generation.pipeline import MusicPipeline

RIGHT = (*ATTRIBUTES, "key")  # attributes that are measured
_SLOTS = {"family": {"solo", "lead"}, "tempo_class": {"quick", "pace", "bpm"}, "mode": {"mode", "key"}}


@dataclass(frozen=True)
class Prompt:
    """A prompt, its row of the store, and the true class of each attribute that it states."""

    name: str
    caption: str
    row: int
    expected: dict[str, str]


def caption_prompts(store: Store, split: str, n: int, seed: int) -> list[Prompt]:
    """n captions that mention lead, tempo and mode, balanced over their classes, each of another piece."""
    found = []
    for i, chosen in enumerate(balanced_prompts(store, n, seed, split, one_per_track=True)):
        annotations = annotations_of(store, chosen.row)
        key = {"key": annotations["key"]} if names_key(chosen.caption, annotations) else {}
        found.append(Prompt(f"{i:03d}", chosen.caption, chosen.row, chosen.expected | key))
    if len({store.manifest["track"][prompt.row].as_py() for prompt in found}) < n:
        raise UserError(f"{store.path} has fewer than {n} pieces in the split {split}: use fewer prompts or more hours")
    return found


def paraphrase_prompts(store: Store, captions: Sequence[Prompt], n: int, seed: int) -> list[Prompt]:
    """Free-form prompts that state lead, tempo and mode, for n of the rows of the captions; templates used evenly."""
    uses = dict.fromkeys(TEMPLATES, 0)
    found: list[Prompt] = []
    for caption in captions:
        truth = annotations_of(store, caption.row)
        options = []
        for draw in range(8):
            for text in write_paraphrases(truth, f"{seed} {caption.row} {draw}"):
                template = _template_of(text)
                if all(_slots(template) & slots for slots in _SLOTS.values()):
                    options.append((uses[template], text, template))
        if not options or len(found) == n:
            continue
        _, text, template = min(options)
        uses[template] += 1
        key = {"key": truth["key"]} if "key" in _slots(template) else {}
        found.append(Prompt(f"{len(found):03d}", text, caption.row, expected_labels(truth) | key))
    if len(found) < n:
        raise UserError(f"only {len(found)} free-form prompts for {len(captions)} pieces: ask for fewer than {n}")
    return found


def _slots(template: str) -> set[str]:
    return set(re.findall(r"\{(\w+)\}", template))


def _template_of(text: str) -> str:
    """The template that a free-form prompt was made from."""
    for template in TEMPLATES:
        fixed = [re.escape(run) for run in re.split(r"\{\w+\}", template)]
        if re.fullmatch(".+?".join(fixed), text):
            return template
    raise ValueError(f"no template gives: {text}")


def reference_files(store: Store, split: str, prompts: Sequence[Prompt], n: int) -> list[Path]:
    """Audio of up to n held-out segments of pieces that no prompt is of."""
    tracks = store.manifest["track"].to_pylist()
    prompted = {tracks[prompt.row] for prompt in prompts}
    held_out = [np.arange(len(store))] if split == "all" else [store.indices("test"), store.indices("valid")]
    rows = [int(row) for row in np.concatenate(held_out) if tracks[row] not in prompted]
    if len(rows) < 2:
        raise UserError(f"no held-out music is left beside {len(prompts)} prompts: use fewer, or more hours")
    return [store.audio_path(row) for row in rows[:n]]


def true_clips(store: Store, prompts: Sequence[Prompt], seconds: float, folder: Path) -> list[Path]:
    """The first seconds of the own music of each prompt, as WAV with the prompt in the sidecar."""
    paths = []
    for prompt in tqdm(prompts, desc="true music", unit="clip"):
        path = folder / f"{prompt.name}.wav"
        if not path.is_file():
            wav, rate = audio.read(store.audio_path(prompt.row))
            write_with_sidecar(path, wav[:, : round(seconds * rate)], rate, {"prompt": prompt.caption})
        paths.append(path)
    return paths


def decoded_clips(paths: Sequence[Path], codec: Codec, seconds: float, folder: Path) -> list[Path]:
    """The same music, decoded by a codec."""
    return decoded_files(paths, codec, seconds, folder)


def model_clips(pipeline: MusicPipeline, prompts: Sequence[Prompt], decoding: Decoding, folder: Path) -> list[Path]:
    """Clips of a model, one for each prompt."""
    return generate(pipeline, [(prompt.name, prompt.caption) for prompt in prompts], decoding, folder, batch=8)


@dataclass(frozen=True)
class Measured:
    """Predicted attributes and music metrics of a set of clips."""

    predicted: list[dict[str, Any]]  # of each clip: RIGHT and bpm
    music: FolderMetrics


def measure(paths: Sequence[Path], seconds: float, classifiers: AttributeClassifiers, cache: Path) -> Measured:
    """Predict and measure clips, or read the results of the same files and classifiers from the cache folder."""
    code = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()
    fields = ", ".join(ClipMetrics.__dataclass_fields__)
    identity = f"{set_hash(paths)} {classifiers.fingerprint} {seconds} {fields} {code}"
    file = cache / f"{hashlib.sha256(identity.encode()).hexdigest()[:16]}.json"
    if file.is_file():
        found = json.loads(file.read_text())
        clips = {path: ClipMetrics(**clip) for path, clip in found["music"].items()}
        return Measured(found["predicted"], FolderMetrics(clips, found["unreadable"]))
    predicted = []
    for path in tqdm(paths, desc=f"classifying {paths[0].parent.name}", unit="clip"):
        wav, rate = audio.read(path)
        one = classifiers.predict(wav[:, : round(seconds * rate)], rate)[0]
        predicted.append({name: getattr(one, name) for name in (*RIGHT, "bpm")})
    music = measure_files(paths, seconds)
    document = {
        "predicted": predicted,
        "music": {path: asdict(clip) for path, clip in music.clips.items()},
        "unreadable": music.unreadable,
    }
    write_text(file, json.dumps(document) + "\n")
    return Measured(predicted, music)


def right(prompts: Sequence[Prompt], predicted: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """How often each attribute that the prompts state is predicted: rate, 95 % interval (Wilson) and n."""
    from scipy.stats import binomtest

    found = {}
    for name in RIGHT:
        pairs = [(p.expected[name], one[name]) for p, one in zip(prompts, predicted, strict=True) if name in p.expected]
        if not pairs:
            continue
        hits = sum(pitch_class(a) == pitch_class(b) if name == "key" else a == b for a, b in pairs)
        interval = binomtest(hits, len(pairs)).proportion_ci(method="wilson")
        found[name] = {"rate": hits / len(pairs), "low": interval.low, "high": interval.high, "n": len(pairs)}
    return found
