"""Selection of the channels that a narrower student keeps of its teacher, and slicing of parameters by them.

Each axis of a parameter is a concatenation of segments of one kind of channel; an index set for each kind slices all
parameters consistently. Kinds: "model" D, "inner" I, "heads" H, "group_state" G N, "state" N, "rank" R, "hidden" M, and
"all", which is not sliced.
"""

import contextlib
from collections.abc import Callable, Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers import S4D, Attention, Mamba1, Mamba2
from ssmttm.models.blocks import MLP
from ssmttm.models.cross_attention import CrossAttention

Axes = Sequence[Sequence[str]]  # the segments of each axis of a parameter
ChannelIndices = Mapping[str, Tensor]  # kind -> indices of the teacher's channels, int64

_M, _I, _H, _GN, _N, _R, _ALL = ["model"], ["inner"], ["heads"], ["group_state"], ["state"], ["rank"], ["all"]
_MAMBA2_IN = ["inner", "inner", "group_state", "group_state", "heads"]
_MAMBA2_CONV = ["inner", "group_state", "group_state"]
AXES: dict[type[nn.Module], dict[str, Axes]] = {
    Mamba2: {
        "in_proj.weight": [_MAMBA2_IN, _M], "in_proj.bias": [_MAMBA2_IN],
        "conv1d.weight": [_MAMBA2_CONV, _ALL, _ALL], "conv1d.bias": [_MAMBA2_CONV],
        "dt_bias": [_H], "A_log": [_H], "D": [_H], "norm.weight": [_I],
        "out_proj.weight": [_M, _I], "out_proj.bias": [_M],
    },
    Mamba1: {
        "in_proj.weight": [["inner", "inner"], _M], "in_proj.bias": [["inner", "inner"]],
        "conv1d.weight": [_I, _ALL, _ALL], "conv1d.bias": [_I],
        "x_proj.weight": [["rank", "state", "state"], _I], "dt_proj.weight": [_I, _R], "dt_proj.bias": [_I],
        "A_log": [_I, _N], "D": [_I], "out_proj.weight": [_M, _I], "out_proj.bias": [_M],
    },
    S4D: {
        "in_proj.weight": [_I, _M], "in_proj.bias": [_I], "log_dt": [_I], "log_A_real": [_I, _N], "A_imag": [_I, _N],
        "C": [_I, _N, _ALL], "D": [_I],
        "out_proj.weight": [["model", "model"], _I], "out_proj.bias": [["model", "model"]],
    },
    Attention: {
        **{f"{name}_proj.weight": [_I, _M] for name in "qkv"}, **{f"{name}_proj.bias": [_I] for name in "qkv"},
        "out_proj.weight": [_M, _I], "out_proj.bias": [_M],
    },
    MLP: {"fc1.weight": [["hidden"], _M], "fc1.bias": [["hidden"]], "fc2.weight": [_M, ["hidden"]], "fc2.bias": [_M]},
}  # fmt: skip
AXES[CrossAttention] = AXES[Attention]


