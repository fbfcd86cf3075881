"""The store (what a corpus is on disk) and the deterministic loaders that read it."""

from ssmttm.data.loader import AudioLoader, CodesLoader
from ssmttm.data.store import Store, open_store
from ssmttm.data.writer import StoreWriter

__all__ = ["AudioLoader", "CodesLoader", "Store", "StoreWriter", "open_store"]
