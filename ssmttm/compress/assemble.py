"""Assembly of a student system into one model folder."""

import shutil
import tempfile
from pathlib import Path

from ssmttm import checkpoint
from ssmttm.codecs import load_codec
from ssmttm.errors import UserError
from ssmttm.export.int8 import export_int8
from ssmttm.export.model_folder import export
from ssmttm.licences import strictest
from ssmttm.model_folder import CODEC, SECOND_STAGE, is_exported, read_card, training_licences, write_card


def assemble(
    language: str | Path, codec: str | Path | None, out: str | Path, int8: bool = False,
    second_stage: Path | None = None,
) -> Path:  # fmt: skip
    """Write, atomically, a new model folder for `MusicPipeline.from_pretrained`.

    Args:
        language: a run, checkpoint or model folder of a language model, with or without its own text encoder.
        codec: a run or a folder of a student codec; None: the codec of the language model.
        int8: quantise the language model's linear layers to int8.
        second_stage: a folder of the second stage of the language model's teacher; None: that of `language`, if any.
    """
    out = Path(out)
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=out.parent, prefix=f".{out.name}.") as temporary:
        folder = _copy_or_export(language, Path(temporary) / out.name)
        if second_stage is not None and not (folder / SECOND_STAGE).exists():
            _add_second_stage(folder, second_stage)
        if codec is not None:
            _add_codec(folder, codec)
        if int8:
            folder = export_int8(folder, Path(temporary) / "int8" / out.name)
        folder.rename(out)
    return out


def _copy_or_export(model: str | Path, folder: Path) -> Path:
    """Copy a model folder (a codec's may have no card), or export a run or a checkpoint."""
    source = checkpoint.find_model(model)
    if is_exported(source) or (source / "config.json").is_file():
        shutil.copytree(source, folder)
        return folder
    return export(source, folder)


def _add_second_stage(folder: Path, second_stage: Path) -> None:
    """Add the teacher's second stage to the model folder. It reads the text encoder of its first stage, also a student,
    which has learnt the original's states (`ssmttm.training.tasks.distill_text`)."""
    _copy_or_export(second_stage, folder / SECOND_STAGE)
    text, card = read_card(folder)["data"]["text"], read_card(folder / SECOND_STAGE)
    card["data"]["text"] = card["data"]["text"] | {"fingerprint": text["fingerprint"]}
    if text["name"].startswith("./"):
        card["data"]["text"]["name"] = f".{text['name']}"  # of the folder above
    write_card(folder / SECOND_STAGE, card)


def _add_codec(folder: Path, codec: str | Path) -> None:
    """Add the decoder to the model folder and its name to the card."""
    shutil.rmtree(folder / CODEC, ignore_errors=True)
    _copy_or_export(codec, folder / CODEC)
    card = read_card(folder)
    fingerprint, expected = load_codec(folder / CODEC).fingerprint, card["data"]["codec"]["fingerprint"]
    if fingerprint != expected:
        raise UserError(
            f"{codec} decodes the codes of codec {fingerprint}, the language model was trained with {expected}: give a "
            "student of that codec"
        )
    card["data"]["codec"] = {"name": f"./{CODEC}", "fingerprint": fingerprint}
    card["data"]["licences"] = training_licences(folder / CODEC) | (card["data"].get("licences") or {})
    card["licence"] = strictest(card["data"]["licences"])
    write_card(folder, card)
