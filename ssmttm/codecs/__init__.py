"""Waveform <-> codes <-> latents: the embedded tiny codec, and DAC, EnCodec and Mimi behind one interface."""

import json
from pathlib import Path

from ssmttm.codecs.base import Codec, CodecOutput
from ssmttm.codecs.tiny import MODEL_TYPE, TinyCodec, TinyCodecConfig
from ssmttm.errors import UserError

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny_codec"

__all__ = ["Codec", "CodecOutput", "TinyCodec", "TinyCodecConfig", "load_codec"]


def load_codec(name_or_path: str | Path = "tiny") -> Codec:
    """Load a codec in eval mode.

    Args:
        name_or_path: "tiny" (embedded) or a folder with config.json and model.safetensors.

    Raises:
        UserError: no such codec, or its files are missing or damaged.
    """
    if str(name_or_path) == "tiny":
        if not (TINY_FOLDER / "model.safetensors").is_file():
            raise UserError(f"the embedded codec is not in this installation ({TINY_FOLDER} is empty): train one with "
                            "`python train.py experiment=codec_tiny` or name another codec")  # fmt: skip
        return TinyCodec.load(TINY_FOLDER, "tiny")
    folder = Path(name_or_path)
    if not folder.is_dir():
        raise UserError(f"codec {name_or_path}: no such folder; `tiny` is embedded")
    if _model_type(folder) == MODEL_TYPE:
        return TinyCodec.load(folder)
    raise UserError(f"codec folder {folder}: config.json names no codec known here")


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except FileNotFoundError as error:
        raise UserError(f"codec folder {folder} has no config.json") from error
    except json.JSONDecodeError as error:
        raise UserError(f"codec folder {folder}: config.json cannot be read: {error}") from error
