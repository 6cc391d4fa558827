"""`oner-fast bench gpu-tune` with stand-ins for a GPU's clock."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

pytest.importorskip("triton", reason="needs triton")

from oner_fast.benchmarks.cases import Call
from oner_fast.benchmarks.gpu import tiles, tune, tune_compile, tune_timing
from oner_fast.benchmarks.gpu.tiles import label, neighbours
from oner_fast.benchmarks.gpu.tune import Tuner
from oner_fast.benchmarks.gpu.tune_log import Log
from oner_fast.benchmarks.gpu.workloads import Workload, workloads
from oner_fast.benchmarks.gpuless import emulate, tools
from oner_fast.benchmarks.ops import token_alignment
from oner_fast.benchmarks.timing import Candidate, Samples
from oner_fast.kernels import launch
from oner_fast.kernels.launch import Configuration, configuration
from oner_fast.kernels.tile_overrides import Key, committed_keys, counted_lookups, override, reload_tiles, tiles_of

KEY: Key = ("token_alignment", "forward", "wide")
OTHER: Key = ("token_alignment", "backward", "wide")
COMMITTED = configuration(*KEY, 90)
FASTER = replace(COMMITTED, blocks={"BLOCK_D": 512})
SLOWER = replace(COMMITTED, num_warps=2)


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A copy of the committed tiles, which a tuning may overwrite."""
    copied = tmp_path / "configurations"
    shutil.copytree(launch.CONFIGURATIONS, copied)
    monkeypatch.setattr(launch, "CONFIGURATIONS", copied)
    reload_tiles()
    yield copied
    reload_tiles()


class Clock:
    """A timer that returns given seconds for a tile and 1 second for all others, and records its calls."""

    def __init__(self, seconds: dict[str, list[float]] | None = None, runs: bool = True) -> None:
        self.seconds, self.runs, self.asked = seconds or {}, runs, list[list[str]]()

    def __call__(self, candidates: Sequence[Candidate], sets: int, seconds: float) -> dict[str, Samples]:
        self.asked.append([one.name for one in candidates])
        for one in candidates if self.runs else ():
            one.run(len(self.asked))
        return {one.name: Samples(one.name, self.seconds.get(one.name, [1.0] * 5)) for one in candidates}

    @property
    def timed(self) -> set[str]:
        return {name for names in self.asked for name in names}


class Compilers:
    """Compilers that find a problem in some tiles."""

    def __init__(self, spilling: Sequence[Configuration] = ()) -> None:
        self.spilling, self.compiled = [label(tile) for tile in spilling], list[tuple[Key, str]]()

    def __call__(self, key: Key, given: Sequence[Configuration], targets: Sequence[str]) -> Iterator[Any]:
        for tile in given:
            self.compiled.append((key, label(tile)))
            yield tile, ["7 instructions spill"] if label(tile) in self.spilling else [], [{"targets": targets}]


def stand_in(key: Key, wrong: Configuration | None = None) -> Workload:
    """Make an op that asks for a tile and returns its inputs; with the tile `wrong` it returns something else."""

    def forward(x: torch.Tensor) -> torch.Tensor:
        return x + 1 if configuration(*key, 90) == wrong else x * 1

    return Workload(f"stand-in {key[1]}", key[0], torch.float32, lambda seed, device: Call((torch.ones(3),)), forward)


def tuner(log: Log, clock: Clock, compilers: Compilers | None = None, **more: Any) -> Tuner:
    given: dict[str, Any] = {"of": lambda op: [stand_in(KEY), stand_in(OTHER)], "say": lambda text: None, **more}
    return Tuner(90, "a GPU", log, "cpu", clock, compilers or Compilers(), **given)


@pytest.fixture
def log(tmp_path: Path) -> Iterator[Log]:
    with Log(tmp_path / "runs" / "log.jsonl", "a GPU", 90) as opened:
        yield opened


