"""Part `tests`: pytest on the tests that need a GPU, and on those of the Triton kernels, where a checkout has them."""

from __future__ import annotations

import importlib.util
import os
import time
from collections import Counter
from pathlib import Path
from xml.etree import ElementTree

from oner_fast.benchmarks.first_gpu import children, deadline
from oner_fast.benchmarks.first_gpu.parts import Setting
from oner_fast.benchmarks.first_gpu.record import Record

FOLDERS = ("tests/gpu", "tests/kernels")
REHEARSED = ("tests/gpu",)
RESERVE = 12.0
"""Seconds for the tests that run when no further one may start, and for the report."""
MOST_JOBS = 8
MOST_FAILURES = 10


def run(record: Record, setting: Setting) -> None:
    """Run the tests while there is time; the part is skipped without a checkout or without pytest."""
    root = Path(__file__).resolve().parents[2]
    folders = [folder for folder in (REHEARSED if setting.rehearse else FOLDERS) if (root / folder).is_dir()]
    if not folders:
        record.skip("an installed package has no tests: run this in a checkout")
        return
    if importlib.util.find_spec("pytest") is None:
        record.skip("pytest is not installed (pip install pytest)")
        return
    report = setting.out / "tests.xml"
    report.unlink(missing_ok=True)
    jobs = min(MOST_JOBS, (os.cpu_count() or 1) // 2)
    parallel = ["-n", f"{jobs}", "--dist", "worksteal"] if jobs > 1 and importlib.util.find_spec("xdist") else []
    left = record.left()
    environment = {deadline.UNTIL: f"{time.time() + left - RESERVE}", "PYTHONPATH": str(root)}
    if not setting.rehearse:
        environment["ONER_FAST_GPU"] = "1"
    command = children.module(
        "pytest", "-q", "-rfE", "-p", deadline.__name__, "--rootdir", str(root), f"--junitxml={report}",
        *(parallel if not setting.rehearse else []), *(str(root / folder) for folder in folders),
    )  # fmt: skip
    ended = children.run(command, setting.out / "tests.pytest.txt", max(left - 2 * children.PATIENCE, 1.0), environment)
    if not report.is_file():
        record.fail(f"pytest left no report: {ended.last}")
        return
    counts, failures, late = read(report)
    record.row(", ".join(f"{count} {name}" for name, count in counts.items()), **counts)
    for failure in failures[:MOST_FAILURES]:
        record.fail(failure)
    if len(failures) > MOST_FAILURES:
        record.fail(f"{len(failures) - MOST_FAILURES} more in tests.pytest.txt")
    if ended.status not in (0, 5) and not failures:
        record.fail(f"pytest ended with status {ended.status}: {ended.last}")
    if late:
        record.leave_out(f"{late} tests for want of time")
    record.finish(", ".join(f"{count} {name}" for name, count in counts.items() if count))


def read(report: Path) -> tuple[dict[str, int], list[str], int]:
    """Read a JUnit file: counts by outcome, a sentence for each failure, and how many tests found no time."""
    counts, failures, late = Counter[str](), [], 0
    for case in ElementTree.parse(report).iter("testcase"):
        outcome = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if outcome is None:
            counts["passed"] += 1
            continue
        counts["skipped" if outcome.tag == "skipped" else "failed"] += 1
        message = (outcome.get("message") or "").strip()
        if outcome.tag != "skipped":
            first = message.splitlines()[0][:200] if message else "no message"
            failures.append(f"{case.get('classname')}.{case.get('name')}: {first}")
        elif deadline.REASON in message:
            late += 1
    return {name: counts[name] for name in ("passed", "failed", "skipped")}, failures, late
