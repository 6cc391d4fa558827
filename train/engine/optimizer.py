"""AdamW with weight decay on weights alone, and clipping of the gradient norm."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

# A table of positions anywhere in the name, or a [CLS] or mask token at its end.
_POSITION = re.compile(r"(^|[._])(pos|position|positions|positional)([._]|$)")
_TOKEN = re.compile(r"(^|[._])(cls|mask)(_(token|embed|embedding))?(\.weight)?$")
_TOGETHER = ("cpu", "cuda")  # devices on which one operation takes a list of tensors


def decays(name: str, parameter: torch.Tensor) -> bool:
    """Tell whether weight decay applies to a parameter.

    It does not apply to a parameter of at most one dimension (biases, norms, scales), a table of positions, or a [CLS]
    or mask token.
    """
    return parameter.ndim > 1 and not _POSITION.search(name) and not _TOKEN.search(name)


def parameter_groups(module: nn.Module, weight_decay: float) -> list[dict[str, Any]]:
    """The parameters of `module` that require a gradient, as two groups for an optimiser.

    The groups hold named parameters, `[(name, parameter)]` under `params`, in the order of
    `named_parameters()`: first those that decay, then the rest with `weight_decay` 0. An empty group stays,
    so that a state loads by position.
    """
    named = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    groups = (
        {"params": [pair for pair in named if decays(*pair)], "weight_decay": weight_decay},
        {"params": [pair for pair in named if not decays(*pair)], "weight_decay": 0.0},
    )
    # PyTorch takes the names from the pairs. An empty group has none, and may not stand beside a group with names.
    return [group if group["params"] else {**group, "param_names": []} for group in groups]


def build_adamw(
    module: nn.Module,
    lr: float,
    betas: tuple[float, float] = (0.9, 0.98),
    eps: float = 1e-6,
    weight_decay: float = 0.1,
) -> torch.optim.AdamW:
    """AdamW over `parameter_groups`; `param_names` of each group lists its parameters.

    Fused where all parameters lie on one CPU or CUDA device, one loop over them elsewhere; either is
    deterministic, as each element is updated on its own.

    Raises:
        ValueError: no parameter requires a gradient.
    """
    groups = parameter_groups(module, weight_decay)
    parameters = [parameter for group in groups for _, parameter in group["params"]]
    if not parameters:
        raise ValueError(f"{type(module).__name__} has no parameter that requires a gradient")
    devices = {parameter.device.type for parameter in parameters}
    fused = len(devices) == 1 and devices <= set(_TOGETHER) and all(p.is_floating_point() for p in parameters)
    return torch.optim.AdamW(groups, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=fused or None)


def load_moments(optimizer: torch.optim.Optimizer, state: dict[str, Any]) -> None:
    """Load an optimiser's state, and keep the settings of `optimizer`: learning rate, betas, eps and weight decay.

    Raises:
        ValueError: the state belongs to other parameters.
    """
    own = [{name: value for name, value in group.items() if name != "params"} for group in optimizer.param_groups]
    optimizer.load_state_dict(state)
    for group, settings in zip(optimizer.param_groups, own, strict=True):
        group.update(settings)


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Give every group of `optimizer` the learning rate `lr`."""
    for group in optimizer.param_groups:
        group["lr"] = lr


def step_unless(skip: torch.Tensor, optimizer: torch.optim.Optimizer) -> None:
    """Take the step of a fused optimiser unless `skip` says that it has no finite gradient; the host reads nothing.

    Args:
        skip: 1.0 to leave parameters, moments and counts of steps as they are, else 0.0; 0-d float32, on the device of
            the parameters.
        optimizer: an optimiser of `build_adamw`, whose kernels take `skip` as `torch.amp.GradScaler` gives it.
    """
    optimizer.found_inf = skip  # type: ignore[attr-defined]
    optimizer.step()


def clip_grad_norm(parameters: Iterable[torch.Tensor], max_norm: float | None) -> torch.Tensor:
    """Scale the gradients in place so that their joint L2 norm is at most `max_norm`.

    On a CPU and on CUDA the number of operations does not depend on that of the parameters.

    Args:
        parameters: the parameters; those without a gradient are skipped.
        max_norm: positive; None only measures.

    Returns:
        The norm before clipping, a scalar float tensor on the gradients' device; no host synchronisation. Where it is
        not finite, the gradients are unusable afterwards and the step must be skipped.

    Raises:
        ValueError: `max_norm` is not positive.
    """
    if max_norm is not None and not max_norm > 0:
        raise ValueError(f"max_norm must be positive or None, got {max_norm}")
    kept = [parameter for parameter in parameters if parameter.grad is not None]
    # Asked for, as PyTorch by itself takes tensors without values (those of a fake mode) one by one.
    foreach = all(parameter.device.type in _TOGETHER for parameter in kept) or None
    norm = nn.utils.get_total_norm([p.grad for p in kept if p.grad is not None], foreach=foreach)
    if max_norm is not None:
        nn.utils.clip_grads_with_norm_(kept, max_norm, norm, foreach=foreach)
    return norm
