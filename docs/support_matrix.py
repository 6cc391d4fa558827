"""Write the support matrix, docs/support.md: `python docs/support_matrix.py`.

Versions come from the files that set them. The tables of ops are the registry's own answers: it is asked what it would
choose on machines that are described here, with and without an extension, CUDA C++ and optional packages.
"""

from __future__ import annotations

import argparse
import importlib.util
import re
import runpy
import sys
import tomllib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from unittest.mock import patch

import setuptools
import torch

from oner_fast import _extension
from oner_fast.ops import attention_backends, implementations, library

HERE = Path(__file__).resolve().parent
ROOT = HERE.parent
PAGE = HERE / "support.md"
DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
GPUS = {
    "80": "A100",
    "86": "A10, A40, RTX 30",
    "89": "L4, L40S, RTX 40",
    "90": "H100, H200",
    "100": "B200",
}
NEEDS_A_PACKAGE = ("flash_attn_3", "flash_attn", "xformers")


@dataclass(frozen=True)
class Machine:
    """A machine that the registry is asked about: its device type, its GPU, and what is built and installed."""

    device: str
    built: bool = True
    cuda_cpp: bool = False
    architecture: str = "80"


COLUMNS = {
    "CPU": Machine("cpu"),
    "CPU, nothing compiled": Machine("cpu", built=False),
    "GPU, with CUDA C++": Machine("cuda", cuda_cpp=True),
    "GPU, Triton alone": Machine("cuda", built=False),
}


@contextmanager
def on(machine: Machine, torch_version: str) -> Iterator[None]:
    """Let the registry answer as it would on `machine`, with Triton and every optional package installed."""
    status = _extension.Status(machine.built, "" if machine.built else "the C++ extension is not built")
    capability = (int(machine.architecture[:-1]), int(machine.architecture[-1]))
    find = importlib.util.find_spec
    library._of_this_machine.cache_clear()
    with ExitStack() as stack:
        for target, name, value in (
            (_extension, "_status", status),
            (library, "has_cuda_kernel", lambda name: machine.cuda_cpp),
            (library, "_triton_runs_on_the_cpu", lambda: False),
            (attention_backends, "_version", lambda module, distribution: "99.0"),
            (torch, "__version__", torch_version),
            (torch.cuda, "is_available", lambda: machine.device == "cuda"),
            (torch.cuda, "get_device_capability", lambda device=None: capability),
            (torch.cuda, "is_current_stream_capturing", lambda: False),
            (torch.backends.cuda, "is_flash_attention_available", lambda: True),
            (importlib.util, "find_spec", lambda name, *rest: True if name == "triton" else find(name, *rest)),
        ):
            stack.enter_context(patch.object(target, name, value))
        yield
    library._of_this_machine.cache_clear()


def able(op: str, dtype: torch.dtype, machine: Machine, torch_version: str) -> list[str]:
    """Return the implementations that `machine` could take for a call of `op`, best first."""
    with on(machine, torch_version):
        known = implementations.implementations(op)
        return [name for name, one in known.items() if not one.reasons_against(machine.device, dtype=dtype)]


