"""The promises of memory where nothing is compiled: plain PyTorch keeps them, and the definition is not chosen."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast import _extension, ops
from oner_fast.benchmarks import peak_memory
from oner_fast.benchmarks.cases import Call
from oner_fast.ops import library, portable, reference
from oner_fast.ops.implementations import choose, implementations
from oner_fast.ops.portable import mixup_info_nce as contrast
from oner_fast.ops.portable import sigmoid_loss as sigmoid

MIB = 2**20
FLOATING = [
    "gather_patches",
    "masked_gather",
    "mixup_info_nce",
    "padded_attention",
    "sigmoid_loss",
    "token_alignment",
    "varlen_attention",
]
linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="needs Linux' /proc")


@pytest.fixture
def nothing_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_status", _extension.Status(False, "not built", "build it"))
    monkeypatch.setattr(_extension, "_warned", True)
    monkeypatch.setattr("importlib.util.find_spec", lambda *names: None)


@pytest.mark.parametrize("device", ["cpu", "cuda", "mps"])
@pytest.mark.parametrize("op", FLOATING)
@pytest.mark.parametrize("causal", [False, True])
def test_the_definition_runs_only_when_asked_for(
    op: str, device: str, causal: bool, nothing_compiled: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    for dtype in (torch.float32, torch.float16, torch.bfloat16, torch.float64):
        facts = {"dtype": dtype, "causal": causal, "head_dim": 64, "needs_grad": True}
        assert choose(op, device, **facts).name == ("sdpa" if op.endswith("attention") else "portable")
        assert choose(op, device, **facts, dropout_p=0.1).name == "portable"
    assert list(implementations(op))[-1] == "reference"
    assert choose(op, device, "reference", dtype=torch.float32).function is getattr(reference, op)


class Bytes(TorchDispatchMode):
    """The most numbers that one result has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.element_size())
        return out


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_no_buffer_of_the_contrast_has_more_numbers_than_stated(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(portable, "PART_NUMBERS", 1 << 12)
    query, key, other = (torch.randn(500, 8).to(dtype) for _ in range(3))
    partner, scale = torch.randint(500, (500,)), torch.tensor(7.0)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    mix, each = torch.rand(500, dtype=wide), torch.rand(500, dtype=wide)
    with Bytes() as seen:
        norms = contrast.inverse_norms(query, other, mix), contrast.inverse_norms(key, None, None)
        sides = (query, other, mix, norms[0], key, None, None, norms[1], scale, partner, 0)
        row_max, _, column_max, *_ = contrast.statistics(*sides, True)
        contrast.backward(*sides, row_max, each, column_max, each, each, each, True, False)
        targets = (partner, each, 0)
        sigmoid.sums(*sides[:9], scale, *targets)
        sigmoid.backward(*sides[:9], scale, *targets, each[:1], True, False)
    # A part has at least 16 rows.
    assert seen.largest <= 16 * 500


def test_what_backward_keeps() -> None:
    """As with the compiled ops: the inputs, and a few numbers for each row."""

    def contrast_of(query: Tensor, key: Tensor) -> Tensor:
        return ops.mixup_info_nce(query, key, 5.0, implementation="portable")

    def alignment_of(student: Tensor, teacher: Tensor) -> Tensor:
        return ops.token_alignment(student, teacher, implementation="portable")

    def gather_of(tokens: Tensor, positions: Tensor) -> Tensor:
        return ops.masked_gather(tokens, kept, positions, implementation="portable")

    query, key = (torch.randn(300, 64, requires_grad=True) for _ in range(2))
    _, beyond = peak_memory.saved_bytes(contrast_of, Call((query, key), (query, key)))
    assert beyond <= 300 * 4 * 8
    student, teacher = (torch.randn(3, 100, 64, requires_grad=True) for _ in range(2))
    _, beyond = peak_memory.saved_bytes(alignment_of, Call((student, teacher), (student,)))
    assert beyond == 300 * 2 * 4
    tokens, positions = torch.randn(3, 100, 64, requires_grad=True), torch.randn(100, 64, requires_grad=True)
    kept = torch.randint(100, (3, 20))
    saved, _ = peak_memory.saved_bytes(gather_of, Call((tokens, positions), (tokens, positions)))
    assert saved == kept.nbytes


@pytest.mark.parametrize("numbers", [1, 64, 1 << 22])
def test_the_size_of_the_parts_changes_no_more_than_rounding(numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "PART_NUMBERS", numbers)
    query, key = (torch.randn(50, 12, dtype=torch.float64, requires_grad=True) for _ in range(2))
    partner, kept = torch.randint(50, (50,)), torch.randint(9, (5, 4))
    student, teacher = torch.randn(5, 4, 6, dtype=torch.float64, requires_grad=True), torch.randn(5, 9, 6)
    found = {}
    for name in ("portable", "reference"):
        loss = ops.mixup_info_nce(query, key, 9.0, key_other=query, partner=partner, implementation=name)
        loss = loss + ops.sigmoid_loss(query, key, 9.0, -2.0, key_other=query, partner=partner, implementation=name)
        loss = loss + ops.token_alignment(student, teacher.double(), kept, implementation=name)
        found[name] = [loss.detach(), *torch.autograd.grad(loss, (query, key, student))]
    for one, other in zip(found["portable"], found["reference"], strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-12)


def test_blocks_of_a_larger_matrix_and_missing_rows() -> None:
    """As ranks exchange keys: statistics of blocks add up, and a block without rows or columns has none."""
    raw = library.raw_ops("portable")
    query, keys = torch.randn(50, 40, dtype=torch.float64), reference.unit(torch.randn(90, 40, dtype=torch.float64))
    partner, side = torch.randint(90, (50,)), (query, None, None, raw.mixup_inverse_norms(query, None, None))

    def statistics(first: int, last: int) -> list[Tensor]:
        block = (keys[first:last], None, None, None, torch.tensor(9.0), partner - first, 20 - first)
        return list(raw.mixup_info_nce_statistics(*side, *block, True))

    whole, blocks = statistics(0, 90), [statistics(*ends) for ends in ((0, 30), (30, 31), (31, 90), (90, 90))]
    for at in (4, 5):
        torch.testing.assert_close(sum(one[at] for one in blocks), whole[at])
    torch.testing.assert_close(torch.cat([one[2] for one in blocks]), whole[2])
    assert blocks[3][0].eq(-torch.inf).all() and not blocks[3][1].any()
    none = torch.zeros(0, dtype=torch.float64)
    results = raw.mixup_info_nce_backward(
        query[:0], None, None, none, keys, None, None, None, torch.tensor(9.0), None, 0, none, none,
        *torch.zeros(2, 90, dtype=torch.float64), none, None, True, True,
    )  # fmt: skip
    assert results[0].shape == (0, 40) and results[3].shape == (90, 40) and not results[3].any()


def test_one_graph_and_opcheck() -> None:
    """The raw ops are opaque to torch.compile: no loop over parts is unrolled."""
    query, key = (torch.randn(20, 8, requires_grad=True) for _ in range(2))

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return ops.mixup_info_nce(query, key, 5.0, implementation="portable")

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(query, key), loss(query, key))
    raw = torch.ops.oner_fast_portable
    torch.library.opcheck(raw.mixup_inverse_norms.default, (query.detach(), None, None))
    torch.library.opcheck(raw.token_alignment.default, (torch.randn(2, 3, 4), torch.randn(2, 3, 4), None))
    kept = torch.tensor([[1, 1], [0, 2]])
    torch.library.opcheck(raw.masked_gather.default, (torch.randn(2, 3, 4), kept, torch.randn(3, 4), None, None))
    torch.library.opcheck(
        raw.gather_patches.default, (torch.rand(2, 3, 8, 8), kept, 4, None, None, torch.float32, None)
    )


