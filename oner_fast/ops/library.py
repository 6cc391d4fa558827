"""The torch.library behind the ops: schemas are defined in Python, so an op exists even where nothing was compiled.

Four libraries hold the same schemas. `oner_fast` has the kernels of the C++ extension, for the CPU and, in CUDA C++,
for GPUs. `oner_fast_triton` has the Triton kernels, and `oner_fast_triton_atomic` has variants that add in no fixed
order. `oner_fast_portable` has plain PyTorch for any device. One autograd.Function therefore works with all of them.
The GPU's Triton kernels can be forced by name on the CPU, where Triton's interpreter or an emulated GPU runs them. The
implementation "cuda" takes each raw op from the first library where that has a CUDA kernel, else from the second.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from types import ModuleType
from typing import Any, TypeVar

import torch

from oner_fast import _cuda_extension, _extension
from oner_fast.ops import batching

_COMPILED = torch.library.Library("oner_fast", "DEF")
_TRITON = torch.library.Library("oner_fast_triton", "DEF")
_ATOMIC = torch.library.Library("oner_fast_triton_atomic", "DEF")
_PORTABLE = torch.library.Library("oner_fast_portable", "DEF")
_COMPILED.define("cpu_capability() -> str")
_names: list[str] = []  # names of the raw ops that have Triton kernels
_cuda = ModuleType("oner_fast_cuda")  # a module, like torch.ops.oner_fast: torch.compile reads its attributes

Shape = TypeVar("Shape", bound=Callable[..., object])
Function = TypeVar("Function", bound=Callable[..., object])


def constant(function: Function) -> Function:
    """Mark a function as torch.compiler.assume_constant_result does, without importing torch._dynamo, which is slow."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def define(
    schema: str,
    *,
    triton: str | None = None,
    atomic: str | None = None,
    portable: bool | str = False,
    fold: batching.Fold | None = None,
) -> Callable[[Shape], Shape]:
    """Define the raw op `schema`; the decorated function is its fake implementation.

    The fake implementation returns empty tensors of the result's shapes and dtypes. Raw ops are private: they check no
    more than memory safety needs, and have no gradient. The public function of the same name checks its arguments and
    holds the autograd.Function.

    Args:
        schema: "name(Tensor x, ...) -> Tensor", as torch.library takes it.
        triton: "module.function" under `oner_fast.kernels`, which takes the schema's arguments and launches the Triton
            kernels. It is imported at the first call, since importing Triton takes a while.
        atomic: the same for kernels that add in no fixed order; `triton` where there are none.
        portable: the function of the same path under `oner_fast.ops.portable` computes it in plain PyTorch. Another
            path, where there is no kernel at all: only the library `oner_fast_portable` then has the op.
        fold: computes the op under `torch.vmap` in one call, where it can; see `oner_fast.ops.batching`. Without it
            the op is called once for each element of the batch.
    """
    name = schema.split("(", 1)[0]
    plain_path = triton if portable is True else portable or None

    def wrap(fake: Shape) -> Shape:
        kernels = () if isinstance(portable, str) else (_COMPILED, *((_TRITON, _ATOMIC) if triton else ()))
        for library in (*kernels, *((_PORTABLE,) if plain_path else ())):
            library.define(schema, tags=(torch.Tag.pt2_compliant_tag,))
            qualified = f"{library.ns}::{name}"
            torch.library.register_fake(qualified, fake, lib=library)
            rule = batching.rule(getattr(getattr(torch.ops, library.ns), name), fold)
            torch.library.register_vmap(qualified, rule, lib=library)
        if triton:
            _names.append(name)
            for library, path in ((_TRITON, triton), (_ATOMIC, atomic or triton)):
                module, function = path.rsplit(".", 1)
                launcher = _Launcher(f"oner_fast.kernels.{module}", function)
                for key in ("CPU", "CUDA"):
                    library.impl(name, launcher, key)
        if plain_path:
            module, function = plain_path.rsplit(".", 1)
            plain = _PlainPyTorch(f"oner_fast.ops.portable.{module}", function)
            _PORTABLE.impl(name, plain, "CompositeExplicitAutograd")
        return fake

    return wrap


class _Launcher:
    """A function that is imported at its first call, and launches on the GPU of its first tensor."""

    def __init__(self, module: str, function: str) -> None:
        self.module, self.function = module, function
        self.launch: Callable[..., Any] | None = None

    def __call__(self, *arguments: Any) -> Any:
        if self.launch is None:
            self.launch = getattr(importlib.import_module(self.module), self.function)
        first = next(one for one in arguments if isinstance(one, torch.Tensor))
        with self.context(first):
            return self.launch(*arguments)

    def context(self, first: torch.Tensor) -> AbstractContextManager[Any]:
        return on_gpu_of(first)


class _PlainPyTorch(_Launcher):
    """A function of PyTorch's own ops, which autocast must leave in the dtypes that they are given."""

    def context(self, first: torch.Tensor) -> AbstractContextManager[Any]:
        return torch.autocast(first.device.type, enabled=False)


