"""The compiled kernels give the same bits for every instruction set, and the one in use can be chosen."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import pytest

from oner_fast import _extension

pytestmark = pytest.mark.skipif(not _extension.status().loaded, reason=_extension.status().reason or "built")

PROGRAM = """
import hashlib, torch
from oner_fast.ops import gather_patches, masked_gather
torch.manual_seed(0)
digest = hashlib.sha256()
def add(*tensors):
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().view(torch.uint8).numpy().tobytes())
for dtype in (torch.float32, torch.float64, torch.float16, torch.bfloat16):
    bits = torch.arange(-2**15, 2**15).to(torch.int16)
    every = bits.view(dtype) if dtype.itemsize == 2 else torch.randn(2**16, dtype=dtype)
    tokens = every.view(2, 8, -1).clone().requires_grad_()
    positions = torch.randn(8, 4096, dtype=dtype, requires_grad=True)
    prefix = torch.randn(1, 4096, dtype=dtype, requires_grad=True)
    out = masked_gather(tokens, torch.randint(0, 8, (2, 20)), positions, prefix, implementation="cpp")
    upstream = torch.randn_like(out)
    add(torch.nan_to_num(out), *torch.autograd.grad(out, (tokens, positions, prefix), upstream))
    for images in (torch.randn(2, 3, 20, 35, dtype=dtype), torch.randint(0, 256, (2, 3, 20, 35), dtype=torch.uint8)):
        kept = torch.randint(0, 28, (2, 30))
        add(gather_patches(images, kept, 5, (.1, .2, .3), (.4, .5, .6), dtype, implementation="cpp"))
print(torch.ops.oner_fast.cpu_capability(), digest.hexdigest())
"""


KNOWN = ("portable", "avx2", "avx512", "avx512_bf16", "amx")


@cache
def run(capability: str) -> subprocess.CompletedProcess[str]:
    env = {**os.environ, "ONER_FAST_CPU_CAPABILITY": capability}
    return subprocess.run([sys.executable, "-c", PROGRAM], env=env, capture_output=True, text=True, check=False)


def test_same_bits_on_every_instruction_set() -> None:
    best = run("")
    assert best.returncode == 0, best.stderr
    name, digest = best.stdout.split()
    others = {capability: run(capability) for capability in KNOWN if capability != name}
    for other, done in others.items():
        if "but this processor runs" in done.stderr:
            continue
        assert done.stdout.split() == [other, digest], done.stderr


def test_the_default_instruction_set_is_the_fastest_not_the_latest() -> None:
    """AVX-512-BF16 of Intel's without tiles is slower than widened numbers."""
    default, most = run("").stdout.split()[0], run("amx").stderr
    expected = re.search(r"but this processor runs (\w+) at most", most)
    able = expected[1] if expected else "amx"
    intel = Path("/proc/cpuinfo").is_file() and "GenuineIntel" in Path("/proc/cpuinfo").read_text()
    assert default == ("avx512" if able == "avx512_bf16" and intel else able)


def test_an_unknown_implementation_lists_the_known_ones() -> None:
    wrong = run("sse9")
    assert wrong.returncode != 0
    assert "'sse9'; known ones: portable, avx2, avx512, avx512_bf16, amx" in wrong.stderr
