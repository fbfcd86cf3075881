"""A small text encoder in the place of a large one: an encoder of transformers and a projection to the other's width.

On disk it is a folder of transformers (config.json, model.safetensors, tokenizer files) and projection.safetensors.
Shapes: B captions, L tokens, H its own width, E that of the encoder which it stands for.
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

from ssmttm.errors import UserError
from ssmttm.text.vocabulary import plain_tokenizer, tokenizer_json, trim

PROJECTION = "projection.safetensors"
_LAYER = re.compile(r"(encoder\.(?:layer|block)\.)(\d+)")
# What transformers calls the sizes of an encoder.
_NAMES = {
    "bert": {
        "layers": "num_hidden_layers", "width": "hidden_size", "mlp": "intermediate_size",
        "heads": "num_attention_heads", "positions": "max_position_embeddings",
    },
    "t5": {"layers": "num_layers", "width": "d_model", "mlp": "d_ff", "heads": "num_heads"},
}  # fmt: skip
_DROPOUTS = ("hidden_dropout_prob", "attention_probs_dropout_prob", "dropout_rate")


class EncoderOutput(NamedTuple):
    """As transformers names it. last_hidden_state: [B, L, E]."""

    last_hidden_state: Tensor


class StudentEncoder(nn.Module):
    """A BertModel or T5EncoderModel, and a linear map of its token states, which starts as the identity.

    Args:
        model: the encoder.
        dim: E.
    """

    def __init__(self, model: Any, dim: int) -> None:
        super().__init__()
        self.model, self.dim, self.config = model, dim, model.config
        self.projection = nn.Linear(model.config.hidden_size, dim)
        nn.init.eye_(self.projection.weight)
        nn.init.zeros_(self.projection.bias)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> EncoderOutput:
        """Tokens and which of them are real, [B, L] each -> states [B, L, E]."""
        states = self.model(input_ids=input_ids, attention_mask=attention_mask).last_hidden_state  # [B, L, H]
        return EncoderOutput(self.projection(states))

    def flops(self, n_tokens: int) -> int:
        """Forward FLOPs of the linear maps."""
        return 2 * n_tokens * sum(m.weight.numel() for m in self.modules() if isinstance(m, nn.Linear))

    def save(self, folder: str | Path, tokenizer: Any, half: bool = True) -> None:
        """Write the folder that `load_text_encoder` reads; with `half`, matrices in float16."""

        def stored(value: Tensor) -> Tensor:
            return value.detach().to(torch.float16 if half and value.ndim > 1 else torch.float32).contiguous()

        folder = Path(folder)
        weights = {name: stored(value) for name, value in self.model.state_dict().items()}
        self.model.save_pretrained(folder, state_dict=weights)
        tokenizer.save_pretrained(folder)
        save_file({name: stored(value) for name, value in self.projection.state_dict().items()}, folder / PROJECTION)

    @classmethod
    def around(cls, model: Any, folder: Path) -> "StudentEncoder":
        """The encoder of a folder with its projection. Raises UserError if that cannot be read or does not fit."""
        try:
            weights = load_file(folder / PROJECTION)
            student = cls(model, len(weights["bias"]))
            student.projection.load_state_dict(weights)
        except (OSError, SafetensorError, KeyError, RuntimeError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{folder / PROJECTION} does not fit the encoder beside it ({reason}): export it again"
                            ) from error  # fmt: skip
        return student


class StudentShape(NamedTuple):
    """What a student keeps of the encoder that it starts from.

    Attributes:
        layers: which, counted from 1; None: all.
        width, mlp: channels of the stream and hidden units of each MLP; None: all.
        positions: of a table of positions; None: all.
    """

    layers: Sequence[int] | None = None
    width: int | None = None
    mlp: int | None = None
    positions: int | None = None


def build_student(
    model: Any, tokenizer: Any, dim: int, shape: StudentShape, captions: Iterable[str] | None = None
) -> tuple[StudentEncoder, Any]:
    """A student and its tokenizer.

    Args:
        model, tokenizer: what it starts from, an encoder of transformers or a student; they stay as they are.
        dim: E.
        shape: what it keeps.
        captions: the vocabulary is trimmed to them; None: it stays whole.

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
    """An encoder of that shape and without dropout, trainable, made of layers and leading channels of another.

    Heads keep their size: a narrower encoder has fewer of them.

    Raises:
        UserError: the shape is larger than the encoder, or its heads do not divide the width.
    """
    names, old = _NAMES[model.config.model_type], model.config
    config = copy.deepcopy(old)
    asked = {"width": shape.width, "mlp": shape.mlp, "positions": shape.positions}
    for part, size in asked.items():
        if size is None or part not in names:
            continue
        if not 1 <= size <= getattr(old, names[part]):
            raise UserError(f"a text student with {part} {size} cannot be cut from an encoder with "
                            f"{getattr(old, names[part])}: give 1 to as many")  # fmt: skip
        setattr(config, names[part], size)
    if shape.width is not None:
        head = getattr(old, "d_kv", None) or old.hidden_size // getattr(old, names["heads"])
        if shape.width % head:
            raise UserError(f"text_student.d_model={shape.width}: the heads are {head} wide, give a multiple of that")
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
            there = _LAYER.sub(lambda match: f"{match[1]}{layers[int(match[2])] - 1}", name, count=1)
            # T5 counts distances in its first layer only, which stays the first.
            value = source.get(there, source.get(name))
            parameter.copy_(value[tuple(slice(size) for size in parameter.shape)])
    return student


def new_encoder(config: Any) -> Any:
    """An encoder of transformers with fresh weights."""
    from transformers import BertModel, T5EncoderModel

    return T5EncoderModel(config) if config.model_type == "t5" else BertModel(config, add_pooling_layer=False)


def describe(encoder: StudentEncoder, tokenizer: Any) -> dict[str, Any]:
    """All of a student but its weights, as JSON."""
    return {
        "dim": encoder.dim,
        "config": encoder.config.to_dict(),
        "tokenizer": tokenizer_json(tokenizer),
        "marks": tokenizer.special_tokens_map,
    }


def from_description(description: dict[str, Any]) -> tuple[StudentEncoder, Any]:
    """A student with fresh weights, and its tokenizer."""
    from transformers import AutoConfig

    model = new_encoder(AutoConfig.for_model(**description["config"]))
    tokenizer = plain_tokenizer(description["tokenizer"], description["marks"])
    return StudentEncoder(model, description["dim"]), tokenizer
