"""A student's first weights, taken from its teacher: chosen layers, slices of their widths, attention as Mamba-2.

Layers of one kind are cut; attention goes into Mamba-2 as in arXiv 2408.15237, Q, K, V and O as C, B, x and out. The
rest keeps its random start. With shapes like the teacher's the student is the teacher, to the bit.
Shapes: B batch, K codebooks, S positions, D model width, I and M what goes into a layer's last projection, H heads.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ssmttm.distill.channels import AXES, chosen, cut, most, sizes_of
from ssmttm.distill.layer_map import layer_map
from ssmttm.errors import UserError
from ssmttm.mixers import Attention, Mamba2
from ssmttm.models import TokenLM
from ssmttm.models.blocks import MLP, Sublayer
from ssmttm.text.condition import TextCondition


@dataclass(frozen=True)
class Importance:
    """Energies of a teacher's channels on calibration data.

    Attributes:
        model: [D], of the stream of unit size, over all blocks.
        layers: by the name of a layer, of what goes into its last projection, [I] or [M].
    """

    model: Tensor
    layers: dict[str, Tensor]


@torch.no_grad()
def channel_importance(teacher: TokenLM, batches: Iterable[tuple[Tensor, TextCondition]]) -> Importance:
    """Mean squares of a teacher's activations over batches of codes [B, K, S], as its forward takes them, and text."""
    model, layers, handles = torch.zeros(teacher.config.d_model), {}, []

    def of_stream(module: nn.Module, inputs: Any, output: Tensor) -> None:
        model.add_(F.rms_norm(output, output.shape[-1:]).square().flatten(0, -2).mean(0).cpu())

    def of_layer(name: str) -> Any:
        def hook(module: nn.Module, inputs: tuple[Tensor]) -> None:
            energy = inputs[0].square().flatten(0, -2).mean(0).cpu()
            layers[name] = layers.get(name, 0) + energy

        return hook

    for name, module in _layers(teacher).items():
        last = module.fc2 if isinstance(module, MLP) else module.out_proj
        handles.append(last.register_forward_pre_hook(of_layer(name)))
    handles += [block.register_forward_hook(of_stream) for block in teacher.blocks]
    try:
        for codes, text in batches:
            teacher(codes, text)
    finally:
        for handle in handles:
            handle.remove()
    return Importance(model, layers)


@torch.no_grad()
def transfer_weights(
    teacher: TokenLM,
    student: TokenLM,
    layers: str | Sequence[int] | None,
    width: str | None,
    importance: Importance | None = None,
) -> list[str]:
    """Fill a student with what it can take from its teacher.

    Args:
        layers: a teacher's block for each of the student's, see `ssmttm.distill.layer_map`; None: no block is taken, but
            embedding, text projection, last norm and heads.
        width: how channels are chosen where the student is narrower: "importance", those with the most energy; "first".
            None: widths are the same.
        importance: for width="importance".

    Returns:
        The names of the student's parameters that were set.

    Raises:
        UserError: other codes or text, a block that is not there, a student that is wider, a slice that is not known.
    """
    for key in ("n_codebooks", "codebook_size", "text_dim"):
        ours, theirs = getattr(student.config, key), getattr(teacher.config, key)
        if ours != theirs:
            raise UserError(f"weights cannot be taken from a teacher with model.{key}={theirs}: the student has {ours}")
    if width not in (None, "importance", "first"):
        raise UserError(f"unknown distill.transfer.width {width!r}: choose importance or first")
    has, wants = teacher.config.d_model, student.config.d_model
    if wants > has or (wants < has and width is None):
        raise UserError(
            f"the student is {wants} wide, its teacher {has}: " + ("weights are cut, not grown" if wants > has else
            "set distill.transfer.width=importance")
        )  # fmt: skip
    if width == "importance" and importance is None:
        raise ValueError("width='importance' needs the teacher's `channel_importance`")
    energies = importance if width == "importance" else None
    kept = most(None if energies is None else energies.model, has, wants)  # [D of the student]
    done = _transfer_ends(teacher, student, kept)
    numbers = [] if layers is None else layer_map(layers, student.config.n_layers, teacher.config.n_layers)
    for index, number in enumerate(numbers):
        for i, j in _alike(teacher.blocks[number - 1], student.blocks[index]):
            source, place = f"blocks.{number - 1}.sublayers.{i}", f"blocks.{index}.sublayers.{j}"
            theirs, ours = teacher.get_submodule(source), student.get_submodule(place)
            if width is None:
                _check_same_widths(theirs.inner, ours.inner, place)
            energy = None if energies is None else energies.layers.get(f"{source}.inner")
            done += [f"{place}.{name}" for name in _transfer_sublayer(theirs, ours, kept, energy, source)]
    return done


