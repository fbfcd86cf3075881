"""Concept coverage: the share of a prompt's concepts that an audio language model finds in the clip (arXiv 2605.21538).

The model is asked about one concept of one clip at a time and is given neither the prompt nor the system's name.
"""

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from torch import Tensor
from tqdm import tqdm

from ssmttm import audio
from ssmttm.evaluation.metrics.bootstrap import mean_interval
from ssmttm.evaluation.metrics.compute import Clip, text_hash
from ssmttm.evaluation.metrics.metric import Metric
from ssmttm.evaluation.protocol.embed_files import content_hash
from ssmttm.files import write_text
from ssmttm.text.captioner import AudioCaptioner

QUESTION = "Is {concept} the genre, an instrument, or the mood or theme of this music? Answer with yes or no."
ANSWER_TOKENS = 8
_WRITE_EVERY = 20  # answers between two writes of the cache


def concept_coverage(
    clips: Sequence[Clip], judge: AudioCaptioner, seconds: float, decoding: Mapping[str, Any], cache: Path
) -> tuple[Metric, list[str]]:
    """`ccs`: the mean over the clips of K / M, where the model answers yes to K of the M concepts of the prompt.

    Clips without concepts are left out, and an answer that is neither yes nor no counts as no. Answers are cached in
    the folder `cache` by the content of the files; `decoding` is part of the fingerprint.

    Returns:
        The metric, and notes on what was left out or unclear.
    """
    judged = [clip for clip in clips if clip.concepts]
    verdicts = [[verdict(answer) for answer in row] for row in _answers(judge, judged, seconds, cache)]
    covered = np.array([row.count("yes") / len(row) for row in verdicts])
    fingerprint = {
        "judge": "qwen2_audio",
        "weights": judge.fingerprint,
        "question": QUESTION,
        "sample_rate": judge.sample_rate,
        "clip_seconds": seconds,
        "n": len(judged),
        "prompts": text_hash(sorted(f"{clip.caption}: {', '.join(clip.concepts)}" for clip in judged)),
        **decoding,
    }
    notes = []
    if left_out := len(clips) - len(judged):
        notes.append(f"{left_out} prompts without concepts are left out of ccs")
    if unclear := sum(row.count("") for row in verdicts):
        notes.append(f"{unclear} of {sum(map(len, verdicts))} answers are neither yes nor no and count as no in ccs")
    return Metric("ccs_qwen2_audio", *mean_interval(covered), "higher", fingerprint), notes


def verdict(answer: str) -> str:
    """The first word of an answer if it is yes or no, in lower case; else an empty text."""
    words = "".join(letter if letter.isalpha() else " " for letter in answer.lower()).split()
    return words[0] if words[:1] in (["yes"], ["no"]) else ""


def _answers(judge: AudioCaptioner, clips: Sequence[Clip], seconds: float, cache: Path) -> list[list[str]]:
    """The answers about each clip's concepts."""
    asked = hashlib.sha256(f"{judge.fingerprint} {QUESTION} {seconds:g}".encode()).hexdigest()[:16]
    file = cache / f"answers-{asked}.json"
    known = _read_cache(file)
    keys = [[f"{content_hash(clip.path)} {concept}" for concept in clip.concepts] for clip in clips]
    missing = [
        (key, clip.path, concept)
        for clip, row in zip(clips, keys, strict=True)
        for key, concept in zip(row, clip.concepts, strict=True)
        if key not in known
    ]

    def questions() -> Iterator[tuple[Tensor, str]]:
        for _, path, concept in missing:
            wav, rate = audio.read(path)
            mono = audio.resample(audio.to_mono(wav[:, : round(seconds * rate)]), rate, judge.sample_rate)
            yield mono[0], QUESTION.format(concept=concept)

    answers = tqdm(judge.answers(questions()), desc="judging concepts", unit="answer", total=len(missing))
    for i, (answer, (key, _, _)) in enumerate(zip(answers, missing, strict=True), start=1):
        known[key] = answer
        if i % _WRITE_EVERY == 0 or i == len(missing):
            write_text(file, json.dumps(known, indent=1, ensure_ascii=False) + "\n")
    return [[known[key] for key in row] for row in keys]


def _read_cache(path: Path) -> dict[str, str]:
    """Answers by content and concept; a damaged file counts as empty."""
    try:
        answers: dict[str, str] = json.loads(path.read_text(encoding="utf-8"))
        return answers
    except (OSError, ValueError):
        return {}
