"""Captions of segments: from their tags, from an audio language model, and other wordings of what is known.

A caption depends on its own segment alone, never on what stands beside it.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from importlib import import_module
from random import Random
from typing import TYPE_CHECKING, Any, NamedTuple

from data_prep.builtin.captions import article, listed
from data_prep.stages.captions.tag_words import CATEGORIES, GENRES, INSTRUMENTS, MOODS, NAMES, TEMPI, USES, VOCALS
from data_prep.track import Rejected, Rejection
from ssmttm.errors import UserError

if TYPE_CHECKING:
    from torch import Tensor

    from ssmttm.text.captioner import AudioCaptioner

Rephraser = Callable[[list[str]], list[list[str]]]
Sound = tuple["Tensor", int]  # [C, S] and Hz
# What a hook of somebody's own may raise.
_HOOK_ERRORS = (
    ArithmeticError, AssertionError, AttributeError, LookupError, OSError, RuntimeError, TypeError, ValueError,
)  # fmt: skip


@dataclass(frozen=True)
class CaptionOptions:
    """How segments get captions.

    Attributes:
        templates: captions made of the tags, at most, where the source gives none.
        captioner: an audio language model that adds one: a folder or a hub name, such as Qwen/Qwen2-Audio-7B-Instruct;
            empty for none.
        prompt: what it is asked; empty: `ssmttm.text.captioner.PROMPT`.
        batch: clips at a time.
        max_new_tokens: its longest caption.
        rephrase: `package.module:function` that gives other wordings, list[str] -> list[list[str]]; empty for none.
        instrumental: leave out tags of voices, as when they were removed.
        device: where the captioner runs.
    """

    templates: int = 3
    captioner: str = ""
    prompt: str = ""
    batch: int = 4
    max_new_tokens: int = 256
    rephrase: str = ""
    instrumental: bool = False
    device: str = "cpu"

    def facts(self) -> dict[str, Any]:
        """What decides the captions, as JSON. Raises UserError if the captioner or the hook is not there."""
        facts = asdict(self)
        del facts["device"]
        if self.captioner:
            from ssmttm.text.captioner import PROMPT, captioner_fingerprint, captioner_folder

            facts["prompt"] = self.prompt or PROMPT
            facts["fingerprint"] = captioner_fingerprint(captioner_folder(self.captioner))
        if self.rephrase:
            facts["rephrase_source"] = _source_of(load_rephraser(self.rephrase))
        return facts


def describe(
    ids: Sequence[str],
    known: Sequence[Sequence[str]],
    tags: Sequence[Sequence[str]],
    settings: CaptionOptions,
    sounds: Iterable[Sound] = (),
) -> tuple[list[list[str]], list[Rejection]]:
    """The captions of each segment: those known and the model's, each with its other wordings behind it; else of tags.

    Args:
        ids: of the segments.
        known: what their source says of them, which is kept as it is.
        tags: `category---name`; captions are made of them where nothing is known.
        sounds: audio [C, S] and Hz of each, read one batch at a time; needed for a captioner only.

    Returns:
        The captions, each once, and what the captioner could not do; such a segment keeps its other captions.

    Raises:
        UserError: the captioner or the rephrasing hook cannot be loaded, or the hook fails.
    """
    said: list[list[str]] = [list(captions) for captions in known]
    rejections: list[Rejection] = []
    if settings.captioner:
        for id, captions, caption in zip(ids, said, _captions(sounds, settings), strict=True):
            if fault := fault_of(caption):
                rejections.append(fault.of(id))
            else:
                captions.append(caption)
    if settings.rephrase:
        said = _with_rewordings(said, load_rephraser(settings.rephrase))
    for id, captions, given, names in zip(ids, said, known, tags, strict=True):
        if not given:
            captions += template_captions(names, id, settings.templates, settings.instrumental)
    return [list(dict.fromkeys(captions)) for captions in said], rejections


def template_captions(tags: Iterable[str], id: str, n: int = 3, instrumental: bool = False) -> list[str]:
    """Up to `n` captions in varied English of what tags say, the first one of all that fits into one.

    Args:
        tags: `category---name`; genre, instrument, mood/theme, tempo, bpm and key are understood, others left out.
        id: the same one gives the same captions.
        instrumental: leave out voices.

    Returns:
        Distinct captions; none if no tag is understood.
    """
    facts = _facts_of(tags, instrumental)
    if not any(facts):
        return []
    rng = Random(f"caption {id}")
    made: dict[str, str] = {}  # by what they say, whatever their dots and capitals
    for attempt in range(4 * n):
        text = _write(rng, _some_of(facts, rng, everything=attempt == 0), prose=attempt == 0)
        if len(made) < n:
            made.setdefault(text.rstrip(".").lower(), text)
    return list(made.values())


def fault_of(caption: str) -> Rejected | None:
    """Why a model's caption is no use: it is empty, has no words, or goes round in circles; None if it is good."""
    words = caption.lower().split()
    if not any(letter.isalpha() for letter in caption):
        return Rejected("caption", "the model said nothing" if not words else "the model gave no words")
    if len(words) > 3 and len(set(words)) == 1:
        return Rejected("caption", "the model repeats one word")
    circles = len(words) >= 16 and len(set(words)) < len(words) / 4
    if circles or (len(caption) > 8 and len(set(caption.lower()) - {" "}) <= 2):
        return Rejected("caption", "the model repeats itself")
    return None


