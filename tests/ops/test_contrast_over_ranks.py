"""mixup_info_nce over ranks, by gathered keys and by the ring of key blocks: both compute what one process does.

The ring overlaps its messages with work, and stays small. Gathered keys take few exchanges.
"""

from __future__ import annotations

import datetime
import functools
import itertools
import multiprocessing
import os
import random
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import profiler

from oner_fast import _extension
from oner_fast.ops import mixup_info_nce, rank_blocks, reference
from oner_fast.ops.rank_blocks import GATHER_BELOW, Block, Gathered, Part, Ring, ranks_of

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

WORLD = 4
FORMS = {"gathered": GATHER_BELOW, "ring": 0}  # bytes of keys up to which they are gathered
# Unequal parts of 9 rows: one rank, a rank with few rows, with none.
SHARES = {1: (9,), 2: (7, 2), 3: (4, 0, 5), 4: (1, 5, 0, 3)}
CASES: dict[str, dict[str, Any]] = {
    "plain": {},
    "rows only": {"symmetric": False},
    "mixed": {"others": ("query_other", "key_other"), "mix": "each"},
    "mixed keys, rows only": {"others": ("key_other",), "mix": "one", "symmetric": False},
    "partner": {"partner": "half", "others": ("query_other",), "mix": "one"},
    "partner, rows only": {"partner": "weighted", "symmetric": False},
    "positives": {"ids": "queries", "same": "positive", "others": ("key_other",), "mix": "each"},
    "positives of other keys": {"ids": "both", "same": "positive"},
    "positives, rows only": {"ids": "both", "same": "positive", "symmetric": False},
    "ignored": {"ids": "queries", "same": "ignore", "others": ("query_other", "key_other"), "mix": "each"},
    "ignored, rows only": {"ids": "both", "same": "ignore", "symmetric": False},
    "everything": {"partner": "weighted", "others": ("query_other", "key_other"), "mix": "each"},
}
KEYS_WANTED: tuple[tuple[int, ...], ...] = ((), (1,), (0, 1, 2))  # ranks of three
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
        found["mix"] = torch.rand(rows if chosen["mix"] == "each" else (), generator=generator, dtype=torch.float64)
    found["logit_scale"] = torch.tensor(5.0, dtype=torch.float64)
    found = {argument: x.requires_grad_() for argument, x in found.items()}
    if "partner" in chosen:
        found["partner"] = torch.randint(rows, (rows,), generator=generator)
    if chosen.get("partner") == "weighted":
        # Whole weights, and a partner that nobody shares, leave columns without any mass.
        weight = torch.rand(rows, generator=generator, dtype=torch.float64)
        found["partner_weight"] = torch.where(weight < 0.4, 1.0, weight)
    if "ids" in chosen:
        ids = torch.randint(-1, 3, (2, rows), generator=generator)
        found |= {"query_ids": ids[0], "same": chosen["same"]} | (
            {"key_ids": ids[1]} if chosen["ids"] == "both" else {}
        )
    return found | {"symmetric": chosen.get("symmetric", True)}


def close_keys(rows: int, width: int, spread: float) -> dict[str, Any]:
    """Keys that lie close together, far from the queries, as before training: gradients of blocks nearly cancel."""
    generator = torch.Generator().manual_seed(3)
    query, noise = (torch.randn(rows, width, generator=generator, dtype=torch.float64) for _ in range(2))
    middle = torch.randn(width, generator=generator, dtype=torch.float64)
    scale = torch.tensor(10.0, dtype=torch.float64)
    return {"query": query.requires_grad_(), "key": (middle + spread * noise).requires_grad_(), "logit_scale": scale}


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


def run(given: dict[str, Any], group: dist.ProcessGroup | None) -> list[Tensor]:
    """The loss and its gradients."""
    loss = mixup_info_nce(**given, group=group, implementation="cpp")
    return [loss.detach(), *torch.autograd.grad(loss, leaves(given))]


@contextmanager
def replaced(owner: Any, name: str, new: Callable[[Any], Any]) -> Iterator[None]:
    old = getattr(owner, name)
    setattr(owner, name, new(old))
    try:
        yield
    finally:
        setattr(owner, name, old)


