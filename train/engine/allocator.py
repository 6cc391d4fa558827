"""Keep freed memory in glibc's heap between steps."""

from __future__ import annotations

import contextlib
import ctypes
import sys
from collections.abc import Iterator

_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # glibc's malloc.h
_DEFAULTS = {_M_MMAP_MAX: 65536, _M_TRIM_THRESHOLD: 128 << 10, _M_MMAP_THRESHOLD: 128 << 10}


@contextlib.contextmanager
def freed_memory_kept() -> Iterator[bool]:
    """Keep freed memory for the next allocations of this process; yield whether the C library (glibc) agreed.

    By default every tensor above 32 MB is fresh memory from the system, which is cleared page by page when it is first
    written. A training step allocates the same tensors again and again, so after a few steps it touches no new page.
    Outside the context glibc's defaults hold: a program that goes on after a training gets its memory back.
    """
    library = ctypes.CDLL(None) if sys.platform.startswith("linux") else None
    set_option, trim = getattr(library, "mallopt", None), getattr(library, "malloc_trim", None)
    if set_option is None or trim is None:
        yield False
        return
    try:
        yield bool(set_option(_M_MMAP_MAX, 0)) and bool(set_option(_M_TRIM_THRESHOLD, -1))
    finally:
        for option, value in _DEFAULTS.items():
            set_option(option, value)
        trim(0)
