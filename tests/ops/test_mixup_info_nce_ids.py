"""mixup_info_nce where rows have ids: further positives, and pairs that are ignored."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from oner_fast import _extension
from oner_fast.ops import mixup_info_nce, reference
from oner_fast.ops.implementations import implementations
from oner_fast.ops.same_ids import same_pairs
from tests.ops.test_mixup_info_nce import formula

EVERY = [name for name, one in implementations("mixup_info_nce").items() if not one.reasons_against("cpu")]
COMPUTED = [name for name in EVERY if name != "reference"]
SAME = ("positive", "ignore")
LARGEST, SMALLEST = 2**63 - 1, -(2**63)


def rows(count: int, width: int, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(count + width)
    query = torch.randn(count, width, generator=generator, dtype=torch.float64)
    key = query + 2 * torch.randn(count, width, generator=generator, dtype=torch.float64)
    return [x.to(dtype).requires_grad_() for x in (query, key)]


def run(leaves: list[Tensor], scale: float, implementation: str, **options: Any) -> list[Tensor]:
    """The loss, and the gradients of query and key."""
    loss = mixup_info_nce(*leaves, scale, **options, implementation=implementation)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]


@pytest.mark.parametrize("implementation", EVERY)
@given(
    ids=st.lists(st.sampled_from([-1, 0, 1, -2, LARGEST, SMALLEST]), min_size=1, max_size=8),
    keys=st.one_of(st.none(), st.randoms(use_true_random=False)),
    width=st.integers(1, 4),
    mixed=st.booleans(),
    normalized=st.booleans(),
    symmetric=st.booleans(),
    same=st.sampled_from(SAME),
)
def test_the_loss_agrees_with_its_formula(
    implementation: str, ids: list[int], keys: Any, width: int, mixed: bool, normalized: bool, **options: Any
) -> None:
    count = len(ids)
    leaves = rows(count, width)
    options |= {"query_ids": torch.tensor(ids), "normalized": normalized}
    if keys is not None:
        options["key_ids"] = torch.tensor(keys.sample(ids, count))
    if mixed:
        leaves += rows(count, width + 5)
        leaves[2:] = [x.detach()[:, :width].clone().requires_grad_() for x in leaves[2:]]
        options |= {"query_other": leaves[2], "key_other": leaves[3]}
    ours = mixup_info_nce(*leaves[:2], 5.0, **options, implementation=implementation)
    exact = formula(*leaves[:2], 5.0, **options)
    torch.testing.assert_close(ours, exact, rtol=1e-11, atol=1e-11)
    mine, theirs = torch.autograd.grad(ours, leaves), torch.autograd.grad(exact, leaves)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("symmetric", [True, False])
def test_gradcheck(implementation: str, same: str, symmetric: bool) -> None:
    options = {"query_ids": torch.tensor([3, 3, -1, 3, 4]), "key_ids": torch.tensor([3, 4, -1, 3, 3])}
    scale = torch.tensor(4.0, dtype=torch.float64, requires_grad=True)

    def call(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        return mixup_info_nce(
            query, key, scale, **options, same=same, symmetric=symmetric, implementation=implementation
        )

    assert torch.autograd.gradcheck(call, (*rows(5, 3), scale))


@pytest.mark.parametrize("implementation", COMPUTED)
@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ids", ["-1", "all differ"])
def test_ids_without_equals_change_no_more_than_rounding(
    implementation: str, same: str, symmetric: bool, dtype: torch.dtype, ids: str
) -> None:
    leaves = rows(150, 24, dtype)
    given = torch.full((150,), -1) if ids == "-1" else torch.randperm(150) * 2**50 + SMALLEST
    found = run(leaves, 20.0, implementation, query_ids=given, same=same, symmetric=symmetric)
    for one, right in zip(found, run(leaves, 20.0, implementation, symmetric=symmetric), strict=True):
        step = torch.finfo(right.dtype).eps  # a compiler may fuse other products and sums
        torch.testing.assert_close(one, right, rtol=step, atol=8 * step * float(right.abs().max()))


@pytest.mark.parametrize("implementation", EVERY)
@pytest.mark.parametrize("count", [1, 2, 300])
def test_where_every_other_key_is_ignored_nothing_is_left(implementation: str, count: int) -> None:
    """Each softmax has one logit, so that the loss and its gradients are exactly 0."""
    leaves = rows(count, 8, torch.float32)
    for one in run(leaves, 50.0, implementation, query_ids=torch.full((count,), 7), same="ignore"):
        assert one.isfinite().all() and one.abs().max() <= (1e-6 if implementation == "reference" else 0)


@pytest.mark.parametrize("implementation", EVERY)
def test_where_all_keys_are_positive_targets_are_uniform(implementation: str) -> None:
    leaves = rows(40, 8)
    ids = torch.full((40,), 7)
    found = run(leaves, 5.0, implementation, query_ids=ids)
    logits = 5 * reference.unit(leaves[0]) @ reference.unit(leaves[1]).T
    right = -(logits.log_softmax(1).mean() + logits.log_softmax(0).mean()) / 2
    for one, other in zip(found, (right, *torch.autograd.grad(right, leaves)), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("implementation", EVERY)
def test_an_own_pair_counts_though_its_ids_differ(implementation: str) -> None:
    """Row 0 has the targets 0, its own, and 1, whose key has its id; column 1 has 0 and its own."""
    query, key = torch.eye(3, dtype=torch.float64), torch.eye(3, dtype=torch.float64)
    options = {
        "query_ids": torch.tensor([5, 6, 7]),
        "key_ids": torch.tensor([1, 5, 2]),
        "implementation": implementation,
    }
    total = math.log(math.e + 2)
    loss = mixup_info_nce(query, key, 1.0, **options, same="positive", symmetric=False)
    torch.testing.assert_close(loss.item(), (3 * total - 0.5 - 1 - 1) / 3)
    loss = mixup_info_nce(query, key, 1.0, **options, same="ignore")
    torch.testing.assert_close(loss.item(), (2 * math.log(math.e + 1) + 4 * total) / 6 - 1)


def inputs_of(count: int, width: int, dtype: torch.dtype, classes: int) -> tuple[list[Tensor], dict[str, Any]]:
    generator = torch.Generator().manual_seed(classes)
    ids = torch.randint(classes, (2, count), generator=generator) - 1
    return rows(count, width, dtype), {"query_ids": ids[0], "key_ids": ids[1]}


def plain(query: Tensor, key: Tensor, scale: float, query_ids: Tensor, key_ids: Tensor, same: str) -> Tensor:
    """The obvious PyTorch code, in the inputs' dtype."""
    logits = scale * torch.nn.functional.normalize(query, dim=1) @ torch.nn.functional.normalize(key, dim=1).T
    diagonal = torch.eye(len(query), dtype=torch.bool)
    equal = (query_ids.unsqueeze(1) == key_ids) & (key_ids != -1)
    if same == "ignore":
        logits = logits.masked_fill(equal & ~diagonal, -torch.inf)
        target = torch.arange(len(query))
        losses = [torch.nn.functional.cross_entropy(x, target) for x in (logits, logits.T)]
    else:
        targets = (equal | diagonal).to(logits.dtype)
        losses = [
            torch.nn.functional.cross_entropy(x, t / t.sum(1, keepdim=True))
            for x, t in ((logits, targets), (logits.T, targets.T))
        ]
    return (losses[0] + losses[1]) / 2


