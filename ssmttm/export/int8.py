"""Model folders with int8 weights: a quarter of the size of float32, and quicker steps on a CPU.

Such a folder says `"weights": "int8"` in its card; `MusicPipeline.from_pretrained` reads it like any other.
"""

import json
import shutil
from pathlib import Path

import torch
from safetensors.torch import save_file

from ssmttm.errors import UserError
from ssmttm.files import atomic_write, write_text
from ssmttm.generation.loading import load_model, open_model_folder
from ssmttm.ops.int8 import quantise


def export_int8(model: str | Path | None, out: str | Path) -> Path:
    """Write an exported model with int8 weights in the place of its linear maps' (see `ssmttm.ops.int8`); of a model of
    two stages, the second stays as it is.

    Args:
        model: an exported folder, the name of an embedded model, or a hub id; None: the embedded tiny model.
        out: the folder to write, a new one; all else that belongs to the model is copied to it.

    Raises:
        UserError: there is no such model, it is a run or a checkpoint, its weights are int8 already, or `out` exists.
    """
    folder, out = open_model_folder(model), Path(out)
    if not (folder.path / "card.json").is_file():
        raise UserError(f"{folder.path} is a checkpoint: write it with `ssmttm export RUN OUT` first")
    if "weights" in folder.card:
        raise UserError(f"the weights of {folder.path} are {folder.card['weights']} already: give the whole model")
    if out.exists() and any(out.iterdir()):
        raise UserError(f"{out} is not empty: give a new folder")
    quantised = quantise(load_model(folder))
    shutil.copytree(folder.path, out, dirs_exist_ok=True)
    tensors = {
        name: value.half() if value.dtype == torch.float32 and value.ndim > 1 else value
        for name, value in quantised.state_dict().items()
    }
    with atomic_write(out / "model.safetensors") as path:
        save_file(tensors, path)
    write_text(out / "card.json", json.dumps(folder.card | {"weights": "int8"}, indent=2) + "\n")
    return out
