"""Memory of an op: the peak above its inputs, in a process of its own, and the bytes kept for backward.

The peak is the kernel's own count: `VmHWM` of /proc/self/status after a reset through /proc/self/clear_refs. The op
runs once before it is measured, so that pages of code, compiler and threads do not count. Memory that this first run
freed is back with the system and counts again: allocations from 64 KiB on are mapped one by one, and MKL keeps no
buffers.
"""

from __future__ import annotations

import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oner_fast.benchmarks.cases import Call, Case, Contender, Forward, step

# Variables of glibc and MKL: return freed memory at once.
ENVIRONMENT = {"MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "0", "MKL_DISABLE_FAST_MM": "1"}
WARM_UPS = 2


class Unavailable(Exception):
    """Memory cannot be measured here, for the reason given."""


@dataclass(frozen=True)
class Memory:
    """Bytes of one call.

    Args:
        peak: bytes above the memory before the call. Outputs count, returned gradients do not.
        saved: bytes kept between forward and backward, each storage once, inputs included.
        saved_beyond_inputs: the same without storages of the inputs.
    """

    peak: int
    saved: int
    saved_beyond_inputs: int


def peak_bytes(run: Callable[[], Sequence[Tensor]], warm_ups: int = WARM_UPS) -> tuple[int, Sequence[Tensor]]:
    """Measure how far `run()` raises the peak of resident memory, after some warm-ups; also return its result.

    The peak is exact to some hundred KiB where the process was started with `ENVIRONMENT`. Raises Unavailable without
    Linux's /proc.
    """
    for _ in range(warm_ups):
        run()
    gc.collect()
    _give_back()
    before = _status("VmRSS")
    try:
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")
    except OSError as error:
        raise Unavailable(f"the peak cannot be reset: {error}") from error
    results = run()
    return _status("VmHWM") - before, results


def saved_bytes(forward: Forward, call: Call) -> tuple[int, int]:
    """Count the bytes that the forward keeps for backward: all of them, and those outside the inputs' storages."""
    tensors = [value for value in call.arguments if isinstance(value, Tensor)]
    return saved_during(lambda: forward(*call.arguments), tensors)


def saved_during(run: Callable[[], Any], given: Sequence[Tensor]) -> tuple[int, int]:
    """Count the bytes that `run()` keeps for backward: all of them, and those outside the storages of `given`."""
    kept: dict[int, torch.UntypedStorage] = {}

    def pack(tensor: Tensor) -> Tensor:
        for part in _parts(tensor):
            storage = part.untyped_storage()
            kept[storage.data_ptr()] = storage  # held, so that no address is reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        results = run()
    known = {part.untyped_storage().data_ptr() for tensor in given for part in _parts(tensor)}
    del results
    beyond = sum(storage.nbytes() for pointer, storage in kept.items() if pointer not in known)
    return sum(storage.nbytes() for storage in kept.values()), beyond


def of_contender(case: Case, contender: Contender, device: str = "cpu") -> Memory:
    """Measure a contender in this process, which should be a fresh one; `measure` starts it."""
    call = contender.layout(case.make(0, device))
    forward = contender.function()
    if device == "cpu":
        peak, results = peak_bytes(lambda: step(forward, call))
    else:
        peak, results = peak_on_gpu(lambda: step(forward, call))
    gradients = results[len(results) - len(call.leaves) :]
    returned = sum(part.nbytes for one in gradients for part in _parts(one))
    del results
    return Memory(max(peak - returned, 0), *saved_bytes(forward, call))


def measure(case: Case, contender: str, quick: bool, device: str = "cpu") -> Memory:
    """Start a process that measures one contender of a case. Raises Unavailable, with the reason, where it fails."""
    return measure_together([(case, contender)], quick, device)[0]


def measure_together(chosen: Sequence[tuple[Case, str]], quick: bool, device: str = "cpu") -> list[Memory]:
    """Start one process that measures several contenders in turn, each by its case and its name.

    Raises Unavailable, with the reason, where it fails.
    """
    task = {"chosen": [(case.key, case.op, name) for case, name in chosen], "quick": quick, "device": device}
    task["threads"] = torch.get_num_threads()
    command = [sys.executable, "-m", "oner_fast.benchmarks.peak_memory", json.dumps(task)]
    environment = {**os.environ, **ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise Unavailable(f"the process that measures it ended with {done.returncode}: {last}")
    return [Memory(**one) for one in json.loads(done.stdout.strip().splitlines()[-1])]


def _parts(tensor: Any) -> list[Tensor]:
    """Plain tensors that store a tensor: itself, or the values and the boundaries of a nested one."""
    return [tensor.values(), tensor.offsets()] if tensor.is_nested else [tensor]


def peak_on_gpu(run: Callable[[], Sequence[Tensor]]) -> tuple[int, Sequence[Tensor]]:
    """Measure as `peak_bytes`, by the count of torch's allocator."""
    for _ in range(WARM_UPS):
        run()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before, results


def _give_back() -> None:
    try:
        ctypes.CDLL(None).malloc_trim(0)
    except (AttributeError, OSError):
        pass  # another C library keeps little memory beside the tensors


def _status(name: str) -> int:
    """Read a field of /proc/self/status, in bytes."""
    try:
        lines = Path("/proc/self/status").read_text(encoding="ascii", errors="replace").splitlines()
    except OSError as error:
        raise Unavailable(f"/proc/self/status cannot be read: {error}") from error
    for line in lines:
        if line.startswith(f"{name}:"):
            return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {name}")


def _main(argument: str) -> None:
    from oner_fast.benchmarks.ops import cases

    task: dict[str, Any] = json.loads(argument)
    try:
        # Where memory runs out, the system should end this process and no other.
        Path("/proc/self/oom_score_adj").write_text("1000", encoding="ascii")
    except OSError:
        pass
    torch.set_num_threads(task["threads"])
    found = []
    for key, op, name in task["chosen"]:
        case = next(one for one in cases(task["quick"], [op]) if one.key == key)
        found.append(asdict(of_contender(case, case.contender(name), task["device"])))
    print(json.dumps(found))


if __name__ == "__main__":
    _main(sys.argv[1])
