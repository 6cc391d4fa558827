"""Part `doctor`: import the package and say what serves each op."""

from __future__ import annotations

import importlib
import importlib.util
import time

import torch

from oner_fast import _cuda_extension, _extension, doctor
from oner_fast.benchmarks.first_gpu.parts import Setting
from oner_fast.benchmarks.first_gpu.record import Record
from oner_fast.benchmarks.source import commit_of_this, versions


def run(record: Record, setting: Setting) -> None:
    """Import the ops, print the doctor's report, and keep versions, GPU and the implementation of each op."""
    start = time.perf_counter()
    importlib.import_module("oner_fast.ops")
    seconds = time.perf_counter() - start
    record.say(doctor.report())
    commit, changed = commit_of_this()
    gpu = torch.cuda.get_device_properties(0) if setting.device == "cuda" else None
    record.row(
        f"imported in {seconds:.1f} s",
        import_seconds=seconds,
        commit=commit + "+" * changed,
        versions=versions(),
        cuda=torch.version.cuda or "",
        gpu=gpu.name if gpu else "",
        capability=f"sm_{gpu.major}{gpu.minor}" if gpu else "",
        memory_bytes=gpu.total_memory if gpu else 0,
    )
    from oner_fast.ops.implementations import explain

    chosen = {}
    for choice in explain(setting.device):
        chosen[choice.op] = choice.chosen or ""
        if choice.chosen is None:
            record.fail(f"nothing can compute {choice.op} on {setting.device}")
    record.row(", ".join(f"{op}: {name}" for op, name in chosen.items()), chosen=chosen)
    if importlib.util.find_spec("triton") is None:
        say = record.leave_out if setting.rehearse else record.fail
        say("the Triton kernels: Triton is not installed (CUDA builds of torch bring it)")
    if not (extension := _extension.status()).loaded:
        record.leave_out(f"the compiled ops of the CPU: {extension.reason}")
    elif not (cuda := _cuda_extension.status()).loaded:
        record.leave_out(f"the ops in CUDA C++: {cuda.reason}")
    record.finish(f"{gpu.name}, sm_{gpu.major}{gpu.minor}" if gpu else "no GPU, rehearsed on the CPU")
