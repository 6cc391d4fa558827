"""`oner-fast gpu`: parts with time limits, each of which leaves its findings, and what a CPU can rehearse of them."""

from __future__ import annotations

import json
import os
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from torch import Tensor

from oner_fast.benchmarks import first_gpu
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.first_gpu import (
    children,
    command,
    counters,
    exactness,
    ncu,
    parts,
    record,
    shapes,
    speed,
    testing,
    training_step,
)  # fmt: skip
from oner_fast.benchmarks.first_gpu.parts import PARTS, Setting
from oner_fast.benchmarks.first_gpu.record import Findings, Record
from oner_fast.ops import implementations

FINISHED = '{{"part": "{0}", "finished": true, "headline": "fine", "failures": {1}}}'


def started(path: Path, part: str = "part", seconds: float = 60.0) -> Record:
    return Record(path / f"{part}.json", part, seconds)


def rehearsal(path: Path) -> Setting:
    return Setting(path, "cpu", True)


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().split()[2] != "Z"
    except OSError:
        return False


def test_nine_minutes_hold_the_parts_in_the_promised_order() -> None:
    assert [part.name for part in PARTS] == ["doctor", "ops", "step", "speed", "counters", "tests"]
    assert parts.TOTAL + 20 <= 9 * 60
    folder = Path(first_gpu.__file__).parent
    assert all((folder / f"{part.module}.py").is_file() for part in PARTS)


def test_a_child_that_hangs_is_ended_with_all_that_it_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(children, "PATIENCE", 0.2)
    script = "import signal,subprocess,sys,time;signal.signal(15,signal.SIG_IGN);"
    script += "p=subprocess.Popen(['sleep','600']);print(p.pid,flush=True);time.sleep(600)"
    ended = children.run([sys.executable, "-c", script], tmp_path / "log", 3.0)
    assert ended.timed_out and ended.status == -9
    grandchild = int(ended.last)
    until = time.monotonic() + 5
    while alive(grandchild) and time.monotonic() < until:
        time.sleep(0.05)
    assert not alive(grandchild)


def fake_parts(monkeypatch: pytest.MonkeyPatch, scripts: dict[str, str]) -> list[float]:
    """Let each part run a script, in which {out} is the run's folder; returns the time limits as they are given."""
    limits = []

    def module(name: str, part: str, flag: str, out: str, seconds: str, limit: str, *rest: str) -> list[str]:
        limits.append(float(limit))
        return [sys.executable, "-c", scripts[part].replace("{out}", out)]

    monkeypatch.setattr(command.children, "module", module)
    monkeypatch.setattr(command, "describe", lambda rehearse: "this machine")
    monkeypatch.setattr(command, "why_no_gpu", lambda: "")
    monkeypatch.setattr(children, "PATIENCE", 0.2)
    return limits


def leaves(part: str, failures: str = "[]") -> str:
    return f"open('{{out}}/{part}.json','w').write('''{FINISHED.format(part, failures)}''');"