@pytest.mark.parametrize("implementation", COMPUTED)
@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(
    ("count", "width", "scale", "classes"), [(33, 24, 14.0, 4), (301, 80, 20.0, 2), (530, 64, 100.0, 200)]
)
def test_error_against_float64_is_near_that_of_plain_pytorch(
    implementation: str, same: str, dtype: torch.dtype, count: int, width: int, scale: float, classes: int
) -> None:
    """Several blocks; small classes, and one that holds half of the rows."""
    leaves, ids = inputs_of(count, width, dtype, classes)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    exact, theirs = plain(*wide, scale, **ids, same=same), plain(*leaves, scale, **ids, same=same)
    found = run(leaves, scale, implementation, **ids, same=same)
    bound = 2 * abs(theirs.double() - exact) + torch.finfo(torch.float32).eps * (1 + abs(exact))
    assert abs(found[0].double() - exact) <= bound
    plains, rights = torch.autograd.grad(theirs, leaves), torch.autograd.grad(exact, wide)
    for one, other, right in zip(found[1:], plains, rights, strict=True):
        unit = torch.finfo(dtype).eps * right.abs().max()
        assert (one.double() - right).abs().max() <= 3 * (other.double() - right).abs().max() + unit


@pytest.mark.parametrize("implementation", COMPUTED)
def test_an_ignored_logit_far_above_all_others_overflows_nothing(implementation: str) -> None:
    """Key 1 has the direction of query 0 at scale 200: exp(200) is infinite in float32, beside logits of -200."""
    query = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [-1.0, 0.1]])
    leaves = [query.requires_grad_(), (-query.detach()).requires_grad_()]
    options = {"query_ids": torch.tensor([4, 4, -1]), "same": "ignore"}
    found = run(leaves, 200.0, implementation, **options)
    wide = [x.detach().double().requires_grad_() for x in leaves]
    for one, right in zip(found, run(wide, 200.0, "reference", **options), strict=True):
        torch.testing.assert_close(one.double(), right, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("implementation", COMPUTED)
@pytest.mark.parametrize("same", SAME)
def test_a_diverged_row_makes_the_loss_nan(implementation: str, same: str) -> None:
    leaves = rows(40, 6, torch.float32)
    with torch.no_grad():
        leaves[0][3] = torch.nan
    assert run(leaves, 5.0, implementation, query_ids=torch.arange(40) // 2, same=same)[0].isnan()


@pytest.mark.parametrize("same", SAME)
@pytest.mark.parametrize("implementation", COMPUTED)
def test_autocast_and_strides_change_nothing_about_ids(implementation: str, same: str) -> None:
    leaves, ids = inputs_of(20, 8, torch.float32, 4)
    strided = {name: torch.stack([x, x], dim=1)[:, 0] for name, x in ids.items()}
    right = run(leaves, 5.0, implementation, **ids, same=same)
    assert all(
        torch.equal(a, b) for a, b in zip(run(leaves, 5.0, implementation, **strided, same=same), right, strict=True)
    )
    with torch.autocast("cpu", dtype=torch.bfloat16):
        inside = mixup_info_nce(*leaves, 5.0, **ids, same=same, implementation=implementation)
    narrow = [x.detach().bfloat16() for x in leaves]
    assert torch.equal(inside, mixup_info_nce(*narrow, 5.0, **ids, same=same, implementation=implementation))


@pytest.mark.parametrize("implementation", COMPUTED)
@pytest.mark.parametrize("same", SAME)
def test_compiles_to_one_graph(implementation: str, same: str) -> None:
    leaves, ids = inputs_of(40, 16, torch.float32, 9)

    def call(query: Tensor, key: Tensor, query_ids: Tensor, key_ids: Tensor) -> Tensor:
        return mixup_info_nce(
            query, key, 9.0, query_ids=query_ids, key_ids=key_ids, same=same, implementation=implementation
        )

    compiled = torch.compile(call, fullgraph=True, backend="aot_eager")(*leaves, *ids.values())
    for one, right in zip(
        (compiled, *torch.autograd.grad(compiled, leaves)), run(leaves, 9.0, implementation, **ids, same=same),
        strict=True,
    ):  # fmt: skip
        torch.testing.assert_close(one.detach(), right)


@pytest.mark.parametrize("same", SAME)
def test_saves_a_few_numbers_a_row_more(same: str) -> None:
    leaves, ids = inputs_of(512, 32, torch.float32, 9)
    saved: dict[bool, dict[int, int]] = {True: {}, False: {}}
    for with_ids in (True, False):

        def note(x: Tensor, with_ids: bool = with_ids) -> Tensor:
            saved[with_ids][x.untyped_storage().data_ptr()] = x.untyped_storage().nbytes()
            return x

        with torch.autograd.graph.saved_tensors_hooks(note, lambda x: x):
            mixup_info_nce(*leaves, 9.0, **(ids if with_ids else {}), same=same, implementation=COMPUTED[0])
    # The codes of queries and keys and, for positives, their shares.
    more = 4 * 4 * 512 if same == "positive" else 2 * 4 * 512
    assert sum(saved[True].values()) - sum(saved[False].values()) == more


def codes(query_ids: list[int], key_ids: list[int] | None = None, **options: bool) -> Any:
    options = {"positive": True, "symmetric": True, **options}
    given = None if key_ids is None else torch.tensor(key_ids)
    return same_pairs(torch.zeros(len(query_ids), 1), torch.tensor(query_ids), given, **options)


def test_codes_are_equal_where_ids_are_and_shares_count_them() -> None:
    found = codes([9, -1, LARGEST, 9, SMALLEST], [9, -1, 9, LARGEST, SMALLEST])
    equal = found.query_code.unsqueeze(1) == found.key_code
    assert equal.int().tolist() == [
        [1, 0, 1, 0, 0], [0, 0, 0, 0, 0], [0, 0, 0, 1, 0], [1, 0, 1, 0, 0], [0, 0, 0, 0, 1]
    ]  # fmt: skip
    # Row 2 has key 3 and its own; row 3 has keys 0, 2 and its own. Column 2 has rows 0, 3 and its own.
    assert (1 / found.row_share).tolist() == [2, 1, 2, 3, 1]
    assert (1 / found.column_share).tolist() == [2, 1, 3, 2, 1]
    assert not codes([9, 9], symmetric=False).column_share.any()
    ignored = codes([9, 9], positive=False)
    assert ignored.row_share is None and ignored.column_share is None


@pytest.mark.skipif(not _extension.status().loaded, reason="the extension is not built")
class TestRawOps:
    def given(self, dtype: torch.dtype, positive: bool) -> tuple[tuple[Any, ...], tuple[Any, ...], Any]:
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        query, key = (x.detach() for x in rows(20, 12, dtype))
        norms = [torch.ops.oner_fast.mixup_inverse_norms(x, None, None) for x in (query, key)]
        ids = torch.arange(20) // 3 - 1
        same = same_pairs(query, ids, None, positive=positive, symmetric=True)
        forward = (query, None, None, norms[0], key, None, None, norms[1], torch.tensor(5.0), None, 0)
        row_max, row_sum, column_max, column_sum, *_ = torch.ops.oner_fast.mixup_info_nce_statistics(
            *forward, True, *same
        )
        each = torch.full((20,), 0.1, dtype=wide)
        weights = (row_max, each / row_sum, column_max, each / column_sum, same.row_share if positive else each, None)
        return (*forward, True, *same), (*forward, *weights, True, False, *same.of_backward(each)), same

    @pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
    @pytest.mark.parametrize("positive", [True, False])
    def test_opcheck(self, dtype: torch.dtype, positive: bool) -> None:
        forward, backward, _ = self.given(dtype, positive)
        torch.library.opcheck(torch.ops.oner_fast.mixup_info_nce_statistics.default, forward)
        torch.library.opcheck(torch.ops.oner_fast.mixup_info_nce_backward.default, backward)

    def test_wrong_codes_and_shares_are_refused(self) -> None:
        forward, backward, same = self.given(torch.float32, True)
        statistics, gradients = (
            torch.ops.oner_fast.mixup_info_nce_statistics,
            torch.ops.oner_fast.mixup_info_nce_backward,
        )
        partner = torch.zeros(20, dtype=torch.int64)
        refused = (ValueError, RuntimeError)
        for op, arguments, message in (
            (statistics, (*forward[:12], same.query_code[:19], *forward[13:]), "query_code must be"),
            (statistics, (*forward[:13], same.key_code.long(), *forward[14:]), "key_code must be"),
            (statistics, (*forward[:13], None, *forward[14:]), "codes of both sides come together"),
            (statistics, (*forward[:12], None, None, *forward[14:]), "come together"),
            (statistics, (*forward[:15], same.column_share.double()), "column_share must be"),
            (statistics, (*forward[:9], partner, *forward[10:]), "codes and partners exclude each other"),
            (gradients, (*backward[:21], same.column_share[:3]), "column_share must be"),
            (gradients, (*backward[:9], partner, *backward[10:16], forward[3], *backward[17:]), "exclude each other"),
        ):
            with pytest.raises(refused, match=message):
                op(*arguments)
