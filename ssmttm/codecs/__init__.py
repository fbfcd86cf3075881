"""Waveform <-> codes <-> latents: the embedded tiny codec, and DAC, EnCodec and Mimi behind one interface."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmttm.codecs import tiny
from ssmttm.codecs.base import Codec, CodecOutput
from ssmttm.codecs.students import codec
from ssmttm.codecs.students.codec import StudentCodec, StudentConfig
from ssmttm.codecs.tiny import TinyCodec, TinyCodecConfig
from ssmttm.errors import UserError

TINY_FOLDER = Path(__file__).parent.parent / "assets" / "tiny_codec"

__all__ = [
    "Codec", "CodecOutput", "StudentCodec", "StudentConfig", "TinyCodec", "TinyCodecConfig", "build_codec",
    "encoder_of", "load_codec",
]  # fmt: skip
_OURS = {tiny.MODEL_TYPE: TinyCodec, codec.MODEL_TYPE: StudentCodec}


def load_codec(name_or_path: str | Path = "tiny", n_codebooks: int | None = None) -> Codec:
    """Load a codec in eval mode.

    Args:
        name_or_path: "tiny" (embedded); a folder with config.json and model.safetensors, of ours (a
            student only decodes) or of transformers' DacModel, EncodecModel or MimiModel; or a hub name such as
            "descript/dac_44khz".
        n_codebooks: keep only the first so many codebooks.

    Raises:
        UserError: no such codec, or its files are missing or damaged.
    """
    codec = _load(name_or_path)
    return codec if n_codebooks is None else codec.keep_codebooks(n_codebooks)


def encoder_of(codec: Codec) -> Codec:
    """What gives the codes that a codec decodes: itself; of a student, the codec whose codes it speaks.

    Raises:
        UserError: that codec is not found by its name, or is another by now.
    """
    if not isinstance(codec, StudentCodec):
        return codec
    encoder = load_codec(codec.config.teacher, codec.n_codebooks)
    if encoder.fingerprint != codec.fingerprint:
        raise UserError(
            f"{codec.name} decodes the codes of {codec.config.teacher} ({codec.fingerprint}), what is found under that "
            f"name is {encoder.fingerprint}: put the original back"
        )
    return encoder


def build_codec(config: Mapping[str, Any]) -> Codec:
    """A codec with random weights from a config of the group `codec`: `kind` (tiny, dac, encodec, mimi) and its fields.

    Raises:
        UserError: an unknown kind or field.
    """
    fields = {name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
              for name, value in config.items()}  # fmt: skip
    kind = fields.pop("kind", None)
    try:
        if kind == "tiny":
            return TinyCodec(TinyCodecConfig(**fields))
        from ssmttm.codecs import hf  # transformers' models are slow to import

        if kind in hf.CLASSES:
            return hf.from_config(kind, fields)
    except TypeError as error:
        raise UserError(f"codec kind {kind}: {error}") from error
    raise UserError(f"codec kind {kind!r} is none of tiny, {', '.join(hf.CLASSES)}")


def _load(name_or_path: str | Path) -> Codec:
    name = str(name_or_path)
    if name == "tiny":
        if not (TINY_FOLDER / "model.safetensors").is_file():
            raise UserError("the embedded codec `tiny` is not in this installation: reinstall, or name another codec")
        return TinyCodec.load(TINY_FOLDER, "tiny")
    folder = Path(name)
    if folder.is_dir():
        ours = _OURS.get(_model_type(folder))
        if ours is not None:
            return ours.load(folder)
    elif name.count("/") != 1 or name.startswith((".", "/", "~")):
        raise UserError(f"codec {name}: no such folder, and no hub name such as descript/dac_44khz; `tiny` is embedded")
    from ssmttm.codecs import hf

    return hf.from_pretrained(name, folder.resolve().name if folder.is_dir() else name)


def _model_type(folder: Path) -> str | None:
    try:
        return json.loads((folder / "config.json").read_text()).get("model_type")
    except FileNotFoundError as error:
        raise UserError(f"codec folder {folder} has no config.json") from error
    except json.JSONDecodeError as error:
        raise UserError(f"codec folder {folder}: config.json cannot be read: {error}") from error
