"""Building modules whose weights are read from a file right after."""

from collections.abc import Callable
from typing import Any

from torch import nn
from torch.overrides import TorchFunctionMode

_RANDOM = (nn.init.normal_, nn.init.uniform_, nn.init.kaiming_uniform_)


class EmptyWeights(TorchFunctionMode):
    """A context in which the random initialisation of `torch.nn.init` is skipped: the memory is not even touched.

    Unlike on the meta device, buffers and constant parameters are computed, and torch's compiler is not imported (which
    `normal_` does there, for 2 s). Every tensor that was skipped must be overwritten.
    """

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in _RANDOM:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)