@cache
def load_rephraser(name: str) -> Rephraser:
    """The hook that `package.module:function` names. Raises UserError if there is no such function."""
    module, _, function = name.partition(":")
    try:
        hook = getattr(import_module(module), function)
    except (ImportError, AttributeError, ValueError) as error:
        raise UserError(f"no function {name!r} to rephrase with ({error}): give package.module:function") from error
    if not callable(hook):
        raise UserError(f"{name} is no function: give package.module:function")

    def rephrase(captions: list[str]) -> list[list[str]]:
        try:
            made = hook(list(captions))
        except _HOOK_ERRORS as error:
            raise UserError(f"the rephrasing hook {name} failed ({type(error).__name__}: {error}): mend it") from error
        if not isinstance(made, list) or len(made) != len(captions):
            got = f"{len(made)} lists" if isinstance(made, list) else f"a {type(made).__name__}"
            raise UserError(f"the rephrasing hook {name} gave {got} for {len(captions)} captions: one list each")
        for wordings in made:
            if not isinstance(wordings, list) or not all(isinstance(text, str) and text.strip() for text in wordings):
                raise UserError(f"the rephrasing hook {name} gave {wordings!r:.80}: a list of texts is needed")
        return [[" ".join(text.split()) for text in wordings] for wordings in made]

    rephrase.__wrapped__ = hook  # type: ignore[attr-defined]
    return rephrase


def _with_rewordings(said: list[list[str]], rephrase: Rephraser) -> list[list[str]]:
    """Each caption with its other wordings behind it."""
    captions = list(dict.fromkeys(caption for several in said for caption in several))
    wordings = dict(zip(captions, rephrase(captions) if captions else [], strict=True))
    return [[text for caption in several for text in (caption, *wordings[caption])] for several in said]


def _captions(sounds: Iterable[Sound], settings: CaptionOptions) -> Iterator[str]:
    from ssmttm import audio

    captioner = _captioner(settings)
    rate = captioner.sample_rate
    wavs = (audio.resample(audio.to_mono(wav), hertz, rate)[0] for wav, hertz in sounds)
    for caption in captioner.captions(wavs):
        yield " ".join(caption.split())


@cache
def _captioner(settings: CaptionOptions) -> "AudioCaptioner":
    from ssmttm.text.captioner import PROMPT, AudioCaptioner

    prompt = settings.prompt or PROMPT
    return AudioCaptioner(settings.captioner, settings.device, prompt, settings.batch, settings.max_new_tokens)


def _source_of(hook: Rephraser) -> str:
    """The text of a hook, so that another one is another corpus; its name where there is no text."""
    try:
        return inspect.getsource(inspect.unwrap(hook))
    except (OSError, TypeError):
        return repr(hook)


_MOST = (2, 4, 2, 1, 1, 1, 1)  # of each kind of fact in one caption
_PLAIN = re.compile(r"\w(?:[\w&'’+#♭♯ -]|\.(?=\w))*")


class _Facts(NamedTuple):
    """What tags say, as English words; instruments and uses with their articles."""

    genres: list[str]
    instruments: list[str]
    moods: list[str]
    uses: list[str]
    tempo: list[str]  # adjectives
    bpm: list[str]
    key: list[str]


