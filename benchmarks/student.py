"""`oner-fast bench uta`: the cost of a step of UTA's student by the share of hidden patches.

Three students give gradients of the same shape: ours (hidden patches never enter), one fed mask tokens in their place,
and one that embeds all patches and drops the hidden ones afterwards. A step is forward, token alignment and backward,
without teacher and optimiser. Steps are interleaved, so that the ratios hold on a noisy machine, and the peak of memory
is measured in fresh processes. With `--teacher` the targets are measured too: computed, and read from a cache on disk.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oner_fast import ops
from oner_fast.benchmarks import machine, peak_memory
from oner_fast.benchmarks.timing import Candidate, Samples, interleave, ratio
from oner_fast.models.files import uta_config_from_dict
from oner_fast.models.forward_flops import uta_flops
from oner_fast.models.teacher import load_teacher
from oner_fast.models.uta import UTA, UTA_SIZES, UTAConfig
from oner_fast.ops.patch_masks import draw_masks
from oner_fast.train.engine.allocator import freed_memory_kept
from oner_fast.train.engine.throughput import FORWARD_AND_BACKWARD
from oner_fast.train.uta.inputs import with_cls
from oner_fast.train.uta.teacher_cache import FeatureCache

VISIBLE, MASK_TOKENS, GATHERED = "visible tokens alone (ours)", "mask tokens", "embed all, then gather"
NAMES = (VISIBLE, MASK_TOKENS, GATHERED)
COMPUTED, CACHED = "the teacher's tokens, computed", "the teacher's tokens, from the cache"
_DTYPES = {"fp32": None, "bf16": torch.bfloat16}
Tell = Callable[[str], None]


class _EmbedsAll(UTA):
    """The student that embeds all patches before it drops the hidden ones."""

    def _embed(
        self, images: Tensor, kept: Tensor | None, masked: Tensor | None, masked_count: int | None = None
    ) -> tuple[Tensor, Tensor]:
        tokens, places = super()._embed(images, None, masked, masked_count)
        if kept is None:
            return tokens, places
        rows = with_cls(kept)
        return ops.masked_gather(tokens, rows), places.gather(1, rows)


@dataclass(frozen=True)
class Setting:
    """Setting of the measurement: the student, and one batch of random images with random target tokens."""

    config: UTAConfig
    batch_size: int
    device: str
    dtype: str

    def step(self, name: str, mask_ratio: float) -> Callable[[], list[Tensor]]:
        """Make a call that computes the gradients anew and returns them."""
        torch.manual_seed(0)
        c, device = self.config, torch.device(self.device)
        config = replace(c, mask_token=name == MASK_TOKENS)
        student = (_EmbedsAll if name == GATHERED else UTA)(config).to(device)
        images = torch.randint(256, (self.batch_size, 3, c.image_size, c.image_size), dtype=torch.uint8, device=device)
        target = torch.randn(self.batch_size, 1 + c.cells, c.embed_dim, device=device)
        samples = torch.arange(self.batch_size, device=device)
        masks = draw_masks(0, 0, samples, (c.grid, c.grid), int(mask_ratio * c.cells), "reversed_block")
        autocast = _DTYPES[self.dtype]

        def run() -> list[Tensor]:
            with torch.autocast(device.type, dtype=autocast or torch.bfloat16, enabled=autocast is not None):
                if name == MASK_TOKENS:
                    tokens = student(images, masked=masks.mask)
                else:
                    tokens = student(images, masks.kept)
            kept = None if name == MASK_TOKENS else with_cls(masks.kept)
            ops.token_alignment(tokens, target, kept).backward()
            gradients = [parameter.grad for parameter in student.parameters() if parameter.grad is not None]
            student.zero_grad(set_to_none=True)
            return gradients

        return run

    def peak(self, name: str, mask_ratio: float) -> int:
        """Bytes above weights and batch, gradients included, measured in a process of its own."""
        task = {**asdict(self), "name": name, "mask_ratio": mask_ratio, "threads": torch.get_num_threads()}
        environment = {**os.environ, **peak_memory.ENVIRONMENT, "OMP_NUM_THREADS": str(torch.get_num_threads())}
        command = [sys.executable, "-m", "oner_fast.benchmarks.student", "--peak", json.dumps(task)]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        if done.returncode:
            last = (done.stderr.strip().splitlines() or ["no message"])[-1]
            raise peak_memory.Unavailable(f"the process that measures it ended with {done.returncode}: {last}")
        return int(done.stdout.strip().splitlines()[-1])


@dataclass
class Row:
    """One mask ratio: tokens of an image that enter our student, and the seconds and peak bytes of each student."""

    mask_ratio: float
    tokens: int
    seconds: dict[str, Samples]
    peaks: dict[str, int]
    flops: float


def teacher_steps(setting: Setting, source: str, folder: Path) -> dict[str, Callable[[], Tensor | None]]:
    """Make calls that return the targets of a batch: by the teacher, and by a cache in `folder` that holds them."""
    c = setting.config
    dtype = _DTYPES[setting.dtype] or torch.float32
    teacher = load_teacher(source, grid=c.grid, device=setting.device, dtype=dtype)
    images = torch.randint(256, (setting.batch_size, 3, c.image_size, c.image_size), dtype=torch.uint8)
    cache = FeatureCache(folder, {}, shape=(1 + c.cells, teacher.embed_dim), dtype="bf16")
    cache.put(0, images, teacher.tokens(images))
    return {COMPUTED: lambda: teacher.tokens(images), CACHED: lambda: cache.get(0, images)}


def measure(
    setting: Setting, ratios: Sequence[float], rounds: int, tell: Tell, teacher: str = ""
) -> tuple[list[Row], dict[str, Samples]]:
    """Measure a row for each mask ratio, and the teacher's tokens where there is a teacher; all take turns."""
    with tempfile.TemporaryDirectory() as folder:
        targets = teacher_steps(setting, teacher, Path(folder)) if teacher else {}
        return _measure(setting, ratios, rounds, tell, targets)


