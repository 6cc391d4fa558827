"""FLOPs of our ops by PyTorch's counter."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from oner_fast import _extension
from oner_fast.ops import (
    masked_gather,
    mixup_info_nce,
    padded_attention,
    sigmoid_loss,
    token_alignment,
    varlen_attention,
)

compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")


def counted(run: Callable[[], object]) -> int:
    with FlopCounterMode(display=False) as counter:
        run()
    return int(counter.get_total_flops())


def leaves(*shapes: tuple[int, ...]) -> list[Tensor]:
    return [torch.randn(shape).requires_grad_() for shape in shapes]


@compiled
def test_flops_of_attention_count_pairs_within_sequences() -> None:
    query, key, value = leaves((11, 4, 8), (9, 2, 8), (9, 2, 8))
    cu_q, cu_k = torch.tensor([0, 5, 5, 11], dtype=torch.int32), torch.tensor([0, 3, 4, 9], dtype=torch.int32)
    product = 2 * (5 * 3 + 0 * 1 + 6 * 5) * 4 * 8

    def attend(causal: bool = False) -> Tensor:
        return varlen_attention(query, key, value, cu_q, cu_k, causal=causal, implementation="cpp")

    assert counted(attend) == 2 * product
    assert counted(lambda: attend(causal=True)) == 2 * product  # as PyTorch counts its own
    for needed, products in ([query, key, value], 5), ([query], 3), ([value], 4):
        for leaf in (query, key, value):
            leaf.requires_grad_(any(leaf is one for one in needed))
        assert counted(lambda: attend().sum().backward()) == (2 + products) * product
    own = torch.tensor([0, 2, 9], dtype=torch.int32)
    given = [one.detach() for one in leaves((9, 4, 8), (9, 2, 8), (9, 2, 8))]
    assert counted(lambda: varlen_attention(*given, own)) == 4 * (2 * 2 + 7 * 7) * 4 * 8


@compiled
def test_flops_of_padded_attention_count_no_padding() -> None:
    query, key, value = leaves((3, 4, 5, 8), (3, 2, 7, 8), (3, 2, 7, 8))
    lengths, product = torch.tensor([7, 0, 2]), 2 * (5 * 7 + 5 * 0 + 5 * 2) * 4 * 8

    def attend(**options: object) -> Tensor:
        return padded_attention(query, key, value, implementation="cpp", **options)  # type: ignore[arg-type]

    assert counted(attend) == 2 * 2 * 3 * 5 * 7 * 4 * 8
    for options in ({}, {"causal": True}, {"dropout_p": 0.5}):
        assert counted(lambda o=options: attend(key_lengths=lengths, **o)) == 2 * product  # type: ignore[misc]
        assert counted(lambda o=options: attend(key_lengths=lengths, **o).sum().backward()) == 7 * product  # type: ignore[misc]
    query.requires_grad_(False)
    assert counted(lambda: attend(key_lengths=lengths).sum().backward()) == 6 * product
    raw, wide = torch.ops.oner_fast_triton, 2 * 3 * 5 * 7 * 4 * 8
    with FakeTensorMode():
        q, k, seen = torch.empty(3, 5, 4, 8), torch.empty(3, 7, 2, 8), torch.empty(3, dtype=torch.int32)
        given = q, q, k, k, q, torch.empty(2, 3, 5, 4), seen, 1.0
        assert counted(lambda: raw.padded_attention(q, k, k, seen, 1.0)) == 2 * wide
        assert counted(lambda: raw.padded_attention_backward(*given, True, True)) == 7 * wide
        assert counted(lambda: raw.padded_attention_backward(*given, False, True)) == 4 * wide


@pytest.mark.parametrize("symmetric", [True, False])
@compiled
def test_flops_of_the_contrast_count_logits_twice_and_needed_gradients(symmetric: bool) -> None:
    query, key = leaves((7, 5), (7, 5))
    product = 2 * 7 * 7 * 5

    def loss(key: Tensor) -> Tensor:
        return mixup_info_nce(query, key, 3.0, symmetric=symmetric, implementation="cpp")

    assert counted(lambda: loss(key)) == product
    assert counted(lambda: loss(key).backward()) == 4 * product
    assert counted(lambda: loss(key.detach()).backward()) == 3 * product


@compiled
def test_flops_of_the_sigmoid_loss_are_those_of_the_contrast() -> None:
    query, key = leaves((7, 5), (7, 5))
    product = 2 * 7 * 7 * 5

    def loss(key: Tensor) -> Tensor:
        return sigmoid_loss(query, key, 3.0, -1.0, implementation="cpp")

    assert counted(lambda: loss(key)) == product
    assert counted(lambda: loss(key).backward()) == 4 * product
    assert counted(lambda: loss(key.detach()).backward()) == 3 * product


@compiled
def test_ops_that_move_memory_count_no_flops() -> None:
    tokens, student = leaves((2, 5, 8), (2, 3, 8))
    kept = torch.tensor([[0, 4, 1], [2, 2, 3]])
    assert counted(lambda: masked_gather(tokens, kept, implementation="cpp").sum().backward()) == 0
    assert counted(lambda: token_alignment(student, tokens, kept, implementation="cpp").backward()) == 0


@pytest.mark.parametrize(
    "imports",
    [
        "import oner_fast.ops\nassert 'torch.utils.flop_counter' not in sys.modules\nimport torch.utils.flop_counter",
        "import torch.utils.flop_counter\nimport oner_fast.ops",
    ],
)
def test_flop_counter_knows_the_ops_in_either_order_of_import(imports: str) -> None:
    program = f"""
