"""Arguments of the pipeline, checked before torch is imported or weights are loaded."""

import math
import unicodedata
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from numbers import Integral, Real
from operator import index, itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ssmttm.audio.notation import beats_of, check_bpm, parse_key, parse_metre
from ssmttm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ssmttm.generation.editing.continuation import AudioInput

MAX_SEED = 2**32 - 1  # torch's CPU generator uses 32 bits of a seed
MAX_DURATION = 600.0  # seconds
Prompt = str | Mapping[str, float]  # a caption, or captions and their weights in a blend
SAMPLING = ("guidance_scale", "temperature", "top_k", "top_p", "min_p")
CONTROLS = ("bpm", "key", "metre")
CHANGEABLE = ("prompt", "negative_prompt", *SAMPLING, *CONTROLS)  # while the music plays
_EXAMPLE = "'a slow waltz in D minor on a music box'"


@dataclass(frozen=True)
class Sampling:
    """How tokens are sampled. Raises UserError if a value is out of its range.

    temperature: > 0. top_k: number of codes kept, 0 for all. top_p: probability mass kept, in (0, 1]. min_p: fraction
    of the most likely code's probability below which codes are dropped, in [0, 1) (arXiv 2407.01082).
    guidance_scale: >= 0; 1 samples the conditional distribution in one pass, 0 the unconditional one.
    """

    temperature: float = 1.0
    top_k: int = 250
    top_p: float = 1.0
    guidance_scale: float = 3.0
    min_p: float = 0.0

    def __post_init__(self) -> None:
        for name in SAMPLING:
            value, kind = getattr(self, name), (Integral if name == "top_k" else Real)
            if isinstance(value, bool) or not isinstance(value, kind):
                raise UserError(f"{name} must be a {'whole ' if kind is Integral else ''}number, got {value!r}")
        if not (math.isfinite(self.temperature) and self.temperature > 0):
            raise UserError(f"temperature must be above 0, got {self.temperature} (greedy sampling is top_k 1)")
        if self.top_k < 0:
            raise UserError(f"top_k must be at least 0 (0 keeps all codes), got {self.top_k}")
        if not 0 < self.top_p <= 1:
            raise UserError(f"top_p must be in (0, 1] (1 keeps all codes), got {self.top_p}")
        if not 0 <= self.min_p < 1:
            raise UserError(f"min_p must be in [0, 1) (0 keeps all codes), got {self.min_p}")
        if not (math.isfinite(self.guidance_scale) and self.guidance_scale >= 0):
            raise UserError(f"guidance must be at least 0 (1: no guidance, 3 is usual), got {self.guidance_scale}")


@dataclass(frozen=True, kw_only=True)
class MusicOptions:
    """What calls and streams have in common besides prompts and seeds; see `MusicPipeline.__call__`. They are checked
    when a `Request` is made of them. Settings of the sampling that are None are the model's."""

    duration: float | Sequence[float] | None = None
    guidance_scale: float | None = None
    temperature: float | None = None
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None
    bpm: float | None = None
    key: str | None = None
    metre: str | None = None
    bars: float | None = None
    melody: "Tensor | None" = None
    schedule: Sequence[tuple[float, Mapping[str, Any]]] = ()
    diffusion_steps: int | None = None
    continue_from: "AudioInput | None" = None

    @property
    def sampling(self) -> dict[str, Any]:
        """The settings of the sampling, None where they are the model's."""
        return {name: getattr(self, name) for name in SAMPLING}