def layer_sizes(layer: nn.Module) -> dict[str, int]:
    """Number of channels by kind, for the kinds that are selected independently: heads and head width, not "inner"."""
    if isinstance(layer, Mamba2):
        return {"heads": layer.nheads, "head": layer.headdim, "groups": layer.ngroups, "state": layer.d_state}
    if isinstance(layer, Attention | CrossAttention):
        return {"heads": layer.n_heads, "head": layer.d_model // layer.n_heads}
    if isinstance(layer, Mamba1):
        return {"inner": layer.d_inner, "state": layer.d_state, "rank": layer.dt_rank}
    if isinstance(layer, S4D):
        return {"inner": layer.d_inner, "state": layer.A_imag.shape[1]}
    assert isinstance(layer, MLP), layer
    return {"hidden": layer.fc1.out_features}


@torch.no_grad()
def input_energy(
    modules: Mapping[str, Sequence[nn.Module]], run: Callable[[], object], axis: int = -1
) -> dict[str, Tensor]:
    """Mean squares by channel of the inputs of modules during `run`, summed over calls and over the modules of a name.
    axis: of the channels."""
    energies: dict[str, Tensor] = {}

    def add_energy(name: str, module: nn.Module, inputs: tuple[Tensor]) -> None:
        energy = inputs[0].square().movedim(axis, -1).flatten(0, -2).mean(0).cpu()
        energies[name] = energies[name] + energy if name in energies else energy

    with contextlib.ExitStack() as hooks:
        for name, named_modules in modules.items():
            for module in named_modules:
                hooks.enter_context(module.register_forward_pre_hook(partial(add_energy, name)))
        run()
    return energies


def select_channels(teacher: nn.Module, student: nn.Module, energy: Tensor | None, name: str) -> ChannelIndices:
    """The channels inside a teacher's layer that its student's layer of the same class keeps. energy: of the input of
    the teacher's last projection, [I] or [M]; None: the first channels are kept. name: of the layer, in errors."""
    theirs, ours = layer_sizes(teacher), layer_sizes(student)
    for kind, size in ours.items():
        if size > theirs[kind] or (kind == "groups" and size != theirs[kind]):
            limit = "the same" if kind == "groups" else "as many or fewer"
            raise UserError(
                f"the student has {size} {kind}, {name} of its teacher has {theirs[kind]}: weights are cut, not grown; "
                f"choose {limit}"
            )
    if "heads" in theirs:
        return _select_heads(teacher, theirs, ours, energy)
    widest = "hidden" if "hidden" in theirs else "inner"
    indices = {kind: torch.arange(size) for kind, size in ours.items()}
    return indices | {widest: top_channels(energy, ours[widest])}


def top_channels(energy: Tensor | None, n: int) -> Tensor:
    """Indices of the n channels with the most energy, ascending; without energies the first n."""
    return torch.arange(n) if energy is None else energy.topk(n).indices.sort().values


def slice_parameter(parameter: Tensor, axes: Axes, indices: ChannelIndices, sizes: Mapping[str, int]) -> Tensor:
    """The selected channels of a parameter. sizes: number of the teacher's channels by kind."""
    for axis, segments in enumerate(axes):
        if segments == _ALL:
            continue
        start, selected = 0, []
        for kind in segments:
            selected.append(start + indices[kind].to(parameter.device))
            start += sizes[kind]
        parameter = parameter.index_select(axis, torch.cat(selected))
    return parameter


def _select_heads(
    teacher: nn.Module, theirs: Mapping[str, int], ours: Mapping[str, int], energy: Tensor | None
) -> ChannelIndices:
    """Heads within each group, one set of channels within all heads, and the states of a Mamba-2."""
    groups = theirs.get("groups", 1)
    heads_per_group, kept_per_group = theirs["heads"] // groups, ours["heads"] // groups
    head_energy, channel_energy = None, None
    if energy is not None:
        by_head = energy.view(groups, heads_per_group, theirs["head"])
        head_energy, channel_energy = by_head.sum(-1), by_head.sum((0, 1))  # [G, H / G], [P]
    selected = []
    for group in range(groups):
        in_group = top_channels(None if head_energy is None else head_energy[group], kept_per_group)
        selected.append(group * heads_per_group + in_group)
    heads, within_head = torch.cat(selected), top_channels(channel_energy, ours["head"])
    indices = {"heads": heads, "inner": (heads[:, None] * theirs["head"] + within_head).flatten()}
    if isinstance(teacher, Mamba2):
        states = top_channels(None if energy is None else _state_energy(teacher), ours["state"])
        group_starts = torch.arange(groups) * theirs["state"]
        indices["group_state"] = (group_starts[:, None] + states).flatten()
    return indices


def _state_energy(mixer: Mamba2) -> Tensor:
    """Energy of each state channel, [N]: norm of its row of B times norm of its row of C, summed over groups."""
    start = 2 * mixer.d_inner
    rows = mixer.in_proj.weight[start : start + 2 * mixer.ngroups * mixer.d_state].detach().norm(dim=1)  # [2 G N]
    B, C = rows.view(2, mixer.ngroups, mixer.d_state)
    return (B * C).sum(0)
