"""Which dtype the matrix products run in."""

from __future__ import annotations

from pathlib import Path

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """bfloat16 for `amp_bf16`, None for `fp32`; `auto` chooses bfloat16 where the device multiplies in it
    natively."""
    if precision == "auto":
        return torch.bfloat16 if has_native_bf16(device) else None
    return torch.bfloat16 if precision == "amp_bf16" else None


def has_native_bf16(device: torch.device) -> bool:
    """Whether products of bfloat16 are faster than float32's there: AMX on x86, AVX-512-BF16 but for Intel's, which has
    one unit for it and two for float32 (0.6x was measured), BF16 on ARM, sm_80 and later."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "bf16"}) or ("avx512_bf16" in words and "GenuineIntel" not in words)
