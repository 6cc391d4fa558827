"""Every kernel compiles for GPUs that are not here, does not spill, and fits."""

from __future__ import annotations

import os
import re
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("interpreted kernels are not compiled", allow_module_level=True)

import triton
import triton.language as tl

from oner_fast.benchmarks.gpu import resources
from oner_fast.benchmarks.gpu.kernels import compilations, first_of_each_kernel
from oner_fast.benchmarks.gpu.machine_code import Figures, compile_triton, occupancy, versions
from oner_fast.benchmarks.gpuless.architectures import ARCHITECTURES, GATED
from oner_fast.kernels import launch
from oner_fast.kernels.launch import Compilation, Configuration

COMMITTED = Path(__file__).parents[2] / "benchmarks" / "results" / "gpu_resources.md"
NAME = "one of our kernels"
FIRST = first_of_each_kernel()
EVERY = compilations()


@pytest.fixture(autouse=True)
def executor() -> None:
    """Nothing runs here."""


@triton.jit
def _product(left, right, out, SIZE: tl.constexpr):
    """A product of two [SIZE, SIZE] tiles, all of it in registers."""
    places = tl.arange(0, SIZE)[:, None] * SIZE + tl.arange(0, SIZE)[None, :]
    tl.store(out + places, tl.dot(tl.load(left + places), tl.load(right + places)))


def product(size: int, **options: int) -> Compilation:
    tensors = {"left": "*fp16", "right": "*fp16", "out": "*fp32"}
    return Compilation(NAME, _product, tensors, {"SIZE": size}, options=options, tensor_cores=True)


def committed() -> str:
    text = COMMITTED.read_text(encoding="utf-8")
    if f"{versions()}." not in text:
        pytest.skip(f"{COMMITTED.name} was made by other versions than {versions()}")
    return text


@pytest.fixture(scope="module")
def figures() -> dict[tuple[str, str], Figures]:
    """The figures of one specialisation of every kernel on sm_80, compiled several at a time."""
    return resources.compile_all([(one.name, "sm_80") for one in FIRST], os.cpu_count() or 1)


@pytest.mark.parametrize("one", FIRST, ids=lambda one: one.name)
def test_compiles_without_spills_and_as_committed(one: Compilation, figures: dict[tuple[str, str], Figures]) -> None:
    """Check one specialisation of every kernel on sm_80; the others, and all on the other gated GPUs, are `slow`."""
    assert not figures[one.name, "sm_80"].problems(one.tensor_cores), figures[one.name, "sm_80"]
    row = resources.row(figures[one.name, "sm_80"])
    assert row in committed().splitlines(), f"run `{resources.COMMAND}` again: {row}"


@pytest.mark.slow
@pytest.mark.parametrize("target", GATED)
@pytest.mark.parametrize("one", EVERY, ids=lambda one: one.name)
def test_every_specialisation_compiles_without_spills(one: Compilation, target: str) -> None:
    assert not resources.compile_named(one.name, target).problems(one.tensor_cores)


def test_the_report_has_every_kernel_on_every_target() -> None:
    rows = re.findall(r"^\| (.+?) \| ((?:sm_|gfx)\w+) \|", committed().split("## CUDA C++")[0], re.MULTILINE)
    assert rows == resources.tasks(), f"run `{resources.COMMAND}` again"


def test_lines_are_kept_by_the_names_of_their_kernels(tmp_path: Path) -> None:
    committed()  # skips where other compilers made it
    kept = resources.kept_rows(COMMITTED, ("mixup_info_nce", "boundaries"))
    assert kept and not any(name.startswith(("mixup_info_nce", "boundaries")) for name, _ in kept)
    left = [one for one in resources.tasks() if one not in kept]
    assert {name for name, _ in left} == {
        one.name for one in EVERY if one.name.startswith(("mixup_info_nce", "boundaries"))
    }
    figures = [Figures(*one) for one in left]
    lines = resources.table(figures, kept)[2:]
    assert len(lines) == len(resources.tasks()) and all(line in lines for line in kept.values())
    old = tmp_path / "resources.md"
    old.write_text(COMMITTED.read_text(encoding="utf-8").replace(versions(), "Triton 1.0"), encoding="utf-8")
    with pytest.raises(ValueError, match="was not made by Triton"):
        resources.kept_rows(old, ("boundaries",))
    with pytest.raises(SystemExit):
        resources.main(["--kernels", "boundaries", "--out", str(old)])


def test_every_launch_states_whether_multiplications_and_additions_fuse() -> None:
    """Triton 3.9 warns where a launch does not, and later versions will no longer fuse by themselves."""
    assert all("enable_fp_fusion" in one.options and "enable_fp_fusion" not in one.constexprs for one in EVERY)


def test_the_report_finds_spills_and_other_problems() -> None:
    """A gate that finds nothing proves nothing: spills, too much shared memory, no tensor cores, no compilation."""
    good = compile_triton(product(64, num_warps=4), "sm_80")
    assert good.matrix > 0 and good.local == 0 and good.shared > 0 and not good.problems(tensor_cores=True)
    assert "spill" in " ".join(compile_triton(product(128, num_warps=1), "sm_80").problems())
    assert "shared memory" in " ".join(Figures(NAME, "sm_80", shared=164 * 1024).problems())
    copy = Compilation(NAME, _product, {"left": "*fp64", "right": "*fp64", "out": "*fp64"}, {"SIZE": 24})
    assert "does not compile" in compile_triton(copy, "sm_80").problems()[0]
    plain = next(one for one in EVERY if not one.tensor_cores)
    assert "no tensor-core instruction" in compile_triton(plain, "sm_80").problems(tensor_cores=True)


def test_occupancy_is_that_of_the_calculator() -> None:
    """Values of CUDA's occupancy calculator."""
    assert occupancy("sm_80", 32, 0, 8) == 1.0
    assert occupancy("sm_80", 255, 0, 4) == 0.125
    assert occupancy("sm_80", 64, 99 * 1024, 4) == 4 / 64
    assert occupancy("sm_90", 168, 0, 12) == 12 / 64
    assert occupancy("gfx942", 64, 0, 4) is None


def test_a_gpu_with_little_shared_memory_takes_no_tile_of_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """A tile of sm_90 may need 227 KiB, and one of sm_86 would leave an H100 with half of what it can do."""
    tiles = {each: Configuration({"BLOCK": each}, 4, 1) for each in (80, 86, 90)}
    known = {each: {"kernel": {"any": tile}} for each, tile in tiles.items()}
    monkeypatch.setattr(launch, "committed_tiles", lambda op: known)
    chosen = {each: launch.configuration("op", "kernel", "any", each).blocks["BLOCK"] for each in ARCHITECTURES}
    assert chosen == {80: 80, 86: 86, 89: 86, 90: 90, 100: 90, 120: 86}
    assert {each for each, chip in ARCHITECTURES.items() if chip.shared_block < 100 * 1024} <= launch.SMALL_BLOCKS
    del known[86], known[90]
    assert all(launch.configuration("op", "kernel", "any", each) is tiles[80] for each in ARCHITECTURES)
