"""Generate a clip for each prompt, with a metadata sidecar; existing clips are kept."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from tqdm import tqdm

from ssmttm.errors import UserError
from ssmttm.generation.output import read_sidecar, sidecar, write_with_sidecar
from ssmttm.generation.pipeline import MusicPipeline


@dataclass(frozen=True)
class Decoding:
    """Sampling settings; clip i has the seed `first_seed` + i."""

    duration: float
    guidance_scale: float
    temperature: float
    top_k: int
    top_p: float
    first_seed: int
    min_p: float = 0.0

    @classmethod
    def of(cls, pipeline: MusicPipeline, duration: float, first_seed: int, **given: Any) -> "Decoding":
        """The sampling settings that are given, and the model's for those that are None."""
        return cls(duration=duration, first_seed=first_seed, **asdict(pipeline.sampling(**given)))

    def settings(self) -> dict[str, Any]:
        """The settings without the seed, as in sidecars and fingerprints, where there is a min_p only if it is used."""
        names = ("duration", "guidance_scale", "temperature", "top_k", "top_p", *(("min_p",) if self.min_p else ()))
        return {name: getattr(self, name) for name in names}


def generate(
    pipeline: MusicPipeline, prompts: Sequence[tuple[str, str]], decoding: Decoding, folder: Path, batch: int
) -> list[Path]:
    """Generate NAME.wav and NAME.json for each prompt (name, caption); existing pairs are kept."""
    names = [name for name, _ in prompts]
    paths = [folder / f"{name}.wav" for name in names]
    sidecars = [
        sidecar(caption, decoding.first_seed + i, decoding.settings(), pipeline.metadata)
        for i, (_, caption) in enumerate(prompts)
    ]
    missing = [i for i, path in enumerate(paths) if not _exists(path, sidecars[i])]
    with tqdm(total=len(prompts), initial=len(prompts) - len(missing), desc="generating", unit="clip") as bar:
        for start in range(0, len(missing), batch):
            rows = missing[start : start + batch]
            out = pipeline(
                [prompts[i][1] for i in rows], seeds=[decoding.first_seed + i for i in rows], **decoding.settings()
            )
            for i, wav in zip(rows, out.audios, strict=True):
                write_with_sidecar(paths[i], wav, out.sample_rate, sidecars[i])
            bar.update(len(rows))
    return paths


def _exists(path: Path, expected: dict[str, Any]) -> bool:
    """Whether the clip is complete: its sidecar is written last."""
    existing = read_sidecar(path)
    if not existing:
        return False
    differing = [key for key in expected if key != "created" and existing.get(key) != expected[key]]
    if differing:
        raise UserError(f"{path} has other settings ({', '.join(differing)} differ): use another out=DIR")
    return path.is_file()
