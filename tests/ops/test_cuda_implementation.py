"""The choice of the implementation "cuda" and the reasons against it, on a machine without a GPU."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast import _cuda_extension, _extension, ops
from oner_fast.ops import (
    attention_backends,
    implementations,
    library,
    masked_gather,
    mixup_info_nce,
    short_attention,
    token_alignment,
)
from oner_fast.ops.implementations import choose

compiled = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")
with_triton = pytest.mark.skipif(library.importlib.util.find_spec("triton") is None, reason="Triton is not installed")
ROOT = Path(__file__).parents[2]
OPS = ["gather_patches", "masked_gather", "mixup_info_nce", "token_alignment"]


def calls(device: str = "cpu") -> dict[str, Any]:
    tokens, kept = torch.randn(2, 4, 8, device=device), torch.zeros(2, 3, dtype=torch.int64, device=device)
    half = torch.randn(4, 8, device=device, dtype=torch.bfloat16)
    return {
        "masked_gather": lambda **how: ops.masked_gather(tokens, kept, **how),
        "gather_patches": lambda **how: ops.gather_patches(torch.randn(2, 3, 8, 8, device=device), kept, 4, **how),
        "token_alignment": lambda **how: ops.token_alignment(tokens[:, :3], tokens, kept, **how),
        "mixup_info_nce": lambda **how: ops.mixup_info_nce(half, half, 10.0, **how),
    }


@pytest.fixture
def built(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if the extension had its CUDA kernels and the GPU were new enough."""
    monkeypatch.setattr(_extension, "_status", _extension.Status(True))
    monkeypatch.setattr(library, "_why_no_cuda_kernel", lambda name: "")


@pytest.mark.parametrize("op", OPS)
def test_cuda_is_never_chosen_for_cpu_tensors(op: str) -> None:
    assert "cuda" in implementations.implementations(op)
    assert choose(op, "cpu").name in ("cpp", "portable")
    calls()[op]()
    with pytest.raises(RuntimeError, match=f"{op}: 'cuda' .*cannot run this call: runs on cuda, not on cpu"):
        calls()[op](implementation="cuda")


def test_mixed_devices_raise_before_any_kernel() -> None:
    tokens, kept = torch.randn(2, 4, 8), torch.zeros(2, 3, dtype=torch.int64)
    with pytest.raises(ValueError, match="masked_gather: kept is on meta but tokens is on cpu; move one of them"):
        masked_gather(tokens, kept.to("meta"))
    with pytest.raises(ValueError, match="masked_gather: positions is on cpu but tokens is on meta"):
        masked_gather(tokens.to("meta"), kept.to("meta"), tokens[0])
    with pytest.raises(ValueError, match="gather_patches: kept is on meta but images is on cpu"):
        ops.gather_patches(torch.randn(2, 3, 8, 8), kept.to("meta"), 4)
    with pytest.raises(ValueError, match="token_alignment: teacher is on meta but student is on cpu"):
        token_alignment(tokens, tokens.to("meta"))
    with pytest.raises(ValueError, match="mixup_info_nce: key is on meta but query is on cpu"):
        mixup_info_nce(tokens[0], tokens[0].to("meta"), 1.0)


