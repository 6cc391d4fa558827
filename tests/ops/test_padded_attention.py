"""padded_attention: every implementation against a loop over single queries, and the promises of the compiled one."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast import _extension
from oner_fast.ops import padded_attention, varlen_attention
from oner_fast.ops.implementations import implementations

EVERY = [name for name, one in implementations("padded_attention").items() if not one.reasons_against("cpu")]
compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
DTYPES = [torch.float32, torch.float16, torch.bfloat16]
FORWARD, BACKWARD = torch.ops.oner_fast.padded_attention, torch.ops.oner_fast.padded_attention_backward


def numbers(*shape: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, dtype=torch.float64).to(dtype).requires_grad_()


def three(
    batch: int, heads: int, key_heads: int, rows: int, keys: int, width: int, dtype: torch.dtype = torch.float64
) -> list[Tensor]:
    shapes = ((heads, rows), (key_heads, keys), (key_heads, keys))
    return [numbers(batch, count, length, width, dtype=dtype) for count, length in shapes]


def plain(query: Tensor, key: Tensor, value: Tensor, real: Tensor, causal: bool, scale: float) -> Tensor:
    """One query of one head at a time."""
    batch, heads, rows, _ = query.shape
    keys, out = key.shape[2], []
    for b in range(batch):
        for h in range(heads):
            head = h * key.shape[1] // heads
            for i in range(rows):
                seen = [j for j in range(keys) if real[b, j] and (not causal or j <= i + keys - rows)]
                weights = (scale * key[b, head, seen] @ query[b, h, i]).softmax(0)
                out.append(weights @ value[b, head, seen] if seen else query[b, h, i] * 0)
    return torch.stack(out).view_as(query) if out else query * 0


def with_gradients(out: Tensor, leaves: list[Tensor], upstream: Tensor | None = None) -> list[Tensor]:
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape) if upstream is None else upstream
    found = torch.autograd.grad(out, leaves, upstream.to(out.dtype), materialize_grads=True)
    return [out.detach(), *found]


@st.composite
def padding(draw: st.DrawFn) -> tuple[int, int, int, dict[str, Tensor]]:
    batch, rows, keys = draw(st.integers(0, 3)), draw(st.integers(0, 4)), draw(st.integers(0, 5))
    kind = draw(st.sampled_from(["nothing", "lengths", "mask", "mask on the left"]))
    counts = [draw(st.integers(0, keys)) for _ in range(batch)]
    if kind == "lengths":
        return batch, rows, keys, {"key_lengths": torch.tensor(counts, dtype=torch.int64)}
    if kind == "mask":
        cells = [[draw(st.booleans()) for _ in range(keys)] for _ in range(batch)]
        return batch, rows, keys, {"key_mask": torch.tensor(cells, dtype=torch.bool).view(batch, keys)}
    if kind == "mask on the left":
        missing = torch.tensor(counts, dtype=torch.int64).unsqueeze(1)
        return batch, rows, keys, {"key_mask": torch.arange(keys) >= missing}
    return batch, rows, keys, {}


def real_of(batch: int, keys: int, given: dict[str, Tensor]) -> Tensor:
    if "key_lengths" in given:
        return torch.arange(keys) < given["key_lengths"].unsqueeze(1)
    return given.get("key_mask", torch.ones(batch, keys, dtype=torch.bool))


@pytest.mark.parametrize("implementation", EVERY)
@settings(max_examples=20)
@given(case=padding(), heads=st.integers(1, 2), groups=st.integers(1, 2), causal=st.booleans())
def test_any_padding(implementation: str, case: Any, heads: int, groups: int, causal: bool) -> None:
    """Against the loop, forward and backward, in float64."""
    batch, rows, keys, given_padding = case
    leaves = three(batch, heads * groups, heads, rows, keys, 3)
    ours = padded_attention(*leaves, **given_padding, causal=causal, scale=0.7, implementation=implementation)
    exact = plain(*leaves, real_of(batch, keys, given_padding), causal, 0.7)
    assert ours.shape == leaves[0].shape and ours.dtype == torch.float64
    for one, other in zip(with_gradients(ours, leaves), with_gradients(exact, leaves), strict=True):
        torch.testing.assert_close(one, other, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("causal", [False, True])
def test_error_against_float64(implementation: str, dtype: torch.dtype, causal: bool) -> None:
    """At most twice (gradients three times) that of plain PyTorch in the same dtype, plus a unit in the last place."""
    leaves = three(3, 4, 2, 70, 90, 64, dtype)
    lengths = torch.tensor([90, 33, 71])
    hidden = torch.arange(90) >= lengths.view(-1, 1, 1, 1)
    if causal:
        hidden = hidden | torch.ones(70, 90, dtype=torch.bool).tril(20).logical_not()

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        scores = ((query * 0.125) @ key.mT).masked_fill(hidden, -math.inf)
        return scores.softmax(-1) @ value

    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours = padded_attention(*leaves, key_lengths=lengths, causal=causal, implementation=implementation)
    every = (with_gradients(ours, leaves), with_gradients(eager(*leaves), leaves), with_gradients(eager(*wide), wide))
    assert ours.dtype == dtype
    for index, (mine, plainly, truth) in enumerate(zip(*every, strict=True)):
        unit = torch.finfo(dtype).eps * truth.abs().max()
        error, allowed = (mine - truth).abs(), (plainly - truth).abs()
        factor = 2 if index == 0 else 3
        assert error.max() <= factor * allowed.max() + unit, f"tensor {index}"
        assert error.square().mean().sqrt() <= factor * allowed.square().mean().sqrt() + unit, f"tensor {index}"


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck(implementation: str, causal: bool) -> None:
    mask = torch.tensor([[True, False, True, True], [False, False, True, False]])
    for given_padding in ({"key_mask": mask}, {"key_lengths": torch.tensor([3, 0])}):
        assert torch.autograd.gradcheck(
            lambda *x, p=given_padding: padded_attention(*x, **p, causal=causal, implementation=implementation),
            three(2, 2, 1, 3, 4, 3),
        )


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("left", [False, True])
def test_what_padding_holds_changes_nothing(implementation: str, dtype: torch.dtype, left: bool) -> None:
    """NaN and infinities included: the same bits, and a gradient of 0."""
    leaves = three(3, 2, 2, 5, 7, 8, dtype)
    lengths = torch.tensor([7, 4, 0])
    mask = torch.arange(7) < lengths.unsqueeze(1)
    options = {"key_mask": mask.flip(1)} if left else {"key_lengths": lengths}
    expected = with_gradients(padded_attention(*leaves, **options, implementation=implementation), leaves)
    unreal = ~(mask.flip(1) if left else mask)
    with torch.no_grad():
        for x, bad in ((leaves[1], math.nan), (leaves[2], math.inf)):
            x.transpose(1, 2)[unreal] = bad
    found = with_gradients(padded_attention(*leaves, **options, implementation=implementation), leaves)
    for one, other in zip(found, expected, strict=True):
        assert torch.equal(one, other)
    assert not found[0][2].any() and not found[1][2].any()
    assert not any(x.transpose(1, 2)[unreal].any() for x in found[2:])


@pytest.mark.parametrize("implementation", EVERY)
def test_a_query_that_sees_no_key_gives_zero_and_takes_no_gradient(implementation: str) -> None:
    """Five queries and three keys, aligned at their ends: the first two see nothing, nor do those of sample 1."""
    leaves = three(2, 1, 1, 5, 3, 4)
    out = padded_attention(
        *leaves, key_lengths=torch.tensor([3, 0]), causal=True, implementation=implementation
    )  # fmt: skip
    assert not out[0, :, :2].any() and not out[1].any() and out[0, :, 2:].abs().min() > 0
    blind = out[0, :, :2].sum() + out[1].sum()
    for gradient in torch.autograd.grad(blind, leaves, retain_graph=True):
        assert not gradient.any()
    to_query = torch.autograd.grad(out.sum(), leaves[0])[0]
    assert not to_query[0, :, :2].any() and not to_query[1].any()


@pytest.mark.parametrize("implementation", EVERY)
def test_a_single_query_sees_all_that_is_no_padding(implementation: str) -> None:
    """As a model that generates: a causal mask hides nothing from the last place."""
    leaves = three(3, 2, 1, 1, 6, 4)
    mask = torch.rand(3, 6) < 0.5
    options = {"key_mask": mask, "implementation": implementation}
    torch.testing.assert_close(padded_attention(*leaves, causal=True, **options), padded_attention(*leaves, **options))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast_casts_to_its_dtype(implementation: str, dtype: torch.dtype) -> None:
    leaves = three(2, 2, 2, 5, 5, 4, torch.float32)
    lengths = torch.tensor([2, 5])
    with torch.autocast("cpu", dtype=dtype):
        inside = padded_attention(*leaves, key_lengths=lengths, implementation=implementation)
        wide = padded_attention(
            *(x.double() for x in leaves), key_lengths=lengths, implementation=implementation
        )  # fmt: skip
    cast = padded_attention(*(x.to(dtype) for x in leaves), key_lengths=lengths, implementation=implementation)
    assert inside.dtype == dtype and wide.dtype == torch.float64 and torch.equal(inside, cast)
    inside.sum().backward()
    assert all(x.grad is not None and x.grad.dtype == torch.float32 for x in leaves)


def layouts(batch: int, heads: int, rows: int, width: int, dtype: torch.dtype) -> dict[str, list[Tensor]]:
    """The same numbers in the layouts that models have."""
    fused = torch.randn(batch, rows, 3, heads, width, dtype=torch.float64).to(dtype)
    return {
        "fused projection": [x.transpose(1, 2) for x in fused.unbind(2)],
        "heads before rows": [x.transpose(1, 2).contiguous() for x in fused.unbind(2)],
        "samples far apart": [
            torch.stack([x, torch.full_like(x, math.nan)], 1)[:, 0].transpose(1, 2) for x in fused.unbind(2)
        ],
        "numbers apart": [x.permute(3, 2, 1, 0).contiguous().permute(3, 1, 2, 0) for x in fused.unbind(2)],
    }


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_any_strides(implementation: str, dtype: torch.dtype) -> None:
    lengths, seen = torch.tensor([9, 4, 0]), []
    for leaves in layouts(3, 2, 9, 5, dtype).values():
        leaves = [x.detach().requires_grad_() for x in leaves]
        out = padded_attention(*leaves, key_lengths=lengths, causal=True, implementation=implementation)
        seen.append(with_gradients(out, leaves))
        assert out.transpose(1, 2).is_contiguous() or implementation in ("reference", "sdpa")
    for other in seen[1:]:
        for one, first in zip(other, seen[0], strict=True):
            torch.testing.assert_close(one, first, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", DTYPES)
def test_numbers_that_begin_anywhere_in_memory(implementation: str, dtype: torch.dtype) -> None:
    """No row, head or sample begins at a multiple of more than one number."""
    leaves = three(2, 2, 1, 19, 23, 11, dtype)
    apart = [torch.nn.functional.pad(x.detach(), (1, 1))[..., 1:-1].requires_grad_() for x in leaves]
    options = {"key_lengths": torch.tensor([23, 6]), "causal": True, "implementation": implementation}
    found, expected = (with_gradients(padded_attention(*x, **options), x) for x in (apart, leaves))
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("keys", [0, 3])
@pytest.mark.parametrize("dtype", DTYPES)
def test_no_key_at_all_leaves_no_gradient_missing(implementation: str, keys: int, dtype: torch.dtype) -> None:
    """Without keys, and with padding alone: every input takes a gradient of its shape, and it is 0."""
    for causal, autocast in ((False, False), (True, False), (False, True)):
        leaves = three(2, 2, 1, 4, keys, 3, dtype)
        lengths = torch.zeros(2, dtype=torch.int64)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            out = padded_attention(*leaves, key_lengths=lengths, causal=causal, implementation=implementation)
        assert out.dtype == (torch.bfloat16 if autocast else dtype) and not out.any()
        for x, gradient in zip(leaves, torch.autograd.grad(out.sum(), leaves), strict=True):
            assert gradient.shape == x.shape and gradient.dtype == dtype and not gradient.any()


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
def test_large_scores_and_numbers_that_are_not_finite(implementation: str, dtype: torch.dtype) -> None:
    """A softmax of one key, however large its score; and a NaN in one sample stays there."""
    query, key, value = torch.zeros(2, 1, 5, 8), torch.zeros(2, 1, 7, 8), torch.ones(2, 1, 7, 8)
    query[..., 0], key[:, :, 3, 0], value[:, :, 3], key[1, 0, 6, 0] = 100.0, 100.0, 2.0, math.nan
    leaves = [x.to(dtype).requires_grad_() for x in (query, key, value)]
    out = padded_attention(*leaves, scale=100.0, implementation=implementation)
    to_query, to_key, to_value = torch.autograd.grad(out.sum(), leaves)
    assert (out[0] == 2).all() and out[1].isnan().all()
    assert not to_query[0].any() and not to_key[0].any()
    assert (to_value[0, 0, 3] == 5).all() and to_value[0].sum() == 5 * 8


class Names(TorchDispatchMode):
    """The names of the ops that are called with rows, which have three or more dimensions."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(isinstance(x, Tensor) and x.ndim > 2 for x in args):
            self.seen.append(func.overloadpacket.__name__)
        return func(*args, **(kwargs or {}))


