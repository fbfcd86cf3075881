"""The store (a corpus on disk) and its deterministic loaders."""

from ssmttm.data.loader import AudioLoader, CodesLoader
from ssmttm.data.store import Store, open_store
from ssmttm.data.writer import StoreWriter

__all__ = ["AudioLoader", "CodesLoader", "Store", "StoreWriter", "open_store"]
