"""The store (a corpus on disk) and its deterministic loaders. They load on first use: `splits` needs no torch."""

from typing import TYPE_CHECKING, Any

from ssmttm.errors import import_attribute

if TYPE_CHECKING:
    from ssmttm.data.loader import AudioLoader, CodesLoader
    from ssmttm.data.store import Store, open_store
    from ssmttm.data.writer import StoreWriter

__all__ = ["AudioLoader", "CodesLoader", "Store", "StoreWriter", "open_store"]

_MODULES = {
    "AudioLoader": "loader",
    "CodesLoader": "loader",
    "Store": "store",
    "StoreWriter": "writer",
    "open_store": "store",
}


def __getattr__(name: str) -> Any:
    if name in _MODULES:
        return import_attribute(f"ssmttm.data.{_MODULES[name]}", name)
    raise AttributeError(f"module 'ssmttm.data' has no attribute {name!r}")