def versions() -> dict[str, tuple[str, str]]:
    """Return what each requirement must be, and the version that continuous integration tests."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    tested = [dict(each.split("==") for each in line.split()[:2]) for line in tested_versions()]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    tritons = {*(each["triton"] for each in tested), _only(r"TRITON \?= triton==(\S+)", makefile)}
    workflow = (ROOT / ".github" / "workflows" / "ci.yml").read_text(encoding="utf-8")
    needed_torch = _only(r"torch(.*)", "\n".join(project["dependencies"]))
    return {
        "Python": (project["requires-python"], _only(r'python-version: "([\d.]+)"', workflow)),
        "PyTorch": (needed_torch, ", ".join(each["torch"] for each in tested)),
        "Triton": ("that of PyTorch", ", ".join(sorted(tritons, key=lambda one: [*map(int, one.split("."))]))),
        "CUDA toolkit (nvcc)": (
            "the major version of PyTorch's CUDA",
            _only(r"nvidia-cuda-nvcc==([\d.]+)\.", workflow),
        ),
    }


def tested_versions() -> list[str]:
    """Return the lines of .ci/versions, such as "torch==2.13.0 triton==3.8.0 numpy>=2.4", the oldest torch first."""
    lines = (ROOT / ".ci" / "versions").read_text(encoding="utf-8").splitlines()
    return [line for line in lines if not line.startswith("#")]


def _only(pattern: str, text: str) -> str:
    found = re.search(pattern, text)
    if found is None:
        raise ValueError(f"nothing matches {pattern!r}")
    return found[1]


def architectures() -> list[str]:
    """Return the GPUs that setup.py compiles CUDA C++ for."""
    with patch.object(setuptools, "setup"), patch.object(sys, "argv", ["setup.py"]):
        return list(runpy.run_path(str(ROOT / "setup.py"), run_name="setup")["ARCHITECTURES"])


def _table(head: list[str], rows: list[list[str]]) -> list[str]:
    return ["| " + " | ".join(head) + " |", "|" + "---|" * len(head), *("| " + " | ".join(row) + " |" for row in rows)]


def _grouped(answers: dict[torch.dtype, list[str]]) -> Iterator[tuple[str, list[str]]]:
    """Yield dtypes with the same answers together."""
    for answer in dict.fromkeys(tuple(answer) for answer in answers.values()):
        names = [str(dtype).removeprefix("torch.") for dtype, one in answers.items() if tuple(one) == answer]
        yield ("any" if len(names) == len(DTYPES) else ", ".join(names)), list(answer)


def chosen(torch_version: str) -> list[list[str]]:
    """Return the rows of the table of what is chosen where no optional package is installed."""
    rows = []
    for op in implementations.ops():
        answers = {}
        for dtype in DTYPES:
            each = [able(op, dtype, machine, torch_version) for machine in COLUMNS.values()]
            answers[dtype] = [next(name for name in names if name not in NEEDS_A_PACKAGE) for names in each]
        rows += [[op, dtypes, *names] for dtypes, names in _grouped(answers)]
    return rows


def others(targets: list[str], torch_version: str) -> list[list[str]]:
    """Return the rows of the table of everything that can be chosen or forced on a GPU, best first."""
    rows = []
    for op in implementations.ops():
        answers = {}
        for dtype in DTYPES:
            machines = {target: Machine("cuda", cuda_cpp=True, architecture=target) for target in targets}
            each = {target: able(op, dtype, machine, torch_version) for target, machine in machines.items()}
            order = [name for name in implementations.implementations(op) if any(name in one for one in each.values())]
            answers[dtype] = [_named(name, [t for t in targets if name in each[t]], targets) for name in order]
        rows += [[op, dtypes, ", ".join(names)] for dtypes, names in _grouped(answers)]
    return rows


def _named(name: str, on_targets: list[str], targets: list[str]) -> str:
    marks = ["package"] * (name in NEEDS_A_PACKAGE)
    marks += [] if on_targets == targets else [f"sm_{' and sm_'.join(on_targets)} alone"]
    return f"{name} ({', '.join(marks)})" if marks else name


def markdown() -> str:
    """Return the page."""
    needed, targets = versions(), architectures()
    torch_version = needed["PyTorch"][1].split(", ")[-1]
    gpus = [
        [f"sm_{one}", GPUS[one], "machine code" + (" and PTX" if one == targets[-1] else ""), "none"] for one in targets
    ]
    return "\n".join(
        [
            "<!-- Written by docs/support_matrix.py; change that, and run `make support`. -->",
            "",
            "# Support matrix",
            "",
            "**CPU:** every op, model and training is tested on Linux x86-64, at each commit. **CUDA:** no GPU",
            "has run this project's code. Its kernels are compiled, and emulated on a CPU; see",
            "[GPU status](gpu-status.md).",
            "",
            "## Versions",
            "",
            *_table(["", "Needed", "Tested"], [[name, *both] for name, both in needed.items()]),
            "",
            "`.ci/run --versions` tests one built library under each of these versions of PyTorch.",
            "A C++20 compiler builds the extension for the CPU, and nvcc the CUDA C++ kernels. Both are optional.",
            "CUDA builds of PyTorch bring their own Triton. `oner-fast requirements triton` names that of a CPU",
            "build.",
            "",
            "## What is chosen",
            "",
            "The implementation that each op takes where no optional package is installed.",
            "[Choosing an implementation](implementations.md) explains the names.",
            "",
            *_table(["Op", "dtype", *COLUMNS], chosen(torch_version)),
            "",
            "## GPUs",
            "",
            "CUDA C++ is compiled for these. Newer ones run the PTX.",
            "",
            *_table(["Target", "GPUs", "Compiled", "Has run on"], gpus),
            "",
            "Everything that an op can take there, in the order of preference; (package): where it is installed.",
            "",
            *_table(["Op", "dtype", "Implementations"], others(targets, torch_version)),
            "",
            "Shapes can rule out more: `oner-fast doctor` and the error of a call give every reason.",
            "",
        ]
    )


def main() -> None:
    """Write the page."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--out", type=Path, default=PAGE, help="the page (docs/support.md)")
    parser.parse_args().out.write_text(markdown(), encoding="utf-8")


if __name__ == "__main__":
    main()