def on_gpu_of(x: torch.Tensor) -> AbstractContextManager[Any]:
    """Make the GPU of `x` the current one, on which Triton launches; do nothing for a CPU tensor."""
    return torch.cuda.device(x.device) if x.is_cuda else nullcontext()


def raw_ops(backend: str) -> Any:
    """Return the raw ops of the implementation `backend`: "cpp", "cuda", "triton", "triton_atomic" or "portable"."""
    if backend == "cuda":
        return _cuda
    if backend == "triton_atomic":
        return torch.ops.oner_fast_triton_atomic
    if backend == "portable":
        return torch.ops.oner_fast_portable
    return torch.ops.oner_fast_triton if backend == "triton" else torch.ops.oner_fast


def choose_cuda_ops() -> None:
    """Take each raw op of the implementation "cuda" from CUDA C++ or Triton; call once the extension is loaded."""
    for name in _names:
        library = torch.ops.oner_fast if has_cuda_kernel(name) else torch.ops.oner_fast_triton
        setattr(_cuda, name, getattr(library, name))


def has_cuda_kernel(name: str) -> bool:
    """Return whether the extension has a CUDA C++ kernel for the raw op `name` that can serve here."""
    loaded = _cuda_extension.status().loaded
    return loaded and torch._C._dispatch_has_kernel_for_dispatch_key(f"oner_fast::{name}", "CUDA")


def why_not_cuda(name: str, *, half_alone: bool = False) -> Callable[..., list[str]]:
    """Return the `reasons` of an implementation in CUDA C++ whose first raw op is `name`.

    `half_alone` says that its kernels multiply float16 and bfloat16 alone, and that Triton's kernels compute the rest
    of the op.
    """

    def reasons(device: str, dtype: torch.dtype | None = None, **facts: Any) -> list[str]:
        found = [why] if device == "cuda" and (why := _why_no_cuda_kernel(name)) else []
        if half_alone and dtype not in (None, torch.float16, torch.bfloat16):
            found.append(f"its products are of float16 and bfloat16, not of {str(dtype).removeprefix('torch.')}")
        if half_alone and device == "cuda":
            found.extend(why_not_triton(device))
        return found

    return reasons


@constant
def _why_no_cuda_kernel(name: str) -> str:
    """Say why the extension or the GPU cannot run the raw op `name` in CUDA C++; empty where they can.

    A missing extension is reported elsewhere, and may be loaded later in the process.
    """
    return _of_this_machine(name) if _extension.status().loaded else ""


@cache
def _of_this_machine(name: str) -> str:
    """Say why the loaded extension or the GPU cannot run the raw op `name` in CUDA C++; empty where they can.

    Without a GPU there is nothing to report about its age.
    """
    if not has_cuda_kernel(name):
        return _cuda_extension.status().reason or f"there is no kernel in CUDA C++ for {name}"
    if not torch.cuda.is_available():
        return ""
    major, minor = torch.cuda.get_device_capability()
    return "" if major >= 8 else f"needs a GPU of sm_80 (A100) or newer, this one is sm_{major}{minor}"


def why_not_triton(device: str, **facts: Any) -> list[str]:
    """List every reason why Triton kernels cannot run on `device`.

    On the CPU they run in Triton's interpreter, or where the active Triton driver works on CPU tensors.
    """
    why = _why_no_triton(device == "cpu")
    return [why] if why else []


def why_not_triton_products(device: str, **facts: Any) -> list[str]:
    """List every reason why Triton kernels with matrix products cannot run on `device`."""
    found = why_not_triton(device, **facts)
    if facts.get("dtype") == torch.float64:
        found.append("the Triton kernels have float32 statistics and no float64 products")
    return found


@constant
def _why_no_triton(on_the_cpu: bool) -> str:
    """Say why Triton kernels cannot run on the CPU or on a GPU; empty where they can.

    torch.compile calls it and keeps the result. It must not trace it: torch 2.11 cannot trace a search for a package.
    """
    try:
        found = importlib.util.find_spec("triton") is not None
    except ValueError:  # some program put an empty module of that name in its place
        found = False
    if not found:
        return "Triton is not installed (pip install $(oner-fast requirements triton))"
    try:
        if not on_the_cpu or _triton_runs_on_the_cpu():
            return ""
    except Exception as error:  # whatever a damaged package, or one of another version, raises
        return f"Triton cannot be used: {type(error).__name__}: {error}"
    return "on the CPU Triton kernels run in its interpreter alone: set TRITON_INTERPRET=1 before Python starts"


def _triton_runs_on_the_cpu() -> bool:
    triton = importlib.import_module("triton")
    if triton.knobs.runtime.interpret:
        return True
    try:
        return bool(triton.runtime.driver.active.get_active_torch_device().type == "cpu")
    except RuntimeError:  # no driver at all
        return False