@contextmanager
def noted(events: list[Any]) -> Iterator[None]:
    """Notes the order of messages (sent parts, received parts with their rows), work on blocks, and waits."""

    def post(old: Any) -> Any:
        def replacement(messages: list[dist.P2POp]) -> Any:
            sent, received = (
                [(Part(m.tag).name, m.tensor.shape[0]) for m in messages if m.op is way]
                for way in (dist.isend, dist.irecv)
            )
            events.append(("post", sent, received))
            return old(messages)

        return replacement

    def work(old: Any) -> Any:
        def replacement(ring: Ring, ahead: Any, behind: Any, work: Any, merge: Any) -> Any:
            def noting(block: Block, given: Any) -> Any:
                events.append(("work", block.first))
                return work(block, given)

            return old(ring, ahead, behind, noting, merge)

        return replacement

    def wait(old: Any) -> Any:
        return lambda posted: (events.append(("wait",)), old(posted))

    with (
        replaced(dist, "batch_isend_irecv", post),
        replaced(Ring, "pass_around", work),
        replaced(rank_blocks, "_wait", wait),
    ):
        yield


EXCHANGES = ("all_gather", "all_gather_into_tensor", "all_to_all_single", "all_reduce", "batch_isend_irecv")


@contextmanager
def exchanges(found: list[str]) -> Iterator[None]:
    """Note the name of each exchange of this rank with the others."""

    def noting(name: str) -> Callable[[Any], Any]:
        return lambda old: lambda *given, **options: (found.append(name), old(*given, **options))[1]

    with ExitStack() as stack:
        for name in EXCHANGES:
            stack.enter_context(replaced(dist, name, noting(name)))
        yield


def form(name: str) -> Any:
    """Let every call take one form."""
    return replaced(rank_blocks, "GATHER_BELOW", lambda _: FORMS[name])


def late(rank: int, seed: int) -> Any:
    """Messages that a rank begins after a while, another one each time."""
    delays = random.Random(10 * seed + rank)

    def delay(old: Any) -> Any:
        return lambda messages: (time.sleep(0.01 * delays.randrange(3)), old(messages))[1]

    return replaced(dist, "batch_isend_irecv", delay)


def peak_of(call: Callable[[], Any]) -> tuple[int, int]:
    """The most bytes that tensors and scratch held at a time beyond those before the call, and the largest of them."""
    call()
    with profiler.profile(profile_memory=True, use_kineto=True) as profile:
        result = call()
    del result
    events = [event for event in profile.kineto_results.events() if event.name() == "[memory]"]
    now = highest = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        now += event.nbytes()
        highest = max(highest, now)
    return highest, max(event.nbytes() for event in events)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=patience, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size)), timeout=patience) for size in SHARES}
    results: dict[str, Any] = {}
    for size, sizes in SHARES.items():
        if rank >= size:
            continue
        for name, chosen in itertools.product(CASES, FORMS):
            given = {argument: part_of(x, sizes, rank) for argument, x in inputs(name).items()}
            with form(chosen):
                results[f"{chosen} {size} {name}"] = run(given, groups[size])
    ids = torch.zeros(2, dtype=torch.int64)
    for options in (
        ({"query_ids": ids}, {}),
        ({"query_ids": ids, "same": "ignore"}, {"query_ids": ids, "same": "positive"}),
    ):
        if rank < 2:
            with pytest.raises(ValueError, match=r"every rank must pass query_ids.*'\w+' on rank 0.* on rank 1"):
                mixup_info_nce(torch.ones(2, 3), torch.ones(2, 3), 1.0, **options[rank], group=groups[2])
    for spread in (0.1, 1.0):
        for (name, dtype), chosen in itertools.product(DTYPES.items(), FORMS):
            whole = close_keys(sum(SIZES), 40, spread)
            given = {argument: part_of(x, SIZES, rank, dtype) for argument, x in whole.items()}
            with form(chosen):
                results[f"{chosen} {spread} {name}"] = run(given, groups[WORLD])
    for size in (2, 3, 4):
        if rank < size:
            given = {argument: part_of(x, (3,) * size, rank) for argument, x in inputs("plain", 12).items()}
            seen: list[str] = []
            with exchanges(seen):
                run(given, groups[size])
            results[f"exchanges {size}"] = seen
    with form("ring"):
        run_ring(rank, groups, results)
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_ring(rank: int, groups: dict[int, Any], results: dict[str, Any]) -> None:
    """Add what is asked of the ring alone."""
    for size in (2, 3, 4):
        if rank < size:
            given = {argument: part_of(x, (256,) * size, rank) for argument, x in inputs("partner", 1024, 64).items()}
            given["partner"] %= 256 * size
            for dtype in (torch.float32, torch.bfloat16):
                narrow = {name: part_of(x, (256,), 0, dtype) for name, x in given.items()}
                results[f"memory {size} {dtype}"] = peak_of(functools.partial(run, narrow, groups[size]))
    whole = inputs("everything")
    if rank < 3:
        sizes = (2, 3, 4)
        for wanted in KEYS_WANTED:
            given = {argument: part_of(x, sizes, rank) for argument, x in inputs("plain").items()}
            given["key"].requires_grad_(rank in wanted)
            events: list[Any] = []
            with noted(events):
                results[f"keys of {wanted}"] = run(given, groups[3])
            results[f"events of {wanted}"] = events
    for seed in range(3):
        given = {argument: part_of(x, SHARES[WORLD], rank, torch.float32) for argument, x in whole.items()}
        with late(rank, seed):
            results[f"late {seed}"] = run(given, groups[WORLD])


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


