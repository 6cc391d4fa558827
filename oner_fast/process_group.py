"""The ranks of a command, as torchrun starts them; or one process alone."""

from __future__ import annotations

import math
import os
import pickle
from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist

from oner_fast.failures import keep_origin

T = TypeVar("T")

_PEERS = {"OMPI_COMM_WORLD_SIZE": "mpirun", "PMI_SIZE": "mpiexec", "SLURM_STEP_NUM_TASKS": "srun"}


@dataclass(frozen=True)
class World:
    """This process's place in the process group.

    Attributes:
        rank: 0 <= rank < size.
        size: number of processes.
        local_rank: index on this machine; the CUDA device it uses.
        device: where this process computes.
    """

    rank: int
    size: int
    local_rank: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes the logs and files: rank 0."""
        return self.rank == 0


def setup(device: str = "auto", *, init_method: str | None = None, timeout_seconds: float = 1800.0) -> World:
    """Join the process group that torchrun's environment describes; alone, nothing is started.

    Args:
        device: `auto` (CUDA where there is one), `cpu` or `cuda`; a single process may name `cuda:1`.
        init_method: how the ranks meet, by default through `MASTER_ADDR` and `MASTER_PORT`.
        timeout_seconds: how long a collective waits for a rank before it fails.

    Returns:
        The world; its collectives run on gloo for CPU tensors and NCCL for CUDA tensors.

    Raises:
        ValueError: the environment is incomplete, contradicts itself, or comes from another launcher; the
            device is not one that can be used, or there are fewer GPUs than local ranks; or the other ranks did not
            come in time.
    """
    if not 0 < timeout_seconds < math.inf:
        raise ValueError(f"timeout_seconds must be positive and finite, got {timeout_seconds}")
    rank, size, local_rank = _ranks()
    place = _device(device, size, local_rank)
    if place.type == "cuda":
        torch.cuda.set_device(place)
        # Without it torch refuses matrix products on CUDA under use_deterministic_algorithms(True).
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    world = World(rank, size, local_rank, place)
    if size > 1 and not dist.is_initialized():
        missing = [name for name in ("MASTER_ADDR", "MASTER_PORT") if name not in os.environ]
        if init_method is None and missing:
            raise ValueError(f"WORLD_SIZE={size} but {' and '.join(missing)} not set: start with torchrun")
        try:
            dist.init_process_group(
                "cpu:gloo,cuda:nccl" if place.type == "cuda" else "gloo",
                init_method=init_method,
                rank=rank,
                world_size=size,
                timeout=timedelta(seconds=timeout_seconds),
            )
        except dist.DistError as error:
            at = init_method or "{MASTER_ADDR}:{MASTER_PORT}".format(**os.environ)
            raise ValueError(
                f"rank {rank} did not meet the other {size - 1} at {at} within {timeout_seconds:g} s "
                f"(--collective-timeout): {str(error).splitlines()[0]}"
            ) from error
    return world


def shutdown() -> None:
    """Leave the process group, if there is one. It waits for nobody, so that a failing rank can leave too."""
    if dist.is_initialized():
        dist.destroy_process_group()


def is_main() -> bool:
    """Tell whether this process is rank 0, or alone."""
    return not dist.is_initialized() or dist.get_rank() == 0


def barrier() -> None:
    """Wait until every rank is here; alone, at once."""
    if dist.is_initialized():
        # A collective on the CPU: a barrier on NCCL has to guess the device.
        dist.all_reduce(torch.zeros(1))


def sum_over_ranks(tensor: torch.Tensor) -> torch.Tensor:
    """The sum of `tensor` over the ranks, as a new tensor of its shape, dtype and device, without gradient.

    Every rank must call it with the same shape and dtype, in the same order.
    """
    total = tensor.detach().clone(memory_format=torch.contiguous_format)
    if dist.is_initialized():
        dist.all_reduce(total, op=dist.ReduceOp.SUM)
    return total


def on_main(world: World, work: Callable[[], T]) -> T:
    """Let rank 0 do `work`, and return its result on every rank.

    Where `work` raises, every rank raises the same error, so that none waits for a rank that has ended. The result and
    the error are pickled.
    """
    if world.size == 1:
        return work()
    sent: list[Any] = [None, None]
    if world.is_main:
        try:
            sent[0] = work()
        except Exception as error:
            sent[1] = _portable(error)
    # On the CPU, so that no GPU is waited for.
    dist.broadcast_object_list(sent, src=0, device=torch.device("cpu"))
    if sent[1] is not None:
        raise sent[1]
    return cast(T, sent[0])


def _portable(error: Exception) -> Exception:
    """Return the error as one that another process can build again, with its place in the code."""
    keep_origin(error)
    try:
        if str(pickle.loads(pickle.dumps(error))) == str(error):
            return error
    except Exception:  # an exception's constructor may take anything
        pass
    told = RuntimeError(f"{type(error).__name__}: {error}")
    told.__dict__.update(error.__dict__)
    return told


def _ranks() -> tuple[int, int, int]:
    given = [name for name in ("RANK", "WORLD_SIZE") if name in os.environ]
    if not given:
        for name, launcher in _PEERS.items():
            if os.environ.get(name, "1") not in ("", "1"):
                raise ValueError(
                    f"{name}={os.environ[name]} says that {launcher} started several processes, but RANK and "
                    "WORLD_SIZE are not set, and each would train alone. Start with torchrun, or set both"
                )
        return 0, 1, 0
    if len(given) == 1:
        other = "WORLD_SIZE" if given == ["RANK"] else "RANK"
        raise ValueError(f"{given[0]} is set but {other} is not: start with torchrun, or unset {given[0]}")
    rank, size = _integer("RANK"), _integer("WORLD_SIZE")
    if not 0 <= rank < size:
        raise ValueError(f"needs 0 <= RANK < WORLD_SIZE, got RANK={rank}, WORLD_SIZE={size}")
    if "LOCAL_RANK" not in os.environ and size > 1:
        raise ValueError(f"WORLD_SIZE={size} but LOCAL_RANK is not set: start with torchrun")
    local_rank = _integer("LOCAL_RANK") if "LOCAL_RANK" in os.environ else 0
    if not 0 <= local_rank < size:
        raise ValueError(f"needs 0 <= LOCAL_RANK < WORLD_SIZE, got LOCAL_RANK={local_rank}, WORLD_SIZE={size}")
    return rank, size, local_rank


def _integer(name: str) -> int:
    try:
        return int(os.environ[name])
    except ValueError:
        raise ValueError(f"{name} must be an integer, got {os.environ[name]!r}") from None


def _device(name: str, size: int, local_rank: int) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        device = None
    if device is None or device.type not in ("cpu", "cuda"):
        raise ValueError(f"device must be auto, cpu or cuda, got {name!r}")
    if device.type == "cpu":
        return torch.device("cpu")
    if not torch.cuda.is_available():
        raise ValueError(f"device={name!r} but torch finds no GPU (torch.cuda.is_available() is False)")
    if device.index is not None and size > 1:
        raise ValueError(f"with {size} processes each takes the GPU of its local rank; give cuda, not {name!r}")
    index = local_rank if device.index is None else device.index
    if index >= torch.cuda.device_count():
        raise ValueError(
            f"this process needs GPU {index} but there are {torch.cuda.device_count()}: start torchrun with "
            "--nproc-per-node of at most that many"
        )
    return torch.device("cuda", index)
