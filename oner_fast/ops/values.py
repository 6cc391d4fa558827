"""Decide where the values of a tensor can be read on the host, and where a call is about shapes alone."""

from __future__ import annotations

import os

import torch
from torch import Tensor
from torch._subclasses import FakeTensor
from torch.nn import Parameter

_WITHOUT_VALUES = (torch._C._TorchDispatchModeKey.FAKE, torch._C._TorchDispatchModeKey.PROXY)


def readable(tensor: Tensor) -> Tensor | None:
    """Return an index tensor in a form whose values may be read on the host, or None.

    Values are read on the CPU, and on CUDA only where `ONER_FAST_DEBUG=1`. There are none on the meta device, in a fake
    tensor, and while a graph is traced. Under `vmap` the batches come in front: (..., *shape).
    """
    if torch.compiler.is_compiling():
        return None
    device = tensor.device.type
    if device != "cpu" and (device == "meta" or os.environ.get("ONER_FAST_DEBUG", "0") != "1"):
        return None
    if is_plain(tensor):
        return tensor
    if _traced() or isinstance(tensor, FakeTensor):
        return None
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        batch = torch._C._functorch.maybe_get_bdim(tensor)  # -1 where the wrapper is not that of a vmap
        tensor = torch._C._functorch.get_unwrapped(tensor)
        tensor = tensor if batch < 0 else tensor.movedim(batch, 0)
    return None if isinstance(tensor, FakeTensor) else tensor


def is_plain(tensor: Tensor) -> bool:
    """Return whether a tensor is no subclass, and neither a transform nor a dispatch mode is active."""
    return (
        type(tensor) in (Tensor, Parameter)
        and not torch._C._are_functorch_transforms_active()
        and not torch._C._len_torch_dispatch_stack()
    )


def is_fake(tensor: Tensor) -> bool:
    """Return whether a call with `tensor` as its first argument computes no more than shapes, outside torch.compile."""
    if torch.compiler.is_compiling() or is_plain(tensor):
        return False
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return isinstance(tensor, FakeTensor) or _traced()


def is_batched(tensor: Tensor) -> bool:
    """Return whether a `torch.vmap` batches `tensor`, at any level."""
    while torch._C._functorch.is_functorch_wrapped_tensor(tensor):
        if torch._C._functorch.is_batchedtensor(tensor):
            return True
        tensor = torch._C._functorch.get_unwrapped(tensor)
    return False


def inside_vmap() -> bool:
    """Return whether a `torch.vmap` is active."""
    stack = torch._C._functorch.get_interpreter_stack() or ()
    return any(level.key() == torch._C._functorch.TransformType.Vmap for level in stack)


def under_autocast(tensor: Tensor) -> bool:
    """Return whether autocast is on for the device of `tensor`."""
    device = tensor.device.type
    return device != "meta" and torch.is_autocast_enabled(device)


def _traced() -> bool:
    return any(torch._C._get_dispatch_mode(key) is not None for key in _WITHOUT_VALUES)
