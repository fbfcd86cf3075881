"""Initial weights of a student from its teacher: selected layers, sliced widths, attention converted to Mamba-2.

Layers of the same class are sliced; attention becomes Mamba-2 as in arXiv 2408.15237 (Q, K, V, O -> C, B, x, out). All
other parameters keep their random initialisation. A student of equal shape equals its teacher bit for bit.
Shapes: B batch, K codebooks, S positions, D model width, I and M inputs of a layer's last projection, H heads.
"""

import contextlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.distill.channels import AXES, input_energy, layer_sizes, select_channels, slice_parameter, top_channels
from ssmttm.distill.layer_map import layer_map
from ssmttm.errors import UserError
from ssmttm.mixers import Attention, Mamba2
from ssmttm.models import TokenLM
from ssmttm.models.blocks import MLP, CrossAttentionSublayer, MLPSublayer, Sublayer
from ssmttm.models.controls import CONFIG_KEYS
from ssmttm.text.condition import TextCondition


@dataclass(frozen=True)
class Importance:
    """Energies of a teacher's channels on calibration data."""

    model: Tensor  # [D], of the RMS-normalised hidden states after all blocks
    layers: dict[str, Tensor]  # [I] or [M], of the input of the last projection of each layer


@torch.no_grad()
def channel_importance(teacher: TokenLM, batches: Iterable[tuple[Tensor, TextCondition]]) -> Importance:
    """Mean squares of a teacher's activations over batches of input codes [B, K, S] and text."""
    energy = torch.zeros(teacher.config.d_model)

    def add_energy(module: nn.Module, inputs: tuple[Tensor], output: Tensor) -> None:
        energy.add_(F.rms_norm(output, output.shape[-1:]).square().flatten(0, -2).mean(0).cpu())

    projections = {}
    for name, layer in teacher.named_modules():
        if type(layer) in AXES:
            projections[name] = [layer.get_submodule("fc2" if isinstance(layer, MLP) else "out_proj")]
    with contextlib.ExitStack() as hooks:
        for block in teacher.blocks:
            hooks.enter_context(block.register_forward_hook(add_energy))
        layers = input_energy(projections, lambda: [teacher(codes, text) for codes, text in batches])
    return Importance(energy, layers)


@torch.no_grad()
def transfer_weights(
    teacher: TokenLM,
    student: TokenLM,
    layers: str | Sequence[int] | None,
    width: str | None,
    importance: Importance | None = None,
) -> list[str]:
    """Initialise a student from its teacher where they correspond; returns the names of the parameters that were set.

    Args:
        layers: an argument of `layer_map`; None: only embedding, text projection, controls, last norm and heads.
        width: how a narrower student selects channels: "importance" (most energy) or "first"; None: equal widths.
        importance: for width="importance".
    """
    for key in ("n_codebooks", "codebook_size", "text_dim"):
        size, expected = getattr(student.config, key), getattr(teacher.config, key)
        if size != expected:
            raise UserError(f"weight transfer needs model.{key}={expected}, as of the teacher; the student has {size}")
    if width not in (None, "importance", "first"):
        raise UserError(f"unknown distill.transfer.width {width!r}: choose importance or first")
    d_teacher, d_student = teacher.config.d_model, student.config.d_model
    if d_student > d_teacher or (d_student < d_teacher and width is None):
        hint = "weights are cut, not grown" if d_student > d_teacher else "set distill.transfer.width=importance"
        raise UserError(f"the student has model.d_model={d_student}, its teacher {d_teacher}: {hint}")
    if width == "importance" and importance is None:
        raise ValueError("width='importance' needs the teacher's `channel_importance`")
    if width != "importance":
        importance = None
    kept = top_channels(None if importance is None else importance.model, d_student)  # [D of the student]
    transferred = _transfer_ends(teacher, student, kept)
    blocks = [] if layers is None else layer_map(layers, student.config.n_layers, teacher.config.n_layers)
    for index, block in enumerate(blocks):
        for i, j in _matching_sublayers(teacher.blocks[block - 1], student.blocks[index]):
            source, target = f"blocks.{block - 1}.sublayers.{i}", f"blocks.{index}.sublayers.{j}"
            theirs: Any = teacher.get_submodule(source)
            ours: Any = student.get_submodule(target)
            if width is None and type(theirs.inner) is type(ours.inner) and not _same_shapes(theirs.inner, ours.inner):
                raise UserError(
                    f"{target} has other widths than its teacher's layer: set distill.transfer.width=importance"
                )
            energy = None if importance is None else importance.layers.get(f"{source}.inner")
            names = _transfer_sublayer(theirs, ours, kept, energy, source)
            transferred += [f"{target}.{name}" for name in names]
    return transferred


