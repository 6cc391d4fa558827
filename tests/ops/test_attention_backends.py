"""Other packages behind varlen_attention: why each cannot run, and that the adapters keep the contract.

None of them runs without a GPU. Where one is missing, a stand-in with its signature records its calls, computes by the
definition, and leaves NaN wherever the package makes no promise.
"""

from __future__ import annotations

import importlib.util
import inspect
import itertools
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch import Tensor

from oner_fast.ops import attention_backends as backends
from oner_fast.ops import reference, varlen_attention
from oner_fast.ops.implementations import choose, explain, implementations

NAMES = ("flash_attn_3", "flash_attn", "torch_varlen", "xformers")
GPU = torch.cuda.is_available()


def cumulative(lengths: list[int], device: str = "cpu") -> Tensor:
    return torch.tensor(list(itertools.accumulate(lengths, initial=0)), dtype=torch.int32, device=device)


class _Poison(torch.autograd.Function):
    """x; its rows `which` take NaN for a gradient."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, which: Tensor) -> Tensor:  # type: ignore[override]
        ctx.save_for_backward(which)
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:  # type: ignore[override]
        return grad.masked_fill(ctx.saved_tensors[0][:, None, None], float("nan")), None


def careless(q: Tensor, k: Tensor, v: Tensor, cu_q: Tensor, cu_k: Tensor, causal: bool, scale: float) -> Tensor:
    """The definition, with NaN in rows that see nothing and in gradients of keys that nobody sees."""
    lengths_q, lengths_k = cu_q.diff().tolist(), cu_k.diff().tolist()
    pairs = list(zip(lengths_q, lengths_k, strict=True))
    blind = torch.tensor(
        [i + lk - lq < 0 if causal else lk == 0 for lq, lk in pairs for i in range(lq)], dtype=torch.bool
    )
    unseen = torch.tensor([lq == 0 for lq, lk in pairs for _ in range(lk)], dtype=torch.bool)
    q, k, v = _Poison.apply(q, blind), _Poison.apply(k, unseen), _Poison.apply(v, unseen)
    result = reference.varlen_attention(q, k, v, cu_q, cu_k, causal=causal, scale=scale)
    return result.masked_fill(blind[:, None, None], float("nan"))


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[dict[str, Any]]]:
    """The arguments that the stand-ins were called with."""
    seen: list[dict[str, Any]] = []

    def fake(name: str, **content: Any) -> None:
        module = types.ModuleType(name)
        vars(module).update(content)
        monkeypatch.setitem(sys.modules, name, module)

    def flash_attn_varlen_func(
        q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, dropout_p=0.0, softmax_scale=None,
        causal=False, window_size=(-1, -1), softcap=0.0, alibi_slopes=None, deterministic=False,
        return_attn_probs=False, block_table=None,
    ):  # fmt: skip
        seen.append({name: value for name, value in locals().items() if not isinstance(value, (Tensor, list))})
        return careless(q, k, v, cu_seqlens_q, cu_seqlens_k, causal, softmax_scale)

    def third(q, k, v, cu_q, cu_k, max_seqlen_q, max_seqlen_k, *, softmax_scale, causal, deterministic):  # type: ignore
        """Without dropout; some versions return statistics too."""
        seen.append({"max_seqlen_q": max_seqlen_q, "max_seqlen_k": max_seqlen_k, "softmax_scale": softmax_scale})
        seen[-1] |= {"causal": causal, "deterministic": deterministic}
        return careless(q, k, v, cu_q, cu_k, causal, softmax_scale), None

    def varlen_attn(q, k, v, cu_q, cu_k, max_q, max_k, *, scale=None, window_size=(-1, -1), enable_gqa=False):  # type: ignore
        assert enable_gqa or q.shape[1] == k.shape[1]
        seen.append({"max_seqlen_q": max_q, "max_seqlen_k": max_k, "softmax_scale": scale})
        seen[-1]["causal"] = window_size == (-1, 0)
        return careless(q, k, v, cu_q, cu_k, window_size == (-1, 0), scale)

    class BlockDiagonalMask:
        def __init__(self, lengths_q: list[int], lengths_k: list[int], causal: bool) -> None:
            assert all(lq > 0 and lk > 0 for lq, lk in zip(lengths_q, lengths_k, strict=True))
            assert not causal or all(lq <= lk for lq, lk in zip(lengths_q, lengths_k, strict=True))
            self.lengths_q, self.lengths_k, self.causal = lengths_q, lengths_k, causal

        @classmethod
        def from_seqlens(cls, lengths_q: list[int], lengths_k: list[int]) -> BlockDiagonalMask:
            return cls(lengths_q, lengths_k, False)

        def make_causal_from_bottomright(self) -> BlockDiagonalMask:
            return BlockDiagonalMask(self.lengths_q, self.lengths_k, True)

    def memory_efficient_attention(q, k, v, attn_bias=None, p=0.0, scale=None):  # type: ignore
        assert q.shape[0] == 1 and q.shape[2] == k.shape[2]
        cu_q, cu_k = cumulative(attn_bias.lengths_q), cumulative(attn_bias.lengths_k)
        seen.append({"causal": attn_bias.causal, "softmax_scale": scale})
        return careless(q[0], k[0], v[0], cu_q, cu_k, attn_bias.causal, scale or q.shape[-1] ** -0.5)[None]

    fake("flash_attn", flash_attn_varlen_func=flash_attn_varlen_func)
    fake("flash_attn_interface", flash_attn_varlen_func=third)
    fake("torch.nn.attention.varlen", varlen_attn=varlen_attn)
    fake("xformers")
    fake("xformers.ops", memory_efficient_attention=memory_efficient_attention)
    fake("xformers.ops.fmha")
    fake("xformers.ops.fmha.attn_bias", BlockDiagonalMask=BlockDiagonalMask)
    yield seen


def results(attend: Callable[..., Tensor], leaves: list[Tensor], *arguments: Any, **options: Any) -> list[Tensor]:
    out = attend(*leaves, *arguments, **options)
    upstream = torch.arange(out.numel(), dtype=out.dtype, device=out.device).view_as(out).sin()
    return [out.detach(), *torch.autograd.grad(out, leaves, upstream, materialize_grads=True)]


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "lengths", [([3, 2, 4], None), ([3, 0, 4, 2, 5], [2, 3, 0, 2, 9]), ([2, 3], [0, 0]), ([0, 0], [2, 3])]
)
@pytest.mark.parametrize("scale", [None, 0.3])
def test_every_package_keeps_the_contract_of_the_op(
    name: str,
    causal: bool,
    lengths: tuple[list[int], list[int] | None],
    scale: float | None,
    calls: list[dict[str, Any]],
) -> None:
    """Blind queries, keys that nobody sees, grouped heads, and masks aligned bottom-right."""
    torch.manual_seed(0)
    rows_k = sum(lengths[0] if lengths[1] is None else lengths[1])
    leaves = [torch.randn(n, h, 8, dtype=torch.float64, requires_grad=True) for n, h in
              ((sum(lengths[0]), 4), (rows_k, 2), (rows_k, 2))]  # fmt: skip
    cu = cumulative(lengths[0]), None if lengths[1] is None else cumulative(lengths[1])
    serving = implementations("varlen_attention")[name].function
    mine = results(serving, leaves, *cu, causal=causal, scale=scale)
    theirs = results(reference.varlen_attention, leaves, *cu, causal=causal, scale=scale)
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert len(calls) == bool(sum(lengths[0]) and rows_k)


@pytest.mark.parametrize("name", NAMES)
def test_each_package_gets_its_arguments(name: str, calls: list[dict[str, Any]]) -> None:
    query, key = torch.randn(7, 2, 8), torch.randn(9, 2, 8)
    serving = implementations("varlen_attention")[name].function
    cu_q, cu_k = cumulative([3, 4]), cumulative([4, 5])
    serving(query, key, key, cu_q, cu_k, max_seqlen_q=4, max_seqlen_k=6, causal=True, scale=0.7)
    told = calls[-1]
    assert told["causal"] is True and told["softmax_scale"] == 0.7
    if name != "xformers":
        assert (told["max_seqlen_q"], told["max_seqlen_k"]) == (4, 6)
        serving(query, query, query, cu_q, max_seqlen_q=5)
        told = calls[-1]
        assert (told["max_seqlen_q"], told["max_seqlen_k"]) == (5, 5)
        assert told["causal"] is False and told["softmax_scale"] == 8**-0.5
    if name.startswith("flash_attn"):
        assert told["deterministic"] is True


@pytest.mark.parametrize("name", NAMES)
def test_arguments_are_checked_first(name: str, calls: list[dict[str, Any]]) -> None:
    query = torch.randn(7, 2, 8)
    with pytest.raises(ValueError, match="cu_seqlens_q must end with"):
        implementations("varlen_attention")[name].function(query, query, query, cumulative([3, 3]))
    assert not calls


@pytest.mark.skipif(backends._older(str(torch.__version__), backends.TORCH_OLDEST), reason="torch is older than 2.13")
@pytest.mark.skipif(importlib.util.find_spec("torch.nn.attention.varlen") is None, reason="torch has no varlen")
def test_pytorchs_varlen_attn_takes_the_arguments_given() -> None:
    """The real function on meta tensors, which hold no numbers."""
    query, key = torch.empty(7, 4, 8, device="meta").half(), torch.empty(9, 2, 8, device="meta").half()
    cu = cumulative([3, 4], "meta")
    out = backends.torch_varlen(
        query, key, key, cu, cumulative([4, 5], "meta"), max_seqlen_q=4, max_seqlen_k=5, causal=True
    )
    assert out.shape == query.shape and out.dtype == query.dtype


@pytest.mark.parametrize(
    ("module", "function"),
    [("flash_attn", "flash_attn_varlen_func"), ("flash_attn_interface", "flash_attn_varlen_func")],
)
def test_the_real_package_takes_the_arguments_given(module: str, function: str) -> None:
    package = pytest.importorskip(module, reason=f"{module} is not installed")
    known = inspect.signature(getattr(package, function)).parameters
    assert {"softmax_scale", "causal", "deterministic"} <= set(known)


@pytest.fixture
def everything(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    """A machine where all packages are, on a GPU of the given capability."""

    def build(capability: tuple[int, int] | None = (8, 0), missing: tuple[str, ...] = (), version: str = "9.9") -> None:
        found = {"flash_attn_interface", "flash_attn", "torch.nn.attention.varlen", "xformers"} - set(missing)
        monkeypatch.setattr(backends, "_version", lambda module, distribution: version if module in found else None)
        monkeypatch.setattr(backends, "_capability", lambda: capability)
        monkeypatch.setattr(backends, "_capturing", lambda: False)
        monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: True)
        monkeypatch.setattr(torch, "__version__", "2.13.0")

    for variable in ("ONER_FAST_IMPLEMENTATION", "ONER_FAST_VARLEN_ATTENTION_IMPLEMENTATION"):
        monkeypatch.delenv(variable, raising=False)
    return build


FACTS = {
    "dtype": torch.bfloat16, "causal": False, "scale": None, "head_dim": 64, "max_seqlen_q": 237, "max_seqlen_k": 237,
    "needs_grad": True,
}  # fmt: skip


def against(name: str, **facts: Any) -> str:
    return "; ".join(implementations("varlen_attention")[name].reasons_against("cuda", asked_for=True, **facts))


def test_every_reason_is_listed(everything: Callable[..., None]) -> None:
    everything((7, 5), missing=("flash_attn_interface", "flash_attn", "xformers", "torch.nn.attention.varlen"))
    wrong = FACTS | {"dtype": torch.float64, "head_dim": 260, "scale": -1.0, "max_seqlen_q": None}
    flash = (
        "takes float16 and bfloat16, not torch.float64; "
        "takes head dimensions that are multiples of 8 up to 256, not 260; "
        "takes the maximum before it scales: scale must be positive, got -1.0; "
        "needs max_seqlen_q= on the host, or it would have to wait for the device to read it"
    )
    assert against("flash_attn", **wrong) == (
        "flash-attn is not installed (pip install --no-build-isolation flash-attn); "
        "needs a GPU of sm_80 or newer, this is sm_75; " + flash
    )
    assert against("flash_attn_3", **wrong) == (
        "flash-attn 3 is not installed (hopper/ of github.com/Dao-AILab/flash-attention); "
        "needs a GPU of sm_90 to sm_90, this is sm_75; " + flash
    )
    unordered = "adds gradients in any order unless torch.use_deterministic_algorithms(True)"
    assert against("torch_varlen", **wrong) == (
        f"this torch has no torch.nn.attention.varlen; needs a GPU of sm_80 or newer, this is sm_75; {unordered}; "
        + flash
    )
    assert against("xformers", **wrong) == (
        f"xformers is not installed (pip install 'oner_fast[xformers]'); {unordered}; "
        "takes float32, float16 and bfloat16, not torch.float64; "
        "takes the maximum before it scales: scale must be positive, got -1.0"
    )


@pytest.mark.parametrize("name", NAMES)
def test_a_call_that_fits_gives_no_reason_against_any_package(name: str, everything: Callable[..., None]) -> None:
    everything((9, 0))
    torch.use_deterministic_algorithms(True)
    try:
        assert against(name, **FACTS) == "" == against(name)
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    ("name", "capability", "facts", "reason"),
    [
        ("flash_attn_3", (8, 0), {}, "needs a GPU of sm_90"),
        ("flash_attn_3", (10, 0), {}, "needs a GPU of sm_90"),
        ("flash_attn", None, {}, "torch can use no CUDA GPU"),
        ("flash_attn", (8, 0), {"dtype": torch.float32}, "not torch.float32"),
        ("flash_attn", (8, 0), {"head_dim": 60}, "multiples of 8 up to 256, not 60"),
        ("flash_attn", (8, 0), {"scale": 0.0}, "scale must be positive"),
        ("torch_varlen", (8, 0), {"max_seqlen_k": None}, "needs max_seqlen_k="),
        ("torch_varlen", (8, 0), {}, "in any order"),
        ("xformers", (8, 0), {}, "in any order"),
        ("xformers", (6, 1), {"needs_grad": False}, "sm_70 or newer, this is sm_61"),
        ("xformers", (8, 0), {"needs_grad": False, "dtype": torch.float32, "head_dim": 6}, "whole 16 bytes"),
    ],
)
def test_each_unfit_call_gives_its_reason(
    name: str, capability: tuple[int, int] | None, facts: dict[str, Any], reason: str, everything: Callable[..., None]
) -> None:
    everything(capability)
    assert reason in against(name, **FACTS | facts)


def test_old_versions_and_waits_for_the_device_are_reasons(
    everything: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything(version="2.6.3")
    assert "flash-attn 2.6.3 is older than 2.7" in against("flash_attn", **FACTS)
    monkeypatch.setattr(torch, "__version__", "2.12.1+cu130")
    assert "torch 2.12.1+cu130 is older than 2.13" in against("torch_varlen", **FACTS)
    monkeypatch.setattr(backends, "_capturing", lambda: True)
    assert "lengths on the host" in against("xformers", **FACTS)
    monkeypatch.setattr(torch.backends.cuda, "is_flash_attention_available", lambda: False)
    monkeypatch.setattr(torch, "__version__", "2.13.0")
    assert "built without flash attention" in against("torch_varlen", **FACTS)


@pytest.mark.parametrize(
    ("capability", "missing", "facts", "chosen"),
    [
        ((9, 0), (), {}, "flash_attn_3"),
        ((9, 0), (), {"max_seqlen_q": None, "max_seqlen_k": None}, "triton"),
        ((9, 0), ("flash_attn_interface",), {}, "triton"),
        ((8, 0), (), {}, "triton"),
        ((8, 0), (), {"dtype": torch.float32}, "triton"),
        ((8, 0), (), {"dtype": torch.float32, "head_dim": 256, "needs_grad": False}, "xformers"),
        ((8, 0), (), {"dtype": torch.float32, "head_dim": 256}, "sdpa"),
        ((8, 0), (), {"dtype": torch.float64}, "sdpa"),
        ((8, 0), (), {"dtype": torch.float64, "causal": True}, "sdpa"),
    ],
)
def test_the_implementation_chosen_on_each_gpu(
    capability: tuple[int, int], missing: tuple[str, ...], facts: dict[str, Any], chosen: str,
    everything: Callable[..., None],
) -> None:  # fmt: skip
    """The table of docs/implementations.md."""
    pytest.importorskip("triton")
    everything(capability, missing)
    assert choose("varlen_attention", "cuda", **FACTS | facts).name == chosen


def test_without_triton_the_next_package_is_chosen(
    everything: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    everything((8, 0))
    real = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *rest: None if name == "triton" else real(name, *rest)
    )
    assert choose("varlen_attention", "cuda", **FACTS).name == "flash_attn"
    everything((8, 0), missing=("flash_attn",))
    assert choose("varlen_attention", "cuda", **FACTS | {"needs_grad": False}).name == "torch_varlen"
    assert choose("varlen_attention", "cuda", **FACTS).name == "sdpa"


def test_a_forced_implementation_that_cannot_run_gives_its_reason() -> None:
    query = torch.randn(3, 1, 8)
    with pytest.raises(RuntimeError, match="'flash_attn' .*cannot run this call: runs on cuda, not on cpu"):
        varlen_attention(query, query, query, cumulative([3]), implementation="flash_attn")


def test_the_doctor_lists_the_packages() -> None:
    choice = next(one for one in explain("cpu") if one.op == "varlen_attention")
    assert set(NAMES) <= set(choice.others)


def test_packages_are_looked_up_without_importing_them() -> None:
    program = """
