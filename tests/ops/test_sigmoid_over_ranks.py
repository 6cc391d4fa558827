"""sigmoid_loss over ranks: one process with N rows equals k processes with N/k, in loss and gradients.

Both by gathered keys and by the ring of key blocks.
"""

from __future__ import annotations

import datetime
import itertools
import multiprocessing
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from oner_fast.ops import rank_blocks, reference, sigmoid_loss
from oner_fast.ops.implementations import implementations
from oner_fast.ops.rank_blocks import GATHER_BELOW, Part

EVERY = [name for name, one in implementations("sigmoid_loss").items() if not one.reasons_against("cpu")]
COMPUTED = [name for name in EVERY if name != "reference"]
WORLD = 4
FORMS = {"gathered": GATHER_BELOW, "ring": 0}  # bytes of keys up to which they are gathered
# Unequal parts of 9 rows: one rank, a rank with few rows, with none.
SHARES = {1: (9,), 2: (7, 2), 3: (4, 0, 5), 4: (1, 5, 0, 3)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "mixed": {"others": ("query_other", "key_other"), "mix": True},
    "mixed keys, normalized": {"others": ("key_other",), "normalized": True},
    "partner": {"others": ("query_other",), "partner": True},
    "positives": {"ids": 2, "same": "positive", "others": ("key_other",), "mix": True},
    "ignored": {"ids": 1, "same": "ignore"},
}
SIZES = (60, 5, 41, 22)  # for float32 and half types
DTYPES = {str(dtype): dtype for dtype in (torch.float32, torch.float16, torch.bfloat16)}


def inputs(name: str, rows: int = 9, width: int = 4) -> dict[str, Any]:
    """Arguments of a call in float64; all that can ask for a gradient do."""
    generator = torch.Generator().manual_seed(rows + width)
    chosen = CASES[name]

    def numbers(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    found: dict[str, Any] = {"query": numbers(rows, width), "key": numbers(width, rows).t()}  # keys of columns
    found |= {other: numbers(rows, width) for other in chosen.get("others", ())}
    if "mix" in chosen:
        found["mix"] = torch.rand(rows, generator=generator, dtype=torch.float64)
    found |= {"logit_scale": torch.tensor(5.0).double(), "logit_bias": torch.tensor(-2.0).double()}
    found = {argument: x.requires_grad_() for argument, x in found.items()}
    if "partner" in chosen:
        found["partner"] = torch.randint(rows, (rows,), generator=generator)
        found["partner_weight"] = torch.rand(rows, generator=generator, dtype=torch.float64)
    if "ids" in chosen:
        ids = torch.randint(-1, 3, (2, rows), generator=generator)
        found |= {"query_ids": ids[0], "same": chosen["same"]} | ({"key_ids": ids[1]} if chosen["ids"] == 2 else {})
    return found | ({"normalized": True} if "normalized" in chosen else {})


def large() -> dict[str, Any]:
    found = inputs("plain", sum(SIZES), 40)
    return found | {"logit_scale": torch.tensor(10.0).requires_grad_()}


def part_of(value: Any, sizes: tuple[int, ...], rank: int, dtype: torch.dtype | None = None) -> Any:
    """A rank's rows, as a leaf and strided as before; what has no rows is every rank's own copy."""
    if not isinstance(value, Tensor):
        return value
    start = sum(sizes[:rank])
    mine = (value[start : start + sizes[rank]] if value.ndim else value).detach().clone()
    mine = mine.to(dtype) if dtype is not None and mine.is_floating_point() else mine
    return mine.requires_grad_(value.requires_grad)


def leaves(given: dict[str, Any]) -> list[Tensor]:
    return [x for x in given.values() if isinstance(x, Tensor) and x.requires_grad]


def run(given: dict[str, Any], group: dist.ProcessGroup | None, implementation: str) -> list[Tensor]:
    """The loss and its gradients."""
    loss = sigmoid_loss(**given, group=group, implementation=implementation)
    return [loss.detach(), *torch.autograd.grad(loss, leaves(given))]


def messages_of(call: Any) -> list[tuple[str, int]]:
    """The parts that this rank sends during a call, and how many bytes each has."""
    sent: list[tuple[str, int]] = []
    post = dist.batch_isend_irecv

    def noting(messages: list[dist.P2POp]) -> Any:
        sent.extend((Part(m.tag).name, m.tensor.nbytes) for m in messages if m.op is dist.isend)
        return post(messages)

    dist.batch_isend_irecv = noting
    try:
        call()
    finally:
        dist.batch_isend_irecv = post
    return sent


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=patience, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size)), timeout=patience) for size in SHARES}
    results: dict[str, Any] = {}
    for size, sizes in SHARES.items():
        if rank >= size:
            continue
        for implementation, name, form in itertools.product(EVERY, CASES, FORMS):
            rank_blocks.GATHER_BELOW = FORMS[form]
            given = {argument: part_of(x, sizes, rank) for argument, x in inputs(name).items()}
            results[f"{form} {implementation} {size} {name}"] = run(given, groups[size], implementation)
    if rank < 2:
        ids = torch.zeros(2, dtype=torch.int64)
        options = ({"query_ids": ids}, {})[rank]
        with pytest.raises(ValueError, match=r"sigmoid_loss: every rank must pass query_ids.*'\w+' on rank 0.*no ids"):
            sigmoid_loss(torch.ones(2, 3), torch.ones(2, 3), 1.0, **options, group=groups[2])
    for implementation, (name, dtype), form in itertools.product(COMPUTED, DTYPES.items(), FORMS):
        rank_blocks.GATHER_BELOW = FORMS[form]
        given = {argument: part_of(x, SIZES, rank, dtype) for argument, x in large().items()}
        results[f"{form} {implementation} {name}"] = run(given, groups[WORLD], implementation)
    rank_blocks.GATHER_BELOW = FORMS["ring"]
    given = {argument: part_of(x, (8,) * 4, rank) for argument, x in inputs("plain", 32, 16).items()}
    loss: list[Tensor] = []
    results["sent forward"] = messages_of(lambda: loss.append(sigmoid_loss(**given, group=groups[4])))
    results["sent backward"] = messages_of(lambda: loss[0].backward())
    given["key"] = given["key"].detach()
    results["sent backward, keys fixed"] = messages_of(lambda: sigmoid_loss(**given, group=groups[4]).backward())
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of four processes for all cases of these tests."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    # This file as a program, which imports once and forks: pytest has threads by now.
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