def _facts_of(tags: Iterable[str], instrumental: bool) -> _Facts:
    facts = _Facts([], [], [], [], [], [], [])
    for tag in tags:
        category, _, name = tag.partition("---")
        name = re.sub(r"\s*/\s*", " and ", " ".join(name.replace("_", " ").split()).lower())
        kind = CATEGORIES.get(category.strip().lower())
        if kind and len(name) <= 40 and _PLAIN.fullmatch(name) and not (instrumental and name in VOCALS):
            group, words = _worded(kind, name)
            if words and words not in getattr(facts, group):
                getattr(facts, group).append(words)
    return facts


def _worded(kind: str, name: str) -> tuple[str, str]:
    """The field of `_Facts` that a tag belongs to, and its words; no words for what is not understood."""
    spaced = " ".join(word.capitalize() if word in NAMES else word for word in name.split())
    if kind == "genre":
        return "genres", GENRES.get(name, spaced)
    if kind == "instrument":
        many = name.endswith("s") and not name.endswith(("ss", "bass", "brass"))
        return "instruments", INSTRUMENTS.get(name, spaced if many else article(spaced))
    if kind == "key":
        found = re.fullmatch(r"([a-g])([#b♯♭]?) ?(major|minor)", name)
        return "key", f"{found[1].upper()}{found[2]} {found[3]}" if found else ""
    if kind == "tempo" and (number := re.fullmatch(r"(\d{2,3})(?:\.\d+)?(?: ?bpm)?", name)):
        return "bpm", f"{number[1]} bpm"
    if name in TEMPI or (kind == "tempo" and name.isalpha()):
        return "tempo", spaced
    if kind == "tempo":
        return "tempo", ""
    return ("uses", USES[name]) if name in USES else ("moods", MOODS.get(name, spaced))


def _some_of(facts: _Facts, rng: Random, everything: bool) -> _Facts:
    """A few of the facts of each kind, at least one in all; `everything` leaves no kind out."""
    chosen = _Facts(*(rng.sample(group, min(len(group), most)) for group, most in zip(facts, _MOST, strict=True)))
    if not everything:
        some = [group if rng.random() < 0.65 else [] for group in chosen]
        chosen = _Facts(*some) if any(some) else chosen
    plain = [genre for genre in chosen.genres if " and " not in genre]
    return chosen._replace(genres=plain if len(plain) == 2 else chosen.genres[:1])


_WITH_PLAYERS = (
    "{np} with {players}", "{np} featuring {players}", "{np} with {players} in it", "{bare} with {players}",
    "{np} built around {players}", "This is {np} with {players}", "{np} in which one hears {players}",
    "{bare} that features {players}",
)  # fmt: skip
_WITHOUT = ("{np}", "{bare}", "This is {np}", "{bare}", "{np}")
_NOUNS = ("piece", "track", "composition", "piece of music")


def _write(rng: Random, facts: _Facts, prose: bool) -> str:
    """One caption that says all of the facts; unless `prose`, now and then as a mere list."""
    if not prose and rng.random() < 0.15 and sum(map(len, facts)) > 1:
        words = [re.sub(r"^an? ", "", word) for group in facts[:3] for word in group] + facts.tempo + facts.bpm
        return ", ".join([*words, *(f"for {use}" for use in facts.uses), *facts.key])
    apart = bool(facts.moods) and rng.random() < 0.25
    adjectives = [*facts.tempo, *([] if apart else facts.moods)]
    rng.shuffle(adjectives)
    kind = " ".join([", ".join(adjectives), listed(facts.genres) if facts.genres else ""]).strip()
    where = "".join([*(f" in {key}" for key in facts.key), *(f" at {bpm}" for bpm in facts.bpm)])
    noun = rng.choice(_NOUNS)
    slots = {"np": article(f"{kind} {noun}".strip()) + where, "bare": f"{kind} music".strip() + where}
    if facts.instruments:
        slots["players"] = listed(facts.instruments)
    text = rng.choice(_WITH_PLAYERS if facts.instruments else _WITHOUT).format(**slots)
    for use in facts.uses:
        text += rng.choice((f" for {use}", f", fit for {use}", f", made for {use}", f". It would suit {use}"))
    if apart:
        text += rng.choice((f"; the mood is {listed(facts.moods)}", f". It sounds {listed(facts.moods)}"))
    return text[0].upper() + text[1:] + rng.choice((".", ".", "")) if rng.random() < 0.75 or ". " in text else text
