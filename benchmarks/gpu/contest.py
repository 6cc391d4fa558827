"""Run one contestant at one workload on the emulated A100, in a process of its own: correctness first, then counts.

`python -m oner_fast.benchmarks.gpu.contest WORKLOAD CONTESTANT [PEERS]` prints JSON. Some rivals need `python -O`,
since they assert that their tensors are on CUDA.
"""

from __future__ import annotations

import importlib
import json
import os
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import partial
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from oner_fast.benchmarks.cases import OURS, Call, Case, Contender, Result, Target, exact_by, step
from oner_fast.benchmarks.gpu.emulated_a100 import count, emulated_a100
from oner_fast.benchmarks.ops import gather_patches, masked_gather, mixup_info_nce, token_alignment
from oner_fast.benchmarks.precision import relative_error
from oner_fast.ops import reference, varlen_attention
from oner_fast.ops.varlen_attention import facts

INDUCTOR = "torch.compile: "
HEADS, WIDTH, LENGTHS = 4, 64, [256, 256]
ALLOWED_UNITS = 4.0


@dataclass(frozen=True)
class Rival:
    """A contestant of another package: `forward` as in a Contender; `unchecked` means that its asserts must be off."""

    name: str
    load: Callable[[], Contender]
    unchecked: bool = False