def kinds(log: Log, tile: Configuration) -> list[str]:
    return [one["kind"] for one in log.records if one["tile"] == tile.numbers]


def test_files_of_tiles_keep_their_format(folder: Path) -> None:
    for path in folder.glob("*.json"):
        before = path.read_bytes()
        for op, kernel, shape_class in committed_keys():
            if op == path.stem:
                tiles.commit((op, kernel, shape_class), 80, configuration(op, kernel, shape_class, 80))
        assert path.read_bytes() == before


def test_neighbours_are_near_valid_and_distinct() -> None:
    for key in committed_keys():
        committed = configuration(*key, 80)
        assert tiles.limits(key).keys() <= committed.blocks.keys()
        sizes = [(committed.blocks[name], *limits) for name, limits in tiles.limits(key).items()]
        assert all(least <= size <= most for size, least, most in sizes), "what is committed lies within its limits"
        found = neighbours(key, committed)
        assert len({label(one) for one in found} | {label(committed)}) == len(found) + 1
        for one in found:
            before, after = committed.numbers, one.numbers
            assert 1 <= sum(before[name] != after[name] for name in before) <= 2
            assert all(size & (size - 1) == 0 for size in (*one.blocks.values(), one.num_warps))
            assert 1 <= one.num_warps <= 8 and 1 <= one.num_stages <= 5
    whole, deep = (("mixup_info_nce", "statistics", name) for name in ("half 256", "half deep"))
    assert {one.blocks["BLOCK_K"] for one in neighbours(whole, configuration(*whole, 80))} == {256}, "a row's length"
    assert {one.blocks["BLOCK_K"] for one in neighbours(deep, configuration(*deep, 80))} == {32, 64, 128}
    assert len(neighbours(KEY, COMMITTED, 1)) == 3 and len(neighbours(KEY, COMMITTED, 2)) == 5


def test_the_fastest_tile_is_committed_and_launched(log: Log, folder: Path) -> None:
    clock = Clock({label(FASTER): [0.5] * 5})
    before = configuration(*KEY, 80)
    assert tuner(log, clock).tune(KEY) == 1, "and its own neighbours are no faster"
    assert configuration(*KEY, 90) == FASTER and configuration(*KEY, 80) == before == COMMITTED
    data = json.loads((folder / "token_alignment.json").read_text(encoding="utf-8"))
    assert data["sm_90"] == {"forward": {"wide": FASTER.numbers}}
    with counted_lookups() as read:
        stand_in(KEY, wrong=FASTER).forward(torch.ones(1))
    assert read == {KEY: 1}
    assert stand_in(KEY, wrong=FASTER).forward(torch.ones(1)) == 2, "this is the tile that a launch is given"
    decided = [one for one in log.records if one["kind"] == "decided"]
    assert [(one["tile"], one["chosen"]) for one in decided] == [
        (COMMITTED.numbers, FASTER.numbers), (FASTER.numbers, FASTER.numbers),
    ]  # fmt: skip
    assert {"compiled", "timed", "timed again"} <= set(kinds(log, FASTER)) and log.records[0]["gpu"] == "a GPU"


def test_a_spilling_tile_is_never_run(log: Log, folder: Path) -> None:
    clock, before = Clock({label(FASTER): [0.1] * 5}), (folder / "token_alignment.json").read_bytes()
    assert tuner(log, clock, Compilers([FASTER])).tune(KEY) == 0
    assert label(FASTER) not in clock.timed and {label(SLOWER), label(COMMITTED)} <= clock.timed
    assert kinds(log, FASTER) == ["compiled"] and (folder / "token_alignment.json").read_bytes() == before


