"""Codecs behind one interface: the embedded tiny codecs, DAC, EnCodec, Mimi, X-Codec and SNAC; VAEs are beside them."""

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ssmttm.codecs import snac, tiny
from ssmttm.codecs.autoencoder import Autoencoder
from ssmttm.codecs.base import Codec, CodecOutput
from ssmttm.codecs.stereo import parametric
from ssmttm.codecs.stereo.channelwise import CODINGS, ChannelwiseCodec
from ssmttm.codecs.stereo.parametric import ParametricStereoCodec
from ssmttm.codecs.students import codec
from ssmttm.codecs.students.codec import StudentCodec, StudentConfig
from ssmttm.codecs.tiny import TinyCodec, TinyCodecConfig
from ssmttm.errors import UserError
from ssmttm.hub import split_revision

_ASSETS = Path(__file__).parent.parent / "assets"
EMBEDDED = {"tiny": _ASSETS / "tiny_codec"}
EMBEDDED_STEREO = {"tiny_stereo": _ASSETS / "tiny_codec_stereo"}

__all__ = [
    "Autoencoder", "ChannelwiseCodec", "Codec", "CodecOutput", "ParametricStereoCodec", "StudentCodec", "StudentConfig",
    "TinyCodec", "TinyCodecConfig", "build_codec", "encoder_of", "load_codec",
]  # fmt: skip


def load_codec(name_or_path: str | Path = "tiny", n_codebooks: int | None = None, revision: str | None = None) -> Codec:
    """Load a codec in eval mode.

    Args:
        name_or_path: "tiny" or, in stereo, "tiny_stereo" (embedded); a folder with config.json and
            model.safetensors, written by ssmttm (a student only decodes) or by transformers' DacModel, EncodecModel or
            MimiModel; or a hub name such as "descript/dac_44khz". A SNAC is a folder or hub name after "snac:". A mono
            codec after "left_right:" or "mid_side:" codes stereo (`ChannelwiseCodec`).
        n_codebooks: keep only the first n codebooks.
        revision: branch, tag or commit of a hub name; `name` of the codec has the commit that was found.

    Raises:
        UserError: no such codec, or its files are missing or damaged.
    """
    codec = _load(name_or_path, revision)
    return codec if n_codebooks is None else codec.keep_codebooks(n_codebooks)


def encoder_of(codec: Codec) -> Codec:
    """The codec that encodes for `codec`: itself, or the teacher of a student.

    Raises:
        UserError: the teacher is not found, or its weights have changed.
    """
    if not isinstance(codec, StudentCodec):
        return codec
    encoder = load_codec(codec.config.teacher, codec.n_codebooks)
    if encoder.fingerprint != codec.fingerprint:
        raise UserError(
            f"{codec.name} decodes codes of {codec.config.teacher} with fingerprint {codec.fingerprint}, but the codec "
            f"of that name has {encoder.fingerprint}: restore the original"
        )
    return encoder


def build_codec(config: Mapping[str, Any]) -> Autoencoder:
    """A codec with random weights from a config's `codec` section: `kind` (tiny, transformers', or the VAE oobleck) and
    its fields.

    Raises:
        UserError: unknown kind or field.
    """
    fields: dict[str, Any] = {name: list(value) if isinstance(value, Sequence) and not isinstance(value, str) else value
              for name, value in config.items()}  # fmt: skip
    kind = fields.pop("kind", None)
    try:
        if kind == "tiny":
            return TinyCodec(TinyCodecConfig(**fields))
        if kind == "oobleck":
            from ssmttm.codecs import vae  # diffusers is slow to import

            return vae.from_config(fields)
        from ssmttm.codecs import hf  # transformers' models are slow to import

        if kind in hf.CLASSES:
            return hf.from_config(kind, fields)
    except TypeError as error:
        raise UserError(f"codec kind {kind}: {error}") from error
    raise UserError(f"unknown codec kind {kind!r}: choose from tiny, oobleck, {', '.join(hf.CLASSES)}")


def _load(name_or_path: str | Path, revision: str | None) -> Codec:
    name = str(name_or_path)
    coding, colon, mono_name = name.partition(":")
    if colon and coding in CODINGS:
        mono = _load(mono_name, revision)
        found = mono_name if Path(mono_name).is_dir() else mono.name  # where training finds it again
        return ChannelwiseCodec(mono, coding, f"{coding}:{found}").eval()
    if colon and coding == snac.PREFIX:
        return snac.load_snac(mono_name, revision)
    if name in EMBEDDED:
        folder = EMBEDDED[name]
        if not (folder / "model.safetensors").is_file():
            raise UserError(f"the embedded codec `{name}` is missing from this installation: reinstall ssmttm")
        return TinyCodec.load(folder, name)
    if name in EMBEDDED_STEREO:
        return _load_parametric(EMBEDDED_STEREO[name], name)
    folder = Path(name)
    if folder.is_dir():
        model_type = _model_type(folder)
        if model_type == tiny.MODEL_TYPE:
            return TinyCodec.load(folder)
        if model_type == codec.MODEL_TYPE:
            return StudentCodec.load(folder)
        if model_type == parametric.MODEL_TYPE:
            return _load_parametric(folder, None)
        if model_type is None and "_class_name" in _read_config(folder):
            raise UserError(f"{folder} is a VAE, whose latents are continuous, no codec: use load_vae, or --latents")
    elif split_revision(name)[0].count("/") != 1 or name.startswith((".", "/", "~")):
        known = ", ".join(EMBEDDED | EMBEDDED_STEREO)
        raise UserError(f"codec {name}: no such folder, nor a hub name such as descript/dac_44khz; embedded: {known}")
    from ssmttm.codecs import hf

    return hf.from_folder(folder) if folder.is_dir() else hf.from_hub(name, revision)


def _load_parametric(folder: Path, name: str | None) -> Codec:
    mono = _load(str(_read_config(folder).get("mono")), None)
    return ParametricStereoCodec.load(folder, mono, name)


def _model_type(folder: Path) -> str | None:
    return _read_config(folder).get("model_type")


def _read_config(folder: Path) -> dict[str, Any]:
    try:
        config: dict[str, Any] = json.loads((folder / "config.json").read_text())
        return config
    except FileNotFoundError as error:
        raise UserError(f"codec folder {folder} has no config.json") from error
    except json.JSONDecodeError as error:
        raise UserError(f"codec folder {folder}: config.json cannot be read: {error}") from error
