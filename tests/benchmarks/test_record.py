"""The record of a commit: what is written is read again, and a file that is none is refused in one sentence."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from oner_fast.benchmarks.record import Entry, LimitShare, Record, machine_object, ratio_of, read, write

ENTRY = Entry(
    key="masked_gather (2, 4, 8) float32",
    kind="op",
    op="masked_gather",
    shape="(2, 4, 8)",
    dtype="float32",
    served="cpp",
    seconds={"oner_fast": [1.0, 2.0, 4.0], "eager index": [2.0, 6.0, 4.0], "compiled index": [30.0, 40.0]},
    best="eager index",
    ratio=2.0,
    limit=LimitShare("limit: copy", 1.2e10, "GB/s", 0.7),
    memory={"oner_fast": {"peak": 10, "saved": 5, "saved_beyond_inputs": 0}},
    counts={"saved_bytes": 0},
    errors={"oner_fast": {"output": 1e-7, "gradients": 2e-7}},
)
RECORD = Record("a machine", {"cores": 2}, {"torch": "2.13.0"}, "abc", False, [ENTRY], "2026-11-30T10:00:00+00:00")


@pytest.fixture
def written(tmp_path: Path) -> tuple[Path, dict[str, Any]]:
    path = tmp_path / "record.json"
    write(RECORD, path)
    return path, json.loads(path.read_text(encoding="utf-8"))


def test_a_record_is_read_as_it_was_written(written: tuple[Path, dict[str, Any]]) -> None:
    assert read(written[0]) == RECORD


def test_an_entry_is_found_by_its_key() -> None:
    assert RECORD.entry(ENTRY.key) is ENTRY
    with pytest.raises(KeyError, match="no entry 'other'; known: masked_gather"):
        RECORD.entry("other")


def test_rounds_are_ratios_within_a_round() -> None:
    assert ENTRY.rounds() == [2.0, 3.0, 1.0]
    # A slow contender has fewer rounds.
    assert replace(ENTRY, best="compiled index").rounds() == [30.0, 20.0]
    assert replace(ENTRY, best="", ratio=None).rounds() == []


def test_the_best_is_the_fastest_by_its_median() -> None:
    others = ["compiled index", "eager index"]
    assert ratio_of(ENTRY.seconds, "oner_fast", others) == ("eager index", 2.0)
    assert ratio_of(ENTRY.seconds, "oner_fast", []) == ("", None)


def test_fields_of_a_later_version_and_benchmarks_without_ours_are_passed_over(
    written: tuple[Path, dict[str, Any]],
) -> None:
    path, data = written
    data["benchmarks"][0]["extra_info"]["oner_fast"]["later"] = 1
    data["benchmarks"].append({"name": "a gate", "extra_info": {}})
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read(path) == RECORD


def _entry_of(data: dict[str, Any]) -> dict[str, Any]:
    return data["benchmarks"][0]["extra_info"]["oner_fast"]


BROKEN: dict[str, Callable[[dict[str, Any]], Any]] = {
    "is no record of a commit": lambda data: data.pop("machine_info"),
    "lacks machine_info.oner_fast or benchmarks": lambda data: data.update(benchmarks=None),
    "format version 2, and this oner_fast reads versions up to 1": lambda data: _entry_of(data).update(format=2),
    'has no "format"': lambda data: data["machine_info"]["oner_fast"].pop("format"),
    r"benchmarks\[0\] has no extra_info": lambda data: data["benchmarks"][0].pop("extra_info"),
    "kind is 'guess', and one of op, step, loader": lambda data: _entry_of(data).update(kind="guess"),
    "seconds.'oner_fast'. is 0.0, and needs to lie between 1e-12 and 1e.09": lambda data: _entry_of(data)[
        "seconds"
    ].update(oner_fast=[0]),
    "seconds.'oner_fast'. is nan": lambda data: _entry_of(data)["seconds"].update(oner_fast=[float("nan")]),
    "no rounds of 'other', which the ratio needs": lambda data: _entry_of(data).update(best="other"),
    "give both or neither": lambda data: _entry_of(data).update(ratio=None),
    "seconds.'oner_fast'. is -1": lambda data: _entry_of(data)["seconds"].update(oner_fast=[-1]),
    "seconds.'oner_fast'. is inf, and needs to be a finite": lambda data: _entry_of(data)["seconds"].update(
        oner_fast=[float("inf")]
    ),
    "seconds.'oner_fast'. is 1e-320, and needs to lie": lambda data: _entry_of(data)["seconds"].update(
        oner_fast=[1e-320]
    ),
    "seconds.'oner_fast'. is 1000.*, and needs to lie": lambda data: _entry_of(data)["seconds"].update(
        oner_fast=[10**400]
    ),
    "ratio is 1e.300, and needs to lie": lambda data: _entry_of(data).update(ratio=1e300),
    "has an empty name": lambda data: _entry_of(data)["seconds"].update({" ": [1.0]}),
    "key has an empty name": lambda data: _entry_of(data).update(key=""),
    "key holds a control character": lambda data: _entry_of(data).update(key="a\x1b[2J"),
    "line holds a control character": lambda data: data["machine_info"]["oner_fast"].update(line="a\n# b"),
    "commit holds a control character": lambda data: data["machine_info"]["oner_fast"].update(commit="a\u202eb"),
    "as ours and as the best of the others": lambda data: _entry_of(data).update(best="oner_fast"),
    "memory.'oner_fast'. has no 'saved'": lambda data: _entry_of(data)["memory"]["oner_fast"].pop("saved"),
    "saved_bytes.. is 1000.*, and needs to lie": lambda data: _entry_of(data).update(counts={"saved_bytes": 10**400}),
    "gradients.. is -1.0, and needs to lie": lambda data: _entry_of(data).update(errors={"a": {"gradients": -1}}),
    "breakdown has the contender 'x', which has no rounds": lambda data: _entry_of(data).update(
        breakdown={"x": {"rest": 1.0}}
    ),
    "breakdown.'oner_fast'. adds up to 0": lambda data: _entry_of(data).update(breakdown={"oner_fast": {"rest": 0}}),
    "saved_bytes.. is 0.5, and needs to be an integer": lambda data: _entry_of(data).update(
        counts={"saved_bytes": 0.5}
    ),
    "peak.. is True, and needs to be an integer": lambda data: _entry_of(data).update(memory={"a": {"peak": True}}),
    "gradients.. is 'small', and needs to be a finite number": lambda data: _entry_of(data).update(
        errors={"a": {"gradients": "small"}}
    ),
    "has no 'served'": lambda data: _entry_of(data).pop("served"),
    "limit is 3, and needs to be a dict": lambda data: _entry_of(data).update(limit=3),
    "has two entries": lambda data: data["benchmarks"].append(data["benchmarks"][0]),
    "versions.torch is 2, and needs to be a str": lambda data: data["machine_info"]["oner_fast"].update(
        versions={"torch": 2}
    ),
}


@pytest.mark.parametrize("message", BROKEN)
def test_a_broken_record_is_refused_in_one_sentence(message: str, written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    BROKEN[message](data)
    path.write_text(json.dumps(data), encoding="utf-8")
    with pytest.raises(ValueError, match=message) as caught:
        read(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


def test_a_note_is_kept_on_one_line_without_control_characters(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    _entry_of(data)["notes"] = ["cannot run here:\n\x1b[31mno\tcompiler"]
    path.write_text(json.dumps(data), encoding="utf-8")
    assert read(path).entries[0].notes == ["cannot run here: ?[31mno compiler"]


def test_many_entries_are_read_in_linear_time(written: tuple[Path, dict[str, Any]]) -> None:
    path, data = written
    small = {**_entry_of(data), "memory": {}, "errors": {}, "limit": None}
    data["benchmarks"] = [{"extra_info": {"oner_fast": {**small, "key": f"key {i}"}}} for i in range(20_000)]
    path.write_text(json.dumps(data), encoding="utf-8")
    start = time.process_time()
    assert len(read(path).entries) == 20_000 and time.process_time() - start < 5


def test_a_record_that_cannot_be_written_leaves_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "record.json"
    write(RECORD, path)
    with pytest.raises(ValueError, match="not JSON compliant"):
        write(replace(RECORD, facts={"load": math.nan}), path)
    assert read(path) == RECORD and [one.name for one in tmp_path.iterdir()] == ["record.json"]


def test_a_missing_file_stays_an_os_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read(tmp_path / "none.json")


def test_the_machine_object_has_the_fields_of_the_format() -> None:
    found = machine_object("a machine", {"cores": 2}, {"torch": "2.13.0"}, "abc", True)
    assert found == {
        "format": 1,
        "line": "a machine",
        "facts": {"cores": 2},
        "versions": {"torch": "2.13.0"},
        "commit": "abc",
        "dirty": True,
    }
