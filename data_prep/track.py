"""Tracks, as the metadata of a source describe them, and rejections."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Track:
    """An audio file and its metadata. What the source does not state is empty."""

    id: str  # unique in the corpus, such as `jamendo:948` or a path in a folder
    path: str  # of the audio file, relative to the source's root, with `/`
    licence: str = ""  # as the source states it: an SPDX identifier, a name or a link
    title: str = ""
    author: str = ""
    source_url: str = ""
    artist: str = ""  # identity across data sets, such as `jamendo:artist:87`
    work: str = ""  # identity across data sets, such as `youtube:-0SdAVK79lg`
    evidence: str = ""  # where the licence is stated, such as `audio_licenses.txt line 17`
    captions: tuple[str, ...] = ()
    tags: tuple[str, ...] = ()  # `category---name`, such as `genre---rock`
    split: str = ""  # train, valid or test
    truth: str = ""  # bpm, key, metre and bars (seconds from the track's start) as JSON


@dataclass(frozen=True)
class Rejection:
    """Why an item is not in the corpus."""

    item: str  # id of a track or segment, or a path
    kind: str  # a key of KINDS
    reason: str  # such as `it is shorter than 3 s`


class Rejected(Exception):
    """An item cannot be used; the run continues. A `kind` of KINDS and a `reason`."""

    def __init__(self, kind: str, reason: str) -> None:
        super().__init__(reason)
        self.kind, self.reason = kind, reason

    def for_item(self, item: str) -> Rejection:
        """The rejection of `item` for this reason."""
        return Rejection(item, self.kind, self.reason)


KINDS = {
    "metadata": "the source's own tables do not describe it usably",
    "missing": "there is no such file",
    "outside": "the path leads out of the source's folder",
    "licence": "no licence, an unknown one, or one that the policy does not allow",
    "unreadable": "no audio that can be decoded, or damaged",
    "limit": "larger, longer or slower to decode than allowed",
    "short": "shorter than the shortest segment",
    "silent": "silent, wholly or for too large a part",
    "clipped": "too many samples at full scale",
    "channels": "more channels than the store keeps, which no rule mixes down",
    "phase": "its channels cancel when mixed down",
    "dual-mono": "two channels that are the same",
    "bandwidth": "nothing above a frequency that is too low",
    "duplicate": "the same recording as another track",
    "evaluation": "in an evaluation set, by work, artist or audio",
    "vocals": "singing or speech",
    "caption": "no caption could be made",
}
