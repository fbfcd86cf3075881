"""The store: a corpus on disk as a Parquet manifest, memory-mapped code shards and text embeddings.

    manifest.parquet            one row per segment (SCHEMA)
    audio/*.flac                the audio of the segments, if the store keeps it
    shards/00000.safetensors    `codes` uint16 [K, T_total], `offsets` int64 [n+1]; with latents of a VAE `latents`
                                float16 [c, T_total * r]
    text/ENCODER.safetensors    `hashes` uint8 [n, 16] sorted, `offsets` int64 [n+1], `embeddings` float16 [tokens, E]
    store.json                  codec, text encoder, counts, sizes and sha256 of the files; written last

Shapes: K codebooks, T frames, c latent channels, r latent frames per code frame, L text tokens, E embedding width.
Nothing is pickled.
"""

import hashlib
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from ssmttm.audio.notation import parse_key, parse_metre
from ssmttm.data.splits import SPLITS
from ssmttm.data.tensorfile import map_tensors
from ssmttm.data.text_table import TextTable
from ssmttm.errors import UserError
from ssmttm.files import file_sha256

FORMAT = "ssmttm-store"
VERSION = 1
_OPEN_SHARDS = 256
# A number `bpm` of the outer object, before any nested one; RE2, without back-tracking.
_TOP_LEVEL_BPM = r'^\s*\{[^{}\[\]]*"bpm"\s*:\s*(?P<bpm>-?[0-9]+(?:\.[0-9]+)?(?:[eE][-+]?[0-9]+)?)\s*[,}]'
_AGAIN = "restore it from a copy, or prepare the store again"
SCHEMA = pa.schema(
    [
        pa.field("id", pa.string(), nullable=False),
        pa.field("shard", pa.int32()),  # -1: no codes
        pa.field("offset", pa.int64()),  # first frame within the shard
        pa.field("frames", pa.int32()),
        pa.field("captions", pa.list_(pa.string())),
        pa.field("tags", pa.list_(pa.string())),
        pa.field("split", pa.string()),
        pa.field("licence", pa.string()),  # SPDX id
        pa.field("licence_url", pa.string()),
        pa.field("title", pa.string()),
        pa.field("author", pa.string()),
        pa.field("source_url", pa.string()),
        pa.field("modifications", pa.string()),
        pa.field("content_hash", pa.string()),
        pa.field("duration", pa.float64()),  # seconds
        pa.field("audio", pa.string()),  # path inside the store, or null
        pa.field("audio_bytes", pa.int64()),  # of that file; not in stores of earlier versions
        pa.field("audio_sha256", pa.string()),
        pa.field("truth", pa.string()),  # annotations as JSON, or null
        pa.field("key", pa.string()),  # such as "D minor", or null; not in stores of earlier versions
        pa.field("metre", pa.string()),  # such as "3/4", or null
        pa.field("bars", pa.list_(pa.float64())),  # times of bar lines in seconds from the segment's start, or null
        pa.field("track", pa.string()),  # id of the source track
        pa.field("start", pa.float64()),  # of the segment in the track, seconds; not in stores of earlier versions
        pa.field("track_duration", pa.float64()),  # seconds; null where the whole track is not known
        pa.field("artist", pa.string()),  # the same across data sets, or empty
        pa.field("work", pa.string()),  # the recording, the same across data sets, or empty
        pa.field("evidence", pa.string()),  # where the licence is stated
        pa.field("loudness", pa.float64()),  # LUFS
    ]
)
STEREO_COLUMNS = (  # of stereo stores; see `ssmttm.audio.stereo.StereoStatistics`
    pa.field("width", pa.float64()),
    pa.field("correlation", pa.float64()),
    pa.field("balance", pa.float64()),  # dB
)


def manifest_schema(channels: int) -> pa.Schema:
    """The columns of the manifest of a store with audio of 1 or 2 channels."""
    return SCHEMA if channels == 1 else pa.schema([*SCHEMA, *STEREO_COLUMNS])


class CodecLike(Protocol):
    """The attributes of a codec that the store needs."""

    name: str

    @property
    def fingerprint(self) -> str: ...


class TagTable(NamedTuple):
    """Pairs of a segment and one of its tags, sorted by row. rows, tags: int64 [m]; `tags` index `names`."""

    names: list[str]
    rows: np.ndarray
    tags: np.ndarray


def open_store(path: str | Path) -> "Store":
    """Open a store for reading. Raises UserError if it is missing, unfinished, damaged or of another version."""
    return Store(Path(path))


