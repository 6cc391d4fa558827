"""Transforms of torch.func over every op: numbers equal those of a Python loop, in every combination of batched inputs.

The compiled implementations are compared with themselves called in a loop, and their gradients with those of the
reference implementations.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch import Tensor, nn
from torch.func import functional_call, grad, grad_and_value, hessian, jacfwd, jacrev, jvp, vjp, vmap

from oner_fast import _extension
from oner_fast.ops import (
    batching,
    boundaries,
    draw_masks,
    gather_patches,
    masked_gather,
    mixup_info_nce,
    padded_attention,
    patch_mask,
    sigmoid_loss,
    token_alignment,
    varlen_attention,
)
from oner_fast.ops.implementations import implementations
from oner_fast.ops.library import raw_ops

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

SIZE = 3  # elements of a batch
Inputs = dict[str, Tensor]


def _normal(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(shape, dtype=torch.float64)


def _below(upper: int, *shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randint(upper, shape)


def _ends(total: int, sequences: int) -> Callable[[], Tensor]:
    """Draw boundaries of `sequences` sequences, some of them empty."""

    def draw() -> Tensor:
        inner = torch.randint(total + 1, (sequences - 1,)).sort().values
        return torch.cat([torch.tensor([0]), inner, torch.tensor([total])]).to(torch.int32)

    return draw


class Case:
    """An op, how to draw each of its tensors, and the names of those with a gradient."""

    def __init__(self, call: Callable[..., Tensor], gradients: str, **draw: Callable[[], Tensor]) -> None:
        self.call, self.draw, self.gradients = call, draw, gradients.split()

    def loss(self, implementation: str | None = None) -> Callable[[Inputs], Tensor]:
        """Return a function of the tensors whose gradient differs at each number of the result."""

        def loss(tensors: Inputs) -> Tensor:
            result = self.call(**tensors, implementation=implementation)
            return (result * torch.arange(1, result.numel() + 1).view(result.shape).sin()).sum()

        return loss


def _mixup(query: Tensor, key: Tensor, logit_scale: Tensor, **rest: Any) -> Tensor:
    return mixup_info_nce(query, key, logit_scale, **rest)


CASES = {
    "masked_gather": Case(masked_gather, "tokens", tokens=_normal(2, 5, 4), kept=_below(5, 2, 3)),
    "masked_gather with positions": Case(
        masked_gather, "tokens positions prefix",
        tokens=_normal(2, 5, 4), kept=_below(5, 2, 3), positions=_normal(5, 4), prefix=_normal(2, 4),
    ),
    "masked_gather ragged": Case(
        lambda **given: masked_gather(**given)[0], "tokens prefix",
        tokens=_normal(3, 5, 4), kept=_below(5, 7), prefix=_normal(2, 4), cu_seqlens=_ends(7, 3),
    ),
    "gather_patches": Case(
        lambda **given: gather_patches(patch_size=2, mean=[0.5, 0.25], std=[2.0, 4.0], **given), "images",
        images=_normal(2, 2, 4, 6), kept=_below(6, 2, 3),
    ),
    "gather_patches ragged": Case(
        lambda **given: gather_patches(patch_size=2, **given)[0], "images",
        images=_normal(2, 2, 4, 6), kept=_below(6, 5), cu_seqlens=_ends(5, 2),
    ),
    "mixup_info_nce": Case(
        _mixup, "query key logit_scale", query=_normal(4, 3), key=_normal(4, 3), logit_scale=lambda: torch.rand(())
    ),
    "mixup_info_nce mixed": Case(
        _mixup, "query key query_other key_other mix",
        query=_normal(4, 3), key=_normal(4, 3), logit_scale=lambda: torch.rand(()), query_other=_normal(4, 3),
        key_other=_normal(4, 3), mix=lambda: torch.rand(4, dtype=torch.float64), partner=_below(4, 4),
        partner_weight=lambda: torch.rand(4, dtype=torch.float64),
    ),
    "mixup_info_nce normalized": Case(
        lambda **given: mixup_info_nce(normalized=True, **given),
        "query key query_other logit_scale logit_bias",
        query=_normal(4, 3), key=_normal(4, 3), query_other=_normal(4, 3), logit_scale=_normal(1),
        logit_bias=_normal(1),
    ),
    "mixup_info_nce with ids": Case(
        _mixup, "query key logit_scale",
        query=_normal(4, 3), key=_normal(4, 3), logit_scale=_normal(), query_ids=_below(3, 4),
        key_ids=lambda: torch.randint(-1, 2, (4,)),
    ),
    "mixup_info_nce with ids ignored": Case(
        lambda **given: mixup_info_nce(same="ignore", **given), "query key",
        query=_normal(4, 3), key=_normal(4, 3), logit_scale=lambda: torch.rand(()), query_ids=_below(3, 4),
    ),
    "sigmoid_loss": Case(
        sigmoid_loss, "query key logit_scale logit_bias",
        query=_normal(4, 3), key=_normal(4, 3), logit_scale=_normal(), logit_bias=_normal(1),
    ),
    "sigmoid_loss mixed": Case(
        lambda **given: sigmoid_loss(logit_scale=5.0, **given), "query key query_other key_other mix",
        query=_normal(4, 3), key=_normal(4, 3), query_other=_normal(4, 3), key_other=_normal(4, 3),
        mix=lambda: torch.rand(4, dtype=torch.float64), partner=_below(4, 4),
        partner_weight=lambda: torch.rand(4, dtype=torch.float64),
    ),
    "sigmoid_loss with ids": Case(
        lambda **given: sigmoid_loss(same="ignore", **given), "query key logit_scale",
        query=_normal(4, 3), key=_normal(4, 3), logit_scale=_normal(), query_ids=_below(3, 4),
        key_ids=lambda: torch.randint(-1, 2, (4,)),
    ),
    "varlen_attention": Case(
        varlen_attention, "query key value",
        query=_normal(6, 4, 3), key=_normal(6, 2, 3), value=_normal(6, 2, 3), cu_seqlens_q=_ends(6, 3),
    ),
    "varlen_attention causal": Case(
        lambda **given: varlen_attention(causal=True, **given), "query key value",
        query=_normal(6, 2, 3), key=_normal(5, 2, 3), value=_normal(5, 2, 3),
        cu_seqlens_q=_ends(6, 3), cu_seqlens_k=_ends(5, 3),
    ),
    "padded_attention": Case(
        padded_attention, "query key value",
        query=_normal(2, 4, 3, 3), key=_normal(2, 2, 5, 3), value=_normal(2, 2, 5, 3), key_lengths=_below(6, 2),
    ),
    "padded_attention causal with a mask": Case(
        lambda **given: padded_attention(causal=True, **given), "query key value",
        query=_normal(2, 2, 3, 3), key=_normal(2, 2, 4, 3), value=_normal(2, 2, 4, 3),
        key_mask=lambda: torch.rand(2, 4) < 0.6,
    ),
    "padded_attention with dropout": Case(
        lambda **given: padded_attention(dropout_p=0.4, **given), "query key value",
        query=_normal(2, 1, 3, 3), key=_normal(2, 1, 4, 3), value=_normal(2, 1, 4, 3),
        dropout_seed=lambda: torch.randint(9, ()),
    ),
    "token_alignment": Case(
        token_alignment, "student", student=_normal(2, 3, 4), teacher=_normal(2, 5, 4), kept=_below(5, 2, 3)
    ),
}  # fmt: skip
NAMES = tuple(CASES)


def _drawn(case: Case, batched: tuple[str, ...] = ()) -> Inputs:
    return {name: torch.stack([draw() for _ in range(SIZE)]) if name in batched else draw()
            for name, draw in case.draw.items()}  # fmt: skip


def _element(tensors: Inputs, batched: tuple[str, ...], index: int) -> Inputs:
    return {name: x[index] if name in batched else x for name, x in tensors.items()}


def _close(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def _some(names: tuple[str, ...]) -> list[tuple[str, ...]]:
    """Every tensor batched alone, all of them, and all but one."""
    alone = [(name,) for name in names]
    return list(dict.fromkeys([*alone, names, *itertools.combinations(names, len(names) - 1)]))


@pytest.mark.parametrize("name", NAMES)
def test_vmap_is_a_loop_whatever_is_batched(name: str) -> None:
    """Results and gradients agree, and a shared tensor's gradient is the sum over the batch."""
    case = CASES[name]
    for batched in filter(None, _some(tuple(case.draw))):
        tensors = _drawn(case, batched)
        dims = ({key: 0 if key in batched else None for key in tensors},)
        leaves = {key: tensors[key].requires_grad_() for key in case.gradients}
        results = vmap(case.loss(), in_dims=dims)(tensors)
        one_by_one = torch.stack([case.loss("reference")(_element(tensors, batched, i)) for i in range(SIZE)])
        _close(results, one_by_one)
        weights = torch.tensor([1.0, 2.0, 4.0], dtype=results.dtype)
        found = torch.autograd.grad(results, leaves.values(), weights)
        _close(found, torch.autograd.grad(one_by_one, leaves.values(), weights))