@compiled
@pytest.mark.parametrize("layout", ["fused projection", "heads before rows", "samples far apart"])
def test_rows_are_read_where_they_lie(layout: str) -> None:
    """Nothing is copied, neither before the op nor in it."""
    leaves = layouts(3, 2, 9, 8, torch.float32)[layout]
    mask = torch.arange(9) < torch.tensor([[9], [4], [0]])
    with Names() as names:
        padded_attention(*leaves, key_mask=mask, causal=True, implementation="cpp")
    copying = {"clone", "contiguous", "copy_", "_to_copy", "gather", "masked_gather", "index", "index_select"}
    assert "padded_attention" in names.seen and not copying & {*names.seen}
    with Names() as names:
        padded_attention(*leaves, key_mask=mask.flip(1), implementation="cpp")
    assert names.seen.count("masked_gather") == 2  # keys and values, where the attended ones are not in front


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("dropout_p", [0.0, 0.2])
def test_the_same_bits_as_packed_sequences(dtype: torch.dtype, dropout_p: float) -> None:
    """Padding moves no number, and no draw."""
    lengths = torch.tensor([300, 1, 0, 37])
    leaves = three(4, 4, 2, 300, 300, 24, dtype)
    options = {"dropout_p": dropout_p, "dropout_seed": 5, "implementation": "cpp"}
    padded = with_gradients(padded_attention(*leaves, key_lengths=lengths, **options), leaves)
    real = torch.arange(300) < lengths.unsqueeze(1)
    keys = [x.transpose(1, 2)[real].detach().requires_grad_() for x in leaves[1:]]
    query = leaves[0].transpose(1, 2).flatten(0, 1).detach().requires_grad_()
    cu_q, cu_k = torch.arange(5) * 300, torch.nn.functional.pad(lengths.cumsum(0), (1, 0))
    out = varlen_attention(query, *keys, cu_q, cu_k, **options)
    upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(4, 4, 300, 24)
    packed = with_gradients(out, [query, *keys], upstream.transpose(1, 2).flatten(0, 1))
    for one, other in zip(padded[:2], packed[:2], strict=True):
        assert torch.equal(one.transpose(1, 2).flatten(0, 1), other)
    for one, other in zip(padded[2:], packed[2:], strict=True):
        assert torch.equal(one.transpose(1, 2)[real], other)