@pytest.mark.parametrize("chosen", list(FORMS))
@pytest.mark.parametrize("size", list(SHARES))
@pytest.mark.parametrize("name", list(CASES))
def test_several_processes_agree_with_one(ranks: list[dict[str, Any]], chosen: str, size: int, name: str) -> None:
    given = inputs(name)
    exact = reference.mixup_info_nce(**given)
    found = [each[f"{chosen} {size} {name}"] for each in ranks[:size]]
    for loss, *_ in found:
        torch.testing.assert_close(loss, exact.detach(), rtol=1e-10, atol=0)
    for one, other in zip(mean_over_ranks(found), torch.autograd.grad(exact, leaves(given)), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


def plain(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
    """The obvious PyTorch code, in the inputs' dtype."""
    logits = logit_scale * F.normalize(query, dim=-1) @ F.normalize(key, dim=-1).T
    target = torch.arange(logits.shape[0])
    return (F.cross_entropy(logits, target) + F.cross_entropy(logits.T, target)) / 2


@pytest.mark.parametrize("chosen", list(FORMS))
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("spread", [0.1, 1.0])
def test_error_against_float64_is_near_that_of_plain_pytorch(
    ranks: list[dict[str, Any]], chosen: str, spread: float, dtype: str
) -> None:
    """Blocks whose gradients nearly cancel included: each is rounded to the inputs' dtype, and their sum is float32."""
    wide = close_keys(sum(SIZES), 40, spread)
    narrow = {name: x.detach().to(DTYPES[dtype]).requires_grad_(x.requires_grad) for name, x in wide.items()}
    wide = {name: x.detach().double().requires_grad_(x.requires_grad) for name, x in narrow.items()}
    exact, theirs = plain(**wide), plain(**narrow)
    found = [each[f"{chosen} {spread} {dtype}"] for each in ranks]
    bound = 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * (1 + abs(exact))
    assert all(abs(loss.double() - exact) <= bound for loss, *_ in found)
    rights, plains = torch.autograd.grad(exact, leaves(wide)), torch.autograd.grad(theirs, leaves(narrow))
    for one, other, right in zip(mean_over_ranks(found), plains, rights, strict=True):
        unit = torch.finfo(DTYPES[dtype]).eps * right.abs().max()
        assert (one.double() - right).abs().max() <= 3 * (other.double() - right).abs().max() + unit


def test_keys_are_gathered_up_to_a_number_of_bytes() -> None:
    group: Any = None
    rows = GATHER_BELOW // 1024 // 2
    assert isinstance(ranks_of((rows, rows), group, 1024), Gathered)
    assert isinstance(ranks_of((rows, rows + 1), group, 1024), Ring)
    assert isinstance(ranks_of((rows,), group, 1024), Ring)  # alone, a rank sends nothing


def test_gathered_keys_take_as_few_exchanges_for_any_number_of_ranks(ranks: list[dict[str, Any]]) -> None:
    """Sizes; keys and statistics of columns; the loss; keys and numbers of columns, and gradients of keys."""
    forward = ["all_gather", "all_gather_into_tensor", "all_to_all_single", "all_reduce"]
    backward = ["all_gather_into_tensor", "all_gather_into_tensor", "all_to_all_single"]
    for size in (2, 3, 4):
        assert all(each[f"exchanges {size}"] == forward + backward for each in ranks[:size])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_of_the_ring_does_not_grow_with_the_ranks(ranks: list[dict[str, Any]], dtype: torch.dtype) -> None:
    """With as many rows each: two ranks have not all of it in flight, three do, four need no more; nor is any tensor
    larger than a block in float32, or else than the scratch of the op."""
    two, three, four = ([each.get(f"memory {size} {dtype}") for each in ranks[:size]] for size in (2, 3, 4))
    slack = 1024  # of objects a step
    assert max(peak for peak, _ in two) <= max(peak for peak, _ in three) + slack
    assert max(peak for peak, _ in four) <= max(peak for peak, _ in three) + slack
    assert {largest for _, largest in four} == {largest for _, largest in two}


@pytest.mark.parametrize("wanted", KEYS_WANTED)
def test_the_next_block_is_sent_while_this_one_is_computed(
    ranks: list[dict[str, Any]], wanted: tuple[int, ...]
) -> None:
    """Every exchange: what leaves and what arrives, begun before the work of its step and waited for after it."""
    sizes = (2, 3, 4)
    for rank, each in enumerate(ranks[:3]):
        events = each[f"events of {wanted}"]

        def block(step: int, rank: int = rank) -> int:
            return sizes[(rank - step) % 3]

        expected: list[Any] = []
        for ahead, behind in (["KEYS"], ["COLUMNS"]), (["KEYS", "COLUMNS"], ["GRADIENTS"] if wanted else []):
            for step in range(3):
                following, found = ahead if step < 2 else [], behind if step > 0 else []
                sent = [(part, block(step)) for part in following] + [(part, block(step - 1)) for part in found]
                received = [(part, block(step + 1)) for part in following] + [(part, block(step)) for part in found]
                expected += [("post", sent, received)] if sent else []
                expected += [("work", sum(sizes[: (rank - step) % 3])), ("wait",)]
            if behind:
                expected.append(("post", [(part, block(2)) for part in behind], [(part, block(0)) for part in behind]))
            expected.append(("wait",))
        assert events == expected


@pytest.mark.parametrize("wanted", KEYS_WANTED)
def test_gradients_of_keys_return_to_their_rank_where_one_rank_wants_them(
    ranks: list[dict[str, Any]], wanted: tuple[int, ...]
) -> None:
    given = inputs("plain")
    query, key, scale = torch.autograd.grad(reference.mixup_info_nce(**given), leaves(given))
    start = 0
    for rank, rows in enumerate((2, 3, 4)):
        _, to_query, *to_key, _ = ranks[rank][f"keys of {wanted}"]
        mine = slice(start, start + rows)
        torch.testing.assert_close(to_query / 3, query[mine], rtol=1e-10, atol=1e-12)
        assert len(to_key) == (rank in wanted)
        for one in to_key:
            torch.testing.assert_close(one / 3, key[mine], rtol=1e-10, atol=1e-12)
        start += rows
    found = torch.stack([each[f"keys of {wanted}"][-1] for each in ranks[:3]]).mean()
    torch.testing.assert_close(found, scale, rtol=1e-10, atol=1e-12)


def test_the_same_bits_in_any_order_of_arrival(ranks: list[dict[str, Any]]) -> None:
    for each in ranks:
        for seed in (1, 2):
            assert all(torch.equal(a, b) for a, b in zip(each["late 0"], each[f"late {seed}"], strict=True))
    assert all(torch.equal(each["late 0"][0], ranks[0]["late 0"][0]) for each in ranks)


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