def mean_over_ranks(found: list[list[Tensor]]) -> list[Tensor]:
    """The mean over ranks of the gradients, as DDP computes it."""
    together = zip(*(gradients for _, *gradients in found), strict=True)
    return [(torch.cat(parts) if parts[0].ndim else torch.stack(parts).sum()) / len(found) for parts in together]


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("size", list(SHARES))
@pytest.mark.parametrize("name", list(CASES))
def test_several_processes_agree_with_one(
    ranks: list[dict[str, Any]], form: str, implementation: str, size: int, name: str
) -> None:
    given = inputs(name)
    exact = reference.sigmoid_loss(**given)
    found = [each[f"{form} {implementation} {size} {name}"] for each in ranks[:size]]
    for loss, *_ in found:
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-12, atol=0)
    for one, other in zip(mean_over_ranks(found), torch.autograd.grad(exact, leaves(given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def plain(query: Tensor, key: Tensor, logit_scale: Tensor, logit_bias: Tensor) -> Tensor:
    """The obvious PyTorch code, in the inputs' dtype."""
    logits = logit_scale * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T + logit_bias
    return -F.logsigmoid((2 * torch.eye(len(query), dtype=logits.dtype) - 1) * logits).sum() / len(query)


@pytest.mark.parametrize("form", list(FORMS))
@pytest.mark.parametrize("implementation", COMPUTED)
@pytest.mark.parametrize("dtype", list(DTYPES))
def test_error_against_float64_is_near_that_of_plain_pytorch(
    ranks: list[dict[str, Any]], form: str, implementation: str, dtype: str
) -> None:
    """The parts of a gradient are rounded to the inputs' dtype by blocks, and their sum is float32."""
    narrow = {name: x.detach().to(DTYPES[dtype]).requires_grad_() for name, x in large().items()}
    wide = {name: x.detach().double().requires_grad_() for name, x in narrow.items()}
    exact, theirs = plain(**wide), plain(**narrow)
    found = [each[f"{form} {implementation} {dtype}"] for each in ranks]
    bound = 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * (1 + abs(exact))
    assert all(abs(loss.double() - exact) <= bound for loss, *_ in found)
    rights, plains = torch.autograd.grad(exact, leaves(wide)), torch.autograd.grad(theirs, leaves(narrow))
    for one, other, right in zip(mean_over_ranks(found), plains, rights, strict=True):
        unit = torch.finfo(DTYPES[dtype]).eps * right.abs().max() * (1 if right.ndim else 4)
        assert (one.double() - right).abs().max() <= 3 * (other.double() - right).abs().max() + unit


def test_a_ring_sends_keys_alone_forward_and_their_gradients_back_where_wanted(ranks: list[dict[str, Any]]) -> None:
    block = 8 * 16 * 8  # float64
    for each in ranks:
        assert each["sent forward"] == [("KEYS", block)] * 3
        assert sorted(each["sent backward"]) == [("GRADIENTS", block)] * 4 + [("KEYS", block)] * 3
        assert each["sent backward, keys fixed"] == [("KEYS", block)] * 6


def main(folder: str) -> None:
    forks = multiprocessing.get_context("fork")
    children = [forks.Process(target=run_rank, args=(rank, folder), daemon=True) for rank in range(WORLD)]
    for child in children:
        child.start()
    deadline = time.monotonic() + 240
    for child in children:
        child.join(max(deadline - time.monotonic(), 0))
    for child in children:
        child.kill()  # what hangs ends here
    sys.exit(any(child.exitcode != 0 for child in children))


if __name__ == "__main__":
    main(sys.argv[1])
