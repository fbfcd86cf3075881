"""Text-to-music models with state-space backbones: train, compress, evaluate, sample.

Importing this package is light; anything that needs torch loads on first use.
"""

from typing import Any

from ssmttm.errors import import_attribute

__version__ = "0.1.0"

_LAZY = {"MusicPipeline": "ssmttm.generation.pipeline", "UserError": "ssmttm.errors"}
__all__ = ["MusicPipeline", "UserError", "__version__"]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return import_attribute(_LAZY[name], name)
    raise AttributeError(f"module 'ssmttm' has no attribute {name!r}")
