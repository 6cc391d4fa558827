"""Every random generator's state as plain values that a checkpoint can hold."""

from __future__ import annotations

import random
import sys
from typing import Any

import torch


def seed_generators(seed: int) -> None:
    """Seed every generator that `random_state` knows, so that equal runs have equal states from the start."""
    torch.manual_seed(seed)
    random.seed(seed)
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        numpy.random.seed(seed % 2**32)


def random_state() -> dict[str, Any]:
    """Return the state of every random generator as plain values, which `torch.load(weights_only=True)` reads back.

    The generators are those of torch on the CPU, torch on the current CUDA device (where CUDA is in use), numpy (where
    imported) and Python.

    It is this process's state. Ranks have equal ones, as every draw of a training is a function of (seed, step).
    """
    state: dict[str, Any] = {"torch": torch.get_rng_state(), "python": random.getstate()}
    # Asking an idle CUDA runtime for its state would start it.
    if torch.cuda.is_initialized():
        state["cuda"] = torch.cuda.get_rng_state()
    numpy: Any = sys.modules.get("numpy")
    if numpy is not None:
        name, keys, position, has_gauss, gauss = numpy.random.get_state(legacy=True)
        state["numpy"] = (str(name), keys.tolist(), int(position), int(has_gauss), float(gauss))
    return state


def set_random_state(state: dict[str, Any]) -> None:
    """Restore what `random_state` returned; a generator that this process lacks is skipped."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    if "cuda" in state and torch.cuda.is_available():
        torch.cuda.set_rng_state(state["cuda"].cpu())
    if "numpy" in state:
        try:
            import numpy
        except ImportError:
            return
        name, keys, position, has_gauss, gauss = state["numpy"]
        numpy.random.set_state((name, numpy.array(keys, dtype=numpy.uint32), position, has_gauss, gauss))