@dataclass(frozen=True)
class Request:
    """One clip per prompt, with one seed each.

    duration: in seconds, of the longest; None: without an end. durations: one per prompt; None: all are the same.
    prompts: a caption, or captions with weights. negative_prompts: one per prompt; "" is the null condition.
    bpm: beats per minute; key: such as "D minor"; metre: such as "3/4"; melody: audio [channels, S]. Each is for models
    trained with it, see `MusicPipeline`. schedule: seconds of new music, and what changes there. drawn: of every item,
    those of bpm, key and metre that the model drew from its caption; None: this request has none drawn. is_whole: the
    clips begin and end as pieces do, not as parts of one.
    """

    prompts: list[Prompt]
    duration: float | None
    seeds: list[int]
    sampling: Sampling
    negative_prompts: list[str]
    bpm: float | None = None
    melody: "Tensor | None" = None
    key: str | None = None
    metre: str | None = None
    schedule: Sequence[tuple[float, Mapping[str, Any]]] = ()
    drawn: Sequence[Mapping[str, Any]] | None = None
    is_whole: bool = True
    durations: Sequence[float] | None = None

    @classmethod
    def create(
        cls, prompts: Prompt | Sequence[Prompt], duration: float | Sequence[float] | None, seeds: int | Iterable[int],
        sampling: Sampling, max_duration: float = MAX_DURATION, bpm: float | None = None,
        melody: "Tensor | None" = None, negative_prompts: str | Sequence[str] | None = None, key: str | None = None,
        metre: str | None = None, schedule: Sequence[tuple[float, Mapping[str, Any]]] = (),
    ) -> "Request":  # fmt: skip
        """Expand shorthand (one prompt as a string; one seed s for s, s + 1, ...; one negative prompt for all) and
        check every value. Raises UserError if a prompt is empty or not text, a value is out of range, seeds, durations
        or negative prompts and prompts differ in number."""
        prompts = [prompts] if isinstance(prompts, str | Mapping) else list(prompts)
        if isinstance(seeds, Iterable):
            seeds = [index(seed) for seed in seeds]
        else:
            seeds = [index(seeds) + item for item in range(len(prompts))]
        if isinstance(negative_prompts, str):
            negatives = [negative_prompts] * len(prompts)
        else:
            negatives = [""] * len(prompts) if negative_prompts is None else list(negative_prompts)
        _check_prompts(prompts)
        if len(negatives) != len(prompts):
            raise UserError(f"got {len(negatives)} negative prompts for {len(prompts)} prompts: give one per prompt")
        for text in negatives:
            _check_text(text, "the negative prompt")
        durations = list(duration) if isinstance(duration, Sequence) else None
        if durations is not None and len(durations) != len(prompts):
            raise UserError(f"got {len(durations)} durations for {len(prompts)} prompts: give one per prompt, or one")
        every = durations or ([] if duration is None or isinstance(duration, Sequence) else [duration])
        for seconds in every:
            _check_duration(seconds, max_duration)
        longest = max(every) if every else None
        if len(seeds) != len(prompts):
            raise UserError(f"got {len(seeds)} seeds for {len(prompts)} prompts: give one per prompt, or one number")
        for seed in seeds:
            check_seed(seed)
        check_bpm(bpm)
        if melody is not None and (melody.ndim != 2 or not melody.numel() or not bool(melody.isfinite().all())):
            raise UserError(f"melody must be finite audio [channels, samples], got shape {list(melody.shape)}")
        if key is not None:
            parse_key(key)
        if metre is not None:
            parse_metre(metre)
        request = cls(
            prompts, longest, seeds, sampling, negatives, bpm, melody, key, metre, sorted_schedule(schedule),
            durations=durations,
        )  # fmt: skip
        for seconds, changes in request.schedule:
            if not (math.isfinite(seconds) and 0 <= seconds < min(every, default=math.inf)):
                raise UserError(f"there is no second {seconds:g} in the music (--at, schedule): give one within it")
            request.changed(**changes)
        return request

    def changed(self, **changes: Any) -> "Request":
        """The request with other words or settings for all clips, checked. Raises UserError for one that cannot change
        while the music plays (see CHANGEABLE) or is out of its range."""
        if unknown := changes.keys() - set(CHANGEABLE):
            raise UserError(f"{min(unknown)} cannot change while the music plays: choose from {', '.join(CHANGEABLE)}")
        prompts, negatives, n_items = self.prompts, self.negative_prompts, len(self.prompts)
        if "prompt" in changes:
            prompts = [changes["prompt"]] * n_items
        if "negative_prompt" in changes:
            negatives = [changes["negative_prompt"]] * n_items
        sampling = replace(self.sampling, **{name: changes[name] for name in SAMPLING if name in changes})
        controls = {name: changes.get(name, getattr(self, name)) for name in CONTROLS}
        request = Request.create(
            prompts, self.duration, self.seeds, sampling, math.inf, melody=self.melody, negative_prompts=negatives,
            **controls,
        )  # fmt: skip
        return replace(request, schedule=self.schedule, drawn=self.drawn, is_whole=self.is_whole)

    def controls_of(self, item: int) -> dict[str, Any]:
        """Those of bpm, key and metre that an item has: as given, else as drawn."""
        given = {name: value for name in CONTROLS if (value := getattr(self, name)) is not None}
        return given if self.drawn is None else {**self.drawn[item], **given}

    def select(self, items: Sequence[int]) -> "Request":
        """The request of some of its items."""
        names = ("prompts", "seeds", "negative_prompts", "drawn", "durations")
        values = {name: value for name in names if (value := getattr(self, name)) is not None}
        selected: dict[str, Any] = {name: [value[item] for item in items] for name, value in values.items()}
        return replace(self, **selected)

    def batches(self, size: int) -> Iterator["Request"]:
        """The same request in batches of `size` prompts."""
        n = len(self.prompts)
        for first in range(0, n, size):
            yield self.select(range(first, min(first + size, n)))

    def by_duration(self) -> Iterator[tuple[list[int], "Request"]]:
        """The items of each duration, and their request."""
        durations: Sequence[float | None] = self.durations or [self.duration] * len(self.prompts)
        for duration in dict.fromkeys(durations):
            items = [item for item, own in enumerate(durations) if own == duration]
            yield items, replace(self.select(items), duration=duration, durations=None)


