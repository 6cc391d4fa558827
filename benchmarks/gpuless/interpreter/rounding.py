"""bfloat16 and TF32 in NumPy, as the strict interpreter computes them."""

from __future__ import annotations

from typing import Any

import ml_dtypes
import numpy as np
from triton.runtime import interpreter as stock

BFLOAT16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)


def round_tf32(x: np.ndarray) -> np.ndarray:
    """Round float32 numbers to the 10 bits of TF32's mantissa, to nearest and ties to even; NaN and infinity stay."""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    special = (bits & np.uint32(0x7F800000)) == np.uint32(0x7F800000)
    rounded = (bits + (((bits >> np.uint32(13)) & np.uint32(1)) + np.uint32(0xFFF))) & np.uint32(0xFFFFE000)
    return np.where(special, bits, rounded).view(np.float32)


class BitMover:
    """Wrap the compiled part of the interpreter, which moves raw bits and treats bfloat16 as uint16."""

    _compiled: Any = stock._interpreter

    def __getattr__(self, name: str) -> Any:
        return getattr(self._compiled, name)

    def load(self, pointers: np.ndarray, mask: np.ndarray, other: Any, dtype: np.dtype[Any]) -> np.ndarray:
        """Read each active lane's number; an inactive lane takes its number from `other`."""
        if dtype != BFLOAT16:
            loaded: np.ndarray = self._compiled.load(pointers, mask, other, dtype)
            return loaded
        other = np.ascontiguousarray(np.asarray(other).astype(BFLOAT16)).view(np.uint16)
        bits: np.ndarray = self._compiled.load(pointers, mask, other, np.dtype(np.uint16))
        return bits.view(BFLOAT16)

    def store(self, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray) -> Any:
        """Write each active lane's number."""
        bits = np.ascontiguousarray(value).view(np.uint16) if value.dtype == BFLOAT16 else value
        return self._compiled.store(pointers, bits, mask)

    def atomic_rmw(self, op: Any, pointers: np.ndarray, value: np.ndarray, mask: np.ndarray, sem: Any) -> np.ndarray:
        """Read, modify and write, and return what was there before.

        Raises:
            NotImplementedError: an operation other than add on bfloat16.
        """
        if value.dtype != BFLOAT16:
            before: np.ndarray = self._compiled.atomic_rmw(op, pointers, value, mask, sem)
            return before
        if op != self._compiled.RMW_OP.FADD:
            raise NotImplementedError("add is the only atomic operation on bfloat16")
        out, active = np.zeros(pointers.shape, BFLOAT16), np.ones(1, bool)
        for at in np.ndindex(pointers.shape):
            if mask[at]:
                pointer = pointers[at].reshape(1)
                old = self.load(pointer, active, np.zeros(1, BFLOAT16), BFLOAT16)
                self.store(pointer, (old + value[at]).astype(BFLOAT16), active)
                out[at] = old[0]
        return out