@compiled
def test_a_mask_of_any_kind_is_the_keys_in_front() -> None:
    """True up to a length it is that length, and any other is the attended keys alone: the same bits."""
    leaves = three(3, 2, 2, 6, 9, 8, torch.float32)
    lengths = torch.tensor([9, 5, 0])
    mask = torch.arange(9) < lengths.unsqueeze(1)
    expected = padded_attention(*leaves, key_lengths=lengths, implementation="cpp")
    assert torch.equal(expected, padded_attention(*leaves, key_mask=mask, implementation="cpp"))
    order = torch.stack([torch.randperm(9).sort().values, torch.tensor([1, 3, 4, 6, 8, 0, 2, 5, 7]), torch.arange(9)])
    moved = [leaves[0], *(x.gather(2, order.argsort(1)[:, None, :, None].expand_as(x)) for x in leaves[1:])]
    found = padded_attention(*moved, key_mask=mask.gather(1, order.argsort(1)), implementation="cpp")
    assert torch.equal(expected, found)


@compiled
@pytest.mark.parametrize("dtype", [torch.float64, *DTYPES])
@pytest.mark.parametrize("causal", [False, True])
def test_same_bits_with_any_threads_and_every_element_is_written(dtype: torch.dtype, causal: bool) -> None:
    """Several blocks of keys, and ranges of one sequence. New memory is NaN in deterministic mode."""
    leaves = three(2, 2, 1, 300, 700, 24, dtype)
    torch.use_deterministic_algorithms(True)
    assert torch.utils.deterministic.fill_uninitialized_memory
    seen = []
    for threads in (1, 2, 5):
        torch.set_num_threads(threads)
        out = padded_attention(
            *leaves, key_lengths=torch.tensor([650, 3]), causal=causal, dropout_p=0.1, dropout_seed=9,
            implementation="cpp",
        )  # fmt: skip
        seen.append(with_gradients(out, leaves))
    for one in seen[0]:
        assert one.isfinite().all()
    for other in seen[1:]:
        for first, again in zip(seen[0], other, strict=True):
            assert torch.equal(first, again)


