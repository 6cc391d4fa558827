"""Weights as a page stores them, in as few bytes as its precision allows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import onnx
from torch import Tensor

from oner_fast.export.onnx_towers import towers

PagePrecision = Literal["float24", "float16", "int8"]
PRECISIONS: tuple[PagePrecision, ...] = ("float24", "float16", "int8")
"""From the most exact to the smallest. float24 is float32 with the last eight bits of its fraction rounded off."""


@dataclass(frozen=True)
class StoredWeights:
    """The content of `weights.bin`, and the bytes of a number in it by which it is best packed."""

    content: bytes
    number_bytes: int


def stored(
    config: dict[str, Any], state: dict[str, Tensor], precision: PagePrecision
) -> tuple[dict[str, onnx.ModelProto], StoredWeights]:
    """Make the graphs of a tower and its weights; see `oner_fast.export.onnx_towers.towers`."""
    graphs, content = towers(config, state, "float32" if precision == "float24" else precision)
    if precision != "float24":
        return graphs, StoredWeights(content, 1)
    bits = np.frombuffer(content, "<u4")
    return graphs, StoredWeights(((bits + np.uint32(0x80)) & np.uint32(0xFFFFFF00)).tobytes(), 4)