@pytest.mark.parametrize("name", NAMES)
def test_a_batch_may_be_any_dimension_of_the_inputs_and_of_the_result(name: str) -> None:
    case = CASES[name]
    every = tuple(case.draw)
    tensors = _drawn(case, every)
    moved = {key: x.movedim(0, -1) for key, x in tensors.items()}

    def call(tensors: Inputs) -> Tensor:
        return case.call(**tensors)

    expected = torch.stack([call(_element(tensors, every, i)) for i in range(SIZE)], dim=-1)
    _close(vmap(call, in_dims=({key: x.ndim - 1 for key, x in moved.items()},), out_dims=-1)(moved), expected)


@pytest.mark.parametrize("name", NAMES)
def test_gradients_of_each_sample(name: str) -> None:
    """vmap(grad), grad(vmap), nested vmap(vmap(grad)), and grad_and_value agree with a loop over the reference."""
    case = CASES[name]
    every = tuple(case.draw)
    tensors = _drawn(case, every)

    def of_leaves(implementation: str | None) -> Callable[[Inputs, Inputs], Tensor]:
        return lambda leaves, others: case.loss(implementation)({**others, **leaves})

    leaves = {key: tensors[key] for key in case.gradients}
    others = {key: x for key, x in tensors.items() if key not in leaves}
    expected = [
        grad(of_leaves("reference"))(_element(leaves, every, i), _element(others, every, i)) for i in range(SIZE)
    ]
    stacked = {key: torch.stack([each[key] for each in expected]) for key in leaves}
    _close(vmap(grad(of_leaves(None)))(leaves, others), stacked)
    _close(grad(lambda leaves: vmap(of_leaves(None))(leaves, others).sum())(leaves), stacked)
    twice = [{key: torch.stack([x, x]) for key, x in part.items()} for part in (leaves, others)]
    _close(vmap(vmap(grad(of_leaves(None))))(*twice), {key: torch.stack([x, x]) for key, x in stacked.items()})
    found, values = vmap(grad_and_value(of_leaves(None)))(leaves, others)
    _close(found, stacked)
    _close(values, torch.stack([case.loss()(_element(tensors, every, i)) for i in range(SIZE)]))


