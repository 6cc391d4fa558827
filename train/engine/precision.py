"""The dtype of matrix products."""

from __future__ import annotations

from pathlib import Path

import torch


def autocast_dtype(precision: str, device: torch.device) -> torch.dtype | None:
    """Return bfloat16 for `amp_bf16` and None for `fp32`; `auto` is bfloat16 where the device has it natively."""
    if precision == "auto":
        return torch.bfloat16 if has_native_bf16(device) else None
    return torch.bfloat16 if precision == "amp_bf16" else None


def has_native_bf16(device: torch.device) -> bool:
    """Tell whether products of bfloat16 are faster than float32's on a device.

    This holds for AMX on x86, BF16 on ARM and GPUs from sm_80 on. It also holds for AVX-512-BF16, except on Intel's
    processors, which have one unit for bfloat16 and two for float32 (0.6x was measured).
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type != "cpu":
        return False
    try:
        words = set(Path("/proc/cpuinfo").read_text(encoding="utf-8").split())
    except OSError:
        return False
    return bool(words & {"amx_bf16", "bf16"}) or ("avx512_bf16" in words and "GenuineIntel" not in words)
