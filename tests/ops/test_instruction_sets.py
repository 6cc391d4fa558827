"""The ops on every instruction set that this processor runs, against their definitions in float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from oner_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

PROGRAM = """
import torch
from oner_fast.ops import mixup_info_nce, padded_attention, sigmoid_loss, token_alignment, varlen_attention
torch.manual_seed(0)

def compare(op, given, dtype, tolerance, *arguments, **options):
    results = []
    for name, kind in (("cpp", dtype), ("reference", torch.float64)):
        # Both start from the numbers as the narrow dtype holds them.
        x = [one.to(dtype).to(kind).requires_grad_() for one in given]
        out = op(*x, *arguments, **options, implementation=name)
        upstream = torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(dtype).to(kind)
        needed = x[:1] if op is token_alignment else x
        results.append([out, *torch.autograd.grad(out, needed, upstream if out.ndim else None)])
    for one, other in zip(*results):
        assert one.isfinite().all()
        error = float((one.double() - other).abs().max() / other.abs().max())
        assert error < tolerance, (op.__name__, dtype, options, error)

for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)):
    # Empty, one token, parts of vectors and panels, several blocks of keys.
    lengths = torch.tensor([0, 1, 0, 37, 130, 600])
    cu_seqlens = lengths.cumsum(0).int()
    total = int(cu_seqlens[-1])
    for heads, groups, width, causal in ((2, 1, 24, False), (2, 2, 64, True)):
        given = [torch.randn(total, count, width, dtype=torch.float64) for count in (heads, groups, groups)]
        compare(varlen_attention, given, dtype, tolerance, cu_seqlens, causal=causal)
    # Draws of many blocks, of parts of vectors, and of queries after the first that see no key.
    given = [torch.randn(2, count, rows, 24, dtype=torch.float64) for count, rows in ((2, 301), (1, 290), (1, 290))]
    options = {"key_lengths": torch.tensor([290, 37]), "causal": True, "dropout_p": 0.3, "dropout_seed": 2**63 + 1}
    compare(padded_attention, given, dtype, tolerance, **options)
    student, teacher = torch.randn(3, 11, 70, dtype=torch.float64), torch.randn(3, 20, 70, dtype=torch.float64)
    compare(token_alignment, [student, teacher], dtype, tolerance, torch.randint(0, 20, (3, 11)))

def mixed(query, key, query_other, key_other, *, implementation):
    others = {"query_other": query_other, "key_other": key_other}
    return mixup_info_nce(query, key, 12.0, **others, implementation=implementation)

for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
    for rows, width in ((9, 5), (300, 72)):
        compare(mixed, [torch.randn(rows, width, dtype=torch.float64) for _ in range(4)], dtype, tolerance)

for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
    for rows, width in ((9, 5), (300, 72)):
        ids = torch.randint(-1, rows // 3, (2, rows))
        for options in ({"same": "ignore"}, {"same": "positive"}, {"same": "ignore", "symmetric": False},
                        {"same": "positive", "symmetric": False}):
            given = [torch.randn(rows, width, dtype=torch.float64) for _ in range(2)]
            compare(mixup_info_nce, given, dtype, tolerance, 12.0, query_ids=ids[0], key_ids=ids[1], **options)

# Rows of zeros take no gradient, in blocks of one kind of row and of both; a diverged row has no finite loss.
for dtype in (torch.float64, torch.float32, torch.bfloat16, torch.float16):
    for rows, width, others in ((9, 5, False), (64, 64, False), (64, 64, True)):
        given = [torch.randn(rows, width).to(dtype) for _ in range(4)]
        for x in given:
            x[3], x[8] = 0, 0
        x = [one.requires_grad_() for one in given[: 4 if others else 2]]
        options = {"query_other": x[2], "key_other": x[3]} if others else {}
        for gradient in torch.autograd.grad(mixup_info_nce(*x[:2], 12.0, **options, implementation="cpp"), x):
            assert gradient.isfinite().all() and gradient[0].any() and not gradient[3].any() and not gradient[8].any()
        for one in x:
            with torch.no_grad():
                one[7, 2] = {torch.float64: 1e200, torch.float16: torch.inf}.get(dtype, 1e20)
            assert not mixup_info_nce(*x[:2], 12.0, **options, implementation="cpp").isfinite()
            with torch.no_grad():
                one[7] = 1
    student, teacher = (torch.randn(2, 4, 70).to(dtype) for _ in range(2))
    student[0, 0], teacher[0, 1] = 0, 0
    student.requires_grad_()
    gradient = torch.autograd.grad(token_alignment(student, teacher, implementation="cpp"), student)[0]
    assert gradient.isfinite().all() and not gradient[0, :2].any() and gradient[1, 0].any()

# Blocks of keys, as ranks exchange them: own pairs and partners are found in one of them.
ops = torch.ops.oner_fast
for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-5), (torch.bfloat16, 1e-5)):
    query, keys = torch.randn(50, 40).to(dtype), torch.nn.functional.normalize(torch.randn(90, 40)).to(dtype)
    partner, side = torch.randint(90, (50,)), (query, None, None, ops.mixup_inverse_norms(query, None, None))

    def statistics(start, end):
        block = (keys[start:end], None, None, None, torch.tensor(9.0), partner - start, 20 - start)
        return ops.mixup_info_nce_statistics(*side, *block, True)

    whole, blocks = statistics(0, 90), [statistics(*ends) for ends in ((0, 30), (30, 31), (31, 90))]
    for at, target in ((4, torch.arange(50) + 20), (5, partner)):
        assert (blocks[2][at].bool() == (target >= 31)).all()
        assert (sum(one[at] for one in blocks) - whole[at]).abs().max() < tolerance

for dtype, tolerance in ((torch.float64, 1e-11), (torch.float32, 1e-4), (torch.bfloat16, 3e-2)):
    for rows, width in ((9, 5), (300, 72)):
        ids = torch.randint(-1, rows // 3, (2, rows))
        partner, weight = torch.randint(rows, (rows,)), torch.rand(rows)
        for options in ({}, {"partner": partner, "partner_weight": weight}, {"query_ids": ids[0], "key_ids": ids[1]},
                        {"query_ids": ids[0], "same": "ignore"}):
            given = [torch.randn(rows, width, dtype=torch.float64) for _ in range(2)]
            compare(sigmoid_loss, given, dtype, tolerance, 12.0, -4.0, **options)
# Every number of log(1 + x) and of the exponential: terms of one pair, from the largest to those that vanish.
for logit in (-110.0, -87.0, -40.0, -10.0, -1.0, -1e-3, 0.0, 0.5, 3.0, 17.0, 60.0, 86.0):
    one = torch.ones(1, 1)
    found = sigmoid_loss(one, one, 0.0, logit, normalized=True, implementation="cpp")
    exact = -torch.nn.functional.logsigmoid(torch.tensor(logit, dtype=torch.float64))
    assert abs(found.double() - exact) <= 4e-7 * exact, (logit, found, exact)
print(torch.ops.oner_fast.cpu_capability())
"""


@pytest.mark.parametrize("capability", ["portable", "avx2", "avx512", "avx512_bf16", "amx"])
def test_ops_are_right_on_every_instruction_set(capability: str) -> None:
    env = {**os.environ, "ONER_FAST_CPU_CAPABILITY": capability}
    done = subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)
    if "but this processor runs" in done.stderr:
        pytest.skip(done.stderr.strip().splitlines()[-1])
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == capability
