"""Columns of a manifest from a segment's annotations: key, metre and bar lines."""

import math
from collections.abc import Mapping
from itertools import pairwise
from typing import Any

from ssmttm.audio.notation import KEYS, METRES, parse_key, parse_metre
from ssmttm.errors import UserError


def annotation_columns(annotations: Mapping[str, Any]) -> dict[str, Any]:
    """Those of the columns `key`, `metre` and `bars` that the annotations state.

    Args:
        annotations: `key` with `mode` ("D", "dorian"), or together ("D minor"); a mode counts by its third. `metre`,
            such as "3/4". `bars`, rising times of bar lines in seconds from the segment's start.

    Raises:
        UserError: a value cannot be read.
    """
    key, metre, bars = annotations.get("key"), annotations.get("metre"), annotations.get("bars")
    if key is not None:
        mode = annotations.get("mode")
        key = KEYS[parse_key(f"{key} {mode}" if mode else str(key))]
    if metre is not None:
        metre = list(METRES)[parse_metre(str(metre))]
    columns = {"key": key, "metre": metre, "bars": None if bars is None else check_bars(bars)}
    return {name: value for name, value in columns.items() if value is not None}


def check_bars(bars: Any) -> list[float]:
    """Times of bar lines. Raises UserError unless they are rising numbers."""
    try:
        times = [float(time) for time in bars]
    except (TypeError, ValueError) as error:
        raise UserError(f"bars must be a list of seconds, got {str(bars)[:80]}") from error
    if not all(map(math.isfinite, times)) or any(first >= second for first, second in pairwise(times)):
        raise UserError(f"bars must be rising times in seconds, got {str(bars)[:80]}")
    return times
