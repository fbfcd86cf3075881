"""Safetensors files, written in a stream and read by memory map.

The layout is `8-byte little-endian header length, JSON header, raw tensors`. It is read here and not with the
safetensors package to get numpy memory maps: a crop of a shard reads only its own pages.
"""

import json
import struct
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ssmttm.errors import UserError
from ssmttm.files import atomic_write

_CODES = {"uint8": "U8", "uint16": "U16", "uint32": "U32", "int64": "I64", "float16": "F16", "float32": "F32"}
_DTYPES = {code: np.dtype(name).newbyteorder("<") for name, code in _CODES.items()}
_CHUNK = 1 << 24


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write arrays atomically as one safetensors file; a memory-mapped array is streamed.

    Args:
        tensors: name -> array of uint8, uint16, uint32, int64, float16 or float32.
        metadata: strings for the header.
    """
    header: dict[str, object] = {"__metadata__": dict(metadata)} if metadata else {}
    ordered = sorted(tensors.items(), key=lambda item: (-item[1].dtype.itemsize, item[0]))  # keeps every tensor aligned
    position = 0
    for name, array in ordered:
        span = [position, position + array.nbytes]
        header[name] = {"dtype": _CODES[array.dtype.name], "shape": list(array.shape), "data_offsets": span}
        position = span[1]
    text = json.dumps(header, ensure_ascii=True).encode()
    text += b" " * (-len(text) % 8)
    with atomic_write(path) as temporary, open(temporary, "wb") as file:
        file.write(struct.pack("<Q", len(text)) + text)
        for _, array in ordered:
            _write_array(file, array)


def read_header(path: Path) -> tuple[dict[str, dict], dict[str, str], int]:
    """Tensor entries, metadata and position of the first data byte. Raises UserError if the file is damaged."""
    advice = "restore it from a copy, or prepare the store again"
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            if length > min(size - 8, 1 << 30):
                raise UserError(f"{path} is truncated or damaged ({size} bytes): {advice}")
            header = json.loads(file.read(length))
        metadata = header.pop("__metadata__", {})
        end = 8 + length + max((entry["data_offsets"][1] for entry in header.values()), default=0)
    except FileNotFoundError as error:
        raise UserError(f"{path} is missing: {advice}") from error
    except (struct.error, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"{path} is truncated or damaged (cannot read its header): {advice}") from error
    if size != end:
        raise UserError(f"{path} is truncated or damaged ({size} bytes, expected {end}): {advice}")
    return header, metadata, 8 + length


def map_tensors(path: Path) -> dict[str, np.ndarray]:
    """Memory-map every tensor of a safetensors file, read-only. Raises as `read_header`."""
    header, _, start = read_header(path)
    raw = np.memmap(path, dtype=np.uint8, mode="r")
    tensors = {}
    for name, entry in header.items():
        if entry["dtype"] not in _DTYPES:
            raise UserError(f"{path} holds {name!r} as {entry['dtype']}, which a store does not use")
        first, last = entry["data_offsets"]
        tensors[name] = raw[start + first : start + last].view(_DTYPES[entry["dtype"]]).reshape(entry["shape"])
    return tensors


def concatenate_on_disk(arrays: Iterable[np.ndarray], spool: BinaryIO) -> np.ndarray:
    """Concatenate arrays along their first axis in a temporary file and memory-map it."""
    total, array = 0, np.empty(0, np.uint8)
    for array in arrays:
        spool.write(np.ascontiguousarray(array).tobytes())
        total += len(array)
    spool.flush()
    shape = (total, *array.shape[1:])
    return np.memmap(spool, array.dtype, "r", shape=shape) if total else np.empty(shape, array.dtype)


def _write_array(file: BinaryIO, array: np.ndarray) -> None:
    flat = np.ascontiguousarray(array).reshape(-1).view(np.uint8) if array.size else np.empty(0, np.uint8)
    for first in range(0, len(flat), _CHUNK):
        file.write(flat[first : first + _CHUNK].data)
