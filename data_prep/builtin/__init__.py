"""The built-in corpus: music composed and rendered by this package, with known ground truth, released as CC0-1.0.

A piece is a pure function of (seed, index). Its audio is rendered from a General MIDI soundfont and its captions are
written from the ground truth, so that a model can be trained and measured with no download.
"""

from typing import TYPE_CHECKING, Any

from ssmttm.errors import import_attribute

if TYPE_CHECKING:
    from data_prep.builtin.captions import write_captions
    from data_prep.builtin.composition.compose import compose
    from data_prep.builtin.composition.score import Piece
    from data_prep.builtin.corpus import render_shard, segments
    from data_prep.builtin.synth import render

__all__ = ["Piece", "compose", "render", "render_shard", "segments", "write_captions"]

_MODULES = {
    "Piece": "composition.score",
    "compose": "composition.compose",
    "render": "synth",
    "render_shard": "corpus",
    "segments": "corpus",
    "write_captions": "captions",
}


def __getattr__(name: str) -> Any:
    """Import on first use, so that importing the package stays light."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return import_attribute(f"{__name__}.{_MODULES[name]}", name)
