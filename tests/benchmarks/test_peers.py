"""Baselines from other packages: offered where installed, called with the layouts that they take, free where missing.

The packages are stand-ins that compute on the CPU and refuse another layout than the real function's.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from oner_fast.benchmarks.cases import Case
from oner_fast.benchmarks.measure import check
from oner_fast.benchmarks.ops import varlen_attention
from oner_fast.benchmarks.peers import attention, layers
from oner_fast.benchmarks.rows import Row

LENGTHS = [5, 3, 5]
FILES = {
    "flash_attn/__init__.py": """
from oner_fast.ops import reference
def flash_attn_varlen_func(q, k, v, cu_q, cu_k, most_q, most_k):
    assert q.dim() == 3 and (most_q, most_k) == (5, 5) and cu_q is cu_k and q.is_contiguous()
    return reference.varlen_attention(q, k, v, cu_q)
""",
    "flash_attn_interface/__init__.py": """
import flash_attn
def flash_attn_varlen_func(*arguments):
    return flash_attn.flash_attn_varlen_func(*arguments), None
""",
    "xformers/__init__.py": "",
    "xformers/ops/__init__.py": """
import torch.nn.functional as F
from oner_fast.ops import reference
def memory_efficient_attention(q, k, v, attn_bias):
    assert q.dim() == 4 and q.shape[0] == 1 and q.is_contiguous()
    return reference.varlen_attention(q[0], k[0], v[0], attn_bias.boundaries)[None]
def unbind(x, dim):
    return x.unbind(dim)
def swiglu(x, w1, b1, w2, b2, w3, b3):
    assert w1.shape == w2.shape and w1._base is w2._base
    return F.linear(F.silu(F.linear(x, w1, b1)) * F.linear(x, w2, b2), w3, b3)
""",
    "xformers/ops/fmha/__init__.py": "",
    "xformers/ops/fmha/attn_bias.py": """
import torch
class BlockDiagonalMask:
    @classmethod
    def from_seqlens(cls, lengths):
        made = cls()
        made.boundaries = torch.tensor([0, *lengths]).cumsum(0).int()
        return made
""",
    "apex/__init__.py": "",
    "apex/normalization/__init__.py": "",
    "apex/normalization/fused_layer_norm.py": """
import torch.nn.functional as F
def fused_layer_norm_affine(x, weight, bias, shape, eps):
    assert shape == (x.shape[-1],)
    return F.layer_norm(x, shape, weight, bias, eps)
""",
    "apex/optimizers/__init__.py": """
import torch
def FusedAdam(parameters, lr, betas, eps, adam_w_mode, weight_decay):
    assert adam_w_mode
    return torch.optim.AdamW(parameters, lr, betas, eps, weight_decay)
""",
}
PACKAGES = ("flash_attn", "flash_attn_interface", "xformers", "apex")


@pytest.fixture
def installed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name, text in FILES.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))
    yield
    for name in [one for one in sys.modules if one.split(".")[0] in PACKAGES]:
        del sys.modules[name]


def check_on_cpu(case: Case) -> Row:
    """Run once against float64 every contender that needs neither compilation nor a GPU of PyTorch's."""
    plain = [
        replace(one, devices=("cpu",)) for one in case.contenders if not one.compiled and "torch.nn" not in one.name
    ]
    case, row = replace(case, contenders=plain), Row(case.op, case.shape, "")
    check(case, {one.name: one.forward for one in plain}, case.make(0, "cpu"), row, lambda text: None)
    return row


def test_a_missing_package_offers_nothing_and_is_not_looked_into() -> None:
    if any(name in sys.modules for name in PACKAGES):
        pytest.skip("a real package is loaded here")
    assert attention.contenders(LENGTHS, torch.bfloat16) == [] and layers.cases() == []
    assert not any(name in sys.modules for name in PACKAGES)


def test_an_installed_package_is_found_without_being_imported(installed: None) -> None:
    found = attention.contenders(LENGTHS, torch.bfloat16)
    assert [one.name for one in found] == [
        "eager flash-attn",
        "eager flash-attn 3",
        "eager xFormers memory_efficient_attention",
    ]
    assert all(one.devices == ("cuda",) and one.eager for one in found)
    assert {case.op for case in layers.cases(4, 8, 6)} == {"layer_norm", "adamw", "swiglu"}
    assert not any(name in sys.modules for name in PACKAGES)


def test_flash_attention_is_no_baseline_of_float32(installed: None) -> None:
    assert [one.name for one in attention.contenders(LENGTHS, torch.float32)] == [
        "eager xFormers memory_efficient_attention"
    ]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_packages_attend_as_we_do(installed: None, dtype: torch.dtype) -> None:
    case = varlen_attention.case(LENGTHS, "test", dtype, varlen_attention.Target())
    row = check_on_cpu(case)
    assert not row.refused and not row.unavailable
    assert {one.name for one in attention.contenders(LENGTHS, dtype)} <= row.errors.keys()


def test_layers_compute_what_ours_compute(installed: None) -> None:
    found = layers.cases(4, 8, 6)
    assert len(found) == 4
    for case in found:
        row = check_on_cpu(case)
        assert not row.refused and not row.unavailable, (case.key, row.refused, row.unavailable)
        assert sum("apex" in name or "xFormers" in name for name in row.errors) == 1
