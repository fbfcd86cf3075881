"""Import of other projects' checkpoints as model folders, and export of MusicGen: see docs/importing.md."""

from ssmttm.export.importers.musicgen import export_musicgen, import_musicgen
from ssmttm.export.importers.released import import_released

__all__ = ["export_musicgen", "import_musicgen", "import_released"]