def _matching_sublayers(teacher: Any, student: Any) -> list[tuple[int, int]]:
    """Indices of sublayers of the same class in two blocks: mixers, cross-attentions, MLPs, in order."""
    pairs: list[tuple[int, int]] = []
    for kind in (Sublayer, CrossAttentionSublayer, MLPSublayer):
        theirs = [index for index, sublayer in enumerate(teacher.sublayers) if type(sublayer) is kind]
        ours = [index for index, sublayer in enumerate(student.sublayers) if type(sublayer) is kind]
        pairs += zip(theirs, ours, strict=False)
    return pairs


def _copy(module: nn.Module, name: str, value: Tensor) -> str:
    module.get_parameter(name).copy_(value)
    return name


def _transfer_ends(teacher: TokenLM, student: TokenLM, kept: Tensor) -> list[str]:
    """Embedding, text projection, last norm, heads and the embeddings of controls."""
    n_logits = min(teacher.n_logits, student.n_logits)
    n_codebooks = student.config.n_codebooks
    ours, theirs = (model.heads.weight.view(n_codebooks, model.n_logits, -1) for model in (student, teacher))
    ours[:, :n_logits] = theirs[:, :n_logits][..., kept]
    student.embedding.weight.copy_(teacher.embedding.weight[:, kept])
    transferred = ["embedding.weight", "heads.weight"]
    modules = ["text", "norm", "chroma", "bar_position", "timing", "key", "metre"]
    if len(kept) == teacher.config.d_model:
        modules.append("tempo")  # its sinusoids depend on the width
    for name in modules:
        own, source = getattr(student, name), getattr(teacher, name)
        if own is None or type(own) is not type(source):
            continue
        present = dict(own.named_parameters())
        for key, value in source.named_parameters():
            if key in present:
                channels = value[..., kept] if key in ("classes.weight", "null") else value[kept]
                transferred.append(f"{name}.{_copy(own, key, channels)}")
    return transferred


@torch.no_grad()
def copy_control_predictor(teacher: TokenLM, student: TokenLM) -> list[str]:
    """Give a student its teacher's control predictor, which reads the captions alone and so fits any width; returns the
    names of the parameters that were set. Raises UserError if the student predicts a control that the teacher does not.
    """
    own, source = student.control_predictor, teacher.control_predictor
    if own is None:
        return []
    missing = set(own.heads) - set(() if source is None else source.heads)
    if source is None or missing:
        names = " and ".join(CONFIG_KEYS[name] for name in own.heads if name in missing)
        raise UserError(
            f"the student predicts {names} from the caption, its teacher does not: set model.predict_controls=false"
        )
    weights = dict(source.named_parameters())
    return [f"control_predictor.{_copy(own, name, weights[name])}" for name, _ in own.named_parameters()]


def _transfer_sublayer(theirs: Sublayer, ours: Sublayer, kept: Tensor, energy: Tensor | None, source: str) -> list[str]:
    """Norm, layer scale, adaLN and the layer inside."""
    transferred = []
    present, d_model = dict(ours.named_parameters()), len(theirs.get_parameter("norm.weight"))
    for name, value in theirs.named_parameters():
        if name.startswith("inner.") or name not in present:
            continue
        axes = [["model"] * 3, ["model"]] if name.startswith("adaln") else [["model"]]
        sliced = slice_parameter(value, axes[: value.ndim], {"model": kept}, {"model": d_model})
        transferred.append(_copy(ours, name, sliced))
    student, teacher = ours.inner, theirs.inner
    if isinstance(teacher, Attention) and isinstance(student, Mamba2):
        inner = attention_to_mamba2(teacher, student, kept)
    elif type(teacher) is not type(student):
        inner = []
    elif _same_shapes(teacher, student):
        student.load_state_dict(teacher.state_dict())
        inner = [name for name, _ in student.named_parameters()]
    elif type(student) not in AXES:
        raise UserError(f"the widths of a {type(student).__name__} cannot be cut ({source}): keep the teacher's")
    else:
        inner = _transfer_slices(teacher, student, kept, energy, source)
    return transferred + [f"inner.{name}" for name in inner]