import sys
import oner_fast.ops, oner_fast.doctor
from oner_fast.ops.implementations import explain
oner_fast.doctor.report(), explain("cuda")
names = ("flash_attn", "flash_attn_interface", "torch.nn.attention.varlen", "xformers")
print([name for name in names if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_a_broken_package_counts_as_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(name: str) -> None:
        raise ValueError(f"{name}.__spec__ is None")

    backends._find.cache_clear()
    monkeypatch.setattr(importlib.util, "find_spec", broken)
    assert backends._find("flash_attn", "flash-attn") is None
    backends._find.cache_clear()


@pytest.mark.skipif(not GPU, reason="no CUDA GPU: these packages run on one alone")
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("causal", [False, True])
def test_error_against_float64(name: str, dtype: torch.dtype, causal: bool) -> None:
    """On a GPU: error at most twice (gradients three times) that of the definition's steps in the same dtype."""
    torch.use_deterministic_algorithms(True)
    try:
        facts = FACTS | {"dtype": dtype, "causal": causal}
        if reasons := against(name, **facts):
            pytest.skip(reasons)
        lengths_q, lengths_k = [37, 0, 70, 5, 9], [20, 3, 95, 0, 9]
        torch.manual_seed(0)
        leaves = [torch.randn(n, h, 64, device="cuda").to(dtype).requires_grad_() for n, h in
                  ((sum(lengths_q), 4), (sum(lengths_k), 2), (sum(lengths_k), 2))]  # fmt: skip
        wide = [x.detach().double().requires_grad_() for x in leaves]
        cu = cumulative(lengths_q, "cuda"), cumulative(lengths_k, "cuda")
        hints = {"max_seqlen_q": 70, "max_seqlen_k": 95, "causal": causal}
        mine = results(implementations("varlen_attention")[name].function, leaves, *cu, **hints)
        exact = results(reference.varlen_attention, wide, *cu, **hints)
        for one, truth in zip(mine, exact, strict=True):
            assert (one - truth).abs().max() <= 12 * torch.finfo(dtype).eps * truth.abs().max()
    finally:
        torch.use_deterministic_algorithms(False)
