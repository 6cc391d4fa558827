"""distill_info_nce: the student's logits against the teacher's softmax, with neither matrix stored."""

from __future__ import annotations

import datetime
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
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.benchmarks import peak_memory
from oner_fast.benchmarks.cases import Call
from oner_fast.ops import distill_info_nce, portable, reference

WORLD = 3
SHARES = {1: (7,), 2: (5, 2), 3: (4, 0, 3)}
OPTIONS: dict[str, dict[str, bool]] = {
    "both directions": {},
    "rows only": {"symmetric": False},
    "normalized": {"normalized": True},
    "normalized, rows only": {"normalized": True, "symmetric": False},
}


def inputs(rows: int = 7, width: int = 5, dtype: torch.dtype = torch.float64) -> list[Tensor]:
    """Query, key, logit_scale, and the teacher's three, whose rows are wider."""
    generator = torch.Generator().manual_seed(rows + width)
    sizes = ((rows, width), (rows, width), (), (rows, width + 3), (rows, width + 3), ())
    found = [torch.randn(size, generator=generator, dtype=torch.float64) for size in sizes]
    found[2], found[5] = torch.tensor(3.0), torch.tensor(5.0)
    return [x.to(dtype).requires_grad_(at < 3) for at, x in enumerate(found)]


def run(given: list[Tensor], **options: Any) -> list[Tensor]:
    """The loss and the gradients of the student."""
    loss = distill_info_nce(*given, **options)
    return [loss.detach(), *torch.autograd.grad(loss, given[:3])]


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("numbers", [1, 64, 1 << 22])
def test_agrees_with_the_definition(name: str, numbers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(portable, "PART_NUMBERS", numbers)
    given = inputs(40, 6)
    found, exact = (run(given, **OPTIONS[name], implementation=each) for each in ("portable", "reference"))
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-11, atol=1e-13)


