"""Parts shared by the launchers of all kernels: the architecture, committed tile shapes, and lists of compilations."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

CONFIGURATIONS = Path(__file__).parent / "configurations"
REFERENCE_ARCHITECTURE = 80
# A block has 99 KiB of shared memory on these GPUs, and 163 KiB or more on the others.
SMALL_BLOCKS = frozenset((86, 89, 120, 121))


@dataclass(frozen=True)
class Configuration:
    """A tile: the block sizes of a kernel for a class of shapes, and Triton's launch options."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        """Triton's launch options, as keyword arguments."""
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def launch(self) -> dict[str, int]:
        """Block sizes and options, as keyword arguments of a launch."""
        return {**self.blocks, **self.options}


@dataclass(frozen=True)
class Compilation:
    """One kernel as a launch would specialise it, so that it can be compiled without a GPU.

    Args:
        name: unique among all; names the kernel and the specialisation.
        kernel: the @triton.jit function.
        signature: the type of every argument that is not constexpr, {"x": "*fp16", "rows": "i32"}.
        constexprs: the values of the constexpr arguments.
        divisible: the divisors of integers, {"stride": 16}; pointers count as aligned to 16 bytes.
        options: num_warps, num_stages.
        tensor_cores: its main loop must multiply on tensor cores.
    """

    name: str
    kernel: Any
    signature: Mapping[str, str]
    constexprs: Mapping[str, Any]
    divisible: Mapping[str, int] = field(default_factory=dict)
    options: Mapping[str, int] = field(default_factory=dict)
    tensor_cores: bool = False


def configuration(op: str, kernel: str, shape_class: str, architecture: int) -> Configuration:
    """Return the committed tile for an architecture, or else for the newest older one of its kind, or else for 80.

    GPUs with little shared memory for a block are one kind, and all others the other. 80 always has a tile.

    Raises KeyError for a kernel and class of shapes without a committed tile.
    """
    known = committed_tiles(op)
    for each in sorted(known, reverse=True):
        its_kind = each == REFERENCE_ARCHITECTURE or (each in SMALL_BLOCKS) == (architecture in SMALL_BLOCKS)
        older = each <= max(architecture, REFERENCE_ARCHITECTURE)
        if older and its_kind and shape_class in known[each].get(kernel, {}):
            return known[each][kernel][shape_class]
    raise KeyError(f"{op}: no configuration of {kernel!r} for {shape_class!r} (kernels/configurations/{op}.json)")


@cache
def committed_tiles(op: str) -> dict[int, dict[str, dict[str, Configuration]]]:
    """Return the tiles in the file of an op, by architecture, kernel and class of shapes."""
    data = json.loads((CONFIGURATIONS / f"{op}.json").read_text(encoding="utf-8"))
    return {
        int(architecture.removeprefix("sm_")): {
            kernel: {
                name: Configuration(
                    {block: size for block, size in one.items() if block.isupper()}, one["num_warps"], one["num_stages"]
                )
                for name, one in classes.items()
            }
            for kernel, classes in kernels.items()
        }
        for architecture, kernels in data.items()
    }


def architecture_of(tensor: torch.Tensor) -> int:
    """Return the architecture that kernels are launched for, 80 for sm_80.

    For a CUDA tensor this is its GPU's. For a CPU tensor it is the active Triton driver's, or 80 without a driver.
    """
    if tensor.is_cuda:
        return _capability(tensor.device.index)
    try:
        return int(triton.runtime.driver.active.get_current_target().arch)
    except (RuntimeError, TypeError, ValueError):  # no driver: the interpreter
        return REFERENCE_ARCHITECTURE


@cache
def _capability(index: int) -> int:
    major, minor = torch.cuda.get_device_capability(index)
    return 10 * major + minor


def triton_type(dtype: torch.dtype) -> str:
    """Return Triton's name of an element type in a signature: fp16 for torch.float16."""
    return {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
        torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
    }[dtype]  # fmt: skip