@compiled
@pytest.mark.parametrize("causal", [False, True])
def test_saves_the_inputs_the_result_and_few_numbers_a_row(causal: bool) -> None:
    leaves = three(3, 4, 2, 20, 30, 16, torch.bfloat16)
    saved: list[Tensor] = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        padded_attention(*leaves, key_lengths=torch.tensor([3, 30, 0]), causal=causal, dropout_p=0.5)
    tensors = 2 * leaves[0].numel() + 2 * leaves[1].numel()
    statistics, counts, seed = 2 * 3 * 20 * 4 * 4, 4 * 3 * (20 if causal else 1), 8
    assert sum(x.numel() * x.element_size() for x in saved) == 2 * tensors + statistics + counts + seed


@compiled
def test_a_gradient_that_is_not_needed_is_not_computed() -> None:
    leaves = three(2, 2, 2, 4, 5, 3)
    lengths = torch.tensor([5, 2])
    expected = with_gradients(padded_attention(*leaves, key_lengths=lengths, implementation="cpp"), leaves)[1:]
    for i in range(3):
        some = [x if i == j else x.detach() for j, x in enumerate(leaves)]
        out = padded_attention(*some, key_lengths=lengths, implementation="cpp")
        assert torch.equal(with_gradients(out, [leaves[i]])[1], expected[i])
    query, key, value = (x.detach().transpose(1, 2) for x in leaves)
    out, statistics = FORWARD(query, key, value, None, 0.5)
    to_query, to_key, to_value = BACKWARD(out, query, key, value, out, statistics, None, 0.5, True, False)
    assert to_query.shape == query.shape and to_key.numel() == to_value.numel() == 0


