"""Tell once, for each reason, that PyTorch's attention runs instead of ours."""

from __future__ import annotations

import warnings

import torch

_told: set[str] = set()


class AttentionFallback(UserWarning):
    """Warn that an attention is left to PyTorch, and why."""


def tell(reason: str) -> None:
    """Warn of `reason`, once until `forget` is called; stay silent inside torch.compile, which traces no warning."""
    if torch.compiler.is_compiling() or reason in _told:
        return
    _told.add(reason)
    warnings.warn(f"oner_fast leaves this attention to PyTorch: {reason}", AttentionFallback, stacklevel=3)


def forget() -> None:
    """Warn of every reason once more."""
    _told.clear()
