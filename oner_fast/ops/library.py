"""The torch.library behind the ops: schemas are defined in Python, so an op exists even where nothing was compiled."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch

_LIBRARY = torch.library.Library("oner_fast", "DEF")
_LIBRARY.define("cpu_capability() -> str")

Shape = TypeVar("Shape", bound=Callable[..., object])


def define(schema: str) -> Callable[[Shape], Shape]:
    """Define the raw op `schema`; the decorated function is its fake implementation: shapes and dtypes of the results.

    Raw ops are private: they check no more than memory safety asks for and carry no gradient. The public function of
    the same name checks its arguments and holds the autograd.Function.
    """
    name = schema.split("(", 1)[0]
    _LIBRARY.define(schema, tags=(torch.Tag.pt2_compliant_tag,))

    def wrap(fake: Shape) -> Shape:
        torch.library.register_fake(f"oner_fast::{name}", fake, lib=_LIBRARY)
        return fake

    return wrap


def statistics_dtype(x: torch.Tensor) -> torch.dtype:
    """Of sums and statistics: float32, or float64 for a float64 tensor."""
    return torch.float64 if x.dtype == torch.float64 else torch.float32