class Store:
    """A finished store, read-only; see `open_store`.

    The sizes of all files but the audio are checked; `verify` compares all hashes.

    Attributes:
        path: the folder.
        info: store.json.
        manifest: the Parquet table.
        fingerprint: 16 hex digits over store.json, which has the hashes of the other files; the manifest has those of
            the audio.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.info = _read_info(path)
        for name, entry in self.info["files"].items():
            size = (path / name).stat().st_size if (path / name).is_file() else None
            if size is None:
                raise UserError(f"{path / name} is missing: {_AGAIN}")
            if size != entry["bytes"]:
                raise UserError(f"{path / name} is truncated ({size} bytes, expected {entry['bytes']}): {_AGAIN}")
        self.fingerprint = hashlib.sha256((path / "store.json").read_bytes()).hexdigest()[:16]
        try:
            self.manifest = pq.read_table(path / "manifest.parquet")
        except (pa.ArrowException, OSError) as error:
            raise UserError(f"{path / 'manifest.parquet'} cannot be read ({error}): prepare the store again") from error
        self._ids = _joined(self.manifest["id"])  # taking rows from one chunk does not depend on the number of rows
        self._shard = self.manifest["shard"].to_numpy()
        self._offset = self.manifest["offset"].to_numpy()
        self._frames = self.manifest["frames"].to_numpy()
        self._shards: dict[int, dict[str, np.ndarray]] = {}
        self._text: TextTable | None = None

    def __len__(self) -> int:
        return self.manifest.num_rows

    @property
    def channels(self) -> int:
        """Channels of the audio files, 1 or 2; stores of earlier versions have one."""
        return int(self.info.get("channels", 1))

    def indices(self, split: str) -> np.ndarray:
        """Rows of a split (train, valid or test), int64 [n]. Raises UserError if the split is empty."""
        if split not in SPLITS:
            raise UserError(f"no split {split!r}: there are {', '.join(SPLITS)}")
        rows = np.flatnonzero(pc.equal(self.manifest["split"], split).to_numpy())
        if len(rows) == 0:
            counts = ", ".join(f"{name} {count}" for name, count in self.info["counts"].items())
            raise UserError(f"{self.path} has no {split} segments ({counts}): prepare more data")
        return rows

    def longest(self, split: str) -> int:
        """The frames of the longest segment of a split."""
        return int(self._frames[self.indices(split)].max())

    def ids(self, rows: np.ndarray) -> list[str]:
        """Segment ids of rows."""
        return self._ids.take(pa.array(rows)).to_pylist()

    def codes(self, row: int) -> np.ndarray:
        """The codes of one segment, uint16 [K, frames], a view of the memory-mapped shard."""
        return self._view(row, "codes", 1)

    def latents(self, row: int) -> np.ndarray:
        """The VAE's latents of one segment, float16 [c, frames * r], a view of the memory-mapped shard. Raises
        UserError if there are none."""
        return self._view(row, "latents", self.vae_info["frames_per_code"])

    @property
    def vae_info(self) -> dict[str, Any]:
        """Name, fingerprint, rates and sizes of the VAE of the latents. Raises UserError if there are none."""
        info: dict[str, Any] | None = self.info.get("latents")
        if info is None:
            names = {kind: (self.info.get(kind) or {}).get("name", "none") for kind in ("codec", "text")}
            raise UserError(
                f"{self.path} holds no latents of a VAE: encode it with `python -m data_prep pack --root {self.path} "
                f"--out NEW --codec {names['codec']} --text {names['text']} --latents VAE`"
            )
        return info

    def _view(self, row: int, name: str, per_frame: int) -> np.ndarray:
        """The part of a tensor of the shards, with `per_frame` columns per frame, that is of one segment."""
        shard = int(self._shard[row])
        if shard < 0:
            raise UserError(_audio_only(self.path))
        if shard not in self._shards:
            if len(self._shards) >= _OPEN_SHARDS:
                self._shards.clear()  # each memory map uses a file descriptor
            self._shards[shard] = map_tensors(self.path / shard_name(shard))
        offset = int(self._offset[row])
        return self._shards[shard][name][:, offset * per_frame : (offset + int(self._frames[row])) * per_frame]

    def captions(self, row: int) -> list[str]:
        """The captions of one segment; [""] for a segment without captions."""
        return self.manifest["captions"][int(row)].as_py() or [""]

    def tags(self, row: int) -> list[str]:
        """The tags of one segment."""
        return self.manifest["tags"][int(row)].as_py() or []

    def tag_table(self) -> "TagTable":
        """The tags of all segments, each tag once per segment."""
        lists = self.manifest["tags"].combine_chunks()
        found = pc.list_flatten(lists).dictionary_encode()
        names = found.dictionary.to_pylist()
        rows, tags = pc.list_parent_indices(lists).to_numpy(), found.indices.to_numpy()
        pairs = np.unique(rows.astype(np.int64) * max(1, len(names)) + tags)
        return TagTable(names, *np.divmod(pairs, max(1, len(names))))

    def has_captions(self, split: str) -> bool:
        """Whether any segment of a split has a caption that is not empty."""
        captions = pc.list_flatten(self.manifest["captions"].filter(pc.equal(self.manifest["split"], split)))
        return bool(pc.any(pc.greater(pc.utf8_length(captions), 0)).as_py())

    def distinct_captions(self, split: str) -> set[str]:
        """All captions of a split; they include "" if a segment has none."""
        lists = self.manifest["captions"].take(pa.array(self.indices(split)))
        captions = set(pc.unique(pc.list_flatten(lists)).to_pylist())
        has_captions = pc.fill_null(pc.list_value_length(lists), 0).to_numpy() > 0
        return captions if has_captions.all() else captions | {""}

    def text(self, caption: str) -> np.ndarray:
        """The embedding of a caption of the store, or of the empty one, float16 [L, E]. Raises KeyError for others."""
        if self._text is None:
            if self.info["text"] is None:
                raise UserError(f"{self.path} holds no text embeddings: prepare it with `--text minilm`")
            self._text = TextTable(self.path / text_name(self.info["text"]["name"]))
        return self._text[caption]

    def annotations(self, row: int) -> dict[str, Any] | None:
        """The ground-truth annotations of one segment (tempo, key, instruments), or None."""
        text = self.manifest["truth"][int(row)].as_py()
        return None if text is None else json.loads(text)

    def tempi(self) -> np.ndarray:
        """`bpm` of the annotations of all segments, float32 [N]; NaN where it is absent or null. Raises UserError if
        one is not a positive number."""
        texts = _joined(self.manifest["truth"])
        tempi = np.full(len(texts), np.nan)
        number = pc.struct_field(pc.extract_regex(texts, pattern=_TOP_LEVEL_BPM), 0)
        is_simple = pc.fill_null(pc.and_(number.is_valid(), pc.equal(pc.count_substring(texts, '"bpm"'), 1)), False)
        simple = np.flatnonzero(is_simple.to_numpy(zero_copy_only=False))
        tempi[simple] = number.take(pa.array(simple)).cast(pa.float64()).to_numpy()
        has_bpm = pc.fill_null(pc.match_substring(texts, '"bpm"'), False).to_numpy(zero_copy_only=False)
        for row in np.setdiff1d(np.flatnonzero(has_bpm), simple):  # nested, doubled or null
            annotations = json.loads(texts[row].as_py())
            bpm = annotations.get("bpm") if isinstance(annotations, dict) else None
            tempi[row] = np.nan if bpm is None else _number(bpm)
        wrong = np.flatnonzero((tempi <= 0) | np.isinf(tempi))
        if len(wrong):
            segment, annotations = self.ids(wrong[:1])[0], texts[int(wrong[0])].as_py()
            raise UserError(
                f"{self.path}: the bpm of segment {segment} is not a positive number ({annotations[:80]}): correct its "
                "annotations and prepare the store again"
            )
        return tempi.astype(np.float32)

    def keys(self) -> np.ndarray:
        """Classes of the segments' keys (`ssmttm.audio.notation`), int64 [N]; -1 where none is stated."""
        return self._classes("key", parse_key)

    def metres(self) -> np.ndarray:
        """Classes of the segments' metres (`ssmttm.audio.notation`), int64 [N]; -1 where none is stated."""
        return self._classes("metre", parse_metre)

    def bars(self, row: int) -> np.ndarray:
        """Times of the bar lines of one segment in seconds, float64 [n]; empty where none are stated."""
        if "bars" not in self.manifest.column_names:
            return np.empty(0)
        return np.array(self.manifest["bars"][int(row)].as_py() or [], np.float64)

    def has_bars(self) -> bool:
        """Whether any segment states two bar lines or more."""
        if "bars" not in self.manifest.column_names:
            return False
        return bool(pc.any(pc.greater(pc.list_value_length(self.manifest["bars"]), 1)).as_py())

    def timing(self) -> np.ndarray:
        """Where the segments are in their tracks, float64 [N, 2]: seconds from the track's start to the segment's, and
        from there to the track's end; NaN where it is not known."""
        found = np.full((len(self), 2), np.nan)
        if "start" in self.manifest.column_names:
            start, duration = (self.manifest[name].to_numpy() for name in ("start", "track_duration"))
            found[:, 0], found[:, 1] = start, duration - start
        return found

    def _classes(self, name: str, parse: Callable[[str], int]) -> np.ndarray:
        if name not in self.manifest.column_names:
            return np.full(len(self), -1)
        column = self.manifest[name].combine_chunks().dictionary_encode()
        classes = np.array([parse(text) for text in column.dictionary.to_pylist()] + [-1], np.int64)
        return classes[pc.fill_null(column.indices, len(classes) - 1).to_numpy()]

    def has_audio(self) -> bool:
        """Whether it keeps the audio of every segment."""
        return self.manifest["audio"].null_count == 0

    def audio_path(self, row: int) -> Path:
        """The audio file of one segment. Raises UserError if the store keeps no audio."""
        return audio_inside(self.path, self.manifest["audio"][int(row)].as_py())

    def require_codec(self, codec: CodecLike) -> None:
        """Raises UserError unless this codec made the codes."""
        known = self.info["codec"]
        if known is None:
            raise UserError(_audio_only(self.path))
        if known["fingerprint"] != codec.fingerprint:
            raise UserError(
                f"{self.path} was encoded by codec {known['name']!r} ({known['fingerprint']}), but the codec in use is "
                f"{codec.name!r} ({codec.fingerprint}): use that codec, or encode the store again with "
                f"`python -m data_prep pack --root {self.path} --out NEW --codec {codec.name}`"
            )

    def require_vae(self, vae: CodecLike) -> None:
        """Raises UserError unless this VAE made the latents."""
        known = self.vae_info
        if known["fingerprint"] != vae.fingerprint:
            raise UserError(
                f"{self.path} holds latents of VAE {known['name']!r} ({known['fingerprint']}), but the VAE in use is "
                f"{vae.name!r} ({vae.fingerprint}): use that VAE, or encode the store again with `--latents {vae.name}`"
            )

    def verify(self) -> None:
        """Compare the sha256 of every file: those listed in store.json, and the audio. Raises UserError on the first
        that is missing or damaged. Warns of audio without a recorded hash, in stores of earlier versions."""
        hashes = {name: entry["sha256"] for name, entry in self.info["files"].items()}
        hashes |= self._audio_hashes()
        for name, sha256 in hashes.items():
            file = audio_inside(self.path, name)
            if not file.is_file():
                raise UserError(f"{file} is missing: {_AGAIN}")
            if sha256 is not None and file_sha256(file) != sha256:
                raise UserError(f"{file} is damaged (its sha256 differs): {_AGAIN}")
        unknown = sum(sha256 is None for sha256 in hashes.values())
        if unknown:
            print(
                f"warning: {self.path} has no hashes of {unknown} audio files, as stores of earlier versions: they are "
                f"not verified; `python -m data_prep pack --root {self.path} --out NEW` records them",
                file=sys.stderr,
            )

    def _audio_hashes(self) -> dict[str, str | None]:
        """The sha256 of each audio file, None where it was not recorded."""
        columns = [name for name in ("audio", "audio_sha256") if name in self.manifest.column_names]
        rows = self.manifest.select(columns).filter(self.manifest["audio"].is_valid()).to_pylist()
        return {row["audio"]: row.get("audio_sha256") for row in rows}