def _measure(
    setting: Setting, ratios: Sequence[float], rounds: int, tell: Tell, targets: dict[str, Callable[[], Tensor | None]]
) -> tuple[list[Row], dict[str, Samples]]:
    c = setting.config
    steps = {f"{name}, {each:g}": _called(setting.step(name, each)) for each in ratios for name in NAMES}
    steps |= {name: _called(run) for name, run in targets.items()}
    with freed_memory_kept():
        samples = interleave(
            [Candidate(name, run) for name, run in steps.items()], rounds=rounds, device=setting.device, progress=tell
        )
    rows = []
    for each in ratios:
        tokens = 1 + c.cells - int(each * c.cells)
        peaks = {}
        for name in NAMES:
            tell(f"memory of {name} at {each:g}")
            peaks[name] = setting.peak(name, each)
        flops = FORWARD_AND_BACKWARD * uta_flops(c, [tokens] * setting.batch_size)
        rows.append(Row(each, tokens, {name: samples[f"{name}, {each:g}"] for name in NAMES}, peaks, flops))
    return rows, {name: samples[name] for name in targets}


def _called(run: Callable[[], object]) -> Callable[[int], object]:
    return lambda call: run()


def markdown(setting: Setting, rows: Sequence[Row], targets: dict[str, Samples]) -> str:
    """Format the table: seconds, ratios to the first row's and to the other students', and memory."""
    c = setting.config
    lines = [
        f"### {c.image_size} px, patch {c.patch_size}, width {c.width}, {c.depth} layers, {setting.batch_size} "
        f"images, {setting.dtype}",
        "",
        "| mask ratio | tokens | their share | ours: p50 s | its share | mask tokens: p50 s | slower than ours "
        "| embed all, gather: p50 s | slower than ours | GFLOP/s of ours | peak MiB: ours | mask tokens | embed all |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    first = rows[0]
    for row in rows:
        ours = row.seconds[VISIBLE]
        cells = [
            f"{row.mask_ratio:g}",
            f"{row.tokens}",
            f"{row.tokens / first.tokens:.2f}",
            f"{ours.p50:.3f}",
            f"{1 / ratio(first.seconds[VISIBLE], ours).p50:.2f}",
        ]
        for name in (MASK_TOKENS, GATHERED):
            cells += [f"{row.seconds[name].p50:.3f}", f"{ratio(row.seconds[name], ours).p50:.2f}x"]
        cells.append(f"{row.flops / ours.p50 / 1e9:.0f}")
        cells += [f"{row.peaks[name] / 2**20:.0f}" for name in NAMES]
        lines.append(f"| {' | '.join(cells)} |")
    if targets:
        lines += ["", "| targets of a batch | p50 s | share of a step of ours by mask ratio |", "|---|---|---|"]
    for name, samples in targets.items():
        shares = (f"{row.mask_ratio:g}: {1 / ratio(row.seconds[VISIBLE], samples).p50:.2f}" for row in rows)
        lines.append(f"| {name} | {samples.p50:.3f} | {', '.join(shares)} |")
    return "\n".join(lines) + "\n"


def _peak(task: dict[str, Any]) -> int:
    torch.set_num_threads(task["threads"])
    setting = Setting(uta_config_from_dict(task["config"]), task["batch_size"], task["device"], task["dtype"])
    run = setting.step(task["name"], task["mask_ratio"])
    if setting.device == "cpu":
        return peak_memory.peak_bytes(run)[0]
    return peak_memory.peak_on_gpu(run)[0]


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit status."""
    parser = argparse.ArgumentParser(prog="oner-fast bench uta", description=__doc__)
    parser.add_argument("--size", choices=list(UTA_SIZES), default="b", help="the student (default: b)")
    parser.add_argument("--image-size", type=int, default=None, help="pixels a side; the size's own by default")
    parser.add_argument("--depth", type=int, default=None, help="layers; the size's own by default")
    parser.add_argument("--batch-size", type=int, default=8, help="images a step (default: 8)")
    parser.add_argument("--mask-ratios", type=float, nargs="+", default=[0.0, 0.4, 0.5, 0.75])
    parser.add_argument("--dtypes", nargs="+", choices=list(_DTYPES), default=["fp32"])
    parser.add_argument("--rounds", type=int, default=5, help="samples of each student")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--teacher", default="", help="measure the tokens of this CLIP too, named as for `train uta`")
    parser.add_argument("--out", type=Path, default=None, help="Markdown file for the tables")
    parser.add_argument("--peak", default=None, help=argparse.SUPPRESS)
    arguments = parser.parse_args(argv)
    if arguments.peak is not None:
        print(_peak(json.loads(arguments.peak)))
        return 0
    if not all(0 <= each < 1 for each in arguments.mask_ratios):
        parser.error(f"mask ratios must be in [0, 1), got {arguments.mask_ratios}")
    if arguments.device == "cuda" and not torch.cuda.is_available():
        parser.error("--device cuda: torch finds no GPU here")
    config = UTA_SIZES[arguments.size]
    config = replace(
        config, image_size=arguments.image_size or config.image_size, depth=arguments.depth or config.depth
    )
    here = machine.describe(arguments.device)
    parts = [f"# The student of UTA by mask ratio\n\nWritten by `oner-fast bench uta`. {here.line()}\n"]
    print(here.line(), flush=True)
    for dtype in arguments.dtypes:
        setting = Setting(config, arguments.batch_size, arguments.device, dtype)
        tell = partial(print, flush=True)
        rows, targets = measure(setting, arguments.mask_ratios, arguments.rounds, tell, arguments.teacher)
        parts.append(markdown(setting, rows, targets))
        print(parts[-1], flush=True)
        if arguments.out is not None:
            arguments.out.parent.mkdir(parents=True, exist_ok=True)
            arguments.out.write_text("\n".join(parts), encoding="utf-8")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
