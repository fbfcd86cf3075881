"""The metadata of tracks with audio as arrays [N], ordered by id."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ssmttm.data.splits import SPLITS
from ssmttm.errors import UserError
from ssmttm.licences import POLICIES, allowed, normalise

_DESCRIPTIVE = ("title", "author", "source_url", "artist", "work", "evidence")


@dataclass(frozen=True)
class TrackColumns:
    """Columns of tracks. Texts are dictionary-encoded, -1 for an empty one."""

    ids: list[str]
    row: np.ndarray  # index in the table of recordings
    rank: np.ndarray  # 0 for the best described track
    file: np.ndarray  # codes of the file hashes
    pcm: np.ndarray  # codes of the sample hashes
    file_hashes: pa.Array
    artist: np.ndarray
    artists: list[str]
    work: np.ndarray
    works: list[str]
    split: np.ndarray  # index in SPLITS, -1 where the source states none

    def __len__(self) -> int:
        return len(self.ids)

    @classmethod
    def from_tables(cls, tracks: pa.Table, recordings: pa.Table) -> "TrackColumns":
        """Join the tables TRACKS and RECORDINGS by id; tracks without a recording are dropped."""
        track_rows = pc.index_in(recordings["id"], tracks["id"].combine_chunks())
        row = np.flatnonzero(track_rows.is_valid().to_numpy())
        row = row[pc.sort_indices(recordings["id"].take(row)).to_numpy()]
        track_row = track_rows.take(row).to_numpy()
        file_hashes = recordings["file_sha256"].take(row).combine_chunks()
        pcm_hashes = recordings["pcm_sha256"].take(row).combine_chunks()
        artist, artists = encode_texts(tracks["artist"].take(track_row))
        work, works = encode_texts(tracks["work"].take(track_row))
        return cls(
            ids=recordings["id"].take(row).to_pylist(),
            row=row,
            rank=_ranks(tracks, track_row, recordings["seconds"].take(row).to_numpy()),
            file=encode_texts(file_hashes)[0],
            pcm=encode_texts(pcm_hashes)[0],
            file_hashes=file_hashes,
            artist=artist,
            artists=artists,
            work=work,
            works=works,
            split=pc.index_in(tracks["split"].take(track_row), pa.array(SPLITS)).fill_null(-1).to_numpy(),
        )


def encode_texts(texts: pa.ChunkedArray | pa.Array) -> tuple[np.ndarray, list[str]]:
    """Dictionary-encode texts: codes int64 [N], -1 for empty or null; and the text of each code."""
    array = texts.combine_chunks() if isinstance(texts, pa.ChunkedArray) else texts
    encoded = pc.dictionary_encode(pc.if_else(pc.equal(array, ""), None, array))
    return encoded.indices.fill_null(-1).to_numpy().astype(np.int64), encoded.dictionary.to_pylist()


def first_with_code(codes: np.ndarray) -> np.ndarray:
    """For each row the first row with the same code; a row of code -1 is alone. int64 [N]"""
    _, first, inverse = np.unique(codes, return_index=True, return_inverse=True)
    return np.where(codes < 0, np.arange(len(codes)), first[inverse])


def _ranks(tracks: pa.Table, track_row: np.ndarray, seconds: np.ndarray) -> np.ndarray:
    """Captions first, then metadata, free licence, length, id. int64 [N]"""
    captioned = pc.greater(pc.list_value_length(tracks["captions"]), 0).fill_null(False).to_numpy()[track_row]
    described = sum(pc.not_equal(tracks[name], "").fill_null(False).to_numpy().astype(int) for name in _DESCRIPTIVE)
    described = described + pc.greater(pc.list_value_length(tracks["tags"]), 0).fill_null(False).to_numpy()
    licence, licences = encode_texts(tracks["licence"])
    policy = np.array([_policy_index(name) for name in licences] + [len(POLICIES)])[licence[track_row]]  # -1: the last
    order = np.lexsort((np.arange(len(track_row)), -seconds, policy, -described[track_row], ~captioned))
    rank = np.empty(len(track_row), np.int64)
    rank[order] = np.arange(len(track_row))
    return rank


def _policy_index(licence: str) -> int:
    """Index of the first policy that allows a licence, 0 for the freest."""
    try:
        return next(i for i, policy in enumerate(POLICIES) if allowed(normalise(licence), policy) is None)
    except UserError:
        return len(POLICIES)