def read_prompts(path: Path) -> list[str]:
    """Prompts of a UTF-8 file, one per line; blank lines and lines that begin with # are skipped. Raises UserError if
    the file cannot be read, has no prompt, or a line is not text."""
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
            raise UserError(f"{path}, line {number} has control characters: write plain text, one prompt per line")
        if text and not text.startswith("#"):
            prompts.append(text)
    if not prompts:
        raise UserError(f"{path} has no prompt: write one per line (lines that begin with # are comments)")
    return prompts


def sorted_schedule(
    schedule: Sequence[tuple[float, Mapping[str, Any]]],
) -> list[tuple[float, dict[str, Any]]]:
    """Changes in the order of their times. Raises UserError if one is not a time and a mapping."""
    try:
        return sorted(((float(seconds), dict(changes)) for seconds, changes in schedule), key=itemgetter(0))
    except (TypeError, ValueError) as error:
        example = "[(10.0, {'prompt': 'driving techno'})]"
        raise UserError(f"a schedule lists seconds and what changes, such as {example}, got {schedule}") from error


def bars_duration(bars: float, bpm: float | None, metre: str | None = None) -> float:
    """Seconds of a number of bars, of 4 beats unless a metre is given. Raises UserError without a tempo."""
    if bpm is None:
        raise UserError("a length in bars needs a tempo: give bpm (--bpm), such as 120")
    check_bpm(bpm)
    if not (math.isfinite(bars) and bars > 0):
        raise UserError(f"bars must be above 0, got {bars}")
    return bars * beats_of(parse_metre(metre or "4/4")) * 60 / bpm


def parse_region(text: str) -> tuple[float, float]:
    """Seconds of a region such as "5:8". Raises UserError if it is none."""
    start, _, stop = text.partition(":")
    try:
        region = float(start), float(stop)
    except ValueError:
        region = math.nan, math.nan
    if not 0 <= region[0] < region[1] < math.inf:
        raise UserError(f"a region is two times in seconds such as 5:8, got {text}")
    return region


def parse_schedule(words: Sequence[Sequence[str]]) -> list[tuple[float, dict[str, str]]]:
    """The schedule of pairs of seconds and a prompt. Raises UserError if a time is no number, or a prompt is empty."""
    schedule = []
    for seconds, prompt in words:
        try:
            schedule.append((float(seconds), {"prompt": prompt}))
        except ValueError as error:
            raise UserError(f"--at takes seconds and a prompt, such as 10 'driving techno', got {seconds}") from error
        if not prompt.strip():
            raise UserError(f"the prompt of --at {seconds} is empty: describe the music, such as {_EXAMPLE}")
    return schedule


def parse_adapter(text: str) -> tuple[str, float]:
    """The folder and the strength of "DIR" or "DIR:STRENGTH". Raises UserError if the strength of a folder is no
    number."""
    folder, colon, strength = text.rpartition(":")
    try:
        return (folder, float(strength)) if colon else (text, 1.0)
    except ValueError as error:
        if Path(folder).is_dir() and not Path(text).exists():
            raise UserError(f"the strength of --adapter {text} must be a number, as {folder}:0.5") from error
        return text, 1.0


def blend_weights(prompt: Prompt) -> dict[str, float]:
    """The captions of a prompt and their weights, with a sum of 1."""
    if isinstance(prompt, str):
        return {prompt: 1.0}
    total = sum(prompt.values())
    return {text: weight / total for text, weight in prompt.items()}


def check_seed(seed: int) -> None:
    """Raises UserError unless the seed has 32 bits."""
    if not 0 <= seed <= MAX_SEED:
        raise UserError(f"seed must be in [0, {MAX_SEED}], got {seed}")


def _check_duration(duration: float, max_duration: float) -> None:
    if not (math.isfinite(duration) and duration > 0):
        raise UserError(f"duration must be above 0 seconds, got {duration}")
    if not duration <= max_duration:
        limit = f"at most {max_duration:g} s (--max-duration, or the pipeline's max_duration)"
        raise UserError(f"duration must be {limit}, got {duration:g} s")


def _check_prompts(prompts: Sequence[Prompt]) -> None:
    if not prompts:
        raise UserError(f"no prompt: describe the music, such as {_EXAMPLE}")
    for number, prompt in enumerate(prompts, 1):
        if not isinstance(prompt, str | Mapping):
            raise UserError(f"prompt {number} must be text, or captions with their weights, got {prompt!r}")
        texts = [prompt] if isinstance(prompt, str) else list(prompt)
        if not any(text.strip() for text in texts):
            raise UserError(f"prompt {number} is empty: describe the music, such as {_EXAMPLE}")
        for text in texts:
            _check_text(text, f"prompt {number}")
        weights = [] if isinstance(prompt, str) else list(prompt.values())
        if weights and not (min(weights) >= 0 and 0 < sum(weights) < math.inf):
            raise UserError(f"prompt {number}: weights must be at least 0, not all 0 and finite, got {weights}")


def _check_text(text: str, name: str) -> None:
    if any("\ud800" <= character <= "\udfff" for character in text):
        raise UserError(f"{name} is not valid UTF-8: type it again, or use a prompts file")