@pytest.mark.parametrize("name", NAMES)
def test_a_transform_of_shared_tensors_under_vmap(name: str) -> None:
    """The gradient of each sample with respect to weights that all share."""
    case = CASES[name]
    shared, own = case.gradients[0], tuple(key for key in case.draw if key != case.gradients[0])
    tensors = _drawn(case, own)
    leaf, others = tensors.pop(shared), tensors

    def loss(implementation: str | None) -> Callable[[Tensor, Inputs], Tensor]:
        return lambda leaf, others: case.loss(implementation)({**others, shared: leaf})

    expected = [grad(loss("reference"))(leaf, _element(others, own, i)) for i in range(SIZE)]
    _close(vmap(grad(loss(None)), in_dims=(None, 0))(leaf, others), torch.stack(expected))


@pytest.mark.parametrize("name", NAMES)
def test_jacobians_and_vector_jacobian_products(name: str) -> None:
    case = CASES[name]
    tensors = _drawn(case)
    first = case.gradients[0]

    def call(x: Tensor, implementation: str | None = None) -> Tensor:
        return case.call(**{**tensors, first: x}, implementation=implementation)

    def reference(x: Tensor) -> Tensor:
        return call(x, "reference")

    _close(jacrev(call)(tensors[first]), torch.autograd.functional.jacobian(reference, tensors[first]))
    result, pull = vjp(call, tensors[first])
    expected, expected_pull = vjp(reference, tensors[first])
    _close(result, expected)
    upstream = torch.randn_like(result)
    _close(pull(upstream), expected_pull(upstream))


