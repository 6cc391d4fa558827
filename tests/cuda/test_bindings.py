"""The bindings of csrc/cuda, compiled with warnings as errors and run on CPU tensors, on emulated kernels."""

from __future__ import annotations

import hashlib
import os
import subprocess
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils import cpp_extension

from oner_fast import ops  # noqa: F401  (the ops exist)

ROOT = Path(__file__).parents[2]
BINDINGS = ROOT / "csrc" / "cuda" / "bindings"
REFUSED = (ValueError, RuntimeError)  # what a check in C++ raises: the first up to torch 2.13, the second in 2.15
NAMES = [
    "masked_gather", "gather_patches", "token_alignment", "mixup_info_nce", "short_attention",
    "short_attention_backward",
]  # fmt: skip
SCHEMAS = {
    "masked_gather": "masked_gather", "masked_gather_backward": "masked_gather",
    "gather_patches": "gather_patches", "gather_patches_backward": "gather_patches",
    "token_alignment": "token_alignment", "token_alignment_backward": "token_alignment",
    "mixup_info_nce_statistics": "mixup_info_nce", "short_attention_table": "short_attention",
    "short_attention": "short_attention", "short_attention_backward": "short_attention_backward",
}  # fmt: skip


def compiled(compiler: str, kernels: list[Path], setup_names: dict[str, Any]) -> Path:
    """The bindings as a library for the CPU, linked to the emulated kernels."""
    sources = [
        *sorted(BINDINGS.glob("[!r]*.cpp")),  # all but registration.cpp
        ROOT / "csrc" / "common" / "raw_op.cpp",
        ROOT / "csrc" / "common" / "tensor.cpp",
        Path(__file__).parent / "bindings.cpp",
    ]
    headers = [*(ROOT / "csrc" / "common").glob("*.h"), *BINDINGS.glob("*.h"), ROOT / "csrc" / "cuda" / "launch.h"]
    read = [*sources, *sorted(headers)]
    target = setup_names["target_version"](setup_names["oldest_torch"]())
    told = f"{torch.__version__} {target} {kernels}".encode()
    digest = hashlib.sha256(told + b"".join(path.read_bytes() for path in read)).hexdigest()[:16]
    folder = Path(tempfile.gettempdir()) / f"oner-fast-cuda-{os.getuid()}"
    library = folder / f"bindings-{digest}.so"
    if library.exists():
        return library
    partial = Path(tempfile.mkdtemp(dir=folder)) / library.name
    command = [
        compiler, "-shared", "-std=c++20", "-O0", "--cudart=none", "--threads", "2", "--Werror", "all-warnings",
        "-Xcompiler", "-fPIC,-fvisibility=hidden,-Wall,-Wextra,-Werror", "-Xlinker", "-Bsymbolic", "-DUSE_CUDA",
        f"-DTORCH_TARGET_VERSION={target}", "-I", ROOT / "csrc",
        *(part for path in cpp_extension.include_paths() for part in ("-isystem", path)),
        *sources, *kernels, "-L", cpp_extension.library_paths()[0], "-ltorch_cpu", "-o", partial,
    ]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[:4000]
    partial.replace(library)
    return library


@pytest.fixture(scope="module")
def emulated(library: Callable[[str], Any], compiler: str, setup_names: Callable[[], dict[str, Any]]) -> Iterator[Any]:
    """The raw ops of CUDA C++, for tensors on the CPU."""
    libraries = {name: library(name) for name in NAMES}
    definitions = torch.library.Library("oner_fast_emulated", "DEF")
    for name in SCHEMAS:
        schema = str(getattr(torch.ops.oner_fast, name).default._schema)
        definitions.define(schema.removeprefix("oner_fast::"))
    kernels = [Path(one.library._name) for one in libraries.values()]
    torch.ops.load_library(str(compiled(compiler, kernels, setup_names())))

    def call(name: str, *arguments: Any) -> Any:
        """Call an op whose kernels may touch any memory, since the bindings allocate what they write."""
        kernels = libraries[SCHEMAS[name]]
        kernels.settings, kernels.tensors, kernels.failure = {"bounds": False}, [], None
        try:
            return getattr(torch.ops.oner_fast_emulated, name)(*arguments)
        finally:
            if kernels.failure is not None:
                raise kernels.failure

    yield SimpleNamespace(**{name: lambda *arguments, name=name: call(name, *arguments) for name in SCHEMAS})
    definitions._destroy()


