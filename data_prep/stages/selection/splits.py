"""Train, valid and test splits of the kept tracks, with every artist in one split."""

import hashlib
from collections import Counter
from collections.abc import Collection, Iterable, Mapping

import numpy as np

from data_prep.audio.duplicates import groups
from data_prep.stages.selection.columns import TrackColumns, first_with_code
from ssmttm.data.splits import SPLITS, split_by_hash


def assign_splits(
    keys: Iterable[str], sizes: Mapping[str, int] | None = None, given: Collection[str] = ()
) -> dict[str, str]:
    """The split of each key by `split_by_hash`, with no split left empty where there are enough keys.

    An empty split gets a key: train the largest, valid and test the smallest; of equal sizes the first by hash. A key
    larger than a twentieth of all goes to train, unless it fills an empty split.

    Args:
        keys: groups that must not be divided.
        sizes: number of tracks of each; None for 1.
        given: splits that have tracks already.
    """
    ranked = sorted(set(keys), key=lambda key: hashlib.sha256(key.encode()).hexdigest())
    size = dict.fromkeys(ranked, 1) if sizes is None else sizes
    large = max(1, sum(size.values()) / 20)
    splits = {key: split_by_hash(key, hash_bytes=4) if size[key] <= large else SPLITS[0] for key in ranked}
    needed = [name for name in SPLITS if name not in given][: len(ranked)]
    counts = Counter(splits.values())
    for name in needed:
        if counts[name] == 0:
            spare = [key for key in ranked if splits[key] not in needed or counts[splits[key]] > 1]
            sign = -1 if name == SPLITS[0] else 1
            unneeded = [key for key in spare if splits[key] not in (*needed, *given)]
            chosen = min(unneeded or spare, key=lambda key: sign * size[key])
            counts.update({splits[chosen]: -1, name: 1})
            splits[chosen] = name
    return splits


def split_tracks(columns: TrackColumns, kept: np.ndarray, links: np.ndarray) -> tuple[list[str], str]:
    """The split of each kept row, and the unit that is not divided: "artist", or "recording" where artists are too few.

    A split that the source states holds, and applies to the artist's other tracks: test before valid before train
    where the source states several.

    Args:
        kept: rows, int64 [n].
        links: pairs of kept rows that share audio, int64 [2, L].
    """
    given = columns.split[kept]
    stated = [SPLITS[code] for code in np.unique(given[given >= 0])]
    wanted = min(len(SPLITS) - len(stated), int(np.sum(given < 0)))
    index = np.full(len(columns), -1)
    index[kept] = np.arange(len(kept))
    same_artist = np.stack([np.arange(len(kept)), first_with_code(columns.artist[kept])])
    candidates = {
        "artist": np.concatenate([index[links], same_artist], axis=1),
        "recording": index[links],
        "track": links[:, :0],
    }
    for split_by, (a, b) in candidates.items():  # noqa: B007
        unit = groups((a, b), len(kept))
        stated_of_unit = np.full(len(kept), -1)
        np.maximum.at(stated_of_unit, unit, given)
        free = stated_of_unit[unit] < 0
        if len(np.unique(unit[free])) >= wanted:
            break
    keys = _unit_keys(columns, kept, unit, split_by)
    sizes = Counter(key for key, is_free in zip(keys, free.tolist(), strict=True) if is_free)
    assigned = assign_splits(sizes, sizes, stated)
    codes = np.where(given >= 0, given, stated_of_unit[unit]).tolist()
    return [SPLITS[code] if code >= 0 else assigned[key] for code, key in zip(codes, keys, strict=True)], split_by


def _unit_keys(columns: TrackColumns, kept: np.ndarray, unit: np.ndarray, split_by: str) -> list[str]:
    """The key of each kept row's unit: its first artist, else the hash of its first file."""
    artists = columns.artist[kept] if split_by == "artist" else np.full(len(kept), -1)
    first: dict[int, tuple[bool, str]] = {}
    rows = zip(unit.tolist(), artists.tolist(), columns.file_hashes.take(kept).to_pylist(), strict=True)
    for number, artist, file_hash in rows:
        key = (artist < 0, file_hash if artist < 0 else columns.artists[artist])
        first[number] = min(first.get(number, key), key)
    return [first[number][1] for number in unit.tolist()]
