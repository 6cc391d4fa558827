"""Attention within short sequences: the kernels of csrc/cuda against float64, and what they count."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate, pairwise
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from oner_fast.benchmarks.gpuless.architectures import shared_block_limit

DTYPES = [torch.float16, torch.bfloat16]
RAGGED = [40, 5, 0, 99, 17, 33]  # tiles of 32 and 16 rows, several heads side by side, and an empty sequence
CROSS = ([10, 33, 0, 5, 50, 64], [40, 3, 7, 0, 50, 20])  # queries without keys, and keys without queries


class Inputs(NamedTuple):
    """Packed tensors of one call, with int32 boundaries and the longest length."""

    query: Tensor
    key: Tensor
    value: Tensor
    starts_q: Tensor
    starts_k: Tensor
    longest: int


def boundaries(lengths: Sequence[int]) -> Tensor:
    return torch.tensor(list(accumulate(lengths, initial=0)), dtype=torch.int32)


def inputs(
    lengths: Sequence[int], heads: int, width: int, dtype: torch.dtype, keys: Sequence[int] | None = None,
    *, seed: int = 0, longest: int | None = None,
) -> Inputs:  # fmt: skip
    """Random rows; query, key and value are views of one tensor where a sequence attends to itself."""
    generator = torch.Generator().manual_seed(seed)
    starts = boundaries(lengths)
    longest = longest or max([1, *lengths, *(keys or [])])
    if keys is None:
        packed = torch.randn(sum(lengths), 3, heads, width, generator=generator).to(dtype)
        return Inputs(*packed.unbind(1), starts, starts, longest)
    query = torch.randn(sum(lengths), heads, width, generator=generator).to(dtype)
    packed = torch.randn(sum(keys), 2, heads, width, generator=generator).to(dtype)
    return Inputs(query, *packed.unbind(1), starts, boundaries(keys), longest)


def described(x: Inputs, causal: bool, scale: float | None) -> dict[str, Any]:
    """The fields that forward and backward share."""
    heads, width = x.query.shape[1:]
    strides = {
        f"{name}_{axis}": tensor.stride(i)
        for name, tensor in (("query", x.query), ("key", x.key), ("value", x.value))
        for i, axis in enumerate(("row", "head"))
    }
    return dict(
        query=x.query, key=x.key, value=x.value, starts_q=x.starts_q, starts_k=x.starts_k,
        scale=width**-0.5 if scale is None else scale, sequences=len(x.starts_q) - 1, queries=len(x.query),
        keys=len(x.key), heads=heads, head_dim=width, longest=x.longest, causal=int(causal), number=_number(x.query),
        **strides,
    )  # fmt: skip


def _number(x: Tensor) -> int:
    return {torch.float16: 2, torch.bfloat16: 3}[x.dtype]


def table(lib: Any, x: Inputs, **settings: Any) -> Tensor:
    heads, sequences = x.query.shape[1], len(x.starts_q) - 1
    made = lib.poison(2 + 2 * sequences * heads, dtype=torch.int32)
    lib.call("short_attention_table", dict(
        starts_q=x.starts_q, starts_k=x.starts_k, table=made, sequences=sequences, queries=len(x.query),
        keys=len(x.key), heads=heads, longest=x.longest,
    ), **settings)  # fmt: skip
    return made


def forward(
    lib: Any, x: Inputs, causal: bool = False, scale: float | None = None, tasks: Tensor | None = None, **settings: Any
) -> tuple[Tensor, Tensor]:
    """The result and its statistics."""
    tasks = table(lib, x) if tasks is None else tasks
    out = lib.poison(*x.query.shape, dtype=x.query.dtype)
    statistics = lib.poison(2, *x.query.shape[:2], dtype=torch.float32)
    fields = described(x, causal, scale) | dict(out=out, statistics=statistics, table=tasks)
    lib.call("short_attention", fields, **settings)
    return out, statistics


def backward(
    lib: Any, grad: Tensor, x: Inputs, out: Tensor, statistics: Tensor, tasks: Tensor, causal: bool = False,
    scale: float | None = None, needed: str = "qk", **settings: Any,
) -> list[Tensor]:  # fmt: skip
    """The gradients of query, key and value; the first or the others are left alone unless they are needed."""
    found = [lib.poison(*each.shape, dtype=each.dtype) for each in x[:3]]
    asked = dict(zip(("to_query", "to_key", "to_value"), found, strict=True))
    asked = {name: to for name, to in asked.items() if ("q" if name == "to_query" else "k") in needed}
    strides = {
        f"{name}_{axis}": tensor.stride(i)
        for name, tensor in (("grad", grad), ("out", out)) for i, axis in enumerate(("row", "head"))
    }  # fmt: skip
    fields = described(x, causal, scale) | strides | asked
    lib.call(
        "short_attention_backward", fields | dict(grad=grad, out=out, statistics=statistics, table=tasks), **settings
    )
    return found


class Exact(NamedTuple):
    """In float64: the result, log2 of the sum of 2^score (-inf without keys), and gradients of query, key, value."""

    out: Tensor
    log_sum: Tensor
    gradients: tuple[Tensor, ...]


def exact(x: Inputs, grad: Tensor, causal: bool = False, scale: float | None = None) -> Exact:
    leaves = tuple(each.double().requires_grad_() for each in x[:3])
    query, key, value = leaves
    by = query.shape[2] ** -0.5 if scale is None else scale
    out, log_sums = [], []
    for (q0, q1), (k0, k1) in zip(pairwise(x.starts_q.tolist()), pairwise(x.starts_k.tolist()), strict=True):
        scores = by * torch.einsum("qhd,khd->hqk", query[q0:q1], key[k0:k1])
        if causal:
            unseen = torch.ones(q1 - q0, k1 - k0, dtype=torch.bool).triu(k1 - k0 - (q1 - q0) + 1)
            scores = scores.masked_fill(unseen, -torch.inf)
        blind = scores.isneginf().all(2, keepdim=True)
        weights = scores.masked_fill(blind, 0.0).softmax(2).masked_fill(blind, 0.0)
        out.append(torch.einsum("hqk,khd->qhd", weights, value[k0:k1]))
        log_sums.append(scores.logsumexp(2).T / torch.log(torch.tensor(2.0)))
    result = torch.cat(out)
    return Exact(result.detach(), torch.cat(log_sums).detach(), torch.autograd.grad(result, leaves, grad.double()))


def tasks_of(made: Tensor) -> list[tuple[int, int, int]]:
    """Sequence, first head and number of heads of each task."""
    entries = made[2 : 2 + 2 * int(made[0])].view(-1, 2).tolist()
    return [(sequence, heads >> 16, heads & 65535) for sequence, heads in entries]


def check_forward(found: tuple[Tensor, Tensor], expected: Exact) -> None:
    out, statistics = found
    seen = ~expected.log_sum.isneginf()
    # Weights are rounded to the dtype before the product with the values, and the result after it.
    tolerance = 2 * torch.finfo(out.dtype).eps
    torch.testing.assert_close(out.double(), expected.out, rtol=tolerance, atol=tolerance)
    log_sum = statistics[0].double() - statistics[1].double().log2()
    torch.testing.assert_close(log_sum[seen], expected.log_sum[seen], rtol=1e-6, atol=2e-6)
    assert out[~seen].eq(0).all() and statistics[:, ~seen].eq(0).all()


def blank(x: Inputs) -> Tensor:
    return torch.zeros(x.query.shape, dtype=x.query.dtype)


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_forward(library: Any, dtype: torch.dtype, causal: bool) -> None:
    lib, x = library("short_attention"), inputs(RAGGED, 3, 64, dtype)
    first = forward(lib, x, causal, seed=1, shuffle=1)
    check_forward(first, exact(x, blank(x), causal))
    again = forward(lib, x, causal, seed=2, shuffle=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_forward_with_other_keys(library: Any, causal: bool) -> None:
    x = inputs(CROSS[0], 2, 64, torch.bfloat16, CROSS[1])
    check_forward(forward(library("short_attention"), x, causal), exact(x, blank(x), causal))


def test_forward_of_narrow_heads(library: Any) -> None:
    x = inputs([40, 70], 3, 32, torch.bfloat16)
    check_forward(forward(library("short_attention"), x), exact(x, blank(x)))


def test_forward_at_scores_of_any_size(library: Any) -> None:
    """The largest score is subtracted, and weights of 0 add nothing."""
    x = inputs([33], 1, 64, torch.bfloat16)
    for scale in (30.0, 1e-6):
        check_forward(forward(library("short_attention"), x, scale=scale), exact(x, blank(x), scale=scale))


def test_a_value_that_is_no_number_stays_in_its_sequence_and_head(library: Any) -> None:
    x = inputs([20, 20], 2, 64, torch.bfloat16)
    x.value[25, 1, 3] = float("nan")
    out, _ = forward(library("short_attention"), x)
    assert out[20:, 1, 3].isnan().all() and out.isnan().sum() == 20


def test_a_wrong_bound_spoils_the_sequence_alone(library: Any) -> None:
    x = inputs([20, 50, 7], 2, 64, torch.bfloat16, longest=40)
    out, _ = forward(library("short_attention"), x)
    assert out[20:70].isnan().all() and out[:20].isfinite().all() and out[70:].isfinite().all()


@pytest.mark.parametrize(
    ("lengths", "keys", "heads", "longest"),
    [
        ([197, 40, 237, 12, 0, 12, 8, 256], None, 12, 256),
        ([197, 197, 30], None, 12, 197),
        ([8, 40, 33, 1], None, 12, 40),
        ([10, 20], [200, 0], 5, 200),
        (list(range(257)) * 4, None, 3, 256),
        ([0, 0], None, 4, 1),
    ],
)
def test_the_table_has_every_head_once_and_the_longest_first(
    library: Any, lengths: list[int], keys: list[int] | None, heads: int, longest: int
) -> None:
    x = inputs(lengths, heads, 8, torch.bfloat16, keys, longest=longest)
    tasks = tasks_of(table(library("short_attention"), x))
    longer = [max(pair) for pair in zip(lengths, keys or lengths, strict=True)]
    covered = sorted((sequence, first + i) for sequence, first, count in tasks for i in range(count))
    assert covered == [(i, head) for i, length in enumerate(longer) if length for head in range(heads)]
    assert all(longer[a[0]] >= longer[b[0]] for a, b in pairwise(tasks))
    rows = max(-(-longest // 16) * 16, 128)
    for sequence, _, count in tasks:
        assert count == 1 or count * -(-longer[sequence] // 16) * 16 <= rows
        assert count * -(-longer[sequence] // 32) <= -(-rows // 32)


def test_a_table_of_other_lengths_spoils_what_does_not_fit(library: Any) -> None:
    """Six heads of sequence 0 do not fit; the others have few tasks more than they need."""
    lib, x = library("short_attention"), inputs([40, 5, 17], 6, 64, torch.bfloat16)
    other = table(lib, inputs([5, 17, 40], 6, 64, torch.bfloat16))
    found = forward(lib, x, tasks=other)[0]
    assert found[:40].isnan().all() and torch.equal(found[40:], forward(lib, x)[0][40:])


def test_blocks_take_tasks_in_turn(library: Any) -> None:
    lib, x = library("short_attention"), inputs([33, 40, 12], 4, 64, torch.bfloat16)
    expected = forward(lib, x)
    lib.library.oner_fast_test_multiprocessors(2)
    try:
        found = forward(lib, x)
    finally:
        lib.library.oner_fast_test_multiprocessors(108)
    assert lib.log[0].grid[0] == 2 and all(torch.equal(a, b) for a, b in zip(found, expected, strict=True))


def flops(lengths: Sequence[int], heads: int, width: int, products: int) -> int:
    return sum(2 * products * length**2 * heads * width for length in lengths)


def check_memory(stats: Any, ideal: int) -> None:
    """No bank conflict, and at most 5 % more bytes than the tensors have."""
    for kind, access in stats.memory.items():
        if kind.startswith("shared"):
            assert access.wavefronts == access.ideal_wavefronts, kind
    assert stats.unique_read_bytes + stats.unique_write_bytes <= 1.05 * ideal


def test_counted_bytes_flops_and_conflicts(library: Any) -> None:
    lib, lengths, heads = library("short_attention"), [197, 40, 237], 1
    x = inputs(lengths, heads, 64, torch.bfloat16)
    forward(lib, x)
    assert lib.log[0].tensor_flops <= 1.05 * flops(lengths, heads, 64, 2)
    check_memory(lib.log[0], sum(lengths) * heads * (4 * 128 + 8))
    assert lib.shared[0] <= (shared_block_limit("sm_80") or 0)


def gradients(
    library: Any, x: Inputs, causal: bool = False, scale: float | None = None, needed: str = "qk", **settings: Any
) -> tuple[list[Tensor], Tensor]:
    """The gradients of a random gradient of the result, which is a view with rows apart, and that gradient."""
    lib = library("short_attention")
    tasks = table(lib, x)
    out, statistics = forward(lib, x, causal, scale, tasks)
    generator = torch.Generator().manual_seed(9)
    heads, width = x.query.shape[1:]
    grad = torch.randn(len(x.query), heads, 2 * width, generator=generator).to(x.query.dtype)[:, :, width:]
    found = backward(
        library("short_attention_backward"), grad, x, out, statistics, tasks, causal, scale, needed, **settings
    )
    return found, grad


def check_gradients(found: Sequence[Tensor], expected: Exact) -> None:
    for ours, theirs in zip(found, expected.gradients, strict=True):
        # Weights and the gradients of scores are rounded before they are multiplied, with errors of either sign.
        tolerance = 3 * torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max()))


@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_backward(library: Any, dtype: torch.dtype, causal: bool) -> None:
    x = inputs(RAGGED, 3, 64, dtype)
    first, grad = gradients(library, x, causal, seed=1, shuffle=1)
    check_gradients(first, exact(x, grad, causal))
    again, _ = gradients(library, x, causal, seed=2, shuffle=2)
    assert all(torch.equal(a, b) for a, b in zip(first, again, strict=True))


@pytest.mark.parametrize("causal", [False, True])
def test_backward_with_other_keys(library: Any, causal: bool) -> None:
    x = inputs(CROSS[0], 2, 64, torch.bfloat16, CROSS[1])
    found, grad = gradients(library, x, causal)
    check_gradients(found, exact(x, grad, causal))


def test_backward_of_narrow_heads(library: Any) -> None:
    x = inputs([40, 70], 3, 32, torch.bfloat16)
    found, grad = gradients(library, x, scale=0.3)
    check_gradients(found, exact(x, grad, scale=0.3))


def test_backward_of_the_longest(library: Any) -> None:
    x = inputs([256], 1, 64, torch.bfloat16)
    found, grad = gradients(library, x)
    check_gradients(found, exact(x, grad))


@pytest.mark.parametrize("needed", ["q", "k"])
def test_gradients_that_nobody_needs_are_left_alone(library: Any, needed: str) -> None:
    x = inputs([20, 40], 2, 64, torch.bfloat16)
    every, _ = gradients(library, x)
    some, _ = gradients(library, x, needed=needed)
    for i, (ours, whole) in enumerate(zip(some, every, strict=True)):
        assert torch.equal(ours, whole) if (i == 0) == (needed == "q") else ours.isnan().all()


def test_a_wrong_bound_spoils_the_gradients_of_the_sequence_alone(library: Any) -> None:
    x = inputs([20, 50, 7], 2, 64, torch.bfloat16, longest=40)
    for found in gradients(library, x)[0]:
        assert found[20:70].isnan().all() and found[:20].isfinite().all() and found[70:].isfinite().all()


def test_counted_bytes_flops_and_conflicts_of_backward(library: Any) -> None:
    """With forward, at most 1.07 of seven products on OneR's mix of images, captions and both."""
    lib, lengths, heads = library("short_attention_backward"), [197, 40, 237], 1
    x = inputs(lengths, heads, 64, torch.bfloat16)
    gradients(library, x)
    stats = lib.log[0]
    assert len(lib.log) == 1 and not any(name.startswith(("atom", "red")) for name in stats.opcodes)
    assert stats.tensor_flops <= 1.05 * flops(lengths, heads, 64, 5)
    check_memory(stats, sum(lengths) * heads * (8 * 128 + 8))
    assert lib.shared[0] <= (shared_block_limit("sm_80") or 0)
