"""Which channels of a teacher a narrower student keeps, and how they lie in each parameter.

Every axis of a parameter is a row of segments, each a named kind of channel; a choice of channels for each kind cuts
all parameters alike. Kinds: "model" D, "inner" I, "heads" H, "group_state" G N, "state" N, "rank" R, "hidden" M, and
"all", left as it is.
"""

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from ssmttm.errors import UserError
from ssmttm.mixers import S4D, Attention, Mamba1, Mamba2
from ssmttm.models.blocks import MLP
from ssmttm.models.cross_attention import CrossAttention

Axes = Sequence[Sequence[str]]  # of a parameter, the segments of each axis
Choice = Mapping[str, Tensor]  # kind -> which of the teacher's channels, int64

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


def sizes_of(layer: nn.Module) -> dict[str, int]:
    """How many channels a layer has of each kind that can be chosen apart: heads and what is in one, not "inner"."""
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


def chosen(teacher: nn.Module, student: nn.Module, energy: Tensor | None, name: str) -> Choice:
    """Which channels inside a teacher's layer its student's keeps; both are of one class.

    Args:
        energy: of what goes into the teacher's last projection, [I] or [M]; None: the first channels are kept.
        name: of the layer, for errors.

    Raises:
        UserError: the student's layer is wider somewhere, or has other groups.
    """
    has, wants = sizes_of(teacher), sizes_of(student)
    for kind, size in wants.items():
        if size > has[kind] or (kind == "groups" and size != has[kind]):
            raise UserError(
                f"the student has {size} {kind} where {name} of its teacher has {has[kind]}: weights are cut, not "
                f"grown; choose {'the same' if kind == 'groups' else 'as many or fewer'}"
            )
    if "heads" in has:
        return _chosen_heads(teacher, has, wants, energy)
    widest = "hidden" if "hidden" in has else "inner"
    picks = {kind: torch.arange(size) for kind, size in wants.items()}
    return picks | {widest: most(energy, has[widest], wants[widest])}


def most(energy: Tensor | None, n: int, keep: int) -> Tensor:
    """The `keep` of n channels with the most energy, in their order; without energies the first."""
    return torch.arange(keep) if energy is None else energy.topk(keep).indices.sort().values


def cut(parameter: Tensor, axes: Axes, choice: Choice, sizes: Mapping[str, int]) -> Tensor:
    """The chosen channels of a parameter. sizes: how many the teacher has of each kind."""
    for axis, segments in enumerate(axes):
        if segments == _ALL:
            continue
        first, picks = 0, []
        for kind in segments:
            picks.append(first + choice[kind].to(parameter.device))
            first += sizes[kind]
        parameter = parameter.index_select(axis, torch.cat(picks))
    return parameter


def _chosen_heads(
    teacher: nn.Module, has: Mapping[str, int], wants: Mapping[str, int], energy: Tensor | None
) -> Choice:
    groups = has.get("groups", 1)
    by_head = None if energy is None else energy.view(groups, -1, has["head"])  # [G, H / G, P]
    per_group = has["heads"] // groups
    in_group = [None] * groups if by_head is None else by_head.sum(-1).unbind()  # [H / G] each
    wanted = wants["heads"] // groups
    heads = torch.cat([g * per_group + most(energies, per_group, wanted) for g, energies in enumerate(in_group)])
    within = most(None if by_head is None else by_head.sum((0, 1)), has["head"], wants["head"])
    choice = {"heads": heads, "inner": (heads[:, None] * has["head"] + within).flatten()}
    if isinstance(teacher, Mamba2):
        state = most(None if energy is None else _state_energy(teacher), has["state"], wants["state"])
        starts = torch.arange(groups) * has["state"]
        choice |= {"group_state": (starts[:, None] + state).flatten()}
    return choice


def _state_energy(mixer: Mamba2) -> Tensor:
    """Of each state channel, over groups: the norm of the rows that write it times that of those that read it, [N]."""
    first = 2 * mixer.d_inner
    rows = mixer.in_proj.weight[first : first + 2 * mixer.ngroups * mixer.d_state].detach().norm(dim=1)  # [2 G N]
    write, read = rows.view(2, mixer.ngroups, mixer.d_state)
    return (write * read).sum(0)
