"""oner_fast: one transformer for images and text, trained fast.

`oner_fast.ops` holds the fused ops, and `oner_fast.load` opens a trained model. Importing the package takes little
longer than importing torch, starts no CUDA context and needs no extra.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from oner_fast import ops as ops
    from oner_fast.loading import load as load

__version__ = "0.1.0"
__all__ = ["__version__", "load", "ops"]


def __getattr__(name: str) -> Any:
    if name == "load":
        return importlib.import_module("oner_fast.loading").load
    if name == "ops":
        return importlib.import_module("oner_fast.ops")
    raise AttributeError(f"module 'oner_fast' has no attribute {name!r}; it has {', '.join(__all__)}")


def __dir__() -> list[str]:
    return sorted([*globals(), "load", "ops"])