PROGRAM = """
import json, sys, torch
from oner_fast.benchmarks.peak_memory import peak_bytes
from oner_fast.ops import mixup_info_nce, varlen_attention
torch.set_num_threads(2)
pairs, width, length = map(int, sys.argv[1:])
small = torch.randn(64, width, requires_grad=True)
mixup_info_nce(small, small, 20.0).backward()  # what libraries allocate once
query, key = (torch.randn(pairs, width, requires_grad=True) for _ in range(2))
def contrast():
    loss = mixup_info_nce(query, key, 20.0)
    return (loss, *torch.autograd.grad(loss, (query, key)))
tokens = [torch.randn(length, heads, 16, requires_grad=True) for heads in (4, 2, 2)]
cu_seqlens = torch.tensor([0, length], dtype=torch.int32)
def attention():
    out = varlen_attention(*tokens, cu_seqlens, causal=True)
    return (out, *torch.autograd.grad(out.sum(), tokens))
found = []
for run in (contrast, attention):
    peak, results = peak_bytes(run, warm_ups=0)
    found.append([peak, all(bool(x.isfinite().all()) for x in results)])
print(json.dumps(found))
"""


def measured(pairs: int, width: int, length: int) -> list[list[Any]]:
    environment = {**os.environ, **peak_memory.ENVIRONMENT, "ONER_FAST_LIBRARY": "/nonexistent/_C.so"}
    command = [sys.executable, "-W", "ignore", "-c", PROGRAM, str(pairs), str(width), str(length)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=True, cwd="/")
    return json.loads(done.stdout)