def test_the_definition_is_the_formula_of_open_clip() -> None:
    query, key, scale, teacher_query, teacher_key, teacher_scale = inputs()
    student, teacher = scale * query @ key.T, teacher_scale * teacher_query @ teacher_key.T
    terms = [-(t.softmax(1) * s.log_softmax(1)).sum(1).mean(0) for t, s in ((teacher, student), (teacher.T, student.T))]
    exact = [sum(terms) / 2, *torch.autograd.grad(sum(terms) / 2, (query, key, scale))]
    for implementation in ("portable", "reference"):
        found = run(inputs(), normalized=True, implementation=implementation)
        for one, other in zip(found, exact, strict=True):
            torch.testing.assert_close(one, other.detach(), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("implementation", ["portable", "reference"])
def test_gradcheck(name: str, implementation: str) -> None:
    query, key, scale, *teacher = inputs(4, 3)

    def loss(query: Tensor, key: Tensor, scale: Tensor) -> Tensor:
        return distill_info_nce(query, key, scale, *teacher, **OPTIONS[name], implementation=implementation)

    assert torch.autograd.gradcheck(loss, (query, key, scale))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_error_against_float64_is_near_that_of_plain_pytorch(dtype: torch.dtype) -> None:
    narrow = inputs(60, 32, dtype)
    wide = [x.detach().double().requires_grad_(x.requires_grad) for x in narrow]
    exact = run(wide, implementation="reference")

    def plain(q: Tensor, k: Tensor, scale: Tensor, tq: Tensor, tk: Tensor, teacher_scale: Tensor) -> Tensor:
        student = scale * F.normalize(q, dim=-1) @ F.normalize(k, dim=-1).T
        teacher = teacher_scale * F.normalize(tq, dim=-1) @ F.normalize(tk, dim=-1).T
        pairs = ((teacher, student), (teacher.T, student.T))
        return sum(-(t.softmax(1) * s.log_softmax(1)).sum(1).mean() for t, s in pairs) / 2  # type: ignore[return-value]

    loss = plain(*narrow)
    theirs = [loss.detach(), *torch.autograd.grad(loss, narrow[:3])]
    for at, (one, other, right) in enumerate(zip(run(narrow), theirs, exact, strict=True)):
        unit = torch.finfo(torch.float32 if at == 0 else dtype).eps * right.abs().max()
        allowed = (3 if at else 2) * (other.double() - right).abs().max() + unit
        assert (one.double() - right).abs().max() <= allowed, at
    assert run(narrow)[0].dtype == torch.float32


class Bytes(TorchDispatchMode):
    """The most numbers that one result has."""

    largest = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for one in out if isinstance(out, tuple | list) else [out]:
            if isinstance(one, Tensor):
                self.largest = max(self.largest, one.untyped_storage().nbytes() // one.element_size())
        return out


def test_no_buffer_has_the_size_of_the_logits(monkeypatch: pytest.MonkeyPatch) -> None:
    from oner_fast.ops.portable import distill_info_nce as plain

    monkeypatch.setattr(portable, "PART_NUMBERS", 1 << 12)
    given = [x.detach() for x in inputs(500, 8, torch.float32)]
    with Bytes() as seen:
        rows, columns = plain.statistics(*given, True)
        plain.backward(*given, rows, columns, torch.tensor(1.0), True)
    assert seen.largest <= 16 * 500  # a part has at least 16 rows


def test_five_numbers_of_each_row_and_column_are_kept() -> None:
    given = inputs(300, 64, torch.float32)
    query, key, scale, *teacher = given

    def loss(query: Tensor, key: Tensor) -> Tensor:
        return distill_info_nce(query, key, scale, *teacher, normalized=True)

    saved, _ = peak_memory.saved_bytes(loss, Call((query, key), (query, key)))
    beyond = saved - sum(x.nbytes for x in given)
    assert beyond <= 300 * 10 * 4


def test_one_graph_and_opcheck() -> None:
    given = inputs(20, 8, torch.float32)
    compiled = torch.compile(lambda *x: distill_info_nce(*x), fullgraph=True, backend="aot_eager")
    loss = compiled(*given)
    for one, other in zip([loss, *torch.autograd.grad(loss, given[:3])], run(given), strict=True):
        torch.testing.assert_close(one.detach(), other)
    raw, plain = torch.ops.oner_fast_portable, [x.detach() for x in given]
    torch.library.opcheck(raw.distill_info_nce.default, (*plain, True))
    rows, columns = raw.distill_info_nce(*plain, False)
    torch.library.opcheck(raw.distill_info_nce_backward.default, (*plain, rows, columns, torch.tensor(0.5), False))


def test_transforms_and_tensors_without_values() -> None:
    given = inputs(6, 4)
    query, key, scale, *teacher = [x.detach() for x in given]
    found = torch.func.grad(lambda q: distill_info_nce(q, key, scale, *teacher))(query)
    torch.testing.assert_close(found, run(given)[1])
    many = torch.stack([query, key])
    each = torch.vmap(lambda q: distill_info_nce(q, key, scale, *teacher))(many)
    torch.testing.assert_close(each, torch.stack([distill_info_nce(q, key, scale, *teacher) for q in many]))
    meta = distill_info_nce(*(x.detach().to("meta") for x in given))
    assert meta.shape == () and meta.dtype == torch.float64 and meta.is_meta
    with FakeTensorMode() as mode:
        fake = distill_info_nce(*[mode.from_tensor(x) for x in (query, key, scale, *teacher)])
    assert fake.shape == () and fake.dtype == torch.float64


def test_a_second_derivative_is_refused_and_the_definition_has_one() -> None:
    given = inputs()
    (first,) = torch.autograd.grad(distill_info_nce(*given), given[0], create_graph=True)
    with pytest.raises(RuntimeError, match="distill_info_nce: trying to differentiate twice"):
        first.sum().backward()
    loss = distill_info_nce(*given, implementation="reference")
    (first,) = torch.autograd.grad(loss, given[0], create_graph=True)
    assert torch.autograd.grad(first.square().sum(), given[0])[0].isfinite().all()


@pytest.mark.parametrize("implementation", ["portable", "reference"])
def test_extreme_logits_zero_rows_and_nan(implementation: str) -> None:
    query, key, _, *teacher, _ = inputs(30, 8, torch.float32)
    scale = torch.tensor(100.0, requires_grad=True)
    loss, *gradients = run([query, key, scale, *teacher, torch.tensor(100.0)], implementation=implementation)
    assert loss.isfinite() and all(x.isfinite().all() for x in gradients)
    dead = query.detach().clone()
    dead[3] = 0
    dead.requires_grad_()
    loss, *gradients = run([dead, key, scale, *teacher, torch.tensor(5.0)], implementation=implementation)
    assert loss.isfinite() and not gradients[0][3].any() and gradients[0][2].any()
    broken = query.detach().clone()
    broken[2, 1] = torch.nan
    assert distill_info_nce(broken, key, scale, *teacher, 5.0, implementation=implementation).isnan()


def test_the_teacher_takes_no_gradient_and_autocast_casts_both_sides() -> None:
    given = [x.requires_grad_() for x in inputs(dtype=torch.float32)]
    loss = distill_info_nce(*given)
    found = torch.autograd.grad(loss, given, allow_unused=True)
    assert all((x is None) == (at >= 3) for at, x in enumerate(found))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        under = distill_info_nce(*given)
    half = [x.detach().bfloat16() if x.ndim else x.detach() for x in given]
    assert under.dtype == torch.float32 and under == distill_info_nce(*half)


@pytest.mark.parametrize(
    ("argument", "value", "error", "message"),
    [
        ("query", torch.ones(3), ValueError, r"query must have shape \(N, D\)"),
        ("query", torch.ones(0, 5), ValueError, "at least one row"),
        ("query", [1.0], TypeError, "query must be a torch.Tensor, got list"),
        ("key", torch.ones(7, 4), ValueError, r"key must have shape \(N, D\) = \(7, 5\), got \(7, 4\)"),
        ("key", torch.ones(7, 5, dtype=torch.int64), TypeError, "key must be float32"),
        ("teacher_query", torch.ones(6, 8), ValueError, r"teacher_query must have shape \(N, D\) = \(7, \*\)"),
        ("teacher_key", torch.ones(7, 9), ValueError, r"teacher_key must have shape \(N, D\) = \(7, 8\)"),
        ("teacher_key", torch.ones(7, 8, device="meta"), ValueError, "teacher_key is on meta but query is on cpu"),
        ("logit_scale", torch.ones(2), ValueError, r"logit_scale must have shape \(\) or \(1,\)"),
        ("teacher_logit_scale", float("inf"), ValueError, "teacher_logit_scale must be a finite number"),
        ("symmetric", 1, TypeError, "symmetric must be True or False"),
        ("normalized", None, TypeError, "normalized must be True or False"),
        ("group", "world", TypeError, "group must be a torch.distributed.ProcessGroup, got str"),
        ("implementation", "cpp", ValueError, "no implementation 'cpp'"),
    ],
)
def test_bad_arguments(argument: str, value: Any, error: type[Exception], message: str) -> None:
    names = ("query", "key", "logit_scale", "teacher_query", "teacher_key", "teacher_logit_scale")
    given = {**dict(zip(names, (x.detach() for x in inputs()), strict=True)), argument: value}
    for function in (distill_info_nce, reference.distill_info_nce):
        if argument != "implementation" or function is distill_info_nce:
            with pytest.raises(error, match=f"distill_info_nce.*{message}"):
                function(**given)


def run_rank(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    patience = datetime.timedelta(seconds=90)
    dist.init_process_group("gloo", f"file://{folder}/meet", timeout=patience, rank=rank, world_size=WORLD)
    groups = {size: dist.new_group(list(range(size)), timeout=patience) for size in SHARES}
    results = {}
    for size, sizes in SHARES.items():
        if rank >= size:
            continue
        first = sum(sizes[:rank])
        for name, options in OPTIONS.items():
            for implementation in ("portable", "reference"):
                mine = [x[first : first + sizes[rank]] if x.ndim else x for x in inputs()]
                mine = [x.detach().clone().requires_grad_(at < 3) for at, x in enumerate(mine)]
                found = run(mine, **options, group=groups[size], implementation=implementation)
                results[f"{size} {name} {implementation}"] = found
    torch.save(results, f"{folder}/{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """The results of three processes for all cases."""
    folder: Path = tmp_path_factory.mktemp("ranks")
    # This file as a program, which imports once and forks: pytest has threads by now.
    done = subprocess.run(
        [sys.executable, __file__, str(folder)], env={**os.environ, "OMP_NUM_THREADS": "1"}, timeout=300,
        stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout
    return [torch.load(folder / f"{rank}.pt", weights_only=True) for rank in range(WORLD)]


@pytest.mark.parametrize("size", list(SHARES))
@pytest.mark.parametrize("name", list(OPTIONS))
@pytest.mark.parametrize("implementation", ["portable", "reference"])
def test_several_processes_agree_with_one(
    ranks: list[dict[str, Any]], size: int, name: str, implementation: str
) -> None:
    exact = run(inputs(), **OPTIONS[name], implementation="reference")
    found = [each[f"{size} {name} {implementation}"] for each in ranks[:size]]
    for loss, *_ in found:
        torch.testing.assert_close(loss, exact[0], rtol=1e-11, atol=0)
    for one, *parts in zip(exact[1:], *(gradients for _, *gradients in found), strict=True):
        whole = (torch.cat(parts) if one.ndim else torch.stack(parts).sum()) / size
        torch.testing.assert_close(whole, one, rtol=1e-10, atol=1e-12)


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
