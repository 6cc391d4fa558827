"""Every op on a GPU at real sizes: right, deterministic, capturable, compiled whole, and never waiting for the host."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.benchmarks.cases import OURS, Call, Case, Result, step
from oner_fast.benchmarks.first_gpu.exactness import judged
from oner_fast.benchmarks.first_gpu.shapes import CASES, DTYPES, NOTHING, dtypes_of
from oner_fast.benchmarks.ops import mixup_info_nce
from oner_fast.ops import distill_info_nce, reference
from oner_fast.ops import masked_gather as masked_gather_op
from oner_fast.ops import mixup_info_nce as mixup_info_nce_op
from oner_fast.ops import padded_attention as padded_attention_op
from oner_fast.ops import token_alignment as token_alignment_op
from oner_fast.ops.row_info_nce import row_info_nce

OPS = [(op, dtype) for op in CASES for dtype in dtypes_of(op)]
every_op = pytest.mark.parametrize(("op", "dtype"), OPS, ids=lambda value: str(value).removeprefix("torch."))
every_implementation = pytest.mark.parametrize("implementation", [None, "triton", "cuda"], ids=str)


def prepared(
    op: str, dtype: torch.dtype, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> tuple[Case, Call]:
    """The case and its inputs, run by an implementation; skips, with the reasons, where it cannot run."""
    case = CASES[op](dtype)
    call = case.make(0, "cuda")
    if implementation is not None:
        monkeypatch.setenv(f"ONER_FAST_{op.upper()}_IMPLEMENTATION", implementation)
        try:
            ours(case, call)
        except (RuntimeError, ValueError) as error:
            if "cannot run" not in str(error) and "has no implementation" not in str(error):
                raise
            pytest.skip(str(error))
    return case, call


def ours(case: Case, call: Call) -> Result:
    return step(case.contender(OURS).forward, call)


@every_op
def test_right_against_float64(op: str, dtype: torch.dtype) -> None:
    """By the benchmarks' own criterion: not much worse than the first eager baseline in the same dtype."""
    row = judged(CASES[op](dtype), "cuda")
    wrong = {**row.refused, **row.unavailable}
    assert not [(name, why) for name, why in wrong.items() if name.split()[0] == OURS]


