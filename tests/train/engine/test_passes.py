"""AdamW, gradient clipping and the teacher's update take all parameters at once: the operations are counted."""

from __future__ import annotations

import contextlib
from collections import Counter
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

from oner_fast.models.oner import OneR, OneRConfig
from oner_fast.train.engine.optimizer import build_adamw, clip_grad_norm, parameter_groups
from oner_fast.train.oner.ema import build_teacher, update_teacher


class Operations(TorchDispatchMode):
    """Count the operations that reach a backend, and the numbers that they read and write."""

    def __init__(self) -> None:
        super().__init__()
        self.names: Counter[str] = Counter()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func.namespace == "aten":
            self.names[str(func.overloadpacket).removeprefix("aten.")] += 1
            given = [x for x in torch.utils._pytree.tree_leaves((args, kwargs, out)) if isinstance(x, Tensor)]
            self.numbers += sum(x.numel() for x in given)
        return out


class Tower(nn.Module):
    """`layers` matrices and as many biases, without values where they are fake."""

    def __init__(self, layers: int, device: str) -> None:
        super().__init__()
        empty = [torch.empty(*shape, device=device) for _ in range(layers) for shape in ((8, 8), (8,))]
        self.all = nn.ParameterList(x if x.device.type == "cuda" else x.normal_() for x in empty)


def counted(layers: int, device: str) -> dict[str, Counter[str]]:
    with FakeTensorMode() if device == "cuda" else contextlib.nullcontext():
        tower, teacher = Tower(layers, device), Tower(layers, device).requires_grad_(False)
        optimizer = build_adamw(tower, lr=1e-2)
        found = {}
        for _ in range(2):  # the first step makes the moments
            for parameter in tower.parameters():
                parameter.grad = torch.ones_like(parameter)
            with Operations() as clip:
                clip_grad_norm(tower.parameters(), 1.0)
            with Operations() as step:
                optimizer.step()
            with Operations() as average:
                update_teacher(teacher, tower, 0.9)  # type: ignore[arg-type]
            found = {"clip": clip.names, "step": step.names, "average": average.names}
        for each in found.values():
            del each["device"]  # no operation of a backend
        return found


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_the_number_of_operations_does_not_grow_with_the_parameters(device: str) -> None:
    few, many = counted(2, device), counted(20, device)
    assert few == many
    assert many["step"] == {"_foreach_add_": 2, "_fused_adamw_": 2}  # weights with decay, and the others
    assert many["average"] == {"_foreach_lerp_": 1}
    assert many["clip"]["_foreach_norm"] == many["clip"]["_foreach_mul_"] == 1 and many["clip"].total() <= 8


def test_adamw_reads_and_writes_each_number_once() -> None:
    """Parameter, gradient and two moments; plain AdamW on the CPU takes an operation and a pass for each term.

    A tensor that is changed in place counts once for the fused operation, which returns nothing, and twice for others.
    """
    numbers, results = {}, []
    for fused in (True, False):
        torch.manual_seed(0)
        tower = Tower(3, "cpu")
        optimizer = build_adamw(tower, lr=1e-2)
        if not fused:
            groups = parameter_groups(tower, 0.1)
            optimizer = torch.optim.AdamW(groups, lr=1e-2, betas=(0.9, 0.98), eps=1e-6, fused=False)
        for step in range(3):
            for parameter in tower.parameters():
                parameter.grad = torch.cos(parameter.detach() * (step + 1))
            with Operations() as seen:
                optimizer.step()
        numbers[fused] = seen.numbers / sum(x.numel() for x in tower.parameters())
        results.append(torch.cat([x.detach().flatten() for x in tower.parameters()]))
    assert numbers[True] < 4.2 and numbers[False] > 20
    torch.testing.assert_close(*results, rtol=1e-6, atol=1e-7)


def test_the_teacher_fits_cudas_one_kernel() -> None:
    """CUDA updates a list in one launch only where each pair has one dtype, equal strides and no gaps."""
    tower = OneR(OneRConfig(image_size=8, patch_size=4, width=8, depth=1, heads=2, vocab_size=5, max_text_tokens=4))
    teacher = build_teacher(tower)
    for one, other in zip(teacher.parameters(), tower.parameters(), strict=True):
        assert one.dtype == other.dtype == torch.float32 and one.stride() == other.stride()
        assert one.is_contiguous() and other.is_contiguous()
