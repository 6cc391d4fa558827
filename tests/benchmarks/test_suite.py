"""The suite of a commit's record: its subjects, their entries, and how pytest-benchmark writes them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from oner_fast.benchmarks import counts, peak_memory
from oner_fast.benchmarks.loading import LoaderContest, write_tar
from oner_fast.benchmarks.measure import Settings, measure
from oner_fast.benchmarks.ops import masked_gather
from oner_fast.benchmarks.record import read
from oner_fast.benchmarks.rows import GRADIENTS, OUTPUTS, Row
from oner_fast.benchmarks.source import commit_of_this, versions
from oner_fast.benchmarks.suite import Wrong, entry_of, subjects, with_memory
from oner_fast.benchmarks.timing import Candidate, interleave
from oner_fast.data.dataset import PairDataset


def test_the_suite_has_every_op_a_step_of_each_system_and_the_loader() -> None:
    for full in (False, True):
        found = subjects(full)
        keys = [one.key for one in found]
        assert len(set(keys)) == len(keys)
        assert {one.op for one in found if one.kind == "op"} == {
            "masked_gather", "gather_patches", "mixup_info_nce", "sigmoid_loss", "varlen_attention",
            "padded_attention", "token_alignment",
        }  # fmt: skip
        assert {one.op for one in found if one.kind == "step"} == {"oner step", "uta step", "clip step"}
        assert [one.op for one in found if one.kind == "loader"] == ["loader"]
    assert len(subjects(True)) > len(subjects())


def small_case() -> masked_gather.Case:
    return masked_gather.case(2, 16, 8, 5, torch.float32, masked_gather.Target())


def test_an_entry_holds_the_rounds_the_errors_and_the_limit_of_a_row() -> None:
    case = small_case()
    eager = [one for one in case.contenders if not one.compiled]
    case = masked_gather.Case(**{**case.__dict__, "contenders": eager})
    row = measure(case, Settings(1.0, memory=False, profile=False))
    entry = entry_of(row, "op", {"saved_bytes": 0}, {"bytes": case.bytes})
    assert entry.key == case.key and not row.profiles
    # The limit's rounds are no contender's.
    assert set(entry.seconds) == {one.name for one in eager} and "limit: copy" in row.seconds
    assert len({len(one) for one in entry.seconds.values()}) == 1
    assert row.speedup is not None and entry.best == row.best and entry.ratio == pytest.approx(row.speedup.p50)
    assert entry.limit is not None and entry.limit.name == "limit: copy" and entry.limit.share == row.share
    assert all(set(one) == {OUTPUTS, GRADIENTS} for one in entry.errors.values())
    assert max(entry.errors["oner_fast"].values()) == row.errors["oner_fast"]
    memory = {"oner_fast": {"peak": 1, "saved": 2, "saved_beyond_inputs": 0}}
    assert with_memory(entry, {case.key: memory}).memory == memory and with_memory(entry, {}).memory == {}


def test_a_wrong_result_makes_no_entry() -> None:
    row = Row("masked_gather", "(2)", "float32", refused={"eager": "result 0 is wrong"})
    with pytest.raises(Wrong, match="masked_gather .*result 0 is wrong"):
        entry_of(row, "op", {}, {})


def test_counts_are_those_that_a_case_promises() -> None:
    case = small_case()
    assert counts.of_case(case) == counts.expected(case) == {"saved_bytes": 0, "graph_breaks": 0, "flops": 0}


def test_bytes_kept_during_a_run_leave_out_what_was_given() -> None:
    weight, x = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4)

    def run() -> torch.Tensor:
        return (x @ weight).exp().sum()

    # The product keeps x and the weight, of which x alone is not given; exp keeps its result.
    assert peak_memory.saved_during(run, [weight]) == (32 + 32, 32 + 32)
    assert peak_memory.saved_during(run, [weight, x]) == (32 + 32, 32)


def test_a_candidate_may_take_part_in_the_first_rounds_alone() -> None:
    many, few = Candidate("many", lambda call: None), Candidate("few", lambda call: None, most_rounds=2)
    found = interleave([many, few], rounds=4)
    assert (len(found["many"].seconds), len(found["few"].seconds)) == (4, 2)


def test_a_busy_machine_still_makes_the_least_rounds() -> None:
    found = interleave([Candidate("one", lambda call: None)], seconds=1e-9, least_rounds=7)
    assert len(found["one"].seconds) == 7


def test_all_loaders_make_batches_of_one_shape(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in {"SAMPLES": 4, "BATCH": 2, "WIDTH": 64, "HEIGHT": 48, "SIZE": 32}.items():
        monkeypatch.setattr(LoaderContest, name, value)
    with LoaderContest() as contest:
        for run in contest.runs().values():
            for call in range(3):  # more than the tar's samples: it is read without end
                images = run(call)
                assert images.shape == (2, 3, 32, 32) and images.dtype == torch.uint8


def test_the_tar_is_a_dataset(tmp_path: Path) -> None:
    write_tar(tmp_path / "train-00000.tar", 3, (32, 16))
    data = PairDataset(str(tmp_path / "train-00000.tar"))
    assert len(data) == 3 and data.read(0).caption == "a picture"


def git(folder: Path, *arguments: str) -> str:
    settings = ["-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    done = subprocess.run(["git", *settings, *arguments], cwd=folder, check=True, capture_output=True, text=True)
    return done.stdout.strip()


def test_the_commit_is_that_of_the_files(tmp_path: Path) -> None:
    folder = tmp_path / "benchmarks"
    folder.mkdir()
    (folder / "a.py").write_text("1\n", encoding="utf-8")
    assert commit_of_this(folder) == ("", False)
    git(tmp_path, "init", "-q")
    # An installed package may lie in a folder of a repository that does not hold its files.
    assert commit_of_this(folder) == ("", False)
    git(tmp_path, "add", ".")
    git(tmp_path, "commit", "-qm", "a")
    assert commit_of_this(folder) == (git(tmp_path, "rev-parse", "HEAD"), False)
    (folder / "a.py").write_text("2\n", encoding="utf-8")
    assert commit_of_this(folder)[1]


TEST = """
import pytest
from oner_fast.benchmarks.record import NAME, Entry
from oner_fast.benchmarks.replay import clock, replay

