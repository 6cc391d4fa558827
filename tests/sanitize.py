"""Builds the C++ extension with AddressSanitizer and UndefinedBehaviorSanitizer and runs the tests of the ops on it.

python tests/sanitize.py [arguments of pytest]. Every instruction set of this processor is gone through.
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


def build() -> Path:
    """The sanitized library, in build/sanitize."""
    folder = ROOT / "build" / "sanitize" / "lib"
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
    for capability in CAPABILITIES:
        print(f"=== {capability}", flush=True)
        command = [sys.executable, "-P", "-m", "pytest", "-q", "-p", "no:cacheprovider", "-k", SKIP, *sys.argv[1:]]
        done = subprocess.run(
            [*command, str(ROOT / "tests" / "ops")],
            cwd=ROOT, env={**environment, "ONER_FAST_CPU_CAPABILITY": capability}, check=False,
        )  # fmt: skip
        if done.returncode:
            failed.append(capability)
    print("failed: " + ", ".join(failed) if failed else "no error found")
    return len(failed) > 0


if __name__ == "__main__":
    sys.exit(main())