def _layers(model: TokenLM) -> dict[str, nn.Module]:
    """All layers of a model's blocks whose channels can be cut, by name."""
    return {name: module for name, module in model.named_modules() if type(module) in AXES}


def _alike(teacher: nn.Module, student: nn.Module) -> list[tuple[int, int]]:
    """Which sublayers of two blocks are for the same: first mixer to first mixer, the looks at the text, the MLPs."""

    def numbers(block: nn.Module, kind: str) -> list[int]:
        kinds = ["mixer" if b.is_mixer else "text" if b.sees_text else "mlp" for b in block.sublayers]
        return [index for index, own in enumerate(kinds) if own == kind]

    pairs = (zip(numbers(teacher, k), numbers(student, k), strict=False) for k in ("mixer", "text", "mlp"))
    return [pair for of_kind in pairs for pair in of_kind]


def _check_same_widths(teacher: nn.Module, student: nn.Module, place: str) -> None:
    """Raises UserError where a layer of the teacher's kind has other widths."""
    if type(teacher) is type(student) and not _same_shapes(teacher, student):
        raise UserError(f"{place} is of other widths than its teacher's layer: set distill.transfer.width=importance")


def _put(ours: nn.Module, name: str, value: Tensor) -> str:
    ours.get_parameter(name).copy_(value)
    return name


def _transfer_ends(teacher: TokenLM, student: TokenLM, kept: Tensor) -> list[str]:
    """Embedding, text projection, last norm, heads, and what tells of a melody and a tempo."""
    codes = torch.arange(min(teacher.n_logits, student.n_logits))
    n_codebooks = student.config.n_codebooks
    ours, theirs = (m.heads.weight.view(n_codebooks, m.n_logits, -1) for m in (student, teacher))
    ours[:, codes] = theirs[:, codes][..., kept]
    student.embedding.weight.copy_(teacher.embedding.weight[:, kept])
    done = ["embedding.weight", "heads.weight"]
    places = ["text", "norm", "chroma"]
    if len(kept) == teacher.config.d_model:
        places.append("tempo")  # whose sinusoids depend on the width
    for place in places:
        own, source = getattr(student, place), getattr(teacher, place)
        if own is None or type(own) is not type(source):
            continue
        for name, value in source.named_parameters():
            if name in dict(own.named_parameters()):
                done.append(f"{place}.{_put(own, name, value[kept])}")
    return done


def _transfer_sublayer(theirs: Sublayer, ours: Sublayer, kept: Tensor, energy: Tensor | None, source: str) -> list[str]:
    """Norm, layer scale, modulation and the layer inside."""
    done = []
    for name, value in theirs.named_parameters():
        if name.startswith("inner.") or name not in dict(ours.named_parameters()):
            continue
        axes = [["model"] * 3, ["model"]] if name.startswith("adaln") else [["model"]]
        value = cut(value, axes[: value.ndim], {"model": kept}, {"model": len(theirs.norm.weight)})
        done.append(_put(ours, name, value))
    inner, teacher = ours.inner, theirs.inner
    if isinstance(teacher, Attention) and isinstance(inner, Mamba2):
        taken = attention_to_mamba2(teacher, inner, kept)
    elif type(teacher) is not type(inner):
        taken = []
    elif _same_shapes(teacher, inner):
        inner.load_state_dict(teacher.state_dict())
        taken = [name for name, _ in inner.named_parameters()]
    elif type(inner) not in AXES:
        raise UserError(f"{source} is a {type(inner).__name__}, whose widths cannot be cut: give it its teacher's")
    else:
        taken = _transfer_slices(teacher, inner, kept, energy, source)
    return done + [f"inner.{name}" for name in taken]


