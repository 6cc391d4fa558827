"""The command line `oner-fast`, which imports a subcommand's module only when it is asked for."""

from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

import oner_fast
from oner_fast.boundary import guarded

# Set before torch loads OpenMP: a waiting thread then sleeps after some microseconds instead of milliseconds.
# Where other processes share the cores, spinning threads make a step many times slower.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")


@dataclass(frozen=True)
class Command:
    """The module of a subcommand, `module:main(argv) -> exit code`, and the extra that the module needs."""

    module: str
    help: str
    extra: str | None
    names: dict[str, str] | None = None  # the words that may follow, with their help; each word of `train` is a package


COMMANDS = {
    "train": Command(
        "oner_fast.train",
        "train a model",
        "train",
        {
            "oner": "OneR, one tower for images and text",
            "clip": "a two-tower CLIP, or the contrastive second stage of UTA",
            "lit": "linear heads on two pretrained encoders, a teacher for UTA that is not a CLIP",
            "uta": "UTA, a vision transformer aligned to a frozen CLIP",
        },
    ),
    "eval": Command("oner_fast.evaluation.cli", "measure retrieval of a run on its validation splits", "train"),
    "data": Command(
        "oner_fast.data.sources.cli",
        "build, index or verify a data set",
        "demo",
        {
            "pictograms": "about 11,000 captioned images from PyPI packages",
            "icons": "about 30,000 captioned images from npm packages",
            "scenes": "several pictures of another dataset on one canvas, with their boxes",
            "pairs": "pack your own image-text pairs (a CSV or a folder)",
            "index": "write the index of webdataset tars you already have",
            "verify": "check the checksums, indexes and every member of a data set",
        },
    ),
    "checkpoint": Command(
        "oner_fast.train.engine.verify",
        "check the checkpoints of a run",
        "train",
        {"verify": "list step, size and state of each; exit code 1 where one is damaged"},
    ),
    "ablate": Command(
        "oner_fast.ablation.cli",
        "train and compare the rows of a study",
        "demo",
        {
            "oner": "OneR's ablation and its open factors, with seeds and intervals; resumable",
            "uta": "UTA's masks against each other and against none, at equal steps, operations and time; resumable",
        },
    ),
    "report": Command("oner_fast.report.cli", "write a run's report.html", "demo"),
    "export": Command("oner_fast.export.cli", "write a run's model for plain PyTorch, transformers or ONNX", "export"),
    "explore": Command(
        "oner_fast.explorer.cli", "write one page that searches a run's pictures by text, without a server", "export"
    ),
    "bench": Command(
        "oner_fast.benchmarks.cli",
        "measure speed and memory against the fastest of PyTorch",
        "bench",
        {
            "ops": "every op, and one training step; --quick for the small shapes",
            "compare": "two records of commits: what changed beyond the noise",
            "against": "this commit against another one, in turn on this machine",
            "noise": "this commit against itself, many times: how often noise raises an alarm",
            "step": "one training step against plain PyTorch, and each op's share of it",
            "uta": "one step of UTA's student for each mask ratio, against mask tokens and a later gather",
            "gpu-resources": "registers, spills and shared memory of the GPU kernels, compiled without a GPU",
            "integrations": "open_clip, timm and transformers with one line of ours and without",
            "gpu-peers": "the GPU kernels against other libraries', counted on an emulated A100",
            "gpu-tune": "time other tiles of the GPU kernels on this GPU, and commit those that are faster",
            "page": "write the report of a results.json, or of a commit's record, as one HTML page",
            "history": "draw the records of many commits as one HTML page",
            "ratios": "commit the ratios of several records, by which the gates judge later ones",
        },
    ),
    "budget": Command(
        "oner_fast.budget.command",
        "estimate a recipe's training step on GPUs, part by part, from counts and named assumptions",
        None,
    ),
    "gpu": Command(
        "oner_fast.benchmarks.first_gpu.command",
        "check and measure on a GPU what only a GPU can show, in nine minutes; --rehearse needs none",
        None,
    ),
    "requirements": Command(
        "oner_fast.remedies",
        "print what clip, lit or triton need, with torch held, for `pip install $(oner-fast requirements clip)`",
        None,
    ),
    "doctor": Command("oner_fast.doctor", "show versions, hardware, and the implementation chosen for each op", None),
}


def usage() -> str:
    """Text of `oner-fast --help`."""
    lines = ["usage: oner-fast COMMAND [...]", "", "commands:"]
    for name, command in COMMANDS.items():
        lines.append(f"  {name:<14}{command.help}")
        lines.extend(f"    {name} {what:<15}{text}" for what, text in (command.names or {}).items())
    lines += ["", "options:", "  --version  print the version"]
    lines += ["  --help     print this; 'oner-fast COMMAND --help' says more", ""]
    return "\n".join(lines)


def _fail(message: str) -> int:
    print(f"oner-fast: {message}", file=sys.stderr)
    return 2


def _complain(what: str, given: str, known: Sequence[str]) -> int:
    return _fail(f"unknown {what} {given!r}; known: {', '.join(known)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run `oner-fast` with `argv` (the process's arguments by default); return the exit code.

    The exit codes are those of `oner_fast.boundary`.
    """
    return guarded("oner-fast", lambda: _main(argv))


def _main(argv: Sequence[str] | None) -> int:
    arguments = list(sys.argv[1:] if argv is None else argv)
    if not arguments:
        print(usage(), file=sys.stderr)
        return 2
    name, *rest = arguments
    if name in ("-h", "--help"):
        print(usage())
        return 0
    if name == "--version":
        print(f"oner-fast {oner_fast.__version__}")
        return 0
    if name not in COMMANDS:
        return _complain("command", name, list(COMMANDS))
    command, module = COMMANDS[name], COMMANDS[name].module
    if command.names is not None:
        if not rest or rest[0] in ("-h", "--help"):
            lines = [f"usage: oner-fast {name} {{{','.join(command.names)}}} [...]", ""]
            lines += [f"  {what:<15}{text}" for what, text in command.names.items()]
            print("\n".join(lines), file=sys.stdout if rest else sys.stderr)
            return 0 if rest else 2
        if rest[0] not in command.names:
            return _complain(f"name after '{name}'", rest[0], list(command.names))
    prog = f"oner-fast {name} {rest[0]}" if name == "train" else f"oner-fast {name}"
    if name == "train":
        module, rest = f"{module}.{rest[0]}.__main__", rest[1:]
    return guarded(prog, lambda: importlib.import_module(module).main(rest), extra=command.extra)
