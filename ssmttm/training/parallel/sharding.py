"""Fully sharded data parallelism (torch's FSDP2): each rank holds a part of every weight, gradient and moment.

Accelerate's launcher and configs choose it (configs/accelerate/fsdp8.yaml). Accelerate's own `prepare` takes one model,
and trains with DDP on a CPU, so the modules are sharded here, with its settings. Each block is gathered for its forward
and its backward, and the rest of the model for those of the model. Weights stay float32; autocast casts them as it does
without sharding. Rank r of n holds the r-th of the n chunks of every parameter along its first axis, which may be
empty.
"""

import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import torch
from accelerate import Accelerator
from accelerate.utils import FullyShardedDataParallelPlugin
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from ssmttm.errors import UserError

TASKS = ("lm", "diffusion")  # whose modules are called by their forward only


class Sharding:
    """How the modules of a training are sharded. All ranks must construct it together."""

    def __init__(self, plugin: FullyShardedDataParallelPlugin, accelerator: Accelerator) -> None:
        self._names = plugin.transformer_cls_names_to_wrap
        self._reshard_after_forward: bool = plugin.reshard_after_forward
        self._mesh: DeviceMesh = init_device_mesh(accelerator.device.type, (accelerator.num_processes,))

    def shard(self, module: nn.Module) -> None:
        """Shard a module in place, by block. Its parameters are DTensors from then on."""
        warnings.filterwarnings("ignore", "FSDP2-wrapped module")  # of outputs that are views: no loss writes to them
        marked = [name for name, p in module.named_parameters() if getattr(p, "_no_weight_decay", False)]
        blocks = [part for part in module.modules() if type(part).__name__ in self._names]
        for part in (*blocks, module):
            fully_shard(part, mesh=self._mesh, reshard_after_forward=self._reshard_after_forward)
        for name in marked:
            module.get_parameter(name)._no_weight_decay = True  # type: ignore[attr-defined]

    @contextmanager
    def gathered(self, module: nn.Module) -> Iterator[None]:
        """Every rank holds all weights of a sharded module, so that one can use it alone. All must enter and leave."""
        assert isinstance(module, FSDPModule)
        module.set_reshard_after_forward(False)
        for part in module.modules():
            if isinstance(part, FSDPModule):
                part.unshard()
        try:
            yield
        finally:
            module.set_reshard_after_forward(self._reshard_after_forward)
            reshard(module)


def build_sharding(task: str, modules: Mapping[str, nn.Module], accelerator: Accelerator) -> Sharding | None:
    """The sharding that the launcher requests; None if it requests none, or there is only one process on a CPU.

    Raises:
        UserError: the task cannot be sharded, or its model has no such blocks; settings that are not supported.
    """
    if os.environ.get("ACCELERATE_USE_FSDP", "false").lower() != "true" or not torch.distributed.is_initialized():
        return None
    if task not in TASKS:
        raise UserError(f"FSDP is for task={', '.join(TASKS)}, not for task={task}: use configs/accelerate/ddp8.yaml")
    if (version := os.environ.get("FSDP_VERSION")) != "2":
        raise UserError(f"fsdp_version={version} is not supported: set fsdp_version: 2")
    plugin = FullyShardedDataParallelPlugin()
    _check(plugin)
    names = plugin.transformer_cls_names_to_wrap
    if not any(type(part).__name__ in names for part in modules["model"].modules()):
        raise UserError(f"fsdp_transformer_layer_cls_to_wrap names no block of the model: {', '.join(names)}")
    return Sharding(plugin, accelerator)


def _check(plugin: FullyShardedDataParallelPlugin) -> None:
    """Raises UserError for settings that are not supported."""
    if plugin.activation_checkpointing:
        raise UserError("fsdp_activation_checkpointing is not supported: set train.recompute=full instead")
    if isinstance(plugin.cpu_offload, CPUOffloadPolicy):
        raise UserError("fsdp_offload_params is not supported: set it to false")
    if not plugin.transformer_cls_names_to_wrap:
        raise UserError(
            "no blocks to shard are named: set fsdp_auto_wrap_policy: TRANSFORMER_BASED_WRAP and "
            "fsdp_transformer_layer_cls_to_wrap: Block,DenoiserBlock"
        )
    if not hasattr(FSDPModule, "reset_iter_state"):
        raise UserError(f"FSDP needs a newer torch than {torch.__version__}: install 2.13 or newer")


def local_part(tensor: Tensor) -> Tensor:
    """The part of this rank, which shares its memory with the tensor; the tensor itself if it is not sharded."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def part_of(value: Tensor, like: Tensor) -> Tensor:
    """This rank's part of a whole tensor, on any device, if `like` is sharded; else the tensor itself."""
    if not isinstance(like, DTensor):
        return value
    mesh = like.device_mesh
    chunks = value.chunk(mesh.size(), dim=0)
    rank = mesh.get_local_rank()
    return chunks[rank] if rank < len(chunks) else value[:0]


def sharded_as(value: Tensor, like: Tensor) -> Tensor:
    """A copy of a whole tensor, sharded as `like` and on its device if `like` is sharded and has its shape."""
    if not isinstance(like, DTensor) or value.shape != like.shape:
        return value.clone()
    local = part_of(value, like).to(local_part(like).device, copy=True)
    return DTensor.from_local(
        local, like.device_mesh, like.placements, run_check=False, shape=like.shape, stride=like.stride()
    )


def whole(tensor: Tensor) -> Tensor:
    """All of a tensor, gathered if it is sharded; then all ranks must call it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def reshard(module: nn.Module) -> None:
    """Free the gathered weights of a sharded module, after calls without a backward. All ranks must call it."""
    if isinstance(module, FSDPModule):
        module.reset_iter_state()
