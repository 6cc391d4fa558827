"""open_clip's losses by our ops over 2 and 3 ranks: the value and every gradient of every rank, for every flag."""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from oner_fast.models.optional_packages import optional_package

if find_spec("open_clip") is None:
    pytest.skip("needs open_clip (pip install $(oner-fast requirements clip))", allow_module_level=True)

from oner_fast.integrations import open_clip as ours

WORLDS = (2, 3)
FLAGS = [
    dict(zip(("local_loss", "gather_with_grad"), x, strict=True)) for x in itertools.product((False, True), repeat=2)
]
CASES: dict[str, tuple[str, dict[str, Any]]] = {
    f"{name} {flags}": (name, flags) for name in ("ClipLoss", "CoCaLoss", "DistillClipLoss") for flags in FLAGS
} | {f"SigLipLoss {how}": ("SigLipLoss", {"dist_impl": how}) for how in ("bidir", "shift", "reduce", "gather")}


def call(name: str, rank: int, dtype: torch.dtype = torch.float64) -> tuple[dict[str, Any], dict[str, Any]]:
    """A rank's arguments of a loss and of its forward."""
    generator = torch.Generator().manual_seed(rank)

    def rows(width: int, gradient: bool = True) -> Tensor:
        x = torch.randn(4, width, generator=generator, dtype=torch.float64)
        return torch.nn.functional.normalize(x, dim=1).to(dtype).requires_grad_(gradient)

    def number(value: float) -> Tensor:
        return torch.tensor(value, dtype=dtype, requires_grad=True)

    given = {"image_features": rows(6), "text_features": rows(6), "logit_scale": number(9.0)}
    if name == "SigLipLoss":
        given["logit_bias"] = number(-3.0)
    if name == "CoCaLoss":
        given |= {
            "logits": rows(5).unsqueeze(1).expand(4, 3, 5),
            "labels": torch.randint(5, (4, 3), generator=generator),
        }
        return {"caption_loss_weight": 2.0, "clip_loss_weight": 0.5}, given
    if name == "DistillClipLoss":
        given |= {"dist_image_features": rows(7, False), "dist_text_features": rows(7, False)}
        given["dist_logit_scale"] = torch.tensor(20.0, dtype=dtype)
    return {}, given


def value_and_gradients(loss: Any, given: dict[str, Any]) -> list[Tensor]:
    found = loss(**given)
    parts = list(found) if isinstance(found, tuple) else [found]
    leaves = [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]
    return [*(x.detach() for x in parts), *torch.autograd.grad(0.7 * sum(parts), leaves)]


def train(rank: int, world: int, loss: Any) -> list[float]:
    """Train a tiny CLIP under DistributedDataParallel for a few steps: the losses."""
    torch.manual_seed(0)
    model = optional_package("open_clip").CLIP(
        16, {"layers": 1, "width": 32, "head_width": 16, "patch_size": 16, "image_size": 32, "patch_dropout": 0.5},
        {"context_length": 6, "vocab_size": 50, "width": 32, "heads": 2, "layers": 1},
    )  # fmt: skip
    model = torch.nn.parallel.DistributedDataParallel(model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
    torch.manual_seed(rank)
    losses = []
    for _ in range(4):
        total = loss(*model(torch.randn(4, 3, 32, 32), torch.randint(1, 49, (4, 6))))
        optimizer.zero_grad()
        total.backward()
        optimizer.step()
        losses.append(total.item())
    return losses


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    theirs = optional_package("open_clip").loss
    results: dict[str, Any] = {}
    for world in WORLDS:
        if rank >= world:
            continue
        patience = datetime.timedelta(seconds=90)
        dist.init_process_group("gloo", f"file://{folder}/{world}", timeout=patience, rank=rank, world_size=world)
        ranks = {"rank": rank, "world_size": world}
        for case, (name, flags) in CASES.items():
            options, given = call(name, rank)
            right, found = (
                value_and_gradients(getattr(module, name)(**options, **flags, **ranks), given)
                for module in (theirs, ours)
            )
            results[f"{world} {case}"] = right, found
        if world == 2:
            for flags in FLAGS:
                own = train(rank, world, theirs.ClipLoss(**flags, **ranks))
                with ours.patch():
                    results[f"training {flags}"] = own, train(rank, world, theirs.ClipLoss(**flags, **ranks))
            with ours.patch(), pytest.warns(UserWarning, match="rank 0 of 3 was given, and the process group says"):
                options, given = call("ClipLoss", rank)
                with pytest.raises((ValueError, RuntimeError)):
                    theirs.ClipLoss(rank=0, world_size=3)(**given)
        dist.barrier()
        dist.destroy_process_group()
    torch.save(results, f"{folder}/{rank}.pt")


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of open_clip and ours in three processes, for all cases."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    # This file as a program, which imports once and forks: pytest has threads by now.
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=400,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(max(WORLDS))]


@pytest.mark.parametrize("world", WORLDS)
@pytest.mark.parametrize("case", list(CASES))
def test_value_and_gradients_of_every_rank(ranks: list[dict[str, Any]], world: int, case: str) -> None:
    for each in ranks[:world]:
        right, found = each[f"{world} {case}"]
        assert any(x.any() for x in right[1:])
        for one, two in zip(found, right, strict=True):
            torch.testing.assert_close(one, two, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("flags", FLAGS, ids=str)
def test_training_under_ddp_gives_the_same_losses(ranks: list[dict[str, Any]], flags: dict[str, bool]) -> None:
    for each in ranks[:2]:
        right, found = each[f"training {flags}"]
        assert found == pytest.approx(right, rel=2e-5) and len(set(right)) == 4


def main(folder: str) -> None:
    forks = multiprocessing.get_context("fork")
    children = [forks.Process(target=run_rank, args=(rank, folder), daemon=True) for rank in range(max(WORLDS))]
    for child in children:
        child.start()
    deadline = time.monotonic() + 300
    for child in children:
        child.join(max(deadline - time.monotonic(), 0))
    for child in children:
        child.kill()  # what hangs ends here
    sys.exit(any(child.exitcode != 0 for child in children))


if __name__ == "__main__":
    main(sys.argv[1])