def _same_shapes(teacher: nn.Module, student: nn.Module) -> bool:
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (teacher, student)]
    return shapes[0] == shapes[1]


def _transfer_slices(
    teacher: nn.Module, student: nn.Module, kept: Tensor, energy: Tensor | None, source: str
) -> list[str]:
    """Cut a layer of one kind to its student's sizes."""
    choice: dict[str, Tensor] = dict(chosen(teacher, student, energy, source)) | {"model": kept}
    if isinstance(getattr(student, "in_proj", None), nn.Identity):  # S4D whose channels are the model's own
        choice["inner"] = kept
    sizes, axes = _axis_sizes(teacher), AXES[type(teacher)]
    return [_put(student, name, cut(value, axes[name], choice, sizes)) for name, value in teacher.named_parameters()]


def _axis_sizes(layer: nn.Module) -> dict[str, int]:
    """Channels of a layer by the kinds that `AXES` names."""
    sizes = sizes_of(layer)
    model = layer.fc1.in_features if isinstance(layer, MLP) else layer.d_model
    if "heads" in sizes:
        sizes["inner"] = sizes["heads"] * sizes["head"]
    if "groups" in sizes:
        sizes["group_state"] = sizes["groups"] * sizes["state"]
    return sizes | {"model": model}


@torch.no_grad()
def attention_to_mamba2(attention: Attention, mamba: Mamba2, kept: Tensor) -> list[str]:
    """Start a Mamba-2 as the attention without its softmax: C reads as Q does, B writes as K, x holds V, O goes out.

    Each group of heads takes the mean of its heads' Q and K; the convolution starts as the identity. What attention has
    not, the gate z, dt, A and D, keeps its start. Heads beyond the attention's and states beyond P start silent: x of
    the ones and C of the others are 0, while out and B keep their start, so that a gradient reaches them all.

    Args:
        kept: the model's channels, int64 [D of the student].

    Raises:
        UserError: the mixer has heads of another width, fewer heads or states, or groups that do not divide its heads.
    """
    heads, width = attention.n_heads, attention.d_model // attention.n_heads
    groups, state = mamba.ngroups, mamba.d_state
    fits = mamba.headdim == width and mamba.nheads >= heads and state >= width and heads % groups == 0
    if not fits:
        raise UserError(
            f"attention of {heads} heads of {width} goes into a Mamba-2 with model.headdim={width}, {heads} heads or "
            f"more, model.d_state of {width} or more and a model.ngroups that divides {heads}; it has headdim "
            f"{mamba.headdim}, {mamba.nheads} heads, d_state {state}, ngroups {groups}"
        )
    q, k, v = (getattr(attention, f"{name}_proj").weight[:, kept] for name in "qkv")  # [H P, D]
    _, x, write, read, _ = mamba.in_proj.weight.detach().split(
        [mamba.d_inner, mamba.d_inner, groups * state, groups * state, mamba.nheads]
    )
    per_group, theirs = mamba.nheads // groups, heads // groups
    places = torch.cat([torch.arange(theirs) + group * per_group for group in range(groups)])  # head -> its place
    x.zero_()
    x.view(mamba.nheads, width, -1)[places] = v.view(heads, width, -1)
    for rows, source in ((write, k), (read, q)):
        rows.view(groups, state, -1)[:, :width] = source.view(groups, theirs, width, -1).mean(1)
    read.view(groups, state, -1)[:, width:] = 0
    mamba.conv1d.weight.zero_()
    mamba.conv1d.weight[..., -1] = 1
    mamba.conv1d.bias.zero_()
    out = mamba.out_proj.weight.view(len(kept), mamba.nheads, width)
    out[:, places] = attention.out_proj.weight[kept].view(len(kept), heads, width)
    return ["in_proj.weight", "conv1d.weight", "conv1d.bias", "out_proj.weight"]