@pytest.mark.benchmark(timer=clock)
def test_speed(benchmark):
    seconds = {"oner_fast": [0.1, 0.3, 0.2], "eager": [0.2, 0.6, 0.6]}
    entry = Entry("a key", "op", "an op", "(1)", "float32", "cpp", seconds, best="eager", ratio=2.0)
    benchmark.extra_info[NAME] = entry.as_dict()
    replay(benchmark, seconds["oner_fast"])
"""


def test_pytest_benchmark_writes_a_record_whose_statistics_are_those_of_our_rounds(tmp_path: Path) -> None:
    hooks = "from oner_fast.benchmarks.conftest import pytest_benchmark_update_machine_info  # noqa: F401\n"
    (tmp_path / "conftest.py").write_text(hooks, encoding="utf-8")
    (tmp_path / "test_speed.py").write_text(TEST, encoding="utf-8")
    (tmp_path / "pytest.ini").write_text("[pytest]\n", encoding="utf-8")
    command = [sys.executable, "-c", "import sys, pytest; sys.exit(pytest.main())", "--benchmark-json=record.json"]
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    record = read(tmp_path / "record.json")
    assert record.entry("a key").rounds() == pytest.approx([2.0, 2.0, 3.0])
    assert record.versions == versions() and "torch" in record.machine and record.facts["threads"] >= 1
    stats = json.loads((tmp_path / "record.json").read_text(encoding="utf-8"))["benchmarks"][0]["stats"]
    assert stats["data"] == [0.1, 0.3, 0.2] and stats["median"] == 0.2 and stats["rounds"] == 3
