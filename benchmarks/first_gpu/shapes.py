"""Cases of every op at a size that a GPU is checked with, and at one that Triton's interpreter runs in a second."""

from __future__ import annotations

from collections.abc import Callable

import torch

from oner_fast.benchmarks.cases import Case, Target
from oner_fast.benchmarks.first_gpu import distilling
from oner_fast.benchmarks.ops import (
    gather_patches,
    masked_gather,
    mixup_info_nce,
    padded_attention,
    sigmoid_loss,
    token_alignment,
    varlen_attention,
)

NOTHING = Target()
LENGTHS = [197, 40, 237] * 11
FEW = [5, 2]
Maker = Callable[[torch.dtype], Case]
CASES: dict[str, Maker] = {
    "masked_gather": lambda dtype: masked_gather.case(64, 196, 768, 98, dtype, NOTHING),
    "gather_patches": lambda dtype: gather_patches.case(64, 224, 16, 0.5, NOTHING),
    "token_alignment": lambda dtype: token_alignment.case(64, 196, 1024, 98, dtype, NOTHING),
    "mixup_info_nce": lambda dtype: mixup_info_nce.case(4096, 256, dtype, NOTHING),
    "varlen_attention": lambda dtype: varlen_attention.case(LENGTHS, "packed", dtype, NOTHING),
    "padded_attention": lambda dtype: padded_attention.case("captions", 237, LENGTHS, dtype, causal=True),
    "sigmoid_loss": lambda dtype: sigmoid_loss.case(4096, 256, dtype, NOTHING),
    "distill_info_nce": lambda dtype: distilling.case(1024, 256, dtype),
}
SMALL: dict[str, Maker] = {
    "masked_gather": lambda dtype: masked_gather.case(2, 6, 32, 3, dtype, NOTHING),
    "gather_patches": lambda dtype: gather_patches.case(2, 32, 8, 0.5, NOTHING),
    "token_alignment": lambda dtype: token_alignment.case(2, 6, 32, 3, dtype, NOTHING),
    "mixup_info_nce": lambda dtype: mixup_info_nce.case(16, 32, dtype, NOTHING),
    "varlen_attention": lambda dtype: varlen_attention.case(FEW, "packed", dtype, NOTHING),
    "padded_attention": lambda dtype: padded_attention.case("captions", max(FEW), FEW, dtype, causal=True),
    "sigmoid_loss": lambda dtype: sigmoid_loss.case(16, 32, dtype, NOTHING),
    "distill_info_nce": lambda dtype: distilling.case(16, 32, dtype),
}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtypes_of(op: str, few: bool = False) -> tuple[torch.dtype, ...]:
    """Return the dtypes that an op is checked in; `few` is bfloat16 alone.

    The result of `gather_patches` is float32 there, since its inputs are bytes.
    """
    if op == "gather_patches":
        return (torch.float32,)
    return (torch.bfloat16,) if few else DTYPES
