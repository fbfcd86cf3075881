"""A track: one work of a source, as its metadata describe it, before its sound is looked at; and why one is refused."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Track:
    """One audio file and what is known of it.

    Attributes:
        id: unique in the corpus, such as `jamendo:948` or a folder's relative path.
        path: of the audio file, relative to the source's root, with `/`.
        licence: as the source states it: an SPDX identifier, a name or a link; empty where it says nothing.
        title, author, source_url: for attribution.
        artist: an identity of the artist across data sets, such as `jamendo:artist:87`; empty where it is not known.
            Splits and decontamination keep artists apart.
        work: an identity of the recording across data sets, such as `jamendo:948` or `youtube:-0SdAVK79lg`.
        evidence: where the licence is stated, such as `audio_licenses.txt line 17`.
        captions: texts that describe it.
        tags: `category---name`, such as `genre---rock`.
        split: train, valid or test where the source says so, else empty.
    """

    id: str
    path: str
    licence: str = ""
    title: str = ""
    author: str = ""
    source_url: str = ""
    artist: str = ""
    work: str = ""
    evidence: str = ""
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()
    split: str = ""


@dataclass(frozen=True)
class Rejection:
    """Why an item does not come into the corpus.

    Attributes:
        item: a track's or segment's id, or the path.
        kind: one of KINDS, to count by.
        reason: a sentence part for people, such as `it is shorter than 3 s`.
    """

    item: str
    kind: str
    reason: str


class Rejected(Exception):
    """An item cannot be used. A `kind` of KINDS and a `reason`; it never stops a run."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason

    def of(self, item: str) -> Rejection:
        """The refusal of `item` for this reason."""
        return Rejection(item, self.kind, self.reason)


KINDS = {
    "metadata": "the source's own tables do not describe it usably",
    "missing": "there is no such file",
    "outside": "the path leads out of the source's folder",
    "licence": "no licence, an unknown one, or one that the policy refuses",
    "unreadable": "no audio that can be read, or damaged",
    "limit": "larger, longer or slower to decode than allowed",
    "short": "shorter than the shortest segment",
    "silent": "silent, wholly or for too large a part",
    "clipped": "too many samples at full scale",
    "phase": "its channels cancel when mixed down",
    "dual-mono": "two channels that are the same",
    "bandwidth": "nothing above a frequency that is too low",
    "duplicate": "the same recording as another track",
    "evaluation": "in an evaluation set, by work, artist or sound",
    "vocals": "somebody sings or speaks",
    "caption": "no caption could be made",
}
