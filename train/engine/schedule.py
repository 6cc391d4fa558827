"""The learning rate and the teacher's momentum, each a pure function of the step."""

from __future__ import annotations

import math


def cosine_lr(step: int, *, peak: float, total_steps: int, warmup_steps: int = 0, floor: float = 0.0) -> float:
    """Learning rate of the step `step` (counted from 0): linear warm-up, then half a cosine.

    Warm-up step `s` has `peak * (s + 1) / warmup_steps`, so that no step is idle. The steps
    `warmup_steps` and the one before it have `peak`; `step >= total_steps` has `floor`, which the last
    step, `total_steps - 1`, is just above.

    Raises:
        ValueError: a negative step, no steps at all, a warm-up outside [0, total_steps), or not
            `0 <= floor <= peak`.
    """
    if step < 0:
        raise ValueError(f"step must not be negative, got {step}")
    if total_steps < 1 or not 0 <= warmup_steps < total_steps:
        raise ValueError(f"needs 0 <= warmup_steps < total_steps, got warmup_steps={warmup_steps}, {total_steps=}")
    if not 0.0 <= floor <= peak:
        raise ValueError(f"needs 0 <= floor <= peak, got {floor=}, {peak=}")
    if step < warmup_steps:
        return peak * (step + 1) / warmup_steps
    return _cosine(step - warmup_steps, total_steps - warmup_steps, peak, floor)


def teacher_momentum(step: int, *, total_steps: int, start: float = 0.996, end: float = 1.0) -> float:
    """Momentum of the teacher's moving average after the step `step`: half a cosine, as in MoCo v3 and BYOL.

    It rises from `start` at step 0 to `end` at `total_steps` and stays there.

    Raises:
        ValueError: a negative step, no steps at all, or not `0 <= start <= end <= 1`.
    """
    if step < 0 or total_steps < 1:
        raise ValueError(f"needs step >= 0 and total_steps >= 1, got {step=}, {total_steps=}")
    if not 0.0 <= start <= end <= 1.0:
        raise ValueError(f"needs 0 <= start <= end <= 1, got {start=}, {end=}")
    return _cosine(step, total_steps, start, end)


def _cosine(position: int, length: int, first: float, last: float) -> float:
    if position >= length:
        return last
    weight = (1.0 + math.cos(math.pi * position / length)) / 2.0
    return last + (first - last) * weight if position else first