@compiled
def test_opcheck() -> None:
    query, key = torch.randn(2, 5, 4, 3), torch.randn(2, 7, 2, 3)
    seed = torch.tensor(3)
    for seen in (None, torch.tensor([7, 2], dtype=torch.int32), torch.tensor([[0, 1, 1, 5, 7]] * 2, dtype=torch.int32)):
        for dropout in ((), (100, seed)):
            torch.library.opcheck(FORWARD.default, (query, key, key, seen, 0.5, *dropout))
        out, statistics = FORWARD(query, key, key, seen, 0.5)
        for need in ((True, True), (True, False), (False, True)):
            torch.library.opcheck(BACKWARD.default, (query, query, key, key, out, statistics, seen, 0.5, *need))


@compiled
def test_raw_op_refuses_a_gradient_and_stays_in_its_tensors() -> None:
    """Under torch.compile no value is checked in Python, so the compiled op must never leave its tensors."""
    x = torch.randn(2, 4, 2, 3)
    with pytest.raises(RuntimeError, match=r"derivative of torch.ops.oner_fast.padded_attention is not implemented"):
        FORWARD(x.clone().requires_grad_(), x, x, None, 1.0)
    for seen, message in (
        (torch.tensor([4, 5], dtype=torch.int32), r"seen must be in \[0, 4\]"),
        (torch.tensor([-1, 4], dtype=torch.int32), r"seen must be in \[0, 4\]"),
        (torch.tensor([[0, 3, 2, 4]] * 2, dtype=torch.int32), "seen must never decrease"),
        (torch.tensor([4, 4]), "seen must be int32"),
        (torch.tensor([4], dtype=torch.int32), r"seen must have shape \(B,\) or \(B, N\), got \[1\]"),
        (torch.zeros(2, 3, dtype=torch.int32), r"seen must have shape \(B,\) or \(B, N\), got \[2, 3\]"),
    ):
        with pytest.raises(REFUSED, match=message):
            FORWARD(x, x, x, seen, 1.0)
    with pytest.raises(REFUSED, match=r"query must have shape \(B, N, H, Dh\), got \[4, 2, 3\]"):
        FORWARD(x[0], x, x, None, 1.0)
    with pytest.raises(REFUSED, match=r"key must have shape \(B, Nk, Hk, 3\), got \[1, 4, 2, 3\]"):
        FORWARD(x, x[:1], x[:1], None, 1.0)
    with pytest.raises(REFUSED, match=r"dropped must be in \[0, 65536\), with a seed"):
        FORWARD(x, x, x, None, 1.0, 1, None)
    with pytest.raises(REFUSED, match=r"dropped must be in \[0, 65536\)"):
        FORWARD(x, x, x, None, 1.0, 65536, torch.tensor(1))
    with pytest.raises(REFUSED, match="dropout_seed must be one int64"):
        FORWARD(x, x, x, None, 1.0, 1, torch.tensor([1, 2]))
    with pytest.raises(REFUSED, match=r"statistics must have shape \[2, 2, 4, 2\], got \[2, 4, 2\]"):
        BACKWARD(x, x, x, x, x, torch.zeros(2, 4, 2), None, 1.0, True, True)