import sys
{imports}
import torch
registry = torch.utils.flop_counter.flop_registry
print(sorted(str(one) for one in registry if str(one).startswith("oner_fast.")), len(registry) > 4)
print([type(one).__name__ for one in sys.meta_path if "oner_fast" in type(one).__module__])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    known = [
        "oner_fast.mixup_info_nce_backward",
        "oner_fast.mixup_info_nce_statistics",
        "oner_fast.padded_attention",
        "oner_fast.padded_attention_backward",
        "oner_fast.sigmoid_loss_backward",
        "oner_fast.sigmoid_loss_sums",
        "oner_fast.varlen_attention",
        "oner_fast.varlen_attention_backward",
    ]
    assert done.stdout.splitlines() == [f"{known} True", "[]"]


@pytest.mark.parametrize("library", ["oner_fast_triton", "oner_fast_triton_atomic"])
def test_flops_of_tritons_attention_count_the_scores_in_both_backward_kernels(library: str) -> None:
    """Three products for the query's gradient, four for the key's and value's: seven, where C++ needs five."""
    raw, product = getattr(torch.ops, library), 2 * (12 * 12 // 3) * 2 * 4
    with FakeTensorMode():
        query, key, value, out, grad = (torch.empty(12, 2, 4) for _ in range(5))
        statistics, cu_seqlens = torch.empty(2, 12, 2), torch.empty(4, dtype=torch.int32)

        def backward(need_query: bool, need_key: bool) -> object:
            given = grad, query, key, value, out, statistics, cu_seqlens, None, False, 1.0
            return raw.varlen_attention_backward(*given, need_query, need_key)

        forward = counted(lambda: raw.varlen_attention(query, key, value, cu_seqlens, None, False, 1.0))
        assert forward == 2 * product
        assert counted(lambda: backward(True, True)) == 7 * product
        assert counted(lambda: backward(True, False)) == 3 * product
        assert counted(lambda: backward(False, True)) == 4 * product


@pytest.mark.parametrize(
    ("library", "dtype", "width", "mixed", "both"),
    [
        ("oner_fast_triton", torch.bfloat16, 256, False, 4),  # kept whole: each side makes the logits
        ("oner_fast_triton", torch.bfloat16, 257, False, 3),  # deep: once, for both
        ("oner_fast_triton", torch.float16, 128, True, 4), ("oner_fast_triton", torch.float16, 129, True, 3),
        ("oner_fast_triton", torch.float32, 8, False, 3), ("oner_fast_triton_atomic", torch.bfloat16, 64, False, 3),
        ("oner_fast", torch.bfloat16, 64, False, 3),
    ],
)  # fmt: skip
def test_flops_of_the_contrasts_backward_follow_each_library(
    library: str, dtype: torch.dtype, width: int, mixed: bool, both: int
) -> None:
    pytest.importorskip("triton")
    raw, product = getattr(torch.ops, library), 2 * 7 * 6 * width
    with FakeTensorMode():
        query, key, mix = torch.empty(7, width, dtype=dtype), torch.empty(6, width, dtype=dtype), torch.empty(7)
        row, column, scale = torch.empty(7), torch.empty(6), torch.empty(())
        other = query if mixed else None

        codes = torch.empty(7, dtype=torch.int32)

        def backward(need_key: bool, *same: Tensor) -> object:
            return raw.mixup_info_nce_backward(
                query, other, mix if mixed else None, row, key, None, None, column, scale, None, 0, row, row, column,
                column, row, None, need_key, False, *same,
            )  # fmt: skip

        assert counted(lambda: backward(True)) == both * product
        assert counted(lambda: backward(False)) == 2 * product
        assert counted(lambda: backward(True, codes, codes[:6], column)) == both * product
        assert counted(lambda: backward(False, codes, codes[:6])) == 2 * product
        if library == "oner_fast_triton_atomic":
            return  # sigmoid_loss has no atomic kernels
        side = (query, other, mix if mixed else None, row, key, None, None, column, scale, scale, None, None, 0)
        assert counted(lambda: raw.sigmoid_loss_backward(*side, scale, True, False)) == both * product
        assert counted(lambda: raw.sigmoid_loss_backward(*side, scale, False, False)) == 2 * product
        assert counted(lambda: raw.sigmoid_loss_sums(*side)) == product


def test_flops_of_fake_tensors_assume_sequences_of_equal_length() -> None:
    """As torch.compile meets them."""
    raw = torch.ops.oner_fast.varlen_attention
    with FakeTensorMode():
        given = [torch.empty(12, 2, 4) for _ in range(3)]
        cu_seqlens = torch.empty(4, dtype=torch.int32)
        assert counted(lambda: raw(*given, cu_seqlens, None, False, 1.0)) == 2 * 2 * (12 * 12 // 3) * 2 * 4
