"""Running on a device whose values the host does not have: torch's meta device stands in for a GPU."""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any
from unittest.mock import patch

import torch
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

FAR = torch.device("meta")


class _NoHostCopies(TorchDispatchMode):
    """Copying a tensor to the device is an error, as reading one from it (`bool`, `int`, `cpu`) is anyway: on a GPU the
    host would wait for either."""

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            devices = {value.device for value in (*args, result) if isinstance(value, torch.Tensor)}
            assert len(devices) == 1, f"a copy between {' and '.join(sorted(map(str, devices)))}"
        return result


class _NoHostValues(TorchFunctionMode):
    """Making a tensor of values of the host on the device is an error; `torch.full` and `torch.arange` are none."""

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        copies = (torch.tensor, torch.as_tensor, torch.from_numpy, torch.Tensor.new_tensor)
        assert function not in copies or result.device != FAR, "a tensor made from values of the host"
        return result


@contextmanager
def far_device() -> Iterator[torch.device]:
    """That device, in a context where nothing is copied to or from it. `torch.autocast` does not know it."""
    with patch("torch.autocast", lambda *_, **__: nullcontext()), _NoHostCopies(), _NoHostValues():
        yield FAR