@pytest.mark.skipif(library.has_cuda_kernel("masked_gather"), reason="the ops in CUDA C++ are loaded")
@compiled
def test_ops_in_cuda_that_are_not_loaded_have_a_reason() -> None:
    for op in OPS:
        against = implementations.implementations(op)["cuda"].reasons_against("cuda", dtype=torch.float16)
        assert (why := _cuda_extension.status().reason) and why in against
        assert choose(op, "cuda").name in ("triton", "portable")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of an installation whose ops of the CPU are loaded, and whose ops of CUDA C++ are no library."""
    monkeypatch.delenv("ONER_FAST_LIBRARY", raising=False)
    monkeypatch.setattr(_extension, "_FOLDER", tmp_path)
    monkeypatch.setattr(_extension, "_status", _extension.Status(True))
    (tmp_path / "_C_cuda.so").write_bytes(b"not a library")
    (tmp_path / "_build.json").write_text('{"cuda": {"built": true, "version": "13.0"}}')
    return tmp_path


def test_a_wheel_without_cuda_gives_the_reason(installed: Path) -> None:
    (installed / "_C_cuda.so").unlink()
    (installed / "_build.json").write_text('{"cuda": {"built": false, "reason": "nvcc was not found"}}')
    state = _cuda_extension._load()
    assert not state.loaded and state.reason == "the extension was built without CUDA C++: nvcc was not found"
    (installed / "_build.json").unlink()
    assert "it is compiled from source alone" in _cuda_extension._load().reason
    assert "--no-build-isolation" in state.remedy


def test_ops_for_another_cuda_are_not_loaded(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", None)
    state = _cuda_extension._load()
    assert state.reason == f"the ops in CUDA C++ were built for CUDA 13.0, and torch {torch.__version__} has no CUDA"
    assert "the ops of the CPU need none" in state.remedy
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    assert _cuda_extension._load().reason.endswith(f"built for CUDA 13.0, and torch {torch.__version__} has CUDA 12.8")


def test_the_first_op_on_a_gpu_warns_where_the_installed_ops_cannot_serve(
    installed: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name, value in (("_status", None), ("_unusable", False), ("_warned", False)):
        monkeypatch.setattr(_cuda_extension, name, value)
    monkeypatch.setattr(torch.version, "cuda", "12.8")
    library._of_this_machine.cache_clear()
    monkeypatch.setattr(library, "has_cuda_kernel", lambda name: False)
    _cuda_extension.status()
    with pytest.warns(RuntimeWarning, match="built for CUDA 13.0, and torch .* has CUDA 12.8. Remedy: .*") as caught:
        for op in OPS:
            choose(op, "cuda")
            choose(op, "cpu")
    assert len(caught) == 1
    library._of_this_machine.cache_clear()


def test_ops_of_the_same_major_cuda_are_loaded(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.version, "cuda", "13.2")
    assert "could not be loaded: " in (state := _cuda_extension._load()).reason and "_C_cuda.so" in state.reason
    asked: list[str] = []
    monkeypatch.setattr(torch.ops, "load_library", asked.append)
    monkeypatch.setattr(_extension, "other_signatures", lambda library: "its varlen_attention takes nothing")
    assert "built from other sources: its varlen_attention takes nothing" in _cuda_extension._load().reason
    asked.clear()
    monkeypatch.setattr(_extension, "other_signatures", lambda library: "")
    assert _cuda_extension._load() == _extension.Status(True) and asked == [str(installed / "_C_cuda.so")]


def test_without_the_ops_of_the_cpu_nothing_else_is_loaded(installed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    missing = _extension.Status(False, "the C++ extension is not built: no compiler", "install one")
    monkeypatch.setattr(_extension, "_status", missing)
    assert _cuda_extension._load() == missing


@pytest.mark.skipif(not _cuda_extension.status().loaded, reason=_cuda_extension.status().reason or "loaded")
def test_the_ops_of_the_bindings_are_registered_where_they_are_loaded() -> None:
    """Beside a torch with CUDA; no GPU is needed."""
    registration = (ROOT / "csrc" / "cuda" / "bindings" / "registration.cpp").read_text(encoding="utf-8")
    ours = set(re.findall(r'ONER_FAST_IMPL\(m, "(\w+)"', registration))
    names = [*library._names, "short_attention_table", "short_attention", "short_attention_backward"]
    assert ours and {name for name in names if library.has_cuda_kernel(name)} == ours


@with_triton
def test_ops_prefer_cuda_or_triton_as_documented(built: None) -> None:
    for op in ("gather_patches", "masked_gather", "token_alignment"):
        assert choose(op, "cuda", dtype=torch.float64).name == "cuda"
    assert choose("mixup_info_nce", "cuda", dtype=torch.bfloat16).name == "triton"
    assert choose("mixup_info_nce", "cuda", "cuda", dtype=torch.bfloat16).name == "cuda"
    with pytest.raises(RuntimeError, match="'cuda' .*its products are of float16 and bfloat16, not of float32"):
        choose("mixup_info_nce", "cuda", "cuda", dtype=torch.float32)


@with_triton
def test_cuda_attends_within_short_sequences(built: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(attention_backends, "_capability", lambda: (8, 0))
    call: dict[str, Any] = dict(
        dtype=torch.bfloat16, head_dim=64, max_seqlen_q=256, max_seqlen_k=40, causal=True, scale=None, dropout_p=0.0
    )
    assert choose("varlen_attention", "cuda", **call).name == "cuda"
    for changed, message in (
        ({"max_seqlen_q": 257}, "max_seqlen_q must be at most 256, got 257"),
        ({"max_seqlen_k": None}, "needs max_seqlen_k= on the host, at most 256"),
        ({"dtype": torch.float32}, "takes float16 and bfloat16, not torch.float32"),
        ({"head_dim": 80}, "takes head dimensions of 32 and 64, not 80"),
        ({"grouped": True}, "as many heads of key and value as of query"),
        ({"scale": -1.0}, "scale must be positive, got -1.0"),
        ({"dropout_p": 0.1}, "dropout_p must be 0"),
    ):
        assert choose("varlen_attention", "cuda", **call | changed).name == "triton"
        with pytest.raises(RuntimeError, match=message):
            choose("varlen_attention", "cuda", "cuda", **call | changed)
    monkeypatch.setattr(attention_backends, "_capability", lambda: (8, 6))
    with pytest.raises(RuntimeError, match="a block of sm_86 has no room for the rows of a sequence"):
        choose("varlen_attention", "cuda", "cuda", **call)


def test_a_table_serves_every_layer_of_a_step_and_no_other_boundaries(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Tensor] = []

    def make(cu_seqlens_q: Tensor, *rest: Any) -> Tensor:
        made.append(torch.zeros(2, dtype=torch.int32))
        return made[-1]

    class OnGpu(Tensor):
        is_cuda = True

    stream = SimpleNamespace(cuda_stream=0)
    monkeypatch.setattr(torch.ops, "oner_fast", SimpleNamespace(short_attention_table=make))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: stream)
    starts = torch.tensor([0, 5, 9], dtype=torch.int32).as_subclass(OnGpu)

    def of(x: Tensor, heads: int = 2) -> Tensor:
        return short_attention.table_of(x, None, 9, 9, heads, 5)

    first = of(starts)
    assert of(starts) is first and len(made) == 1
    assert of(starts, 4) is not first and of(starts.clone()) is not first
    starts[1] = 4
    assert of(starts) is not first
    stream.cuda_stream = 1
    assert of(starts) is made[-1] and len(made) == 5
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert of(starts) is not of(starts)


def test_a_gpu_that_is_too_old_is_a_reason_against_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_extension, "_status", _extension.Status(True))
    monkeypatch.setattr(library, "has_cuda_kernel", lambda name: True)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (7, 5))
    assert library._of_this_machine.__wrapped__("x") == "needs a GPU of sm_80 (A100) or newer, this one is sm_75"


def test_each_raw_op_of_cuda_comes_from_the_library_with_its_kernel(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(library, "_cuda", ModuleType("cuda"))
    monkeypatch.setattr(library, "has_cuda_kernel", lambda name: name == "mixup_info_nce_statistics")
    library.choose_cuda_ops()
    raw = library.raw_ops("cuda")
    assert raw.mixup_info_nce_statistics is torch.ops.oner_fast.mixup_info_nce_statistics
    assert raw.mixup_info_nce_backward is torch.ops.oner_fast_triton.mixup_info_nce_backward
    assert set(library._names) <= set(vars(raw))


@compiled
def test_compiles_without_graph_breaks(monkeypatch: pytest.MonkeyPatch) -> None:
    """torch.compile sees through the choice of raw ops; here they are the CPU's."""
    monkeypatch.setattr(library, "_cuda", ModuleType("cuda"))
    monkeypatch.setattr(library, "has_cuda_kernel", lambda name: True)
    library.choose_cuda_ops()
    function = implementations.implementations("token_alignment")["cuda"].function
    student, teacher = torch.randn(2, 3, 8, requires_grad=True), torch.randn(2, 3, 8)

    def loss(student: Tensor) -> Tensor:
        return function(student, teacher) * 2

    result = torch.compile(loss, fullgraph=True, backend="aot_eager")(student)
    torch.testing.assert_close(result, loss(student))
    (ours,) = torch.autograd.grad(result, student)
    torch.testing.assert_close(ours, torch.autograd.grad(loss(student), student)[0])


@with_triton
def test_imports_with_triton_and_without_a_driver() -> None:
    program = """
import triton, torch, oner_fast.ops
from oner_fast.ops import token_alignment
x = torch.randn(1, 2, 8)
print(token_alignment(x, x).item())
for name in ("triton", "cuda"):
    try:
        token_alignment(x, x, implementation=name)
    except RuntimeError as error:
        print(error)
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    value, triton, cuda = done.stdout.splitlines()
    assert abs(float(value) + 1) < 1e-6
    assert "'triton'" in triton and "TRITON_INTERPRET=1" in triton and "'cuda'" in cuda and "not on cpu" in cuda