def test_functional_call_of_a_module() -> None:
    """Per-sample gradients of a module with an op inside, as torch.func's tutorial takes them."""

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.randn(4, 4))
            self.positions = nn.Parameter(torch.randn(5, 4))

        def forward(self, tokens: Tensor, kept: Tensor) -> Tensor:
            rows = masked_gather(tokens @ self.weight, kept, self.positions).flatten(0, 1).unsqueeze(1)
            ends = torch.arange(3, dtype=torch.int32) * 3
            return varlen_attention(rows, rows, rows, ends).square().sum()

    model = Model()
    weights = dict(model.named_parameters())
    tokens, kept = torch.randn(SIZE, 2, 5, 4), torch.randint(5, (SIZE, 2, 3))

    def loss(weights: Inputs, tokens: Tensor, kept: Tensor) -> Tensor:
        return functional_call(model, weights, (tokens, kept))

    found = vmap(grad(loss), in_dims=(None, 0, 0))({key: x.detach() for key, x in weights.items()}, tokens, kept)
    for i in range(SIZE):
        model.zero_grad()
        model(tokens[i], kept[i]).backward()
        for key, weight in weights.items():
            assert weight.grad is not None
            torch.testing.assert_close(found[key][i], weight.grad, rtol=1e-4, atol=1e-5)


def test_bytes_and_boundaries_of_the_result_take_part_in_vmap() -> None:
    """Inputs that take no gradient, and the second result of a ragged call."""
    images, kept = torch.randint(256, (SIZE, 2, 3, 4, 4), dtype=torch.uint8), torch.randint(4, (SIZE, 2, 2))
    found = vmap(lambda x, k: gather_patches(x, k, 2, [0.5] * 3, [2.0] * 3))(images, kept)
    _close(
        found, torch.stack([gather_patches(x, k, 2, [0.5] * 3, [2.0] * 3) for x, k in zip(images, kept, strict=True)])
    )
    ends = torch.tensor([[0, 1, 4], [0, 4, 4], [0, 2, 4]], dtype=torch.int32)
    tokens, flat, prefix = torch.randn(2, 5, 4), torch.randint(5, (4,)), torch.randn(1, 4)
    packed, out = vmap(lambda cu: masked_gather(tokens, flat, None, prefix, cu_seqlens=cu))(ends)
    for i in range(SIZE):
        one, one_out = masked_gather(tokens, flat, None, prefix, cu_seqlens=ends[i])
        assert torch.equal(packed[i], one) and torch.equal(out[i], one_out)


