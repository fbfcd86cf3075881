"""What may be asked of a pipeline, checked before torch is imported or a weight loaded."""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from operator import index
from pathlib import Path
from typing import TYPE_CHECKING

from ssmttm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

MAX_SEED = 2**32 - 1  # torch's CPU generator reads 32 bits of a seed
MAX_DURATION = 600.0  # seconds
_EXAMPLE = "'a slow waltz in D minor on a music box'"


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn.

    temperature: > 0. top_k: codes kept, 0 for all. top_p: probability kept, in (0, 1]. guidance_scale: >= 0; 1 samples
    the conditional distribution as it is (and halves the work), 0 the unconditional one.

    Raises:
        UserError: a value is out of its range.
    """

    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 1.0
    guidance_scale: float = 3.0

    def __post_init__(self) -> None:
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature is {self.temperature}: give a number above 0 (greedy sampling is top_k 1)")
        if self.top_k < 0:
            raise UserError(f"top_k is {self.top_k}: give 0 (keep all codes) or the number of codes to keep")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}: give a number above 0 and at most 1 (1 keeps all codes)")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UserError(f"guidance is {self.guidance_scale}: give 0 or more (1 means no guidance, 3 is usual)")


@dataclass(frozen=True)
class Request:
    """One piece for each prompt, all of one duration in seconds, with one seed each.

    tempo: beats a minute. melody: audio [channels, S]. Both for models trained with them, see `MusicPipeline`.
    """

    prompts: list[str]
    duration: float
    seeds: list[int]
    sampling: Sampling
    tempo: float | None = None
    melody: "Tensor | None" = None

    @classmethod
    def checked(
        cls,
        prompts: str | Sequence[str],
        duration: float,
        seeds: int | Iterable[int],
        sampling: Sampling,
        max_duration: float = MAX_DURATION,
    ) -> "Request":
        """Settle shorthand (one prompt as a string; one seed s for s, s + 1, ...) and check every value.

        Raises:
            UserError: a prompt is empty or no text, a number is out of range, seeds and prompts differ in number.
        """
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
        if isinstance(seeds, Iterable):
            seeds = [index(seed) for seed in seeds]
        else:
            seeds = [index(seeds) + item for item in range(len(prompts))]
        _check_prompts(prompts)
        if not (math.isfinite(duration) and duration > 0):
            raise UserError(f"duration is {duration} s: give a number of seconds above 0")
        if not duration <= max_duration:
            raise UserError(
                f"duration is {duration:g} s, the maximum is {max_duration:g} s: ask for less, or raise the maximum "
                "(--max-duration, or the pipeline's max_duration)"
            )
        if len(seeds) != len(prompts):
            raise UserError(f"{len(seeds)} seeds for {len(prompts)} prompts: give one a prompt, or a single number")
        for seed in seeds:
            if not 0 <= seed <= MAX_SEED:
                raise UserError(f"seed {seed} is out of range: give whole numbers from 0 to {MAX_SEED}")
        return cls(prompts, duration, seeds, sampling)

    def batches(self, size: int) -> Iterator["Request"]:
        """The same request in parts of `size` prompts."""
        for first in range(0, len(self.prompts), size):
            part = slice(first, first + size)
            yield replace(self, prompts=self.prompts[part], seeds=self.seeds[part])


def read_prompts(path: Path) -> list[str]:
    """One prompt a line in UTF-8; blank lines and lines that begin with # are skipped.

    Raises:
        UserError: the file cannot be read, holds no prompt, or a line is no text.
    """
    try:
        lines = path.read_bytes().removeprefix(b"\xef\xbb\xbf").split(b"\n")
    except OSError as error:
        raise UserError(f"cannot read the prompts file {path}: {error.strerror}") from error
    prompts = []
    for number, line in enumerate(lines, 1):
        try:
            text = line.decode().strip()
        except UnicodeDecodeError as error:
            raise UserError(f"{path}, line {number} is not UTF-8 text: save the file as UTF-8") from error
        if any(unicodedata.category(character) == "Cc" and character != "\t" for character in text):
            raise UserError(f"{path}, line {number} holds control characters: write plain text, one prompt a line")
        if text and not text.startswith("#"):
            prompts.append(text)
    if not prompts:
        raise UserError(f"{path} holds no prompt: write one a line (lines that begin with # are comments)")
    return prompts


def _check_prompts(prompts: list[str]) -> None:
    if not prompts:
        raise UserError(f"no prompt: describe the music, such as {_EXAMPLE}")
    for number, prompt in enumerate(prompts, 1):
        if not prompt.strip():
            raise UserError(f"prompt {number} is empty: describe the music, such as {_EXAMPLE}")
        if any("\ud800" <= character <= "\udfff" for character in prompt):
            raise UserError(f"prompt {number} is broken UTF-8: type it again, or put it in a prompts file")
