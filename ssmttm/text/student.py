"""A small text encoder that replaces a large one: a transformers encoder and a projection to the teacher's width.

On disk: a transformers folder (config.json, model.safetensors, tokenizer files) and projection.safetensors.
Shapes: B captions, L tokens, H width of the student, E width of the teacher.
"""

import copy
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from ssmttm.errors import UserError, first_line
from ssmttm.text.bert import EncoderOutput
from ssmttm.text.vocabulary import plain_tokenizer, tokenizer_json, trim

PROJECTION = "projection.safetensors"
_LAYER = re.compile(r"(encoder\.(?:layer|block)\.)(\d+)")
# The names of an encoder's sizes in transformers.
_NAMES = {
    "bert": {
        "layers": "num_hidden_layers", "width": "hidden_size", "mlp": "intermediate_size",
        "heads": "num_attention_heads", "positions": "max_position_embeddings",
    },
    "t5": {"layers": "num_layers", "width": "d_model", "mlp": "d_ff", "heads": "num_heads"},
}  # fmt: skip
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate")


class StudentEncoder(nn.Module):
    """A `Bert`, or transformers' BertModel or T5EncoderModel, with a linear map of its token states to width `dim`,
    initially the identity."""

    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model, self.dim, self.config = model, dim, model.config
        self.projection = nn.Linear(model.config.hidden_size, dim)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
        """Token ids and mask, [B, L] each -> states [B, L, E]."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, L, H]
        return EncoderOutput(self.projection(states))

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of the linear maps."""
        return 2 * n_tokens * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def save(self, folder: str | Path, tokenizer: Any, half: bool = True) -> None:
        """Write the folder that `load_text_encoder` reads; with `half`, matrices in float16."""

        def stored(module: nn.Module) -> dict[str, Tensor]:
            return {
                name: value.detach().to(torch.float16 if half and value.ndim > 1 else torch.float32).contiguous()
                for name, value in module.state_dict().items()
            }

        folder = Path(folder)
        self.model.save_pretrained(folder, state_dict=stored(self.model))
        tokenizer.save_pretrained(folder)
        save_file(stored(self.projection), folder / PROJECTION)

    @classmethod
    def with_projection(cls, model: Any, folder: Path) -> "StudentEncoder":
        """A loaded encoder with the projection of its folder. Raises UserError if that is missing or does not fit."""
        try:
            weights = load_file(folder / PROJECTION)
            student = cls(model, len(weights["bias"]))
            student.projection.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = first_line(error)
            raise UserError(
                f"{folder / PROJECTION} does not fit the encoder in its folder ({reason}): export it again"
            ) from error
        return student


class StudentShape(NamedTuple):
    """What a student keeps of its source encoder; None: all."""

    layers: Sequence[int] | None = None  # layer numbers, counted from 1
    width: int | None = None  # hidden width
    mlp: int | None = None  # hidden units of each MLP
    positions: int | None = None  # length of the position table


def build_student(
    model: Any, tokenizer: Any, dim: int, shape: StudentShape, captions: Iterable[str] | None = None
) -> tuple[StudentEncoder, Any]:
    """A student of output width `dim` and its tokenizer, from a transformers encoder or another student.

    The vocabulary is trimmed to the captions; None: it is not trimmed. The source is not changed.

    Raises:
        UserError: the shape does not fit, or the vocabulary cannot be trimmed.
    """
    inner = model.model if isinstance(model, StudentEncoder) else model
    if captions is None:
        tokenizer = plain_tokenizer(tokenizer_json(tokenizer), tokenizer.special_tokens_map)
    else:
        inner, tokenizer = trim(inner, tokenizer, captions)
    student = StudentEncoder(cut_down(inner, shape), dim)
    if isinstance(model, StudentEncoder) and model.dim == dim:
        with torch.no_grad():
            student.projection.weight.copy_(model.projection.weight[:, : student.projection.in_features])
            student.projection.bias.copy_(model.projection.bias)
    return student, tokenizer


def cut_down(model: Any, shape: StudentShape) -> Any:
    """A trainable encoder without dropout, initialised from some layers and the leading channels of another.

    Heads keep their width: a narrower encoder has fewer heads.

    Raises:
        UserError: the shape is larger than the encoder, or the head width does not divide its width.
    """
    names, old = _NAMES[model.config.model_type], model.config
    config = copy.deepcopy(old)
    for key in ("width", "mlp", "positions"):
        size, name = getattr(shape, key), names.get(key)
        if size is None or name is None:
            continue
        if not 1 <= size <= getattr(old, name):
            raise UserError(f"{key} of a text student must be in [1, {getattr(old, name)}], its source's; got {size}")
        setattr(config, name, size)
    if shape.width is not None:
        head = getattr(old, "d_kv", None) or old.hidden_size // getattr(old, names["heads"])
        if shape.width % head:
            raise UserError(f"text_student.d_model must be a multiple of the head width {head}, got {shape.width}")
        setattr(config, names["heads"], min(shape.width // head, getattr(old, names["heads"])))
    layers = list(shape.layers or range(1, getattr(old, names["layers"]) + 1))
    setattr(config, names["layers"], len(layers))
    for name in _DROPOUTS:
        if hasattr(config, name):
            setattr(config, name, 0.0)
    student = new_encoder(config)
    source = dict(model.named_parameters())
    with torch.no_grad():
        for name, parameter in student.named_parameters():
            source_name = _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])] - 1}", name, count=1)
            # T5 has relative position biases in its first layer only, which stays the first.
            value = source[source_name if source_name in source else name]
            parameter.copy_(value[tuple(slice(size) for size in parameter.shape)])
    return student


def new_encoder(config: Any) -> Any:
    """A transformers encoder with random weights."""
    from transformers import BertModel, T5EncoderModel

    return T5EncoderModel(config) if config.model_type == "t5" else BertModel(config, add_pooling_layer=False)


def student_description(encoder: StudentEncoder, tokenizer: Any) -> dict[str, Any]:
    """Everything but the weights of a student, as JSON."""
    return {
        "dim": encoder.dim,
        "config": encoder.config.to_dict(),
        "tokenizer": tokenizer_json(tokenizer),
        "special_tokens": tokenizer.special_tokens_map,
    }


def student_from_description(description: dict[str, Any]) -> tuple[StudentEncoder, Any]:
    """A student with random weights, and its tokenizer."""
    from transformers import AutoConfig

    model = new_encoder(AutoConfig.for_model(**description["config"]))
    tokenizer = plain_tokenizer(description["tokenizer"], description["special_tokens"])
    return StudentEncoder(model, description["dim"]), tokenizer
