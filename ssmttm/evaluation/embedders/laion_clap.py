"""CLAP's checkpoints as LAION publishes them: a PyTorch file, read as tensors only, into transformers' ClapModel.

Of the checkpoints without feature fusion, such as music_audioset_epoch_15_esc_90.14.pt. With the settings below the
embeddings are those of the package laion-clap; transformers' extractor begins at 0 Hz and its tokenizer does not
truncate.
"""

import re
from pathlib import Path
from pickle import UnpicklingError
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from ssmttm.errors import UserError, first_line
from ssmttm.evaluation.embedders.weights import load_pretrained

if TYPE_CHECKING:
    from transformers import ClapModel, ClapProcessor

_EXTRACTOR = {"truncation": "rand_trunc", "frequency_min": 50, "frequency_max": 14_000}
_TEXT_TOKENS = 77  # longer captions are truncated
_HEAD_WIDTH = 64  # of the text model
# LAION's names of layers and those of transformers, applied in this order.
_NAMES = (
    (r"^module\.", ""),
    (r"^audio_branch\.", "audio_model.audio_encoder."),
    (r"^text_branch\.", "text_model."),
    (r"_projection\.0\.", "_projection.linear1."),
    (r"_projection\.2\.", "_projection.linear2."),
    (r"\.bn0\.", ".batch_norm."),
    (r"\.attn\.proj\.", ".attention.output.dense."),
    (r"\.attn\.", ".attention.self."),
    (r"\.mlp\.fc1\.", ".intermediate.dense."),
    (r"\.mlp\.fc2\.", ".output.dense."),
    (r"\.norm1\.", ".layernorm_before."),
    (r"\.norm2\.", ".layernorm_after."),
)
# A spectrogram, masks and positions that transformers computes, and heads that no embedding depends on.
_UNUSED = re.compile(
    r"spectrogram_extractor|logmel_extractor|attn_mask|position_ids|audio_encoder\.(tscam_conv|head)\.|_transform\."
)
_COMPUTED = {"text_model.embeddings.position_ids", "text_model.embeddings.token_type_ids"}


def load_laion_clap(path: Path) -> tuple["ClapModel", "ClapProcessor"]:
    """The model of a file and its processor. The tokenizer is that of the file's folder, or else roberta-base.

    Raises:
        UserError: the file does not hold a CLAP without fusion, or there is no tokenizer.
    """
    from transformers import AutoTokenizer, ClapFeatureExtractor, ClapModel, ClapProcessor

    tensors = _tensors(path)
    try:
        model = ClapModel(_config(tensors))
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except (KeyError, RuntimeError) as error:
        reason = first_line(error)
        raise UserError(f"{path} is not a CLAP of LAION without fusion: {reason}") from error
    if wrong := [*(name for name in missing if name not in _COMPUTED), *unexpected]:
        raise UserError(f"{path} is not a CLAP of LAION without fusion: {wrong[0]} does not fit")
    own = (path.parent / "tokenizer.json").is_file() or (path.parent / "vocab.json").is_file()
    tokenizer = load_pretrained(AutoTokenizer.from_pretrained, str(path.parent) if own else "FacebookAI/roberta-base")
    tokenizer.model_max_length = _TEXT_TOKENS
    return model, ClapProcessor(ClapFeatureExtractor(**_EXTRACTOR), tokenizer)


def _config(tensors: dict[str, Tensor]) -> Any:
    """The sizes of a model, from its tensors."""
    from transformers import ClapConfig

    def count(pattern: str) -> int:
        return len({found[1] for name in tensors if (found := re.search(pattern, name))})

    audio, text = "audio_model.audio_encoder", "text_model"
    n_layers = count(rf"{audio}\.layers\.(\d+)\.")
    tables = [
        f"{audio}.layers.{i}.blocks.0.attention.self.relative_position_bias_table" for i in range(n_layers)
    ]  # [positions, heads]
    vocabulary, width = tensors[f"{text}.embeddings.word_embeddings.weight"].shape
    of_audio = {
        "depths": [count(rf"{audio}\.layers\.{i}\.blocks\.(\d+)\.") for i in range(n_layers)],
        "num_attention_heads": [tensors[table].shape[1] for table in tables],
        "hidden_size": len(tensors[f"{audio}.norm.weight"]),
        "patch_embeds_hidden_size": len(tensors[f"{audio}.patch_embed.norm.weight"]),
    }
    of_text = {
        "vocab_size": vocabulary,
        "hidden_size": width,
        "num_attention_heads": width // _HEAD_WIDTH,
        "num_hidden_layers": count(rf"{text}\.encoder\.layer\.(\d+)\."),
        "intermediate_size": len(tensors[f"{text}.encoder.layer.0.intermediate.dense.weight"]),
        "max_position_embeddings": len(tensors[f"{text}.embeddings.position_embeddings.weight"]),
    }
    projection = len(tensors["text_projection.linear1.weight"])
    return ClapConfig(audio_config=of_audio, text_config=of_text, projection_dim=projection)


def _tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a file by transformers' names."""
    scalar = np._core.multiarray.scalar  # of the training's figures, beside the weights; renamed in NumPy 2
    safe: list[Any] = [np.dtype, np.dtypes.Float64DType, scalar, (scalar, "numpy.core.multiarray.scalar")]
    try:
        with torch.serialization.safe_globals(safe):
            found = torch.load(path, map_location="cpu", weights_only=True)
        tensors: dict[str, Tensor] = {}
        for name, value in found.get("state_dict", found).items():
            for old, new in _NAMES:
                name = re.sub(old, new, name)
            if ".qkv." in name:
                for part, third in zip(("query", "key", "value"), value.chunk(3), strict=True):
                    tensors[name.replace(".qkv.", f".{part}.")] = third
            elif not _UNUSED.search(name):
                tensors[name] = value
        return tensors
    except (RuntimeError, AttributeError, ValueError, EOFError, UnpicklingError) as error:
        reason = first_line(error)
        raise UserError(f"{path} cannot be read as a checkpoint of CLAP: {reason}") from error
