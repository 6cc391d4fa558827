"""The cases of every op, one file for each op."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import replace

from oner_fast.benchmarks.cases import Case

OPS = (
    "masked_gather", "gather_patches", "mixup_info_nce", "sigmoid_loss", "varlen_attention", "padded_attention",
    "token_alignment",
)  # fmt: skip


def cases(quick: bool = False, ops: Sequence[str] = OPS) -> list[Case]:
    """List the cases of `ops`, in the order of `OPS`; `quick` ones are small.

    Raises ValueError for an unknown name, listing the known ones.
    """
    for name in ops:
        if name not in OPS:
            raise ValueError(f"unknown op {name!r}; known: {', '.join(OPS)}")
    found: list[Case] = []
    for name in OPS:
        if name in ops:
            found += importlib.import_module(f"oner_fast.benchmarks.ops.{name}").cases(quick)
    if quick:
        found = [replace(case, contenders=[one for one in case.contenders if one.quick]) for case in found]
    return found
