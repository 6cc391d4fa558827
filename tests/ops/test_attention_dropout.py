"""Dropout of attention weights: the same draws everywhere, at the stated rate, independent, and never stored."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from oner_fast import _extension
from oner_fast.ops import attention_dropout, padded_attention, varlen_attention
from oner_fast.ops.implementations import choose, implementations
from oner_fast.philox import DROP_ATTENTION, philox4x32

DTYPES = [torch.float64, torch.float32, torch.float16, torch.bfloat16]
compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")


def able(op: str) -> list[str]:
    known = implementations(op).items()
    return [name for name, one in known if not one.reasons_against("cpu", dropout_p=0.5)]


def packed(attend: Callable[..., Tensor] = varlen_attention, **options: Any) -> Callable[..., Tensor]:
    """Return a function of query, key and value (B, H, N, Dh) whose samples are packed, all rows of each."""

    def call(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        batch, _, rows, _ = query.shape
        flat = [x.transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
        ends = [torch.arange(batch + 1) * x.shape[2] for x in (query, key)]
        return attend(*flat, *ends, **options).unflatten(0, (batch, rows)).transpose(1, 2)

    return call


CALLS = {
    **{f"varlen_attention by {name}": (packed, name) for name in able("varlen_attention")},
    **{
        f"padded_attention by {name}": (lambda **options: lambda *x: padded_attention(*x, **options), name)
        for name in able("padded_attention")
    },
}


def call(name: str, **options: Any) -> Callable[..., Tensor]:
    make, implementation = CALLS[name]
    return make(implementation=implementation, **options)


def weights_of(attend: Callable[..., Tensor], batch: int, heads: int, rows: int, keys: int, **like: Any) -> Tensor:
    """Read the weights, (B, H, N, Nk): scores are equal, and value j is the unit vector j."""
    query, key = torch.zeros(batch, heads, rows, keys, **like), torch.zeros(batch, heads, keys, keys, **like)
    return attend(query, key, torch.eye(keys, **like).expand(batch, heads, keys, keys))


def test_draws_are_those_of_philox_at_the_place_of_the_weight() -> None:
    """Word m // 2 of the block of eight keys, its lower half for even m."""
    seed = 0xDEADBEEF12345678
    signed = torch.tensor(seed - (1 << 64))
    sequences, queries = torch.tensor([0, 7, 2**31 - 1]), torch.tensor([0, 5, 1000])
    kept = attention_dropout.kept(signed, 30000, sequences, 3, queries, 13)
    assert kept.shape == (3, 3, 3, 13)
    for s, h, i, j in ((0, 0, 0, 0), (1, 2, 1, 12), (2, 1, 2, 7), (1, 0, 2, 5), (2, 2, 0, 8)):
        counter = (j // 8, int(queries[i]), h, int(sequences[s]) + DROP_ATTENTION)
        words = philox4x32(counter, (seed & 0xFFFFFFFF, seed >> 32))
        draw = int(words[j % 8 // 2]) >> (16 * (j % 2)) & 0xFFFF
        assert bool(kept[s, h, i, j]) == (draw >= 30000)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_implementation_drops_the_same_weights(name: str, dtype: torch.dtype) -> None:
    """Several blocks of keys, an odd number of queries and of keys, and the factor of the weights that stay."""
    batch, heads, rows, keys = (2, 2, 35, 77) if dtype != torch.bfloat16 else (1, 2, 35, 523)
    weights = weights_of(
        call(name, dropout_p=0.25, dropout_seed=99), batch, heads, rows, keys, dtype=dtype
    )  # fmt: skip
    expected = attention_dropout.kept(
        torch.tensor(99), 1 << 14, torch.arange(batch), heads, torch.arange(rows), keys
    )  # fmt: skip
    assert torch.equal(weights != 0, expected)
    torch.testing.assert_close(
        weights[expected], torch.full_like(weights[expected], 1 / keys / 0.75), rtol=1e-2, atol=0
    )


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("causal", [False, True])
def test_gradcheck_with_a_fixed_seed(name: str, causal: bool) -> None:
    """Backward drops what forward dropped."""
    shapes = ((2, 3), (1, 9), (1, 9))
    leaves = [torch.randn(1, heads, rows, 2, dtype=torch.float64).requires_grad_() for heads, rows in shapes]
    attend = call(name, dropout_p=0.4, dropout_seed=torch.tensor(-3), causal=causal)
    assert torch.autograd.gradcheck(attend, leaves)


@pytest.mark.parametrize("name", CALLS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_against_float64(name: str, dtype: torch.dtype) -> None:
    """At most twice (gradients three times) that of the definition's formulas in the same dtype, plus a unit."""
    shapes = ((4, 70), (2, 90), (2, 90))
    leaves = [torch.randn(2, heads, rows, 32).to(dtype).requires_grad_() for heads, rows in shapes]
    kept = attention_dropout.kept(torch.tensor(7), 13107, torch.arange(2), 4, torch.arange(70), 90)

    def eager(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        key, value = key.repeat_interleave(2, 1), value.repeat_interleave(2, 1)
        weights = ((query * 32**-0.5) @ key.mT).softmax(-1)
        return (weights * attention_dropout.made_up(13107)).masked_fill(~kept, 0.0) @ value

    def with_gradients(attend: Callable[..., Tensor], leaves: list[Tensor]) -> list[Tensor]:
        out = attend(*leaves)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype)
        return [out.detach(), *torch.autograd.grad(out, leaves, upstream.to(out.dtype))]

    wide = [x.detach().double().requires_grad_() for x in leaves]
    ours = with_gradients(call(name, dropout_p=0.2, dropout_seed=7), leaves)
    every = zip(ours, with_gradients(eager, leaves), with_gradients(eager, wide), strict=True)
    for index, (mine, plainly, truth) in enumerate(every):
        unit = torch.finfo(dtype).eps * truth.abs().max()
        assert (mine - truth).abs().max() <= (2 if index == 0 else 3) * (plainly - truth).abs().max() + unit


@pytest.mark.parametrize("rate", [0.02, 0.1, 0.5, 0.9])
def test_weights_are_dropped_at_the_rate(rate: float) -> None:
    """Within five standard deviations, of all draws and of those of each head, sequence and place in a block."""
    kept = attention_dropout.kept(
        torch.tensor(5), attention_dropout.level(rate), torch.arange(8), 8, torch.arange(128), 128
    )  # fmt: skip
    share = 1 - attention_dropout.level(rate) / 65536
    ways = (kept.flatten(), kept, kept.transpose(0, 1), kept.movedim(2, 0), kept.movedim(3, 0))
    places = kept.unflatten(3, (16, 8)).movedim(4, 0)
    for way in (*ways[1:], places, kept.unflatten(3, (16, 8)).movedim(3, 0)):
        each = way.flatten(1).double().mean(1)
        assert ((each - share).abs() <= 5 * (share * (1 - share) / way[0].numel()) ** 0.5).all()
    assert abs(float(ways[0].double().mean()) - share) <= 5 * (share * (1 - share) / ways[0].numel()) ** 0.5


@pytest.mark.parametrize("other", ["head", "sequence", "query", "key", "block of keys", "half of a word", "seed"])
def test_draws_are_independent(other: str) -> None:
    """Draws that differ in one thing are equal as often as two coins."""

    def draw(seed: int) -> Tensor:
        return attention_dropout.kept(
            torch.tensor(seed), 1 << 15, torch.arange(9), 8, torch.arange(64), 128
        )  # fmt: skip

    kept, again = draw(1), draw(2)
    pairs = {
        "head": (kept[:, 1:], kept[:, :-1]), "sequence": (kept[1:], kept[:-1]), "seed": (kept, again),
        "query": (kept[:, :, 1:], kept[:, :, :-1]), "key": (kept[..., 1:], kept[..., :-1]),
        "block of keys": (kept[..., 8:], kept[..., :-8]), "half of a word": (kept[..., ::2], kept[..., 1::2]),
    }  # fmt: skip
    one, two = pairs[other]
    equal = float((one == two).double().mean())
    assert abs(equal - 0.5) <= 5 * 0.5 / one.numel() ** 0.5


def test_no_seeds_of_neighbours_share_draws() -> None:
    """Seeds that differ in their upper half, too."""
    seeds = (0, 1, 2**32, 2**32 + 1, 2**63, 2**64 - 1)
    drawn = [
        weights_of(call("padded_attention by reference", dropout_p=0.5, dropout_seed=seed), 1, 1, 16, 64)
        for seed in seeds
    ]
    for i, one in enumerate(drawn):
        for two in drawn[:i]:
            assert abs(float(((one == 0) == (two == 0)).double().mean()) - 0.5) < 5 * 0.5 / 32


def test_the_expected_result_is_that_of_no_dropout() -> None:
    """The factor of kept weights is that of the rounded rate."""
    weights = torch.randn(1, 2, 40, 20, dtype=torch.float64).softmax(-1)
    level = attention_dropout.level(0.3)
    found = torch.zeros_like(weights)
    for seed in range(200):
        kept = attention_dropout.kept(torch.tensor(seed), level, torch.arange(1), 2, torch.arange(40), 20)
        found += (weights * attention_dropout.made_up(level)).masked_fill(~kept, 0.0) / 200
    deviation = weights * (level / (65536 - level) / 200) ** 0.5
    assert ((found - weights).abs() < 5 * deviation).all()


@pytest.mark.parametrize("name", CALLS)
def test_no_seed_is_another_each_time_and_that_of_the_generator(name: str) -> None:
    leaves = [torch.randn(1, 2, 9, 8) for _ in range(3)]
    attend = call(name, dropout_p=0.5)
    torch.manual_seed(3)
    first, second = attend(*leaves), attend(*leaves)
    assert not torch.equal(first, second)
    torch.manual_seed(3)
    assert torch.equal(attend(*leaves), first) and torch.equal(attend(*leaves), second)
    for seed in (2**63 + 5, torch.tensor(5 - 2**63)):
        assert torch.equal(
            call(name, dropout_p=0.5, dropout_seed=seed)(*leaves),
            call(name, dropout_p=0.5, dropout_seed=2**63 + 5)(*leaves),
        )


@pytest.mark.parametrize("name", CALLS)
def test_a_checkpointed_call_drops_the_same_weights_again(name: str) -> None:
    leaves = [torch.randn(1, 2, 9, 8, dtype=torch.float64).requires_grad_() for _ in range(3)]
    attend = call(name, dropout_p=0.5)
    found = []
    for again in (False, True):
        torch.manual_seed(3)
        out = checkpoint(attend, *leaves, use_reentrant=False) if again else attend(*leaves)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.parametrize("name", CALLS)
def test_a_rate_that_rounds_to_zero_drops_nothing(name: str) -> None:
    leaves = [torch.randn(1, 2, 9, 8) for _ in range(3)]
    expected = call(name)(*leaves)
    for rate in (0, 0.0, 7e-6):
        assert torch.equal(call(name, dropout_p=rate, dropout_seed=1)(*leaves), expected)
    assert attention_dropout.level(8e-6) == 1 and attention_dropout.level(0.999999) == 65535
    assert attention_dropout.level(0.1) == 6554 and attention_dropout.made_up(1 << 15) == 2.0


def test_draws_do_not_depend_on_the_other_sequences() -> None:
    """Nor on the number of heads, queries or keys: only on the place of the weight."""
    seed, every = torch.tensor(11), (torch.arange(6), 4, torch.arange(30), 50)
    whole = attention_dropout.kept(seed, 1 << 15, *every)
    part = attention_dropout.kept(seed, 1 << 15, torch.tensor([4, 1]), 2, torch.tensor([29, 3]), 11)
    assert torch.equal(part, whole[[4, 1]][:, :2, [29, 3]][..., :11])


@pytest.mark.parametrize("op", ["varlen_attention", "padded_attention"])
def test_what_cannot_drop_our_weights_says_so_and_is_skipped(op: str) -> None:
    for name in set(implementations(op)) - {"reference", "portable", "cpp", "triton"}:
        for rate, expected in (
            (0.0, []),
            (0.1, ["drops other weights than oner_fast does: dropout_p must be 0, got 0.1"]),
        ):
            reasons = implementations(op)[name].reasons_against("cpu", asked_for=True, dropout_p=rate)
            assert [reason for reason in reasons if "dropout" in reason] == expected, name
    assert choose(op, "mps", dropout_p=0.1).name == "portable" and choose(op, "mps", dropout_p=0.0).name == "sdpa"
    x = torch.zeros(1, 1, 4, 8)
    attend = packed if op == "varlen_attention" else CALLS["padded_attention by reference"][0]
    with pytest.raises(RuntimeError, match="'sdpa'.*cannot run this call: drops other weights"):
        attend(dropout_p=0.1, implementation="sdpa")(x, x, x)


@compiled
@pytest.mark.parametrize("op", ["varlen_attention", "padded_attention"])
def test_backward_keeps_the_seed_and_no_mask(op: str) -> None:
    kept: list[int] = []

    def note(tensor: Tensor) -> Tensor:
        kept.append(tensor.numel() * tensor.element_size())
        return tensor

    leaves = [torch.randn(2, 2, 300, 8).requires_grad_() for _ in range(3)]
    sums = []
    for rate in (0.0, 0.3):
        kept.clear()
        with torch.autograd.graph.saved_tensors_hooks(note, lambda tensor: tensor):
            call(f"{op} by cpp", dropout_p=rate)(*leaves)
        sums.append(sum(kept))
    assert sums[1] == sums[0] + 8


@compiled
@pytest.mark.parametrize("op", ["varlen_attention", "padded_attention"])
def test_one_graph_draws_a_seed_at_each_call(op: str) -> None:
    leaves = [torch.randn(1, 2, 9, 8).requires_grad_() for _ in range(3)]
    torch._dynamo.reset()
    graph = torch.compile(call(f"{op} by cpp", dropout_p=0.5), fullgraph=True, backend="aot_eager")
    first, second = graph(*leaves), graph(*leaves)
    assert not torch.equal(first, second)
    first.sum().backward()
    assert all(x.grad is not None and x.grad.isfinite().all() for x in leaves)


@compiled
@pytest.mark.parametrize("op", ["varlen_attention", "padded_attention"])
def test_under_vmap_each_element_is_a_call_of_its_own(op: str) -> None:
    """With one seed, or with a seed for each; without a seed PyTorch asks what randomness is meant."""
    x, seeds = torch.randn(3, 1, 2, 9, 8), torch.tensor([1, 5, 9])
    fixed = call(f"{op} by cpp", dropout_p=0.5, dropout_seed=5)
    assert torch.equal(torch.vmap(fixed)(x, x, x), torch.stack([fixed(each, each, each) for each in x]))

    def seeded(x: Tensor, seed: Tensor) -> Tensor:
        return call(f"{op} by cpp", dropout_p=0.5, dropout_seed=seed)(x, x, x)

    expected = torch.stack([seeded(each, seed) for each, seed in zip(x, seeds, strict=True)])
    assert torch.equal(torch.vmap(seeded)(x, seeds), expected)
    free = call(f"{op} by cpp", dropout_p=0.5)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(free)(x, x, x)
    same = x[:1].expand_as(x)
    different = torch.vmap(free, randomness="different")(same, same, same)
    assert not torch.equal(different[0], different[1])
    alike = torch.vmap(free, randomness="same")(same, same, same)
    assert torch.equal(alike[0], alike[1])
