"""Generate the Triton kernels of torch.compile for an A100 without a GPU, and launch them on CPU tensors.

The graph of forward and backward comes from AOTAutograd with inductor's own decompositions and partitioner. Inductor
lowers it for fake CUDA tensors and writes its program, which then runs with allocations on the CPU. Where inductor
would time several configurations of a kernel, the first one is taken.
"""

from __future__ import annotations

import importlib.util
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from functorch.compile import aot_function, make_boxed_func, min_cut_rematerialization_partition
from torch import Tensor
from torch._inductor import scheduler, utils
from torch._inductor.compile_fx import select_decomp_table
from torch._inductor.debug import DebugContext
from torch._inductor.graph import GraphLowering
from torch._inductor.runtime.hints import DeviceProperties
from torch._inductor.runtime.triton_heuristics import GridExpr
from torch._inductor.virtualized import V
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.passes.fake_tensor_prop import FakeTensorProp
from torch.utils._pytree import tree_map

from oner_fast.benchmarks.cases import Forward
from oner_fast.benchmarks.gpu.emulated_a100 import A100

# Lines of inductor's program that need a CUDA build of torch, and their replacements.
REPLACED = {
    "from torch._C import _cuda_getCurrentRawStream as get_raw_stream": "get_raw_stream = lambda device: 0",
    "torch.cuda._DeviceGuard(0)": "nullcontext()",
    "torch._C._dynamo.guards._empty_strided_cuda": "torch._C._dynamo.guards._empty_strided_cpu",
    "async_compile = AsyncCompile()": "async_compile = launcher",
    "device='cuda:0'": "device='cpu'",
}


def compiled(function: Forward) -> Forward:
    """Compile a forward as torch.compile would for an A100; call the result inside `emulated_a100`."""
    made: Forward = aot_function(
        function, fw_compiler=_program, bw_compiler=_program, decompositions=select_decomp_table(),
        partition_fn=min_cut_rematerialization_partition,
    )  # fmt: skip
    return made


def _program(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> Callable[..., Any]:
    source = _generate(graph, inputs)
    for old, new in REPLACED.items():
        source = source.replace(old, new)
    scope: dict[str, Any] = {"__name__": "program", "launcher": _Kernels(), "nullcontext": nullcontext}
    exec(compile(source, "<inductor's program>", "exec"), scope)
    return make_boxed_func(lambda *arguments: scope["call"](list(arguments)))


def _generate(graph: torch.fx.GraphModule, inputs: Sequence[Any]) -> str:
    # The outputs of nodes are known on the CPU; fake CUDA tensors of these shapes need no operation of CUDA.
    FakeTensorProp(graph).propagate(*inputs)
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with fake:
        given = [_on_cuda(one) for one in inputs]
        for node in graph.graph.nodes:
            if "val" in node.meta:
                node.meta["val"] = tree_map(_on_cuda, node.meta["val"])
            if "device" in node.kwargs:
                node.kwargs = {**node.kwargs, "device": torch.device("cuda", 0)}
    graph.recompile()
    properties = DeviceProperties(
        type="cuda", index=0, multi_processor_count=A100.multi_processor_count, cc=80, major=8,
        regs_per_multiprocessor=A100.regs_per_multiprocessor, warp_size=A100.warp_size,
        max_threads_per_multi_processor=A100.max_threads_per_multi_processor,
    )  # fmt: skip
    lowering = GraphLowering(graph, example_inputs=given)
    with ExitStack() as stack:
        stack.enter_context(V.set_debug_handler(DebugContext()))
        stack.enter_context(V.set_graph_handler(lowering))
        stack.enter_context(V.set_fake_mode(fake))
        stack.enter_context(mock.patch.object(DeviceProperties, "create", lambda device: properties))
        stack.enter_context(mock.patch.object(torch.cuda, "is_available", lambda: True))
        for module in (scheduler, utils):
            if hasattr(module, "has_triton"):
                stack.enter_context(mock.patch.object(module, "has_triton", lambda *device: True))
        lowering.run(*given)
        code = lowering.codegen()[0]
    return str(getattr(code, "value", code))


def _on_cuda(x: Any) -> Any:
    if not isinstance(x, Tensor):
        return x
    return torch.empty_strided(x.shape, x.stride(), dtype=x.dtype, device="cuda")


class _Kernels:
    """Replace inductor's compiler: take a kernel's source and return the function that its program calls."""

    def triton(self, name: str, source: str, device_str: str = "cuda") -> Any:
        source = source.replace("triton_helpers.set_driver_to_gpu()", "")
        with tempfile.NamedTemporaryFile("w", suffix=".py", delete=False) as file:  # Triton reads a kernel's file
            file.write(source)
        spec = importlib.util.spec_from_file_location(name, file.name)
        assert spec is not None and spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        tuner = getattr(module, name)
        Path(file.name).unlink()
        return SimpleNamespace(run=_launcher(tuner))

    def wait(self, scope: dict[str, Any]) -> None:
        """Return at once, as nothing is compiled in the background."""


def _launcher(tuner: Any) -> Callable[..., None]:
    kernel, first = tuner.fn, tuner.configs[0]
    sizes = {name: value for name, value in first.kwargs.items() if name in kernel.arg_names}

    def run(*arguments: Any, stream: int) -> None:
        named = dict(zip(kernel.arg_names, arguments, strict=False))
        grid = GridExpr.from_meta(tuner.inductor_meta, first).eval_slow({**named, **first.kwargs})
        kernel[grid](*arguments, **sizes, num_warps=first.num_warps, num_stages=first.num_stages)

    return run
