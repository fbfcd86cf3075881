"""The stage `captions`: captions from tags, from an audio language model, and paraphrases by a user's function.

The captions of a segment depend on that segment alone.
"""

import inspect
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from torch import Tensor

from data_prep.shard_task import Counts
from data_prep.stages.captions.templates import template_captions
from data_prep.stages.segments import Segments, write_segments
from data_prep.tables import write_rejected
from data_prep.track import Rejected, Rejection
from ssmttm import audio
from ssmttm.errors import UserError

if TYPE_CHECKING:
    from ssmttm.text.captioner import AudioCaptioner

Rephraser = Callable[[list[str]], list[list[str]]]
_HOOK_ERRORS = (  # that a user's function may raise
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class CaptionOptions:
    """How segments get captions."""

    templates: int = 3  # maximum number of captions from tags, where the source gives no caption
    captioner: str = ""  # folder or hub name of an audio language model that adds a caption; empty for none
    prompt: str = ""  # of the captioner; empty for `ssmttm.text.captioner.PROMPT`
    batch: int = 4  # clips per batch
    max_new_tokens: int = 256
    rephrase: str = ""  # `package.module:function`, list[str] -> list[list[str]] of paraphrases; empty for none
    instrumental: bool = False  # ignore tags of vocals
    device: str = "cpu"

    def metadata(self) -> dict[str, Any]:
        """What decides the captions, as JSON. Raises UserError if the captioner or the function does not load."""
        metadata = asdict(self)
        del metadata["device"]
        if self.captioner:
            from ssmttm.text.captioner import PROMPT, captioner_fingerprint, captioner_folder

            metadata["prompt"] = self.prompt or PROMPT
            metadata["fingerprint"] = captioner_fingerprint(captioner_folder(self.captioner))
        if self.rephrase:
            metadata["rephrase_source"] = _source_code(load_rephraser(self.rephrase))
        return metadata


def caption_shard(options: CaptionOptions, segments: Segments, folder: Path) -> Counts:
    """Write the rows with their captions. A segment without a usable caption of the model keeps its others."""
    rows = segments.read()
    ids = [row["id"] for row in rows]
    known, tags = ([row[name] or [] for row in rows] for name in ("captions", "tags"))
    clips = (audio.read(segments.audio / row["audio"]) for row in rows)
    captions, rejected = make_captions(ids, known, tags, options, clips)
    write_segments(folder, [row | {"captions": texts} for row, texts in zip(rows, captions, strict=True)])
    write_rejected(folder, "captions", rejected)
    return {"segments": len(rows), "rejected": len(rejected), "captions": sum(map(len, captions))}


def make_captions(
    ids: Sequence[str],
    known: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]],
    options: CaptionOptions,
    clips: Iterable[tuple[Tensor, int]] = (),
) -> tuple[list[list[str]], list[Rejection]]:
    """Caption segments: the known captions, the model's, paraphrases of both; from tags where nothing is known.

    Args:
        ids: of the segments.
        known: captions of the source; they are kept.
        tags: `category---name`.
        clips: audio [C, S] and rate of each segment, read one batch at a time; only for a captioner.

    Returns:
        The captions of each segment without duplicates, and the rejected captions of the model.

    Raises:
        UserError: the captioner or the function does not load, or the function fails.
    """
    captions = [list(texts) for texts in known]
    rejections: list[Rejection] = []
    if options.captioner:
        for id, texts, caption in zip(ids, captions, _model_captions(clips, options), strict=True):
            if rejected := check_caption(caption):
                rejections.append(rejected.for_item(id))
            else:
                texts.append(caption)
    if options.rephrase:
        captions = _with_paraphrases(captions, load_rephraser(options.rephrase))
    for id, texts, given, names in zip(ids, captions, known, tags, strict=True):
        if not given:
            texts += template_captions(names, id, options.templates, options.instrumental)
    return [list(dict.fromkeys(texts)) for texts in captions], rejections


def check_caption(caption: str) -> Rejected | None:
    """Why a caption of the model cannot be used: empty, without words or repetitive; None if it can."""
    words = caption.lower().split()
    if not any(letter.isalpha() for letter in caption):
        return Rejected("caption", "the model's caption is empty" if not words else "the model's caption has no words")
    if len(words) > 3 and len(set(words)) == 1:
        return Rejected("caption", "the model's caption repeats one word")
    few_words = len(words) >= 16 and len(set(words)) < len(words) / 4
    if few_words or (len(caption) > 8 and len(set(caption.lower()) - {" "}) <= 2):
        return Rejected("caption", "the model's caption repeats itself")
    return None


@cache
def load_rephraser(name: str) -> Rephraser:
    """The function `package.module:function`, with checked results. Raises UserError if it does not exist."""
    module, _, function = name.partition(":")
    try:
        hook = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function {name!r} for --rephrase ({error}): give package.module:function") from error
    if not callable(hook):
        raise UserError(f"{name} is not a function: give package.module:function")

    def rephrase(captions: list[str]) -> list[list[str]]:
        try:
            results = hook(list(captions))
        except _HOOK_ERRORS as error:
            raise UserError(f"the function {name} of --rephrase failed ({type(error).__name__}: {error})") from error
        if not isinstance(results, list) or len(results) != len(captions):
            got = f"{len(results)} lists" if isinstance(results, list) else f"a {type(results).__name__}"
            raise UserError(f"the function {name} of --rephrase must return one list per caption, got {got} for "
                            f"{len(captions)} captions")  # fmt: skip
        for texts in results:
            if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
                raise UserError(f"the function {name} of --rephrase must return lists of texts, got {texts!r:.80}")
        return [[" ".join(text.split()) for text in texts] for texts in results]

    rephrase.__wrapped__ = hook  # type: ignore[attr-defined]
    return rephrase


def _with_paraphrases(captions: list[list[str]], rephrase: Rephraser) -> list[list[str]]:
    """Each caption followed by its paraphrases."""
    distinct = list(dict.fromkeys(text for texts in captions for text in texts))
    paraphrases = dict(zip(distinct, rephrase(distinct) if distinct else [], strict=True))
    return [[other for text in texts for other in (text, *paraphrases[text])] for texts in captions]


def _model_captions(clips: Iterable[tuple[Tensor, int]], options: CaptionOptions) -> Iterator[str]:
    captioner = _captioner(options)
    wavs = (audio.resample(audio.to_mono(wav), rate, captioner.sample_rate)[0] for wav, rate in clips)
    for caption in captioner.captions(wavs):
        yield " ".join(caption.split())


@cache
def _captioner(options: CaptionOptions) -> "AudioCaptioner":
    from ssmttm.text.captioner import PROMPT, AudioCaptioner

    prompt = options.prompt or PROMPT
    return AudioCaptioner(options.captioner, options.device, prompt, options.batch, options.max_new_tokens)


def _source_code(function: Rephraser) -> str:
    """The source code of a function, so that a change is noticed; its name where there is none."""
    try:
        return inspect.getsource(inspect.unwrap(function))
    except (OSError, TypeError):
        return repr(function)
