"""Assembly of a student system into one model folder."""

import json
import shutil
import tempfile
from pathlib import Path

from ssmttm import checkpoint
from ssmttm.codecs import load_codec
from ssmttm.codecs.folder import licences_of
from ssmttm.errors import UserError
from ssmttm.export.int8 import export_int8
from ssmttm.export.model_folder import export
from ssmttm.files import write_text
from ssmttm.licences import strictest

CODEC = "codec"  # subfolder of the decoder


def assemble(language: str | Path, codec: str | Path | None, out: str | Path, int8: bool = False) -> Path:
    """Write, atomically, a new model folder for `MusicPipeline.from_pretrained`.

    Args:
        language: a run, checkpoint or model folder of a language model, with or without its own text encoder.
        codec: a run or a folder of a student codec; None: the codec of the language model.
        int8: quantise the language model's linear layers to int8.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as aside:
        folder = _model_folder(language, Path(aside) / out.name)
        if codec is not None:
            _put_codec(folder, codec)
        if int8:
            folder = export_int8(folder, Path(aside) / "int8" / out.name)
        folder.rename(out)
    return out


def _model_folder(language: str | Path, folder: Path) -> Path:
    """Copy the model folder, or export the run or checkpoint."""
    source = checkpoint.find_model(language)
    if (source / "card.json").is_file():
        shutil.copytree(source, folder)
        return folder
    return export(source, folder)


def _put_codec(folder: Path, codec: str | Path) -> None:
    """Add the decoder to the model folder and its name to the card."""
    source = checkpoint.find_model(codec)
    shutil.rmtree(folder / CODEC, ignore_errors=True)
    if (source / "config.json").is_file():  # a codec folder; a checkpoint has config.yaml
        shutil.copytree(source, folder / CODEC)
    else:
        export(source, folder / CODEC)
    card = json.loads((folder / "card.json").read_text())
    fingerprint, expected = load_codec(folder / CODEC).fingerprint, card["data"]["codec"]["fingerprint"]
    if fingerprint != expected:
        raise UserError(
            f"{codec} decodes the codes of codec {fingerprint}, the language model was trained with {expected}: give a "
            "student of that codec"
        )
    card["data"]["codec"] = {"name": f"./{CODEC}", "fingerprint": fingerprint}
    card["data"]["licences"] = licences_of(folder / CODEC) | (card["data"].get("licences") or {})
    card["licence"] = strictest(card["data"]["licences"])
    write_text(folder / "card.json", json.dumps(card, indent=2) + "\n")
