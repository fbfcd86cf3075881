"""Checkpoints of the code of arXiv 2601.14786 (Prefix SiMBA on DAC 44.1 kHz): a PyTorch Lightning file.

It is read as tensors and plain values alone; a file that wants more is refused, for a pickle can run anything.
That model's sinusoidal positions count text and audio together ("joint"), it has no norm in front of the heads, and it
takes the text's padding for words ("unmasked_padding" in `ssmttm.text.null_condition`). The special tokens that its sequences
begin with are the special column that every TokenLM starts from: the pattern is a plain delay.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ssmttm.codecs import load_codec
from ssmttm.errors import UserError
from ssmttm.export.importers.folder import card_of, write_model
from ssmttm.export.importers.names import fill
from ssmttm.files import new_folder
from ssmttm.models.token_lm import TokenLM, TokenLMConfig
from ssmttm.text.encoders import load_text_encoder

CODEC, TEXT_ENCODER, TEXT_DIM = "descript/dac_44khz", "google/flan-t5-base", 768
FROZEN = "text_encoder."  # a copy of Flan-T5, without its tokenizer: it is loaded by its own name
ILL_FORMED = AttributeError, LookupError, TypeError, ValueError
TABLE = {
    r"embedding\.weight": r"music_model.embedding.{k}.weight",
    r"heads\.weight": r"music_model.lm_head.{k}.weight",
    r"text\.linear\.(.*)": r"music_model.condition_linear.\1",
    r"text\.norm\.(.*)": r"music_model.condition_norm.\1",
    r"blocks\.(\d+)\.sublayers\.0\.norm\.(.*)": r"music_model.backbone.\1.mamba.norm.\2",
    r"blocks\.(\d+)\.sublayers\.0\.inner\.(.*)": r"music_model.backbone.\1.mamba.mamba.\2",
    r"blocks\.(\d+)\.sublayers\.1\.norm\.(.*)": r"music_model.backbone.\1.ff.norm.\2",
    r"blocks\.(\d+)\.sublayers\.1\.inner\.fc1\.(.*)": r"music_model.backbone.\1.ff.feed_forward.0.\2",
    r"blocks\.(\d+)\.sublayers\.1\.inner\.fc2\.(.*)": r"music_model.backbone.\1.ff.feed_forward.3.\2",
}


def import_released(
    source: str | Path, out: str | Path, codec: str | Path | None = None, text_encoder: str | Path | None = None
) -> Path:
    """Write a model folder from a checkpoint.

    Args:
        source: the .ckpt file.
        out: a new folder. Its card names codec and text encoder as on the hub, with their fingerprints.
        codec, text_encoder: where these are loaded from, such as a folder, if not by their names.

    Raises:
        UserError: the file is no such checkpoint or of another architecture, or codec or text encoder cannot be had.
    """
    source, out = Path(source), Path(out)
    model = read_released(source)
    its_codec, its_encoder = load_codec(codec or CODEC), load_text_encoder(text_encoder or TEXT_ENCODER)
    with new_folder(out) as folder:
        card = card_of(out.name, source.name, model, (CODEC, its_codec), (TEXT_ENCODER, its_encoder), "unmasked_padding")
        write_model(folder, model, "delay", card)
    return out


def read_released(source: str | Path) -> TokenLM:
    """The language model of a checkpoint, in eval mode. Raises UserError as `import_released`."""
    checkpoint = _load(Path(source))
    try:
        model = TokenLM(_config(checkpoint["hyper_parameters"]["config"]["model"]))
        tensors = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(FROZEN)}
        fill(model, TABLE, tensors, source)
    except ILL_FORMED as error:
        raise UserError(
            f"{source} is no checkpoint of arXiv 2601.14786's code ({type(error).__name__}: {error}): it has a "
            "state_dict, and hyper_parameters with config.model"
        ) from error
    return model.eval()


def _load(path: Path) -> Any:
    """What a file of torch.save holds, its tensors left on the disk until they are read."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} holds more than tensors and plain values, or is damaged: to open it could run code, so it is "
            "refused; save its state_dict and hyper_parameters alone with torch.save"
        ) from error
    except (OSError, EOFError, *ILL_FORMED, RuntimeError, AssertionError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise UserError(f"cannot read {path} ({reason}): give a .ckpt file of arXiv 2601.14786's code") from error


def _config(section: Mapping[str, Any]) -> TokenLMConfig:
    """The settings in `section`, and those that the code does not let vary. Its vocabulary counts the special token."""
    return TokenLMConfig(
        n_codebooks=int(section["codec_layer"]),
        codebook_size=int(section["vocab_size"]) - 1,
        d_model=int(section["d_model"]),
        n_layers=int(section["layers"]),
        d_state=int(section["d_state"]),
        dropout=float(section["drop_p"]),
        text_dim=TEXT_DIM,
        positions="joint",
        final_norm=False,
        predict_special=True,
        init_std=None,
    )