def same(ours: Any, theirs: Any, **tolerance: float) -> None:
    ours, theirs = ([one] if isinstance(one, Tensor) else one for one in (ours, theirs))
    for mine, other in zip(ours, theirs, strict=True):
        assert mine.shape == other.shape and mine.dtype == other.dtype
        torch.testing.assert_close(mine, other, **tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("ragged", [False, True])
def test_masked_gather(emulated: Any, dtype: torch.dtype, ragged: bool) -> None:
    plain, generator = torch.ops.oner_fast_portable, torch.Generator().manual_seed(0)
    tokens = torch.randn(2, 8, 5, generator=generator).to(dtype).transpose(1, 2)  # its rows are not dense
    positions, prefix = (torch.randn(n, 8, generator=generator).to(dtype) for n in (5, 1))
    kept = torch.tensor([[4, 0, 0], [1, 2, 3]])
    cu_seqlens = torch.tensor([0, 2, 6], dtype=torch.int32) if ragged else None
    kept = kept.flatten() if ragged else kept
    same(emulated.masked_gather(tokens, kept, positions, prefix, cu_seqlens),
         plain.masked_gather(tokens, kept, positions, prefix, cu_seqlens))  # fmt: skip
    grad = torch.randn(*((8, 8) if ragged else (2, 4, 8)), generator=generator).to(dtype)
    for needed in ((True, True, True), (False, True, False), (True, False, True)):
        same(emulated.masked_gather_backward(grad, kept, cu_seqlens, 2, 5, 1, *needed),
             plain.masked_gather_backward(grad, kept, cu_seqlens, 2, 5, 1, *needed))  # fmt: skip


def test_gather_patches(emulated: Any) -> None:
    plain, generator = torch.ops.oner_fast_portable, torch.Generator().manual_seed(0)
    images = torch.randint(256, (2, 3, 8, 8), generator=generator, dtype=torch.uint8)
    kept, mean, std = torch.tensor([[3, 0], [1, 1]]), torch.tensor([0.4, 0.5, 0.6]), torch.tensor([0.2, 0.3, 0.4])
    for mine, other in ((mean, std), (None, None)):
        same(emulated.gather_patches(images, kept, 4, mine, other, torch.float32, None),
             plain.gather_patches(images, kept, 4, mine, other, torch.float32, None))  # fmt: skip
    grad = torch.randn(2, 2, 48, generator=generator)
    for other in (std, None):
        same(emulated.gather_patches_backward(grad, kept, 4, other, [2, 3, 8, 8], torch.float32, None),
             plain.gather_patches_backward(grad, kept, 4, other, [2, 3, 8, 8], torch.float32, None))  # fmt: skip


def test_token_alignment(emulated: Any) -> None:
    plain, generator = torch.ops.oner_fast_portable, torch.Generator().manual_seed(0)
    student, teacher = (torch.randn(2, n, 16, generator=generator) for n in (3, 5))
    kept = torch.tensor([[4, 0, 0], [1, 2, 3]])
    loss, factors = emulated.token_alignment(student, teacher, kept)
    same(loss, plain.token_alignment(student, teacher, kept)[0])
    _, of_plain = plain.token_alignment(student, teacher, kept)
    grad = torch.tensor(2.0, dtype=torch.bfloat16)  # converted to the dtype of the loss
    same(emulated.token_alignment_backward(grad, student, teacher, kept, factors),
         plain.token_alignment_backward(grad.float(), student, teacher, kept, of_plain))  # fmt: skip


@pytest.mark.parametrize("width", [8, 5])
def test_the_statistics_of_the_contrast(emulated: Any, width: int) -> None:
    """Width 5 is packed; a mix and a scale on the host are taken from there. Rows may have no norms."""
    plain, generator = torch.ops.oner_fast_portable, torch.Generator().manual_seed(0)
    query, other, key = (torch.randn(6, width, generator=generator).bfloat16() for _ in range(3))
    mix, partner = torch.tensor(0.3, dtype=torch.float64), torch.randint(6, (6,), generator=generator)
    mixed = 0.7 * query.float() + 0.3 * other.float()
    norms = [1 / one.float().norm(dim=1) for one in (mixed, key)]
    for scale, (of_query, of_key) in (
        (torch.tensor(5.0, dtype=torch.float64), norms),
        (torch.tensor(5.0, dtype=torch.bfloat16), norms),
        (torch.tensor(0.25), (None, None)),
    ):
        call = (query, other, mix, of_query, key, None, None, of_key, scale, partner, 0, True)
        same(emulated.mixup_info_nce_statistics(*call),
             plain.mixup_info_nce_statistics(*call[:2], mix.float(), *call[3:8], scale.float(), *call[9:]),
             rtol=2e-2, atol=2e-2)  # fmt: skip


@pytest.mark.parametrize("positive", [True, False])
def test_the_statistics_of_pairs_with_equal_codes(emulated: Any, positive: bool) -> None:
    plain, generator = torch.ops.oner_fast_portable, torch.Generator().manual_seed(0)
    query, key = (torch.randn(6, 8, generator=generator).half() for _ in range(2))
    norms = [1 / one.float().norm(dim=1) for one in (query, key)]
    codes = torch.tensor([[0, 0, 1, -1, 3, 0], [0, 1, 1, -2, 3, 3]], dtype=torch.int32)
    shares = tuple(torch.rand(2, 6, generator=generator)) if positive else (None, None)
    call = (query, None, None, norms[0], key, None, None, norms[1], torch.tensor(5.0), None, 0, True)
    same(emulated.mixup_info_nce_statistics(*call, *codes, *shares),
         plain.mixup_info_nce_statistics(*call, *codes, *shares), rtol=2e-3, atol=2e-3)  # fmt: skip
    for wrong, message in (
        ((codes[0], None), "codes of both sides come together"),
        ((codes[0].long(), codes[1]), "query_code must be"),
        ((*codes, torch.ones(6), None), "shares of both sides"),
    ):
        with pytest.raises(REFUSED, match=message):
            emulated.mixup_info_nce_statistics(*call, *wrong)
    with pytest.raises(REFUSED, match="codes and partners exclude each other"):
        emulated.mixup_info_nce_statistics(*call[:9], torch.zeros(6, dtype=torch.int64), 0, True, *codes)


@pytest.mark.parametrize("apart", [False, True])
def test_short_attention(emulated: Any, apart: bool) -> None:
    """Rows that do not begin at multiples of 16 bytes are copied first."""
    plain, generator = torch.ops.oner_fast_portable, torch.Generator().manual_seed(0)
    width = 33 if apart else 32
    query, key, value, grad = torch.randn(4, 25, 2, width, generator=generator).bfloat16()[..., width - 32 :]
    starts = torch.tensor([0, 5, 5, 25], dtype=torch.int32)
    table = emulated.short_attention_table(starts, None, 25, 25, 2, 20)
    out, statistics = emulated.short_attention(query, key, value, starts, None, table, 20, True, 0.5)
    expected, of_plain = plain.varlen_attention(query, key, value, starts, None, True, 0.5)
    same(out, expected, rtol=1e-2, atol=1e-2)
    same(statistics, of_plain, rtol=1e-4, atol=1e-4)
    for needed in ((True, True), (False, True), (True, False)):
        found = emulated.short_attention_backward(
            grad, query, key, value, out, statistics, starts, starts, table, 20, True, 0.5, *needed
        )
        same(found, plain.varlen_attention_backward(
            grad, query, key, value, out, statistics, starts, starts, True, 0.5, *needed
        ), rtol=2e-2, atol=2e-2)  # fmt: skip


def test_short_attention_refuses_what_does_not_fit(emulated: Any) -> None:
    x, starts = torch.randn(5, 2, 32).bfloat16(), torch.tensor([0, 5], dtype=torch.int32)
    table = torch.zeros(6, dtype=torch.int32)
    good = (x, x, x, starts, None, table, 5, False, 1.0)
    for at, wrong, message in (
        (0, x.float(), "query must be float16 or bfloat16"),
        (1, x[:, :1], "must have the heads of query"),
        (3, starts.long(), "boundaries must be int32"),
        (4, starts[:1], "equally many sequences"),
        (5, table[:4], "not those of these sequences and heads"),
        (6, 257, r"longest must be in \[1, 256\], got 257"),
        (8, -1.0, "scale must be positive"),
    ):
        with pytest.raises(REFUSED, match=message):
            emulated.short_attention(*good[:at], wrong, *good[at + 1 :])
    assert emulated.short_attention_table(starts[:1], None, 0, 0, 2, 5).tolist() == [0, 0]


def test_without_keys_no_kernel_runs(emulated: Any) -> None:
    query, key = torch.randn(2, 8).half(), torch.randn(0, 8).half()
    found = emulated.mixup_info_nce_statistics(
        query, None, None, torch.ones(2), key, None, None, torch.ones(0), torch.tensor(1.0), None, 0, True
    )
    assert found[0].tolist() == [float("-inf")] * 2 and found[1].tolist() == [0, 0] and found[4].tolist() == [0, 0]
    assert [one.shape[0] for one in found] == [2, 2, 0, 0, 2, 0]


def test_what_does_not_fit_raises_before_any_kernel(emulated: Any) -> None:
    tokens, kept = torch.randn(2, 5, 8), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(REFUSED, match=r"masked_gather: tokens must have shape \(B, N, D\), got \[5, 8\]"):
        emulated.masked_gather(tokens[0], kept, None, None, None)
    with pytest.raises(REFUSED, match="masked_gather: kept must be int64, got Int"):
        emulated.masked_gather(tokens, kept.int(), None, None, None)
    with pytest.raises(REFUSED, match="masked_gather: positions must have 5 rows"):
        emulated.masked_gather(tokens, kept, torch.randn(4, 8), None, None)
    with pytest.raises(REFUSED, match="tokens must be float32, float16, bfloat16 or float64, got Int"):
        emulated.masked_gather(tokens.int(), kept, None, None, None)
    with pytest.raises(REFUSED, match="gather_patches: the sides of images must be multiples of patch_size 3"):
        emulated.gather_patches(torch.randn(2, 3, 8, 8), kept, 3, None, None, torch.float32, None)
    with pytest.raises(REFUSED, match="student and teacher must have 3 dimensions"):
        emulated.token_alignment(tokens[0], tokens, None)
    with pytest.raises(REFUSED, match="query must be float16 or bfloat16 for tensor cores, got Float"):
        one = torch.ones(2)
        emulated.mixup_info_nce_statistics(
            tokens[:, 0], None, None, one, tokens[:, 0], None, None, one, one[0], None, 0, False
        )
    with pytest.raises(RuntimeError, match="derivative of torch.ops.oner_fast.masked_gather is not implemented"):
        emulated.masked_gather(tokens.requires_grad_(), kept, None, None, None)


def test_a_launch_that_fails_raises(
    emulated: Any, library: Callable[[str], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As a GPU without room for a block would refuse it."""
    student = torch.randn(1, 2, 8)
    monkeypatch.setattr(library("token_alignment"), "kernel", lambda name: 1 / 0)
    with pytest.raises(ZeroDivisionError) as caught:
        emulated.token_alignment(student, student, None)
    assert "CUDA error 719" in str(caught.value.__context__)
