"""Triton's contrasts over two ranks on gloo: their kernels take blocks of keys that are another rank's."""

from __future__ import annotations

import importlib
import importlib.util
import multiprocessing
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.ops import mixup_info_nce, reference, sigmoid_loss

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("oner_fast.kernels.mixup_info_nce") is None, reason="no Triton kernels of this op"
)

SIZES = (7, 2)
TOLERANCE = 1e-5


CASES: tuple[tuple[str, dict[str, Any]], ...] = (
    ("mixup_info_nce", {}), ("mixup_info_nce", {"normalized": True}), ("mixup_info_nce", {"same": "positive"}),
    ("mixup_info_nce", {"same": "ignore"}), ("sigmoid_loss", {}), ("sigmoid_loss", {"same": "positive"}),
    ("sigmoid_loss", {"same": "ignore", "normalized": True}),
)  # fmt: skip
OPS = {"mixup_info_nce": mixup_info_nce, "sigmoid_loss": sigmoid_loss}


def inputs(targets: str = "") -> dict[str, Any]:
    """Arguments with partners, or with ids where `targets` says what these are for."""
    generator = torch.Generator().manual_seed(4)
    names = ("query", "key", "query_other", "key_other")
    found: dict[str, Any] = {name: torch.randn(sum(SIZES), 16, generator=generator) for name in names}
    found["logit_scale"], found["mix"] = torch.tensor(5.0), torch.rand(sum(SIZES), generator=generator)
    found["logit_bias"] = torch.tensor(-2.0)
    found = {name: x.requires_grad_() for name, x in found.items()}
    if targets:
        ids = torch.randint(-1, 3, (2, sum(SIZES)), generator=generator)
        return found | {"query_ids": ids[0], "key_ids": ids[1]}
    partner = torch.randint(sum(SIZES), (sum(SIZES),), generator=generator)
    return found | {"partner": partner, "partner_weight": torch.rand(sum(SIZES), generator=generator)}


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [x for x in given.values() if x.requires_grad]


def part_of(x: Tensor, rank: int) -> Tensor:
    mine = x.split(SIZES)[rank] if x.ndim else x
    return mine.detach().clone().requires_grad_(x.requires_grad)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", f"file://{folder}/meet", rank=rank, world_size=len(SIZES))
    mode = "interpreter" if os.environ.get("TRITON_INTERPRET") == "1" else "emulate"
    results = {}
    with importlib.import_module(f"oner_fast.benchmarks.gpuless.{mode}").active():
        for number, (op, case) in enumerate(CASES):
            given = {argument: part_of(x, rank) for argument, x in inputs(case.get("same", "")).items()}
            loss = OPS[op](**given, **case, group=dist.group.WORLD, implementation="triton")
            results[number] = [loss.detach(), *torch.autograd.grad(loss, leaves(given))]
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def test_two_ranks_equal_one(device: str, tmp_path: Path) -> None:
    if device == "cuda":
        pytest.skip("two ranks with NCCL need two GPUs")
    done = subprocess.run(
        [sys.executable, __file__, str(tmp_path)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    ranks = [torch.load(tmp_path / f"{rank}.pt", weights_only=True) for rank in range(len(SIZES))]
    for number, (op, case) in enumerate(CASES):
        wide = {
            argument: x.detach().double().requires_grad_(x.requires_grad) if x.is_floating_point() else x
            for argument, x in inputs(case.get("same", "")).items()
        }
        exact = getattr(reference, op)(**wide, **case)
        for each in ranks:
            torch.testing.assert_close(each[number][0].double(), exact.detach(), rtol=TOLERANCE, atol=0)
        together = zip(*(each[number][1:] for each in ranks), strict=True)
        for parts, right in zip(together, torch.autograd.grad(exact, leaves(wide)), strict=True):
            mean = (torch.cat(parts) if right.ndim else torch.stack(parts).sum()).double() / len(SIZES)
            assert (mean - right).abs().max() <= TOLERANCE * right.abs().max() + 1e-12, (op, case)


def main(folder: str) -> None:
    forks = multiprocessing.get_context("fork")
    children = [forks.Process(target=run_rank, args=(rank, folder)) for rank in range(len(SIZES))]
    for child in children:
        child.start()
    for child in children:
        child.join(140)
    for child in children:
        child.kill()  # what hangs ends here
    sys.exit(any(child.exitcode != 0 for child in children))


if __name__ == "__main__":
    main(*sys.argv[1:])