@linux
def test_memory_without_the_extension() -> None:
    """The logits alone would take 64 MiB, and the scores of attention as much."""
    (of_contrast, finite), (of_attention, also) = measured(4096, 32, 2048)
    assert finite and also
    assert of_contrast <= 64 * MIB
    assert of_attention <= 24 * MIB


@linux
@pytest.mark.slow
def test_memory_of_a_large_batch_without_the_extension() -> None:
    """N 32,768 and D 256: the logits alone would take 4 GiB."""
    (of_contrast, finite), _ = measured(32768, 256, 64)
    assert finite and of_contrast <= 400 * MIB


def _column_major(x: Tensor) -> Tensor:
    return x.transpose(-1, -2).contiguous().transpose(-1, -2)


@pytest.mark.parametrize("layout", [Tensor.contiguous, _column_major], ids=["rows", "columns"])
def test_opcheck(layout: Any) -> None:
    """Results have the strides that the fake implementations promise to torch.compile, whatever those of the inputs."""
    raw, kept = library.raw_ops("portable"), layout(torch.tensor([[0, 3], [1, 2]]))
    one, other, positions = (layout(torch.randn(*size)) for size in ((5, 6), (5, 6), (4, 6)))
    tokens, images, e = layout(torch.randn(2, 4, 6)), layout(torch.randn(2, 3, 4, 4)), torch.rand(5)
    sides = (one, None, e, None, other, None, e, None, torch.tensor(5.0), None, 0)
    calls: list[tuple[Any, tuple[Any, ...]]] = [
        (raw.mixup_info_nce_statistics, (*sides, True)),
        (raw.mixup_info_nce_backward, (*sides, e, e, e, e, e, None, True, True)),
        (raw.mixup_info_nce_backward, (*sides, e, e, e, e, e, None, True, False)),
        (raw.masked_gather, (tokens, kept, None, None, None)),
        (raw.masked_gather, (tokens, kept, positions, positions, None)),
        (raw.masked_gather_backward, (layout(torch.randn(2, 4, 6)), kept, None, 2, 4, 2, True, True, True)),
        (raw.gather_patches, (images, kept, 2, torch.rand(3), None, torch.float32, None)),
        (raw.gather_patches_backward, (layout(torch.randn(2, 2, 12)), kept, 2, None, (2, 3, 4, 4), torch.half, None)),
        (raw.token_alignment, (tokens[:, :2], tokens, kept)),
        (
            raw.token_alignment_backward,
            (torch.ones(()), layout(torch.randn(2, 2, 6)), tokens, kept, torch.ones(4, 2)),
        ),
    ]
    for op, arguments in calls:
        torch.library.opcheck(op, arguments, test_utils=("test_schema", "test_faketensor"))