def _joined(column: pa.ChunkedArray) -> pa.Array:
    """A column of strings as one array, of any size."""
    return column.cast(pa.large_string()).combine_chunks()


def _number(value: Any) -> float:
    """A number of JSON; -1 for another value."""
    return float(value) if isinstance(value, int | float) and not isinstance(value, bool) else -1.0


def audio_inside(path: Path, name: str | None) -> Path:
    """The path of an audio file by its name in the manifest. Raises UserError for a name outside the store, or None."""
    if name is None:
        raise UserError(f"{path} keeps no audio: prepare it from audio files again")
    if Path(name).is_absolute() or ".." in Path(name).parts:
        raise UserError(f"{path} lists audio outside the store ({name}): it is damaged or not trustworthy")
    return path / name


def shard_name(shard: int) -> str:
    """Path of a shard inside the store."""
    return f"shards/{shard:05d}.safetensors"


def text_name(encoder: str) -> str:
    """Path of an encoder's embeddings inside the store."""
    return f"text/{encoder.strip('/').replace('/', '-')}.safetensors"


def _read_info(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise UserError(f"no store at {path}: make one, see `python -m data_prep --help`")
    file = path / "store.json"
    if not file.is_file():
        if (path / "prep.json").is_file():
            raise UserError(f"the store {path} is unfinished: run the same `python -m data_prep` command again")
        raise UserError(f"{path} is not a store (it has no store.json): make one, see `python -m data_prep --help`")
    try:
        info = json.loads(file.read_text(encoding="utf-8"))
        kind, version = info["format"], info["version"]
        if kind == FORMAT and version == VERSION and not {"files", "counts", "codec", "text"} <= info.keys():
            raise ValueError("keys are missing")
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file} is damaged: prepare the store again") from error
    if kind != FORMAT or version != VERSION:
        raise UserError(f"{file} is of {kind!r} version {version!r}; this program reads {FORMAT!r} version {VERSION}")
    return info


def _audio_only(path: Path) -> str:
    return f"{path} holds audio only: encode it with `python -m data_prep pack --root {path}`"
