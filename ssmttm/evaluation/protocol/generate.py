"""A model's answers to a list of prompts as files, each with its record; what is there already is not made again."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssmttm import audio
from ssmttm.errors import UserError
from ssmttm.files import write_text
from ssmttm.generation.output import read_sidecar, sidecar_path
from ssmttm.generation.pipeline import MusicPipeline


@dataclass(frozen=True)
class Decoding:
    """How pieces are sampled; piece i has the seed `first_seed` + i."""

    duration: float
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    first_seed: int

    def settings(self) -> dict[str, Any]:
        """As records and fingerprints hold it, but for the seed."""
        names = ("duration", "guidance_scale", "temperature", "top_k", "top_p")
        return {name: getattr(self, name) for name in names}


def generate(
    pipeline: MusicPipeline, prompts: Sequence[tuple[str, str]], decoding: Decoding, folder: Path, batch: int
) -> list[Path]:
    """One wav a prompt, named as it is.

    Args:
        prompts: (name, caption) of each.
        folder: where FILE.wav and FILE.json go; a pair made with the same settings by the same model is kept.
        batch: pieces sampled together.

    Raises:
        UserError: the folder holds pieces of another model or of other settings.
    """
    names = [name for name, _ in prompts]
    paths = [folder / f"{name}.wav" for name in names]
    records = [
        sidecar_path(caption, decoding.first_seed + i, decoding.settings(), pipeline.facts)
        for i, (_, caption) in enumerate(prompts)
    ]
    left = [i for i, path in enumerate(paths) if not _is_made(path, records[i])]
    with tqdm(total=len(prompts), initial=len(prompts) - len(left), desc="generating", unit="piece") as bar:
        for start in range(0, len(left), batch):
            lot = left[start : start + batch]
            out = pipeline(
                [prompts[i][1] for i in lot], seeds=[decoding.first_seed + i for i in lot], **decoding.settings()
            )
            for i, wav in zip(lot, out.audios, strict=True):
                audio.write(paths[i], wav, out.sample_rate)
                write_text(paths[i].with_suffix(".json"), json.dumps(records[i], indent=1, ensure_ascii=False) + "\n")
            bar.update(len(lot))
    return paths


def _is_made(path: Path, record: dict[str, Any]) -> bool:
    """Whether the piece is there (its record is written last)."""
    made = read_sidecar(path)
    if not made:
        return False
    differing = [key for key in record if key != "created" and made.get(key) != record[key]]
    if differing:
        raise UserError(f"{path} was made otherwise ({', '.join(differing)} differ): give another out=DIR")
    return path.is_file()
