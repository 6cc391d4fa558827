"""Builds the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the ops on it.

python tests/sanitize.py [capability ...]: these instruction sets, otherwise every one that this processor runs.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
CAPABILITIES = ("portable", "avx2", "avx512", "avx512_bf16", "amx")
# torch.compile generates code of its own, and other processes would each be built up again under the sanitizer.
SKIP = "not compile and not opcheck and not process and not instruction_set and not graph"

LOADS = """
import torch
import oner_fast.ops
from oner_fast import _extension
assert _extension.status().loaded, _extension.status()
print(torch.ops.oner_fast.cpu_capability())
"""


def build() -> Path:
    """The sanitized library. Not in build/sanitize, which the build clears when it begins anew."""
    folder = ROOT / "build" / "sanitized"
    environment = {**os.environ, "ONER_FAST_SANITIZE": "address,undefined"}
    subprocess.run(
        [sys.executable, "setup.py", "-q", "build_ext", "--build-lib", str(folder)],
        cwd=ROOT, env=environment, check=True, stdout=subprocess.DEVNULL,
    )  # fmt: skip
    library = folder / "oner_fast" / "_C.so"
    if not library.exists():
        raise SystemExit((folder / "oner_fast" / "_build.json").read_text())
    return library


def runtime(name: str) -> str:
    compiler = os.environ.get("CXX", "c++")
    return subprocess.run(
        [compiler, f"-print-file-name={name}"], capture_output=True, text=True, check=True
    ).stdout.strip()


def main() -> int:
    environment = {
        **os.environ,
        "ONER_FAST_LIBRARY": str(build()),
        "LD_PRELOAD": f"{runtime('libasan.so')} {runtime('libubsan.so')}",
        # Python and PyTorch keep what they never free; they are not what is checked.
        "ASAN_OPTIONS": "detect_leaks=0:detect_odr_violation=0:alloc_dealloc_mismatch=0",
        "UBSAN_OPTIONS": "print_stacktrace=1",
    }
    failed = []
    for capability in sys.argv[1:] or CAPABILITIES:
        print(f"=== {capability}", flush=True)
        chosen = {**environment, "ONER_FAST_CPU_CAPABILITY": capability}
        there = subprocess.run(
            [sys.executable, "-P", "-c", LOADS], cwd=ROOT, env=chosen, capture_output=True, text=True, check=False
        )
        if "but this processor runs" in there.stderr:
            print(there.stderr.strip().splitlines()[-1])
            continue
        if there.stdout.strip() != capability:
            print(there.stderr)
            failed.append(capability)
            continue
        # The sanitizers write to the process, whose end must not take what they said along.
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "--capture=sys", "-k", SKIP]
        done = subprocess.run([*command, str(ROOT / "tests" / "ops")], cwd=ROOT, env=chosen, check=False)
        if done.returncode:
            failed.append(capability)
    print("failed: " + ", ".join(failed) if failed else "no error found")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
