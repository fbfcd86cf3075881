"""Import of PyTorch Lightning checkpoints of the code of arXiv 2601.14786 (Prefix SiMBA on DAC 44.1 kHz).

Only tensors and plain values are read: a pickle can execute code, so any other content is rejected.
The model has sinusoidal positions over text and audio together ("joint"), no norm before the heads, and unmasked text
padding ("unmasked_padding" in `ssmttm.text.null_condition`). Its sequences begin with special tokens, which are the
start column of a TokenLM: the pattern is a plain delay.
"""

from collections.abc import Mapping
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch

from ssmttm.codecs import load_codec
from ssmttm.errors import UserError, first_line
from ssmttm.export.importers.card import imported_card, imported_config
from ssmttm.export.importers.names import load_renamed
from ssmttm.files import new_folder
from ssmttm.model_folder import write_model_folder
from ssmttm.models.token_lm import TokenLM, TokenLMConfig
from ssmttm.text.encoders import load_text_encoder

CODEC, TEXT_ENCODER, TEXT_DIM = "descript/dac_44khz", "google/flan-t5-base", 768
FROZEN = "text_encoder."  # a copy of Flan-T5 without its tokenizer; it is loaded by name instead
MALFORMED = AttributeError, LookupError, TypeError, ValueError
TABLE = {
    r"embedding\.weight": r"music_model.embedding.{k}.weight", r"heads\.weight": r"music_model.lm_head.{k}.weight",
    r"text\.linear\.(.*)": r"music_model.condition_linear.\1", r"text\.norm\.(.*)": r"music_model.condition_norm.\1",
    r"blocks\.(\d+)\.sublayers\.0\.norm\.(.*)": r"music_model.backbone.\1.mamba.norm.\2",
    r"blocks\.(\d+)\.sublayers\.0\.inner\.(.*)": r"music_model.backbone.\1.mamba.mamba.\2",
    r"blocks\.(\d+)\.sublayers\.1\.norm\.(.*)": r"music_model.backbone.\1.ff.norm.\2",
    r"blocks\.(\d+)\.sublayers\.1\.inner\.fc1\.(.*)": r"music_model.backbone.\1.ff.feed_forward.0.\2",
    r"blocks\.(\d+)\.sublayers\.1\.inner\.fc2\.(.*)": r"music_model.backbone.\1.ff.feed_forward.3.\2",
}  # fmt: skip


def import_released(
    source: str | Path, out: str | Path, codec: str | Path | None = None, text_encoder: str | Path | None = None
) -> Path:
    """Write a model folder from a checkpoint. Raises UserError if the file is not such a checkpoint, or codec or text
    encoder cannot be loaded.

    Args:
        source: the .ckpt file.
        out: a new folder. Its card has the hub names and the fingerprints of codec and text encoder.
        codec, text_encoder: where to load these from, such as a folder, if not by their names.
    """
    source, out = Path(source), Path(out)
    model = read_released(source)
    its_codec, its_encoder = load_codec(codec or CODEC), load_text_encoder(text_encoder or TEXT_ENCODER)
    codec_entry = CODEC if codec else its_codec.name, its_codec
    text_entry = TEXT_ENCODER if text_encoder else its_encoder.name, its_encoder
    card = imported_card(out.name, source.name, model, codec_entry, text_entry, "unmasked_padding")
    with new_folder(out) as folder:
        write_model_folder(folder, model.state_dict(), imported_config(model, "delay"), card)
    return out


def read_released(source: str | Path) -> TokenLM:
    """The language model of a checkpoint, in eval mode. Raises UserError as `import_released`."""
    checkpoint = _load(Path(source))
    try:
        model = TokenLM(_config(checkpoint["hyper_parameters"]["config"]["model"]))
        tensors = {name: value for name, value in checkpoint["state_dict"].items() if not name.startswith(FROZEN)}
        load_renamed(model, TABLE, tensors, source)
    except MALFORMED as error:
        reason = f"{type(error).__name__}: {error}"
        raise UserError(f"{source} is not a checkpoint of arXiv 2601.14786's code ({reason})") from error
    return model.eval()


def _load(path: Path) -> Any:
    """The content of a torch.save file, memory-mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise UserError(
            f"{path} is damaged, or has more than tensors and plain values and is rejected, since opening it could "
            "execute code: save its state_dict and hyper_parameters alone with torch.save"
        ) from error
    except (OSError, EOFError, *MALFORMED, RuntimeError, AssertionError) as error:
        reason = first_line(error)
        raise UserError(f"cannot read {path} ({reason}): give a .ckpt file of arXiv 2601.14786's code") from error


def _config(section: Mapping[str, Any]) -> TokenLMConfig:
    """The settings in `section` and those fixed in the code. Its vocabulary size includes the special token."""
    return TokenLMConfig(
        n_codebooks=int(section["codec_layer"]), codebook_size=int(section["vocab_size"]) - 1,
        d_model=int(section["d_model"]), n_layers=int(section["layers"]), d_state=int(section["d_state"]),
        dropout=float(section["drop_p"]), text_dim=TEXT_DIM, positions="joint", final_norm=False,
        predict_special=True, init_std=None,
    )  # fmt: skip
