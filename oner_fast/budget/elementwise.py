"""Bytes of the element-wise passes of a block, for each token and each number of its width, under bfloat16 autocast.

The residual stream and LayerNorm are float32 (4 bytes), inputs and outputs of matrix products bfloat16 (2 bytes). The
hidden layer is as many times wider as `mlp_ratio` says. What a matrix product itself reads and writes does not count.
"""

from __future__ import annotations

from dataclasses import dataclass

from oner_fast.budget.workload import Workload


@dataclass(frozen=True)
class Pass:
    """One pass over memory: bytes for each number of the width, and for each of the hidden layer, read and written."""

    name: str
    width: float
    hidden: float = 0.0
    times: int = 1


_NORM = "LayerNorm: reads float32, writes float32"
EAGER_FORWARD = (
    Pass(_NORM, 4 + 4, times=2),
    Pass("cast to bfloat16", 4 + 2, times=2),
    Pass("residual sum of float32 and bfloat16", 4 + 2 + 4, times=2),
    Pass("GELU", 0, 2 + 2),
)
EAGER_BACKWARD = (
    Pass("cast of the branch's gradient to bfloat16", 4 + 2, times=2),
    Pass("bias gradients of the two outputs", 2, times=2),
    Pass("bias gradient of queries, keys and values", 3 * 2),
    Pass("their three gradients side by side", 3 * (2 + 2)),
    Pass("bias gradient of the hidden layer", 0, 2),
    Pass("GELU's gradient", 0, 2 + 2 + 2),
    Pass("cast of the norm's gradient to float32", 2 + 4, times=2),
    Pass("LayerNorm's gradient of its input", 4 + 4 + 4, times=2),
    Pass("LayerNorm's gradients of its weights", 4 + 4, times=2),
    Pass("sum with the residual's gradient", 4 + 4 + 4, times=2),
)
FUSED_FORWARD = (
    Pass("residual sum, LayerNorm and cast in one", 4 + 2 + 4 + 2, times=2),
    Pass("bias and GELU", 0, 2 + 2),
)
FUSED_BACKWARD = (
    Pass("gradients of cast, LayerNorm and residual sum in one", 2 + 4 + 4 + 4 + 2, times=2),
    Pass("gradients of GELU and bias in one", 0, 2 + 2 + 2),
    Pass("bias gradients of the two outputs", 2, times=2),
    Pass("bias gradient of queries, keys and values", 3 * 2),
)


def bytes_per_number(passes: tuple[Pass, ...], mlp_ratio: float) -> float:
    """Add up the bytes of passes for each number of a token's width."""
    return sum(each.times * (each.width + each.hidden * mlp_ratio) for each in passes)


def bytes_of(work: Workload, fused: bool) -> float:
    """Count the bytes of all blocks: student forward and backward, and the teacher's forward.

    In the last block only the kept rows pass the MLP and the sums; it counts by the mean of all and kept rows.
    """
    model, ratio = work.model, work.model.mlp_ratio
    forward, backward = (FUSED_FORWARD, FUSED_BACKWARD) if fused else (EAGER_FORWARD, EAGER_BACKWARD)
    again = int(work.config.optim.accum_freq > 1) + int(model.grad_checkpointing)
    step = (1 + again) * bytes_per_number(forward, ratio) + bytes_per_number(backward, ratio)
    student, teacher = (
        seen.tokens * (model.depth - 1) + (seen.tokens + seen.kept) / 2 if seen.lengths else 0.0
        for seen in (work.student, work.teacher)
    )
    return model.width * (student * step + teacher * bytes_per_number(forward, ratio))