@pytest.mark.parametrize("name", ["masked_gather", "gather_patches ragged", "varlen_attention causal"])
def test_packed_ops_take_a_batch_in_one_call(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A loop over the batch would call the raw op once for each element, forward and backward."""
    case = CASES[name]
    tensors = _drawn(case, tuple(case.draw))
    monkeypatch.setattr(batching, "_one_by_one", None)
    leaf = tensors.pop(case.gradients[0])
    vmap(grad(lambda x, rest: case.loss()({**rest, case.gradients[0]: x})))(leaf, tensors)


@pytest.mark.parametrize("name", NAMES)
def test_an_empty_batch_gives_empty_results(name: str) -> None:
    case = CASES[name]
    tensors = {key: x[:0] for key, x in _drawn(case, tuple(case.draw)).items()}
    known, leaf = implementations(name.split()[0]), case.gradients[0]
    for implementation in (None, *[one for one in known if one == "portable"]):
        expected = case.call(**_drawn(case), implementation=implementation)
        found = vmap(lambda t, i=implementation: case.call(**t, implementation=i))(tensors)  # type: ignore[misc]
        assert found.shape == (0, *expected.shape) and found.dtype == expected.dtype
        gradient = vmap(grad(lambda x, t, i=implementation: case.call(**{**t, leaf: x}, implementation=i).sum()))(
            tensors[leaf], tensors
        )
        assert gradient.shape == tensors[leaf].shape


def test_values_are_checked_in_every_element_of_a_batch() -> None:
    tokens, kept = torch.randn(2, 2, 5, 4), torch.tensor([[[0, 1], [2, 3]], [[0, 1], [2, 5]]])
    with pytest.raises(IndexError, match=r"kept must hold values in \[0, 5\), found 5"):
        vmap(masked_gather)(tokens, kept)
    rows = torch.randn(2, 4, 1, 4)
    for bad, message in (([0, 3], "must end with"), ([1, 4], "must begin with 0"), ([0, 5, 4], "never decrease")):
        good = [0, 4] if len(bad) == 2 else [0, 2, 4]
        ends = torch.tensor([good, bad], dtype=torch.int32)
        with pytest.raises(ValueError, match=message):
            vmap(lambda x, cu: varlen_attention(x, x, x, cu))(rows, ends)
        with pytest.raises(ValueError, match=message):  # the batch is the last dimension
            vmap(lambda x, cu: varlen_attention(x, x, x, cu), in_dims=(0, 1))(rows, ends.T)
        with pytest.raises(ValueError, match=message):
            grad(lambda x, cu: varlen_attention(x, x, x, cu).sum())(rows[0], ends[1])


@pytest.mark.parametrize("name", NAMES)
def test_a_second_derivative_is_refused_and_never_lost(name: str) -> None:
    """A penalty on a gradient is refused too where the incoming gradient needs none itself."""
    case = CASES[name]
    tensors = _drawn(case)
    first = case.gradients[0]

    def loss(x: Tensor) -> Tensor:
        return case.loss()({**tensors, first: x})

    def penalty(x: Tensor) -> Tensor:
        return grad(loss)(x).square().sum()

    linear = name.startswith(("masked_gather", "gather_patches"))
    for second in (grad(penalty), jacrev(jacrev(loss)), lambda x: vmap(grad(penalty))(x.unsqueeze(0))):
        if linear:
            assert not second(tensors[first]).any()  # the gradient of a gather does not depend on its tokens
            continue
        with pytest.raises(RuntimeError, match="differentiate twice.*implementation='reference'"):
            second(tensors[first])
    if not linear:
        leaf = tensors[first].clone().requires_grad_()
        (slope,) = torch.autograd.grad(loss(leaf), leaf, create_graph=True)
        with pytest.raises(RuntimeError, match="differentiate twice"):
            (loss(leaf) + slope.square().sum()).backward()


@pytest.mark.parametrize("name", NAMES)
def test_forward_mode_is_refused_with_the_remedy(name: str) -> None:
    case = CASES[name]
    tensors = _drawn(case)
    first = case.gradients[0]

    def loss(x: Tensor) -> Tensor:
        return case.loss()({**tensors, first: x})

    x = tensors[first]
    for forward in (jacfwd(loss), hessian(loss), lambda x: jvp(loss, (x,), (torch.ones_like(x),))):
        with pytest.raises(NotImplementedError, match="no derivative in forward mode.*implementation='reference'"):
            forward(x)
    with forward_ad.dual_level(), pytest.raises(NotImplementedError, match="no derivative in forward mode"):
        loss(forward_ad.make_dual(x, torch.ones_like(x)))


def test_masks_of_a_batch_of_samples() -> None:
    samples = torch.arange(6).view(3, 2)
    for pattern in ("random", "block", "reversed_block"):
        found = vmap(lambda s, p=pattern: draw_masks(1, 2, s, (6, 6), 12, p))(samples)  # type: ignore[misc]
        for i in range(3):
            expected = draw_masks(1, 2, samples[i], (6, 6), 12, pattern)  # type: ignore[arg-type]
            assert torch.equal(found[0][i], expected.mask) and torch.equal(found[1][i], expected.kept)
    steps = torch.tensor([4, 9])
    found = vmap(lambda step: patch_mask(1, step, samples[0], 36, 9))(steps)
    assert torch.equal(found, torch.stack([patch_mask(1, int(step), samples[0], 36, 9) for step in steps]))
    counts = torch.tensor([[1, 0, 3], [2, 2, 2]])
    assert torch.equal(vmap(boundaries)(counts), torch.stack([boundaries(each) for each in counts]))


@pytest.mark.parametrize("pattern", ["random", "block", "reversed_block"])
def test_masks_of_an_empty_batch(pattern: Any) -> None:
    samples = torch.arange(2)
    for masks in (
        vmap(lambda s: draw_masks(1, 2, s, (4, 4), 5, pattern))(samples.expand(0, 2)),
        vmap(lambda step: draw_masks(1, step, samples, (4, 4), 5, pattern))(samples[:0]),
    ):
        assert masks[0].shape == (0, 2, 16) and masks[1].shape == (0, 2, 11) and masks[0].dtype == torch.bool
    assert vmap(lambda step: patch_mask(1, step, samples, 16, 5))(samples[:0]).shape == (0, 2, 16)


def test_numbers_of_channels_of_an_empty_batch() -> None:
    images, kept = torch.rand(2, 3, 4, 4), torch.tensor([[0], [1]])
    found = vmap(lambda mean: gather_patches(images, kept, 2, mean))(torch.rand(0, 3))
    assert found.shape == (0, 2, 1, 12)


def test_attention_by_length_refuses_boundaries_of_a_batch() -> None:
    rows, ends = torch.randn(4, 1, 2), torch.tensor([[0, 2, 4], [0, 1, 4]])
    for implementation in ("sdpa", "reference"):
        with pytest.raises(ValueError, match=r"torch.vmap cannot batch here; loop over the batch"):
            vmap(lambda c, i=implementation: varlen_attention(rows, rows, rows, c, implementation=i))(ends)


def test_the_definition_takes_part_in_vmap_with_partners() -> None:
    query, key, partner = torch.randn(4, 3), torch.randn(4, 3), torch.randint(4, (2, 4))

    def loss(partner: Tensor) -> Tensor:
        return mixup_info_nce(query, key, 3, partner=partner, implementation="reference")

    torch.testing.assert_close(vmap(loss)(partner), torch.stack([loss(each) for each in partner]))


def test_one_graph_of_a_transform_is_refused_with_the_remedy() -> None:
    x, key = torch.randn(4, 3), torch.randn(4, 3)
    function = torch.compile(grad(lambda x: mixup_info_nce(x, key, 3.0)), backend="eager", fullgraph=True)
    with pytest.raises(torch._dynamo.exc.Unsupported, match=r"traces no gradient of the compiled implementations"):
        function(x)
    torch.compiler.reset()


def test_raw_ops_of_every_library_have_batching_rules() -> None:
    for backend in ("cpp", "triton", "triton_atomic", "portable"):
        library = raw_ops(backend).__name__.removeprefix("torch.ops.")
        for op in ("masked_gather", "gather_patches_backward", "mixup_info_nce_statistics"):
            assert torch._C._dispatch_has_kernel_for_dispatch_key(f"{library}::{op}", "FuncTorchBatched")