def test_every_part_leaves_its_result_and_the_table_has_each_verdict(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    partial = '{"part": "speed", "rows": [{"op": "first"}]}'
    fake_parts(
        monkeypatch,
        {
            "doctor": leaves("doctor"),
            "ops": leaves("ops", '["the loss is off"]') + "raise SystemExit(1)",
            "step": "import os;print('Segmentation',flush=True);os.abort()",
            "speed": f"open('{{out}}/speed.json','w').write('''{partial}''');import time;time.sleep(600)",
            "counters": leaves("counters").replace('"fine"', '"", "skipped": "no ncu"'),
            "tests": leaves("tests").replace('"fine"', '"5 passed", "left_out": ["3 tests"]'),
        },
    )
    monkeypatch.setattr(command, "PARTS", [replace(part, seconds=0.7) for part in PARTS])
    assert command.main(["--out", str(tmp_path)]) == 1
    verdicts = {one["part"]: one["verdict"] for one in json.loads((tmp_path / "summary.json").read_text())["parts"]}
    assert verdicts == {
        "doctor": "passed", "ops": "failed", "step": "failed", "speed": "timed out", "counters": "skipped",
        "tests": "passed in part",
    }  # fmt: skip
    assert json.loads((tmp_path / "speed.json").read_text())["rows"] == [{"op": "first"}]
    said = capfd.readouterr().out
    for words in ("ops: WRONG: the loss is off", "status -6: Segmentation", "tests: left out: 3 tests", "no ncu"):
        assert words in said
    page = (tmp_path / "summary.md").read_text()
    assert "| speed | ops against SDPA, torch varlen and torch.compile | timed out |" in page and "## Wrong" in page


def test_a_part_gets_what_the_ones_before_it_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    limits = fake_parts(monkeypatch, {"doctor": leaves("doctor"), "step": leaves("step")})
    assert command.main(["--out", str(tmp_path), "--parts", "step", "doctor"]) == 0
    seconds = {part.name: part.seconds for part in PARTS}
    assert limits[0] == seconds["doctor"] - children.PATIENCE
    assert seconds["step"] + seconds["doctor"] - 5 < limits[1] < seconds["step"] + seconds["doctor"]


def test_findings_of_an_earlier_run_are_not_taken_for_this_ones(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake_parts(monkeypatch, {"doctor": "raise SystemExit(3)"})
    (tmp_path / "doctor.json").write_text(FINISHED.format("doctor", "[]"))
    assert command.main(["--out", str(tmp_path), "--parts", "doctor"]) == 1
    assert "status 3" in json.loads((tmp_path / "doctor.json").read_text())["failures"][0]


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
def test_without_a_gpu_it_names_the_rehearsal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--out", str(tmp_path / "none")]) == 2
    assert "--rehearse runs all that a CPU can" in capsys.readouterr().err and not (tmp_path / "none").exists()
    (tmp_path / "file").touch()
    assert command.main(["--rehearse", "--out", str(tmp_path / "file")]) == 2
    assert "is a file" in capsys.readouterr().err


def test_one_part_rehearsed_as_a_user_would(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert command.main(["--rehearse", "--out", str(tmp_path), "--parts", "doctor"]) == 0
    found = record.read(tmp_path / "doctor.json", "doctor")
    assert found.finished and set(found.rows[1]["chosen"]) == set(implementations.ops())
    assert "Implementation chosen for each op" in (tmp_path / "doctor.txt").read_text()
    assert "REHEARSAL on a CPU" in capsys.readouterr().out


@pytest.mark.slow
def test_the_whole_rehearsal(tmp_path: Path) -> None:
    assert command.main(["--rehearse", "--out", str(tmp_path)]) == 0
    found = [record.read(tmp_path / f"{part.name}.json", part.name) for part in PARTS]
    assert all(one.finished and not one.failures for one in found)
    assert any(OURS + " triton" in row.get("who", "") for row in found[1].rows)
    assert found[4].rows[0]["emulator"]["instructions"] > 0


def test_every_op_is_compared_with_float64(tmp_path: Path) -> None:
    assert {*shapes.CASES, exactness.MASKS} == set(implementations.ops()) and shapes.CASES.keys() == shapes.SMALL.keys()
    found = started(tmp_path)
    for op in shapes.SMALL:
        exactness.check_op(op, found, "cpu", small=True)
    compared = {row["op"] for row in found.found.rows if row["error"] <= row["allowed"]}
    assert compared == set(shapes.SMALL) and not found.found.failures


def test_a_wrong_result_fails_the_part(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(dtype: torch.dtype) -> object:
        case = made(dtype)
        ours = case.contender(OURS)
        off = replace(ours, forward=lambda *arguments: 1.5 * ours.forward(*arguments))
        return replace(case, contenders=[off, *(one for one in case.contenders if one is not ours)])

    made = shapes.SMALL["mixup_info_nce"]
    monkeypatch.setitem(shapes.SMALL, "mixup_info_nce", wrong)
    found = started(tmp_path)
    exactness.check_op("mixup_info_nce", found, "cpu", small=True)
    assert "relative error" in found.found.failures[0] and OURS in found.found.failures[0]


def test_an_op_whose_process_dies_fails_and_the_others_stand(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def module(name: str, op: str, path: str, seconds: str) -> list[str]:
        script = "import os;os.abort()" if op == "token_alignment" else leaves(f"ops.{op}")
        return [sys.executable, "-c", script.replace("{out}", str(tmp_path))]

    monkeypatch.setattr(exactness.children, "module", module)
    found = started(tmp_path)
    exactness.run(found, Setting(tmp_path, "cuda", False))
    assert len(found.found.failures) == 1 and found.found.failures[0].startswith("token_alignment: its process ended")


def test_the_step_leaves_time_mfu_parts_and_a_trace(tmp_path: Path) -> None:
    found = started(tmp_path, "step")
    training_step.run(found, rehearsal(tmp_path))
    assert found.found.finished and not found.found.failures
    row = next(row for row in found.found.rows if "mfu" in row)
    assert row["mfu"] == pytest.approx(row["flops"] / row["median"] / row["gemm_rate"]) and row["pairs"] == 8
    kinds = {row["kind"]: row["share"] for row in found.found.rows if "kind" in row}
    assert {"linear layers", "attention", "optimizer and clipping"} <= kinds.keys()
    assert sum(kinds.values()) == pytest.approx(1)
    assert json.loads((tmp_path / training_step.TRACE).read_text())["traceEvents"]


def test_a_loss_that_does_not_fall_is_wrong(tmp_path: Path) -> None:
    found, losses = started(tmp_path), iter([1.0, 2.0, float("nan")])
    training_step.warm_up(lambda: Tensor([next(losses)]), found, rehearsal(tmp_path))  # type: ignore[arg-type]
    assert "not down" in found.found.failures[0]


def test_speed_stops_for_want_of_time_and_keeps_its_rows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(speed, "measure", lambda case, settings: pytest.fail("there is no time"))
    found = started(tmp_path, seconds=1.0)
    speed.run(found, replace(rehearsal(tmp_path), rehearse=False))
    assert "7 of 7 cases for want of time" in found.found.left_out[0]
    assert json.loads((tmp_path / "speed" / "results.json").read_text())["finished"]


def test_speed_measures_one_half_precision_case_of_each_op_with_torchs_own_rivals() -> None:
    every = {case.op: case for case in speed.chosen()}
    assert tuple(every) == speed.ORDER
    assert every["varlen_attention"].dtype == torch.bfloat16
    rivals = [one.name for one in every["varlen_attention"].contenders]
    assert "eager torch.nn.attention.varlen" in rivals and "compiled softmax by length" in rivals
    assert any("SDPA" in name for name in rivals)


CSV = """==PROF== Connected to process 7
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
"0","7","forward_kernel","dram__bytes_read.sum","byte","1,024"
"0","7","forward_kernel","dram__bytes_write.sum","byte","512"
"0","7","forward_kernel","smsp__inst_executed.sum","inst","40"
"1","7","backward_kernel","smsp__inst_executed.sum","inst","2"
"1","7","backward_kernel","l1tex__t_sectors_pipe_lsu_mem_global_op_ld.sum","sector","3"
==PROF== Disconnected
"""


def test_ncus_csv_is_added_up_in_the_emulators_units() -> None:
    assert ncu.parse(CSV.splitlines()) == {
        "launches": 2, "dram": 1536, "sectors": 96, "instructions": 42, "conflicts": 0,
    }  # fmt: skip


def program(folder: Path, monkeypatch: pytest.MonkeyPatch, text: str, status: int = 0) -> None:
    """Put an `ncu` on PATH that prints a text."""
    (folder / "said").write_text(text)
    (folder / "ncu").write_text(f"#!/bin/sh\ncat {folder}/said\nexit {status}\n")
    (folder / "ncu").chmod(0o755)
    monkeypatch.setenv("PATH", f"{folder}{os.pathsep}{os.environ['PATH']}")


def test_ncu_counts_or_says_why_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program(tmp_path, monkeypatch, CSV)
    monkeypatch.setattr(counters, "emulate", lambda *rest: {"masked_gather": {"launches": 2, "instructions": 50}})
    setting = Setting(tmp_path, "cuda", False)
    found = started(tmp_path, "counters")
    counters.run(found, setting)
    assert found.found.rows[0]["ncu"]["dram"] == 1536 and found.found.rows[0]["emulator"]["instructions"] == 50
    program(tmp_path, monkeypatch, f"==ERROR== {ncu.REFUSED} - The user does not have permission", 1)
    found = started(tmp_path, "counters")
    counters.run(found, setting)
    assert "only administrators" in found.found.left_out[0] and not found.found.failures
    program(tmp_path, monkeypatch, "==ERROR== no such metric", 1)
    found = started(tmp_path, "counters")
    counters.run(found, setting)
    assert "ncu ended with status 1: ==ERROR== no such metric" in found.found.failures[0]


def test_counters_are_skipped_where_nothing_can_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(counters.tools, "missing", lambda *tools: ["g++"])
    found = started(tmp_path)
    counters.run(found, Setting(tmp_path, "cuda", False))
    assert "ncu is not on PATH" in found.found.skipped and "g++" in found.found.skipped


XML = """<testsuites><testsuite>
<testcase classname="tests.gpu" name="a"/>
<testcase classname="tests.gpu" name="b"><failure message="AssertionError: off&#10;more"/></testcase>
<testcase classname="tests.gpu" name="c"><skipped message="no time was left for it"/></testcase>
<testcase classname="tests.gpu" name="d"><skipped message="needs nvcc"/></testcase>
</testsuite></testsuites>"""


def test_the_tests_part_reads_pytests_report(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = f"open('{tmp_path}/tests.xml','w').write('''{XML}''');raise SystemExit(1)"
    monkeypatch.setattr(testing.children, "module", lambda *arguments: [sys.executable, "-c", script])
    found = started(tmp_path, "tests")
    testing.run(found, rehearsal(tmp_path))
    assert found.found.failures == ["tests.gpu.b: AssertionError: off"]
    assert found.found.rows == [{"passed": 1, "failed": 1, "skipped": 2}]
    assert found.found.left_out == ["1 tests for want of time"]


def test_no_test_starts_after_the_deadline(monkeypatch: pytest.MonkeyPatch) -> None:
    from oner_fast.benchmarks.first_gpu import deadline

    monkeypatch.setenv(deadline.UNTIL, f"{time.time() + 60}")
    deadline.pytest_runtest_setup(SimpleNamespace())
    monkeypatch.setenv(deadline.UNTIL, f"{time.time() - 1}")
    with pytest.raises(pytest.skip.Exception, match=deadline.REASON):
        deadline.pytest_runtest_setup(SimpleNamespace())


def test_a_process_that_ends_well_without_an_end_of_its_findings_has_failed() -> None:
    one = Findings("ops")
    one.judge()
    assert one.verdict == record.FAILED and "wrote nothing" in one.failures[0]