def _same_shapes(teacher: nn.Module, student: nn.Module) -> bool:
    theirs, ours = ({name: p.shape for name, p in module.named_parameters()} for module in (teacher, student))
    return theirs == ours


def _transfer_slices(teacher: Any, student: Any, kept: Tensor, energy: Tensor | None, source: str) -> list[str]:
    """Slice a layer to the sizes of its student's."""
    indices = {**select_channels(teacher, student, energy, source), "model": kept}
    if isinstance(getattr(student, "in_proj", None), nn.Identity):  # an S4D on the model's channels
        indices["inner"] = kept
    sizes = layer_sizes(teacher)
    sizes["model"] = teacher.fc1.in_features if isinstance(teacher, MLP) else teacher.d_model
    if "heads" in sizes:
        sizes["inner"] = sizes["heads"] * sizes["head"]
    if "groups" in sizes:
        sizes["group_state"] = sizes["groups"] * sizes["state"]
    axes = AXES[type(teacher)]
    return [
        _copy(student, name, slice_parameter(value, axes[name], indices, sizes))
        for name, value in teacher.named_parameters()
    ]


@torch.no_grad()
def attention_to_mamba2(attention: Attention, mamba: Mamba2, kept: Tensor) -> list[str]:
    """Initialise a Mamba-2 as linear attention: C, B, x and out from Q, K, V and O; returns the names that were set.

    Each group takes the mean Q and K of its heads; the convolution is set to the identity; the gate z, dt, A and D keep
    their initialisation. Surplus heads and states start at zero output (x of these heads and C of these states are 0),
    while out and B keep their initialisation, so that all of them receive gradients. kept: the student's channels, [D].
    """
    heads, width = attention.n_heads, attention.d_model // attention.n_heads
    groups, state = mamba.ngroups, mamba.d_state
    if mamba.headdim != width or mamba.nheads < heads or state < width or heads % groups:
        raise UserError(
            f"attention with {heads} heads of width {width} needs a Mamba-2 with model.headdim={width}, at least "
            f"{heads} heads, model.d_state of at least {width} and a model.ngroups that divides {heads}; got headdim "
            f"{mamba.headdim}, {mamba.nheads} heads, d_state {state}, ngroups {groups}"
        )
    q, k, v = (getattr(attention, f"{name}_proj").weight[:, kept] for name in "qkv")  # [H P, D]
    _, x, B, C, _ = mamba.in_proj.weight.detach().split(
        [mamba.d_inner, mamba.d_inner, groups * state, groups * state, mamba.nheads]
    )
    heads_per_group, taken_per_group = mamba.nheads // groups, heads // groups
    targets = torch.cat([torch.arange(taken_per_group) + group * heads_per_group for group in range(groups)])
    x.zero_()
    x.view(mamba.nheads, width, -1)[targets] = v.view(heads, width, -1)
    for rows, source in ((B, k), (C, q)):
        rows.view(groups, state, -1)[:, :width] = source.view(groups, taken_per_group, width, -1).mean(1)
    C.view(groups, state, -1)[:, width:] = 0
    mamba.conv1d.weight.zero_()
    mamba.conv1d.weight[..., -1] = 1
    mamba.get_parameter("conv1d.bias").zero_()
    out = mamba.out_proj.weight.view(len(kept), mamba.nheads, width)
    out[:, targets] = attention.out_proj.weight[kept].view(len(kept), heads, width)
    return ["in_proj.weight", "conv1d.weight", "conv1d.bias", "out_proj.weight"]
