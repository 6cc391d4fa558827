"""What the C library does with memory that a step has freed."""

from __future__ import annotations

import ctypes
import sys

_M_TRIM_THRESHOLD, _M_MMAP_MAX = -1, -4  # glibc's malloc.h


def keep_freed_memory() -> bool:
    """Let this process keep what it frees for its next allocations; returns whether the C library (glibc) agreed.

    By default every tensor beyond 32 MB is fresh memory from the system, which is cleared page by page when it is first
    written. A training step allocates the same tensors again and again: after a few steps it meets no new page.
    """
    if not sys.platform.startswith("linux"):
        return False
    set_option = getattr(ctypes.CDLL(None), "mallopt", None)
    if set_option is None:
        return False
    return bool(set_option(_M_MMAP_MAX, 0)) and bool(set_option(_M_TRIM_THRESHOLD, -1))