def _memeff() -> Contender:
    clip = importlib.import_module("memeff.clip_loss")
    for name in ("validate_features", "_validate_features"):
        if hasattr(clip, name):
            setattr(clip, name, lambda x, y: None)  # it checks that they are on CUDA

    def loss(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
        # Its temperature is a number without a gradient; stable=True would scale the gradient.
        scale = float(logit_scale.detach())
        found: Tensor = clip.MemoryEfficientCLIPLoss(temperature=1 / scale, stable=False)(query, key)
        return found + 0 * logit_scale

    return Contender("memeff 0.3.1", loss)


def _inf_cl() -> Contender:
    flash = importlib.import_module("inf_cl.flash")

    def loss(query: Tensor, key: Tensor, logit_scale: Tensor) -> Tensor:
        q, k = F.normalize(query, dim=-1), F.normalize(key, dim=-1)
        rows = flash.cal_flash_loss(q, k, scale=logit_scale, head_dim=256)
        columns = flash.cal_flash_loss(k, q, scale=logit_scale, head_dim=256)
        return (rows.mean() + columns.mean()) / 2

    return Contender("inf-cl 1.2.1", loss)


def _flash_attention_triton(deterministic: bool) -> Contender:
    package = importlib.import_module("flash_attention_triton")
    count = len(LENGTHS)

    def dense(x: Tensor) -> Tensor:
        return x.detach().view(count, -1, HEADS, WIDTH).transpose(1, 2).contiguous()

    def layout(call: Call) -> Call:
        leaves = tuple(dense(one).requires_grad_() for one in call.arguments[:3])
        return Call(leaves, leaves, (dense(call.upstream[0]),))

    def restore(results: Result) -> Result:
        return tuple(one.transpose(1, 2).reshape(-1, HEADS, WIDTH) for one in results)

    def attend(query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        found: Tensor = package.flash_attention_v2(query, key, value, deterministic=deterministic)
        return found

    kind = "deterministic" if deterministic else "atomics"
    return Contender(f"flash-attention-triton 0.1.1, {kind}", attend, layout, restore)


def _attention_case() -> Case:
    """Make the case that the rival can compute: causal, float16, all sequences equally long."""
    total = sum(LENGTHS)

    def make(seed: int, device: str) -> Call:
        generator = torch.Generator().manual_seed(seed)
        drawn = [torch.randn(total, HEADS, WIDTH, generator=generator).to(device, torch.float16) for _ in range(4)]
        leaves = tuple(one.requires_grad_() for one in drawn[:3])
        boundaries = torch.tensor(list(accumulate(LENGTHS, initial=0)), dtype=torch.int32, device=device)
        return Call((*leaves, boundaries), leaves, (drawn[3],))

    longest = max(LENGTHS)
    known: dict[str, Any] = {"max_seqlen_q": longest, "max_seqlen_k": longest, "causal": True}
    pairs = sum(length * (length + 1) / 2 for length in LENGTHS)
    return Case(
        op="varlen_attention",
        shape=f"{len(LENGTHS)} x {longest} tokens, {HEADS} heads of {WIDTH}, causal",
        dtype=torch.float16,
        make=make,
        contenders=[Contender(OURS, partial(varlen_attention, **known))],
        exact=exact_by(partial(reference.varlen_attention, **known)),
        facts=partial(facts, **known),
        flops=14.0 * pairs * HEADS * WIDTH,
        # Forward reads q, k, v and writes the result. Backward reads these four and a gradient, and writes three.
        bytes=float(12 * total * HEADS * WIDTH * 2),
        limit="gemm",
    )


CASES: dict[str, Callable[[], Case]] = {
    "token_alignment": lambda: token_alignment.case(4, 196, 1024, 98, torch.bfloat16, Target()),
    "masked_gather": lambda: masked_gather.case(4, 196, 768, 98, torch.bfloat16, Target()),
    "gather_patches": lambda: gather_patches.case(2, 224, 16, 0.5, Target()),
    "mixup_info_nce": lambda: mixup_info_nce.case(512, 256, torch.float16, Target()),
    "varlen_attention": _attention_case,
}
RIVALS: dict[str, list[Rival]] = {
    "mixup_info_nce": [Rival("memeff 0.3.1", _memeff), Rival("inf-cl 1.2.1", _inf_cl, unchecked=True)],
    "varlen_attention": [
        Rival(f"flash-attention-triton 0.1.1, {kind}", partial(_flash_attention_triton, kind == "deterministic"), True)
        for kind in ("deterministic", "atomics")
    ],
}
# Baselines whose products are cuBLAS's, which cannot be emulated. Inductor's other kernels take little of the time.
WITHOUT_INDUCTOR = ("mixup_info_nce", "varlen_attention")


def contestants(workload: str) -> dict[str, bool]:
    """Names of the contestants, ours first, and whether the asserts of each must be off."""
    names = {OURS: False}
    if workload not in WITHOUT_INDUCTOR:
        names |= {INDUCTOR + one.name.removeprefix("compiled "): False
                  for one in CASES[workload]().contenders if one.compiled}  # fmt: skip
    return names | {one.name: one.unchecked for one in RIVALS.get(workload, [])}


def contender(workload: str, name: str) -> Contender:
    """Find the contender of a workload by its name."""
    case = CASES[workload]()
    if name == OURS:
        os.environ[f"ONER_FAST_{workload.upper()}_IMPLEMENTATION"] = "triton"
        return case.contender(OURS)
    if name.startswith(INDUCTOR):
        from oner_fast.benchmarks.gpu.inductor import compiled

        one = case.contender(f"compiled {name.removeprefix(INDUCTOR)}")
        return replace(one, forward=compiled(one.forward), compiled=False)
    return next(one for one in RIVALS[workload] if one.name == name).load()


def run(workload: str, name: str) -> dict[str, Any]:
    """Run a contestant; returns {"error": against float64, "allowed": ..., and all counts}."""
    case = CASES[workload]()
    given = case.make(0, "cpu")
    exact = case.exact(given)
    torch.set_num_threads(1)
    with emulated_a100() as log:
        one = contender(workload, name)
        call = one.layout(given)
        step(one.forward, call)  # compiles our kernels, and generates inductor's
        counts, results = count(lambda: step(one.forward, call), log)
    found = one.restore(tuple(results))
    # A rival whose temperature takes no gradient has none to compare.
    pairs = [
        (mine, true) for mine, true in zip(found, exact, strict=True) if mine.dim() or not name.startswith("memeff")
    ]
    error = max(relative_error(mine, true) for mine, true in pairs)
    return {"error": error, "allowed": ALLOWED_UNITS * torch.finfo(case.dtype).eps, **asdict(counts)}


if __name__ == "__main__":
    sys.path.extend(sys.argv[3:4])
    print(json.dumps(run(sys.argv[1], sys.argv[2])))
