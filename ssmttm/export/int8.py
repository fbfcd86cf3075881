"""Model folders with int8 weights: a quarter of the size of float32, and faster steps on a CPU.

The card of such a folder has `"weights": "int8"`; `MusicPipeline.from_pretrained` loads it like any other.
"""

import shutil
from pathlib import Path

from ssmttm.errors import UserError
from ssmttm.generation.loading import load_language_model, open_model_folder
from ssmttm.model_folder import is_exported, to_half, write_model_folder
from ssmttm.ops.int8 import quantise


def export_int8(model: str | Path | None, out: str | Path) -> Path:
    """Write a copy of an exported model with int8 weights in its linear layers (see `ssmttm.ops.int8`); the second
    stage of a two-stage model is copied as it is. Raises UserError if there is no such model, it is a checkpoint, its
    weights are int8 already, or `out` is not empty.

    Args:
        model: an exported folder, the name of an embedded model, or a hub id; None: the embedded tiny model.
        out: a new folder.
    """
    folder, out = open_model_folder(model), Path(out)
    if not is_exported(folder.path):
        raise UserError(f"{folder.path} is a checkpoint: export it first with `ssmttm export RUN OUT`")
    if "weights" in folder.card:
        raise UserError(f"the weights of {folder.path} are {folder.card['weights']} already: give the original model")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    weights = quantise(load_language_model(folder)).state_dict()
    shutil.copytree(folder.path, out, dirs_exist_ok=True)
    write_model_folder(out, to_half(weights), folder.config, folder.card | {"weights": "int8"})
    return out