@every_op
@every_implementation
def test_same_bits_twice_without_waiting_for_the_host(
    op: str, dtype: torch.dtype, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, call = prepared(op, dtype, implementation, monkeypatch)
    torch.use_deterministic_algorithms(True)
    first = ours(case, call)  # compiles
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    second = ours(case, call)
    torch.cuda.set_sync_debug_mode("default")
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


@every_op
@every_implementation
def test_captured_in_a_cuda_graph(
    op: str, dtype: torch.dtype, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Replayed on other inputs it gives what a call gives."""
    case, call = prepared(op, dtype, implementation, monkeypatch)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for _ in range(3):
            ours(case, call)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = ours(case, call)
    other = case.make(1, "cuda")
    with torch.no_grad():
        for mine, new in zip(call.arguments + call.upstream, other.arguments + other.upstream, strict=True):
            if isinstance(mine, Tensor):
                mine.copy_(new)
    graph.replay()
    expected = ours(case, other)
    assert all(torch.equal(one, two) for one, two in zip(captured, expected, strict=True))


@every_op
@every_implementation
def test_compiles_as_one_graph(
    op: str, dtype: torch.dtype, implementation: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    case, call = prepared(op, dtype, implementation, monkeypatch)
    torch._dynamo.reset()
    whole = step(torch.compile(case.contender(OURS).forward, fullgraph=True), call)
    for mine, theirs in zip(whole, ours(case, call), strict=True):
        torch.testing.assert_close(mine, theirs)


@pytest.mark.parametrize("implementation", [None, "triton"], ids=str)
def test_memory_of_the_contrast_grows_with_its_rows(implementation: str | None) -> None:
    """O(N D): far from N x N numbers, and twice the rows take twice the memory."""

    def peak(rows: int) -> int:
        case = mixup_info_nce.case(rows, 256, torch.bfloat16, NOTHING)
        call = case.make(0, "cuda")
        for _ in range(2):
            torch.cuda.synchronize()
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            step(lambda q, k, s: mixup_info_nce_op(q, k, s, implementation=implementation), call)
        return torch.cuda.max_memory_allocated() - before

    small, large = peak(8192), peak(16384)
    assert large < 16384**2 * 4 / 8
    assert large <= 2.2 * small + 2**20


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_dropout_draws_the_same_weights_as_the_reference(dtype: torch.dtype) -> None:
    """Zero scores and unit vectors as values show the weights themselves, of a mask with holes too."""
    query, value = torch.zeros(2, 3, 64, 64, device="cuda", dtype=dtype), torch.eye(64, device="cuda", dtype=dtype)
    mask = torch.rand(2, 64, generator=torch.Generator().manual_seed(5)).cuda() < 0.7
    options: dict[str, Any] = {"key_mask": mask, "causal": True, "dropout_p": 0.3, "dropout_seed": 2**64 - 1}
    arguments = (query, query, value.expand(2, 3, 64, 64))
    found, right = padded_attention_op(*arguments, **options), reference.padded_attention(*arguments, **options)
    assert torch.equal(found != 0, right != 0)
    torch.testing.assert_close(found, right)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_distilling_and_one_direction_take_a_scale_on_the_host(dtype: torch.dtype) -> None:
    """The scale's gradient is on the host too, and right."""
    rows = torch.nn.functional.normalize(torch.randn(4, 700, 96, device="cuda"), dim=-1).to(dtype)
    leaves = [rows[0].requires_grad_(), rows[1].requires_grad_(), torch.tensor(20.0, requires_grad=True)]
    wide = [x.detach().cpu().double().requires_grad_() for x in leaves]
    distilled = distill_info_nce(*leaves, rows[2], rows[3], torch.tensor(5.0), normalized=True)
    teacher = rows[2:].detach().cpu().double()
    exact = reference.distill_info_nce(*wide, *teacher, 5.0, normalized=True)
    entropy = torch.nn.functional.cross_entropy(wide[2] * wide[0] @ wide[1].T, torch.arange(700))
    for ours, right in ((distilled, exact), (row_info_nce(*leaves, 0), entropy)):
        found = torch.autograd.grad(ours, leaves)
        assert [x.device.type for x in found] == ["cuda", "cuda", "cpu"]
        for mine, one in zip(found, torch.autograd.grad(right, wide), strict=True):
            assert (mine.cpu().double() - one).abs().max() <= (4 * torch.finfo(dtype).eps + 1e-5) * one.abs().max()


def need(gigabytes: float) -> None:
    free = torch.cuda.mem_get_info()[0]
    if free < gigabytes * 1e9:
        pytest.skip(f"needs {gigabytes:g} GB of free GPU memory, {free / 1e9:.0f} GB are")


@pytest.mark.parametrize("implementation", [None, "triton", "cuda"], ids=str)
def test_tensors_beyond_two_to_the_31_numbers(implementation: str | None) -> None:
    """The last rows of a tensor of more than 2^31 numbers, forward and backward."""
    need(20)
    width = 4096
    count = 2**31 // width + 8
    tokens = torch.zeros(1, count, width, dtype=torch.bfloat16, device="cuda")
    tokens[0, -8:] = torch.randn(8, width, device="cuda")
    kept = torch.arange(count - 8, count, device="cuda").unsqueeze(0)
    near, first = tokens[:, -8:].clone(), torch.arange(8, device="cuda").unsqueeze(0)
    upstream = torch.randn(1, 8, width, dtype=torch.bfloat16, device="cuda")

    def run_forced(function: Any, *arguments: Any) -> Tensor:
        try:
            found: Tensor = function(*arguments, implementation=implementation)
            return found
        except RuntimeError as error:
            if "cannot run" not in str(error):
                raise
            pytest.skip(str(error))

    student = torch.randn(1, 8, width, dtype=torch.bfloat16, device="cuda").requires_grad_()
    loss = run_forced(token_alignment_op, student, tokens, kept)
    torch.testing.assert_close(loss, reference.token_alignment(student, near, first), rtol=1e-4, atol=1e-5)
    tokens.requires_grad_()
    gathered = run_forced(masked_gather_op, tokens, kept)
    assert torch.equal(gathered, near)
    (gradient,) = torch.autograd.grad(gathered, tokens, upstream)
    assert torch.equal(gradient[:, -8:], upstream) and not gradient[:, :-8].any()