@compiled
@pytest.mark.parametrize("padding", ["nothing", "key_lengths", "key_mask"])
def test_compiles_as_one_graph(padding: str) -> None:
    leaves = three(2, 2, 1, 4, 6, 4, torch.float32)
    given_padding = {"key_lengths": torch.tensor([6, 2]), "key_mask": torch.rand(2, 6) < 0.5, "nothing": None}[padding]

    def run(query: Tensor, key: Tensor, value: Tensor, real: Tensor | None, seed: Tensor) -> Tensor:
        options = {} if real is None else {padding: real}
        options |= {"dropout_p": 0.3, "dropout_seed": seed}
        return padded_attention(query, key, value, causal=True, implementation="cpp", **options) * 2

    torch._dynamo.reset()
    seed = torch.tensor(3)
    ours = torch.compile(run, fullgraph=True, backend="aot_eager")(*leaves, given_padding, seed)
    expected = with_gradients(run(*leaves, given_padding, seed), leaves)
    for one, other in zip(with_gradients(ours, leaves), expected, strict=True):
        torch.testing.assert_close(one, other)


Q, KV = torch.zeros(2, 4, 6, 8), torch.zeros(2, 2, 5, 8)
LENGTHS, MASK = torch.tensor([5, 1]), torch.ones(2, 5, dtype=torch.bool)
WRONG: list[tuple[type[Exception], str, dict[str, Any]]] = [
    (TypeError, "query must be a torch.Tensor, got list", {"query": [0.0]}),
    (TypeError, "query must be float32.*got torch.int64", {"query": Q.long()}),
    (ValueError, r"query must have shape \(B, H, N, Dh\).*got \(4, 6, 8\)", {"query": Q[0]}),
    (ValueError, "heads of query must hold at least one number", {"query": Q[..., :0]}),
    (TypeError, "key must have dtype torch.float32.*got torch.float16", {"key": KV.half()}),
    (ValueError, r"key must have shape \(B, Hk, Nk, Dh\) = \(2, \*, \*, 8\), got \(1, 2, 5, 8\)", {"key": KV[:1]}),
    (ValueError, r"value must have shape.*= \(2, 2, 5, 8\), got \(2, 2, 4, 8\)", {"value": KV[:, :, :4]}),
    (ValueError, "must divide the 4 heads of query, got 0", {"key": KV[:, :0], "value": KV[:, :0]}),
    (TypeError, "scale must be a number, got str", {"scale": "1"}),
    (TypeError, "causal must be True or False, got int", {"causal": 1}),
    (TypeError, "key_lengths must be int32 or int64, got torch.float32", {"key_lengths": LENGTHS.float()}),
    (ValueError, r"key_lengths must have shape \(B,\) = \(2,\), got \(1,\)", {"key_lengths": LENGTHS[:1]}),
    (ValueError, r"key_lengths must be in \[0, 5\], found 6", {"key_lengths": LENGTHS + 1}),
    (ValueError, r"key_lengths must be in \[0, 5\], found -1", {"key_lengths": LENGTHS - 2}),
    (TypeError, "key_mask must be bool, True where a key is attended to, got torch.int64", {"key_mask": MASK.long()}),
    (
        ValueError,
        r"key_mask must have shape \(B, Nk\) = \(2, 5\), got \(2, 1, 1, 5\)",
        {"key_mask": MASK[:, None, None]},
    ),
    (ValueError, "key_lengths and key_mask both say", {"key_lengths": LENGTHS, "key_mask": MASK}),
    (ValueError, "key is on meta but query is on cpu", {"key": KV.to("meta")}),
    (ValueError, r"dropout_p must be in \[0, 1\), got 1.0", {"dropout_p": 1.0}),
    (TypeError, "dropout_p must be a number, got str", {"dropout_p": "0.1"}),
    (TypeError, "dropout_seed must be an int, got float", {"dropout_p": 0.1, "dropout_seed": 1.0}),
    (ValueError, r"dropout_seed must be less than 2\^64", {"dropout_p": 0.1, "dropout_seed": 1 << 64}),
    (TypeError, "dropout_seed must be .* int64 tensor, got torch.int32", {"dropout_seed": torch.tensor(1).int()}),
    (ValueError, r"dropout_seed must have shape \(\).*got \(1,\)", {"dropout_seed": torch.tensor([1])}),
    (ValueError, "no implementation 'fast'", {"implementation": "fast"}),
]


@pytest.mark.parametrize(("error", "message", "arguments"), WRONG)
@pytest.mark.parametrize("implementation", EVERY)
def test_errors_name_the_bad_argument(
    implementation: str, error: type[Exception], message: str, arguments: dict[str, Any]
) -> None:
    given_arguments = {"query": Q, "key": KV, "value": KV, "implementation": implementation, **arguments}
    with pytest.raises(error, match=message):
        padded_attention(**given_arguments)