@pytest.mark.parametrize(
    ("seconds", "moves"),
    [
        ([0.98] * 5, 0),  # 2 % is less than the margin
        ([0.8, 1.0, 0.85, 1.1, 0.9], 0),  # 11 % at the median, but often no faster
        ([0.9, 0.91, 0.9, 0.89, 0.92], 1),
        ([float(1 / 1.04)] * 5, 1),
    ],
)
def test_a_tile_moves_only_beyond_margin_and_noise(log: Log, seconds: list[float], moves: int) -> None:
    assert tuner(log, Clock({label(FASTER): seconds})).tune(KEY) == moves
    assert configuration(*KEY, 90) == (FASTER if moves else COMMITTED)


def test_no_workload_slows_down_for_another(log: Log) -> None:
    class Uneven(Clock):
        def __call__(self, candidates: Sequence[Candidate], sets: int, seconds: float) -> dict[str, Samples]:
            self.seconds = {label(FASTER): [0.5 if len(self.asked) % 2 else 1.1] * 5}
            return super().__call__(candidates, sets, seconds)

    two = [stand_in(KEY), replace(stand_in(KEY), name="another")]
    assert tuner(log, Uneven(), of=lambda op: two).tune(KEY) == 0


def test_a_wrong_result_is_refused(log: Log) -> None:
    clock = Clock({label(FASTER): [0.1] * 5})
    assert tuner(log, clock, of=lambda op: [stand_in(KEY, wrong=FASTER)]).tune(KEY) == 0
    assert label(FASTER) not in clock.timed and kinds(log, FASTER) == ["compiled", "refused"]
    assert [one["why"] for one in log.records if one["kind"] == "refused"] == [
        f"result 0: relative error 1, allowed {64 * 2**-23:.2g}"
    ]


