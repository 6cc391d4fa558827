"""Compile one Triton kernel for a GPU that is not here."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from oner_fast.benchmarks.gpuless.architectures import capability_of


def gpu_target(name: str) -> GPUTarget:
    """Return Triton's target for `sm_80`, `gfx942` and the like."""
    capability = capability_of(name)
    if capability is not None:
        return GPUTarget("cuda", capability, 32)
    return GPUTarget("hip", name, 64 if name.startswith("gfx9") else 32)


def compile_kernel(
    kernel: Any,
    signature: Mapping[str, str],
    constexprs: Mapping[str, Any],
    divisible: Mapping[str, int],
    options: Mapping[str, Any],
    target: str,
) -> Any:
    """Compile as a launch would and return Triton's `CompiledKernel`.

    The arguments are those of `aot.Request`, and the name of a target.

    Raises:
        TypeError: the kernel is interpreted, so there is nothing to compile.
        Exception: whatever Triton's compiler raises.
    """
    while not isinstance(kernel, JITFunction):
        if not hasattr(kernel, "fn") or triton.knobs.runtime.interpret:
            raise TypeError(f"{kernel} is not a compiled kernel (is TRITON_INTERPRET set?)")
        kernel = kernel.fn
    constants = {p.name: p.default for p in kernel.params if p.name not in signature and p.has_default}
    constants.update(constexprs)
    types = {name: "constexpr" if name in constants else signature[name] for name in kernel.arg_names}
    aligned = {name: 16 for name, kind in types.items() if kind.startswith("*")} | dict(divisible)
    attributes = {
        (kernel.arg_names.index(name),): [["tt.divisibility", by]] for name, by in aligned.items() if by and by > 1
    }
    source = ASTSource(fn=kernel, signature=types, constexprs=constants, attrs=attributes)
    return triton.compile(source, target=gpu_target(target), options=dict(options))
