"""What the launchers of all kernels share: the architecture, committed tile shapes, and lists of what is compiled."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

import torch
import triton

_CONFIGURATIONS = Path(__file__).parent / "configurations"
REFERENCE_ARCHITECTURE = 80
Key = tuple[str, str, str]  # op, kernel, class of shapes


@dataclass(frozen=True)
class Configuration:
    """How a kernel is compiled for a class of shapes: its block sizes, and Triton's launch options."""

    blocks: Mapping[str, int]
    num_warps: int
    num_stages: int

    @property
    def options(self) -> dict[str, int]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages}

    @property
    def launch(self) -> dict[str, int]:
        """All of it, as keyword arguments of a launch."""
        return {**self.blocks, **self.options}


@dataclass(frozen=True)
class Compilation:
    """One kernel as a launch would specialise it, so that it can be compiled for a GPU that is not here.

    Args:
        name: unique among all: the kernel, and what sets this specialisation apart.
        kernel: the @triton.jit function.
        signature: {"x": "*fp16", "rows": "i32"} of every argument that is not constexpr.
        constexprs: the values of the others.
        divisible: {"stride": 16} of integers; pointers are taken as aligned to 16 bytes.
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
    """The committed configuration: that of the newest architecture not newer than `architecture` (80 is always there).

    Raises KeyError naming the kernel and class that have none.
    """
    known = _table(op)
    for each in sorted(known, reverse=True):
        if each <= max(architecture, REFERENCE_ARCHITECTURE) and shape_class in known[each].get(kernel, {}):
            return known[each][kernel][shape_class]
    raise KeyError(f"{op}: no configuration of {kernel!r} for {shape_class!r} (kernels/configurations/{op}.json)")


@cache
def _table(op: str) -> dict[int, dict[str, dict[str, Configuration]]]:
    data = json.loads((_CONFIGURATIONS / f"{op}.json").read_text(encoding="utf-8"))
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


def keys() -> list[Key]:
    """Of all that is committed, in the order of the files."""
    return [
        (op, kernel, shape_class)
        for op in sorted(path.stem for path in _CONFIGURATIONS.glob("*.json"))
        for kernel, classes in _table(op)[REFERENCE_ARCHITECTURE].items()
        for shape_class in classes
    ]


def read_again() -> None:
    """The files were changed: what was read from them is forgotten."""
    _table.cache_clear()


@contextmanager
def override(op: str, kernel: str, shape_class: str, tile: Configuration) -> Iterator[None]:
    """Within it `tile` is what every architecture is given, in every thread: for tuning alone.

    The table is changed, not how it is read: a launch costs what it always does, and torch.compile sees nothing.
    Raises KeyError for what is not committed, ValueError where the blocks are not those of the kernel.
    """
    places = [kernels[kernel] for kernels in _table(op).values() if shape_class in kernels.get(kernel, {})]
    if not places:
        raise KeyError(f"{op}: no configuration of {kernel!r} for {shape_class!r} (kernels/configurations/{op}.json)")
    before = [classes[shape_class] for classes in places]
    if set(tile.blocks) != set(before[0].blocks):
        raise ValueError(f"{op} {kernel} has the blocks {sorted(before[0].blocks)}, got {sorted(tile.blocks)}")
    try:
        for classes in places:
            classes[shape_class] = tile
        yield
    finally:
        for classes, old in zip(places, before, strict=True):
            classes[shape_class] = old


@contextmanager
def as_on(architecture: int) -> Iterator[None]:
    """Within it what is asked for architecture 80, as the lists of compilations do, is what `architecture` is given."""
    with ExitStack() as stack:
        for op, kernel, shape_class in keys():
            stack.enter_context(override(op, kernel, shape_class, configuration(op, kernel, shape_class, architecture)))
        yield


class _Noting(dict[str, Configuration]):
    """The classes of a kernel, which count what is read of them."""

    def __init__(self, op: str, kernel: str, classes: Mapping[str, Configuration], read: Counter[Key]) -> None:
        super().__init__(classes)
        self.of, self.read = (op, kernel), read

    def __getitem__(self, shape_class: str) -> Configuration:
        self.read[*self.of, shape_class] += 1
        return super().__getitem__(shape_class)


@contextmanager
def asked() -> Iterator[Counter[Key]]:
    """How often each configuration is asked for within it, by its key."""
    read: Counter[Key] = Counter()
    places = [(op, kernels) for op in {op for op, _, _ in keys()} for kernels in _table(op).values()]
    before = [dict(kernels) for _, kernels in places]
    try:
        for op, kernels in places:
            kernels.update({kernel: _Noting(op, kernel, classes, read) for kernel, classes in kernels.items()})
        yield read
    finally:
        for (_, kernels), old in zip(places, before, strict=True):
            kernels.update(old)


def architecture_of(tensor: torch.Tensor) -> int:
    """80 for sm_80: of the tensor's GPU; on the CPU of the active Triton driver, or 80 where none is."""
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
    """What Triton calls an element type in a signature: fp16 for torch.float16."""
    return {
        torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16", torch.float64: "fp64",
        torch.uint8: "u8", torch.int32: "i32", torch.int64: "i64",
    }[dtype]  # fmt: skip
