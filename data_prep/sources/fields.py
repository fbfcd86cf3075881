"""Fields of a track's metadata as people name and write them: columns and keys, licences, splits, file names."""

import re
import unicodedata
from collections.abc import Iterable, Mapping
from typing import Any

from data_prep.paths import printable
from data_prep.sources.records import text, texts
from data_prep.track import Rejected
from ssmttm.data.annotations import annotation_columns
from ssmttm.errors import UserError
from ssmttm.licences import normalise

_NAMES = {
    "path": "path file_name filename file filepath file_path audio_path audio_file audio_filepath relative_path",
    "caption": "caption captions text texts prompt prompts description descriptions transcription main_caption",
    "title": "title track_title",
    "author": "author authors",
    "source_url": "source_url url link",
    "artist": "artist",
    "tags": "tags tag",
    "split": "split splits subset partition data_split dataset_split set_split",
    "id": "id",
    "bpm": "bpm",
    "key": "key musical_key",
    "metre": "metre meter time_signature",
    "bars": "bars bar_lines downbeats",
}
_ANNOTATIONS = ("bpm", "key", "metre", "bars")
_FIELD_OF = {name: field for field, names in _NAMES.items() for name in names.split()}
_LICENCE = re.compile(r"licen[cszç]|lizenz|spdx|usage_terms")
_RIGHTS = re.compile(r"copyright|(?:^|_)rights?(?:_|$)")
FIELDS = {*_NAMES, "licence", "rights"}
JOINED = {"caption", "licence", "rights", "split", "tags"}  # of which every value counts when a record has several

_SPLIT_NAMES = {
    "train": "train training trn trainset trainingset",
    "valid": "valid validation validate val dev devel development validset validationset valset devset",
    "test": "test testing tst testset eval evaluation evalset heldout holdout unseen benchmark",
}
_SPLIT_OF = {name: split for split, names in _SPLIT_NAMES.items() for name in names.split()} | {"": ""}


def field_of(name: str) -> str:
    """The field that a column or key holds, in any case and with any separators; the plain name if it is none.

    Every name with `licence`, in the spelling of any language, is a licence; a copyright or rights statement counts
    (as `rights`) where no licence is stated.
    """
    plain = re.sub(r"[\s_.-]+", "_", unicodedata.normalize("NFKC", name).strip().casefold()).strip("_")
    if _LICENCE.search(plain):
        return "licence"
    if _RIGHTS.search(plain):
        return "rights"
    return _FIELD_OF.get(plain, plain)


def stated_licences(values: Mapping[str, Any]) -> list[str]:
    """The licences of a record with fields as keys, those of nested objects too. Raises Rejected if one is no text."""
    found = texts(values.get("licence"))
    pending = [value for name, value in values.items() if name not in ("licence", "rights")]
    while pending:
        value = pending.pop()
        if isinstance(value, list):
            pending.extend(value)
        elif isinstance(value, dict):
            for name, inner in value.items():
                if field_of(name) == "licence":
                    found.extend(texts(inner))
                else:
                    pending.append(inner)
    return list(dict.fromkeys(found or texts(values.get("rights"))))


def one_licence(stated: Mapping[str, str]) -> tuple[str, str]:
    """The licence that all statements of a track name, and where.

    Args:
        stated: where each licence is stated, by its text.

    Raises:
        Rejected: they name different ones.
    """
    if not stated:
        return "", ""
    if len({_identifier(licence) for licence in stated}) > 1:
        shown = ", ".join(f"{printable(licence)!r} ({where})" for licence, where in stated.items())
        raise Rejected("licence", f"several licences are stated: {shown}; keep the one that applies")
    return next(iter(stated.items()))


def annotations_of(values: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """bpm, key, metre and bars of a record with fields as keys, and the values that cannot be read, by field."""
    found: dict[str, Any] = {}
    unread: dict[str, str] = {}
    for name in _ANNOTATIONS:
        value = values.get(name)
        if value in (None, "", []):
            continue
        try:
            if name == "bpm":
                found[name] = _bpm(value)
            else:
                found |= annotation_columns({name: _times(value) if name == "bars" else value})
        except (UserError, ValueError, TypeError):
            unread[name] = printable(str(value)[:40])
    return found, unread


def _bpm(value: Any) -> float:
    bpm = float(value)
    if not 0 < bpm < 1000:
        raise ValueError("no tempo")
    return bpm


def _times(value: Any) -> list[float]:
    """Times as a list, or as text with blanks, commas or semicolons between them."""
    return [float(time) for time in (re.split(r"[\s,;]+", value.strip(" []")) if isinstance(value, str) else value)]


def one_split(stated: Iterable[str]) -> str:
    """train, valid, test or "", of a split as people write it. Raises Rejected for others and for several."""
    splits: dict[str, None] = {}
    for written in stated:
        plain = re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", written).casefold())
        split = _SPLIT_OF.get(plain.removesuffix("split"))
        if split is None or (written and not plain):
            raise Rejected("metadata", f"its split {printable(written[:40])!r} is not train, valid or test")
        splits |= {split: None} if split else {}
    if len(splits) > 1:
        raise Rejected("metadata", f"it is in several splits ({', '.join(splits)}): keep one")
    return next(iter(splits), "")


def match_key(path: str) -> str:
    """A path for comparison: without differences of case, of Unicode normal form and of separators."""
    plain = unicodedata.normalize("NFC", path).casefold()
    return "/".join(part for part in unicodedata.normalize("NFC", plain).replace("\\", "/").split("/")
                    if part not in ("", "."))  # fmt: skip


def split_texts(value: Any) -> list[str]:
    """The split or splits of a record. Raises Rejected for other than text."""
    return [text(item) for item in value] if isinstance(value, list) else [text(value)]


def _identifier(licence: str) -> str:
    try:
        return normalise(licence).spdx
    except UserError:
        return licence