def test_an_interrupted_run_continues(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"

    class Interrupted(Clock):
        def __call__(self, candidates: Sequence[Candidate], sets: int, seconds: float) -> dict[str, Samples]:
            if self.asked:
                raise KeyboardInterrupt
            return super().__call__(candidates, sets, seconds)

    first, again, clock = Compilers(), Compilers(), Clock()
    with Log(path, "a GPU", 90) as log, pytest.raises(KeyboardInterrupt):
        interrupted = tuner(log, Interrupted(), first)
        assert interrupted.tune(KEY) == 0
        interrupted.tune(OTHER)
    path.write_bytes(path.read_bytes() + b'{"kind": "timed", "key"')
    with Log(path, "a GPU", 90) as log:
        for key in (KEY, OTHER):
            tuner(log, clock, again).tune(key)
    assert first.compiled and not again.compiled, "what was compiled is known"
    assert len(clock.asked) == 1, "the first key is settled"
    assert [json.loads(line)["kind"] for line in path.read_text().splitlines()].count("decided") == 2
    with Log(path, "another GPU", 90) as log:
        assert not log.settled(KEY, COMMITTED, 2)
    with Log(path, "a GPU", 90) as log:
        assert log.settled(KEY, COMMITTED, 2) and not log.settled(KEY, COMMITTED, 3), "more candidates are asked for"
    path.write_text("nonsense\n")
    with pytest.raises(ValueError, match="line 1: not a record"), Log(path, "a GPU", 90):
        pass


def test_graphs_of_all_inputs_are_timed_by_the_gpus_clock(monkeypatch: pytest.MonkeyPatch) -> None:
    """With stand-ins for CUDA's calls: each candidate is compiled, captured once for each set, and replayed in turn."""
    said: list[str] = []

    @contextmanager
    def capture(graph: Any, pool: object) -> Iterator[None]:
        assert pool == "pool"
        said.append("capture")
        yield
        said.append("captured")

    def interleaved(graphs: Sequence[Candidate], seconds: float, device: str) -> dict[str, Samples]:
        assert seconds == 3.0 and device == "cuda"
        for one in graphs:
            one.run(0)
        return {one.name: Samples(one.name, [4.0, 8.0]) for one in graphs}

    streams = SimpleNamespace(wait_stream=lambda other: None)
    for name, value in {
        "graph_pool_handle": lambda: "pool", "Stream": lambda: streams, "current_stream": lambda: streams,
        "stream": lambda stream: nullcontext(), "graph": capture,
        "CUDAGraph": lambda: SimpleNamespace(replay=lambda: said.append("replay")),
    }.items():  # fmt: skip
        monkeypatch.setattr(torch.cuda, name, value)
    monkeypatch.setattr(tune_timing, "interleave", interleaved)
    one = Candidate("one", lambda number: said.append(f"set {number}"))
    assert tune_timing.on_gpu([one], 2, 3.0)["one"].seconds == [2.0, 4.0]
    assert said == ["set 0", "capture", "set 0", "set 1", "captured", "replay"]


def test_newer_gpus_that_use_the_tile_are_compiled_for_too() -> None:
    assert tune.served_by(KEY, 80) == ["sm_80", "sm_86", "sm_89", "sm_90"] and tune.served_by(KEY, 90) == ["sm_90"]
    assert tune.served_by(KEY, 86) == ["sm_86", "sm_89"], "a block of sm_90 may have more shared memory"
    tiles.commit(KEY, 90, FASTER)
    assert tune.served_by(KEY, 80) == ["sm_80", "sm_86", "sm_89"]
    tiles.commit(KEY, 86, FASTER)
    assert tune.served_by(KEY, 80) == ["sm_80"]


def test_the_compiler_gets_the_candidate_and_its_architecture() -> None:
    narrow: Key = ("token_alignment", "forward", "narrow")
    spilling = replace(configuration(*narrow, 80), blocks={"BLOCK_D": 16384})
    (one,) = tune_compile.affected(narrow, spilling, 80)
    assert one.constexprs["BLOCK_D"] == 16384
    _, problems, resources = tune_compile.compile_tile(narrow, spilling, ["sm_80", "sm_90"])
    assert "instructions spill" in problems[0] and len(resources) == 1 and resources[0]["spills"] > 0
    tile = configuration(*narrow, 80)
    ((same, problems, resources),) = tune_compile.compile_tiles(narrow, [tile], ["sm_80"], jobs=1)
    assert same == tile and not problems and resources[0]["registers"] > 0
    unlisted: Key = ("varlen_attention", "rows", "head_dim_128")
    ((_, problems, _),) = tune_compile.compile_tiles(unlisted, [configuration(*unlisted, 80)], ["sm_80"])
    assert problems == [tune_compile.UNLISTED]
    tiles.commit(narrow, 90, spilling)
    with tiles_of(90):
        assert configuration(*narrow, 80) == spilling
    assert configuration(*narrow, 80) == tile


def test_an_override_ends_with_its_block() -> None:
    with pytest.raises(ZeroDivisionError), override(*KEY, FASTER):
        assert configuration(*KEY, 80) == configuration(*KEY, 120) == FASTER
        assert configuration(*OTHER, 80) == COMMITTED
        raise ZeroDivisionError
    assert configuration(*KEY, 80) == COMMITTED
    with pytest.raises(KeyError, match="no configuration of 'forward' for 'huge'"), override(*KEY[:2], "huge", FASTER):
        pass
    other = Configuration({"BLOCK_M": 64}, 4, 1)
    with pytest.raises(ValueError, match=r"has the blocks \['BLOCK_D'\], got \['BLOCK_M'\]"), override(*KEY, other):
        pass
    with counted_lookups() as read:
        configuration(*KEY, 80)
    configuration(*OTHER, 80)
    assert read == {KEY: 1}


def test_a_key_of_backward_alone_is_timed_in_a_whole_step(log: Log) -> None:
    class Both(torch.autograd.Function):
        """Ask for KEY in both directions, and for OTHER in backward alone."""

        @staticmethod
        def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            configuration(*KEY, 90)
            return x * 1

        @staticmethod
        def backward(ctx: Any, grad: torch.Tensor) -> torch.Tensor:  # type: ignore[override]
            configuration(*KEY, 90)
            configuration(*OTHER, 90)
            return grad

    def make(seed: int, device: str) -> Call:
        x = torch.ones(3, requires_grad=True)
        return Call((x,), (x,), (torch.ones(3),))

    both = replace(stand_in(KEY), make=make, forward=Both.apply)
    tuned = tuner(log, Clock(), of=lambda op: [both, replace(stand_in(KEY), name="one way")])
    for key in (KEY, OTHER):
        tuned.tune(key)
    phases = {(one["key"], one["workload"]): one["phase"] for one in log.records if one["kind"] == "timed"}
    assert phases == {(KEY, both.name): "step", (KEY, "one way"): "forward", (OTHER, both.name): "step"}


def test_every_op_has_workloads_with_unique_names() -> None:
    for op in {op for op, _, _ in committed_keys()}:
        found = workloads(op)
        assert found and len({one.name for one in found}) == len(found) and {one.op for one in found} == {op}


def test_a_real_kernel_is_tuned(log: Log, monkeypatch: pytest.MonkeyPatch, needs: Callable[..., None]) -> None:
    """token_alignment is compiled for sm_80 and run on the CPU; overrides reach its launches and change no result."""
    needs(*tools.FOR_EMULATE)
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("interpreted kernels are not compiled")
    case = token_alignment.case(1, 4, 300, 2, torch.float32, token_alignment.Target())
    own = Workload(case.key, case.op, case.dtype, case.make, token_alignment.token_alignment)
    monkeypatch.setattr(tune, "MOST_MOVES", 1)
    clock = Clock({label(SLOWER): [0.5] * 5}, runs=False)
    with emulate.active() as launches:
        found = Tuner(80, "a GPU", log, "cpu", clock, Compilers(), lambda op: [own], 1, say=lambda text: None)
        assert found.tune(KEY) == 1 and configuration(*KEY, 80) == SLOWER
        launches.clear()
        own.run("step", own.make(0, "cpu"))
        warps = {one.name: one.num_warps for one in launches}
    assert warps["_forward"] == 2 and warps["_backward"] == 1
    assert not [one for one in log.records if one["kind"] == "refused"]


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        ([], "--dry-run lists the candidates"),
        (["--op", "softmax"], "unknown op 'softmax'; known: gather_patches, "),
        (["--kernel", "sideways"], "unknown kernel 'sideways'"),
        (["--op", "patch_masks", "--shape-class", "wide"], "unknown class of shapes"),
        (["--architecture", "sm_75"], "sm_80 or newer, got 'sm_75'"),
        (["--architecture", "volta", "--dry-run"], "got 'volta'"),
        (["--changes", "0"], "--changes must be at least 1"),
        (["--margin", "nan"], "--margin must not be negative"),
    ],
)
def test_bad_input_and_a_missing_gpu_are_named(argv: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    if torch.cuda.is_available() and not argv:
        pytest.skip("there is a GPU")
    assert tune.main(argv) == 2
    assert says in capsys.readouterr().err


def test_without_a_gpu_candidates_are_listed_and_compiled(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    chosen = ["--op", KEY[0], "--kernel", KEY[1], "--shape-class", KEY[2], "--architecture", "sm_80"]
    assert tune.main([*chosen, "--dry-run"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("5 candidates") and f"  {label(FASTER)}" in lines and len(lines) == 6
    compilers: Callable[..., Any] = Compilers([FASTER])
    monkeypatch.setattr(tune, "compile_tiles", lambda *task, jobs: compilers(*task))
    assert tune.main([*chosen, "--compile-only", "--log", str(tmp_path / "log.jsonl")]) == 0
    said = capsys.readouterr().out.splitlines()
    assert "4 of 5 candidates" in said[0] and said[1] == f"  {label(FASTER)}: 7 instructions spill"
    assert len(said) == 2 and len((tmp_path / "log.jsonl").read_text().splitlines()) == 5
