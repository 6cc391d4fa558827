"""The history of records: its order, its page, what it leaves out, and the file for github-action-benchmark."""

from __future__ import annotations

import json
import os
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest

import oner_fast.cli
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.comparison import INTERLEAVED
from oner_fast.benchmarks.history.folder import BY_DATE, BY_GIT, read_folder
from oner_fast.benchmarks.history.page import count_changes, history_page, machine_changes
from oner_fast.benchmarks.page.render import render
from oner_fast.benchmarks.record import Entry, Record, write

HOSTILE = '"><script>alert(1)</script>&amp;'


def entry(key: str, ratio: float, flops: int = 7, baseline: bool = True, kind: str = "op") -> Entry:
    ours = [0.01, 0.012, 0.011, 0.01, 0.02]
    seconds = {OURS: ours} | ({"compiled x": [one * ratio for one in ours]} if baseline else {})
    best = "compiled x" if baseline else ""
    return Entry(
        key, kind, key.split()[0], "tiny", "float32", "cpp", seconds, best=best,
        ratio=ratio if baseline else None, counts={"flops": flops},
    )  # fmt: skip


def put(
    folder: Path, name: str, entries: Sequence[Entry], sha: str, date: str = "", facts: Any = None, dirty: bool = False
) -> None:
    facts = {"cpu": "a CPU", "load": 1.0} if facts is None else facts
    record = Record("a machine", facts, {"torch": "2.13.0"}, sha, dirty, list(entries), "2026-11-30T10:00:00")
    write(record, folder / name)
    if date:
        data = json.loads((folder / name).read_text())
        (folder / name).write_text(json.dumps(data | {"commit_info": {"id": sha, "time": date}}))


def series(folder: Path, count: int) -> None:
    """Write records whose names are in another order than their dates."""
    for number in range(count):
        date = f"2026-{1 + number // 28:02}-{1 + number % 28:02}T10:00:00+02:00"
        entries = [entry("gather tiny float32", 2.0)] + ([entry("late tiny float32", 0.5)] if number % 3 == 2 else [])
        put(folder, f"{count - number:04}.json", entries, f"{number:040x}", date)


@pytest.mark.parametrize("count", [1, 2, 200])
def test_a_page_of_any_number_of_commits(count: int, tmp_path: Path, problems: Callable[[str], list[str]]) -> None:
    series(tmp_path, count)
    history = read_folder(tmp_path, tmp_path)
    assert history.order == BY_DATE
    assert [int(one.record.commit, 16) for one in history.records] == list(range(count))
    text = render(history_page(history))
    assert problems(text) == []
    assert (f"{count} commits." if count > 1 else "1 commit.") in text
    # A point for each record at both widths, and a row for each.
    assert text.count('href="#m0-') == 2 * count and text.count('id="m0-') == count
    newest = text.partition("gather tiny float32, the newest first")[2]
    assert newest.index(f'id="m0-{count - 1}"') <= newest.index('id="m0-0"')
    if count == 200:
        assert "134 of 200 records lack it" in text


def test_git_orders_the_commits_of_its_first_parent_line(tmp_path: Path) -> None:
    repository = tmp_path / "clone"
    repository.mkdir()
    who = ["-c", "user.name=A", "-c", "user.email=a@example.org"]
    git = ["git", "-C", str(repository), *who]
    subprocess.run([*git, "init", "-q"], check=True)
    shas = []
    for number in range(3):
        subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", str(number)], check=True)
        found = subprocess.run([*git, "rev-parse", "HEAD"], check=True, capture_output=True, text=True)
        shas.append(found.stdout.strip())
    records = tmp_path / "records"
    records.mkdir()
    for number, sha in enumerate(shas):  # by date they would be in the opposite order
        put(records, f"{number}.json", [entry("gather tiny float32", 2.0)], sha, f"2026-01-{9 - number:02}T00:00:00Z")
    history = read_folder(records, repository)
    assert history.order == BY_GIT and [one.record.commit for one in history.records] == shas
    put(records, "other.json", [entry("gather tiny float32", 2.0)], "f" * 40, "2025-01-01T00:00:00Z")
    history = read_folder(records, repository)
    assert history.order == BY_DATE and [one.record.commit for one in history.records] == ["f" * 40, *shas[::-1]]


def test_changes_of_the_machine_and_of_counts_are_told(tmp_path: Path) -> None:
    key = "gather tiny float32"
    put(tmp_path, "a.json", [entry(key, 2.0)], "a" * 40, "2026-01-01T00:00:00Z")
    put(tmp_path, "b.json", [entry("other tiny float32", 2.0)], "b" * 40, "2026-01-02T00:00:00Z")
    put(tmp_path, "c.json", [entry(key, 2.0, flops=9)], "c" * 40, "2026-01-03T00:00:00Z", {"cpu": "new", "load": 5.0})
    history = read_folder(tmp_path, tmp_path)
    assert machine_changes(history, 1) == [] and machine_changes(history, 2) == ["cpu: a CPU -> new"]
    assert count_changes(history) == [["c" * 10, key, "flops", "7", "9"]]
    text = render(history_page(history))
    assert "cpu: a CPU -&gt; new" in text and "another machine from here on" in text and "from this commit on" in text
    (tmp_path / "c.json").unlink()
    assert "No exact count changed" in render(history_page(read_folder(tmp_path, tmp_path)))


def test_builds_measured_in_turn_are_of_one_machine(tmp_path: Path) -> None:
    for name, clock in (("a", "cpu"), ("b", "cpu"), ("c", "wall")):
        facts = {"cpu": "a CPU", INTERLEAVED: {"id": name, "clock": clock, "rounds_in_a_visit": {"x": 2}}}
        put(
            tmp_path,
            f"{name}.json",
            [entry("gather tiny float32", 2.0)],
            name * 40,
            f"2026-01-0{ord(name) - 96}",
            facts,
        )
    history = read_folder(tmp_path, tmp_path)
    assert machine_changes(history, 1) == []
    assert machine_changes(history, 2) == [f"{INTERLEAVED}: by the cpu clock -> by the wall clock"]
    assert "share of the limit" not in render(history_page(history))


def test_what_is_left_out_is_named_with_its_reason(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], problems: Callable[[str], list[str]]
) -> None:
    entries = [entry("gather tiny float32", 2.0), entry("alone tiny float32", 2.0, baseline=False)]
    put(tmp_path, "a.json", entries, "a" * 40)
    put(tmp_path, "again.json", entries, "a" * 40)
    (tmp_path / "cut.json").write_text('{"machine_info": ')
    (tmp_path / "foreign.json").write_text('{"benchmarks": []}')
    (tmp_path / "folder.json").mkdir()
    (tmp_path / "index.html").write_text("no record")
    assert oner_fast.cli.main(["bench", "history", str(tmp_path), "--repository", str(tmp_path)]) == 0
    said = capsys.readouterr()
    for words in (
        "left out: cut.json: its JSON cannot be read",
        "left out: foreign.json: ",
        "left out: folder.json: ",
        "left out: a.json: an older record of commit aaaaaaaaaa, which again.json measured again",
    ):
        assert words in said.err
    text = (tmp_path / "history.html").read_text()
    assert problems(text) == []
    for words in ("cut.json", "foreign.json", "folder.json", "alone tiny float32", "without a baseline"):
        assert words in text.partition('id="left-out"')[2]


def test_a_hostile_record_changes_no_markup(tmp_path: Path, problems: Callable[[str], list[str]], parsed: Any) -> None:
    hostile = entry(f"{HOSTILE} tiny float32", 2.0)
    put(tmp_path, f"{HOSTILE.replace('/', '')}.json", [hostile], HOSTILE, HOSTILE, {HOSTILE: HOSTILE})
    put(tmp_path, "b.json", [entry(hostile.key, 2.0, flops=8)], "b" * 40, facts={HOSTILE: "b"}, dirty=True)
    text = render(history_page(read_folder(tmp_path, tmp_path)))
    assert problems(text) == [] and "<script" not in text
    assert HOSTILE in " ".join(parsed(text).text) and "bbbbbbbbbb+" in text


@pytest.mark.parametrize("files", [{}, {"x.json": "[1]"}])
def test_a_folder_without_a_record_is_refused(
    files: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, text in files.items():
        (tmp_path / name).write_text(text)
    assert oner_fast.cli.main(["bench", "history", str(tmp_path)]) == 2
    assert "has no record of `pytest benchmarks --benchmark-json`" in capsys.readouterr().err
    assert oner_fast.cli.main(["bench", "history", str(tmp_path / "none")]) == 2


def test_the_action_reads_the_newest_record(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder, out = tmp_path / "records", tmp_path / "out"
    folder.mkdir()
    put(folder, "a.json", [entry("gather tiny float32", 3.0)], "a" * 40, "2026-01-01T00:00:00Z")
    newest = [entry("gather tiny float32", 2.0), entry("alone tiny float32", 2.0, baseline=False)]
    put(folder, "b.json", newest, "b" * 40, "2026-01-02T00:00:00Z")
    command = ["bench", "history", str(folder), "--repository", str(tmp_path)]
    assert oner_fast.cli.main([*command, "--out", str(out / "i.html"), "--action-json", str(out / "x" / "a.json")]) == 0
    (result,) = json.loads((out / "x" / "a.json").read_text())
    # The fields that its tool "customBiggerIsBetter" reads: three strings and a number are needed, two are optional.
    assert set(result) == {"name", "unit", "value", "range", "extra"}
    assert all(isinstance(result[name], str) for name in ("name", "unit", "range", "extra"))
    assert result["name"] == "gather tiny float32" and result["value"] == pytest.approx(2.0)
    assert result["range"] == "2.000 to 2.000" and "served by cpp" in result["extra"]
    assert not (folder / "history.html").exists() and (out / "i.html").exists()
    # A workflow that runs again for an older commit writes that commit's figures.
    command += ["--out", str(out / "i.html"), "--action-json", str(out / "a.json"), "--commit"]
    assert oner_fast.cli.main([*command, "a" * 40]) == 0
    assert json.loads((out / "a.json").read_text())[0]["value"] == pytest.approx(3.0)
    assert oner_fast.cli.main([*command, "c" * 40]) == 2 and "no record is of commit 'ccc" in capsys.readouterr().err
    put(folder, "d.json", newest[1:], "d" * 40, "2026-01-03T00:00:00Z")
    assert oner_fast.cli.main([*command, "d" * 40]) == 2 and "no measurement with a baseline" in capsys.readouterr().err


def test_a_file_that_is_odd_is_left_out_alone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    put(tmp_path, "a.json", [entry("gather tiny float32", 2.0)], "a" * 40)
    odd = os.path.join(os.fsencode(tmp_path), b"\xff\x1b[2J.json")
    os.rename(tmp_path / "a.json", odd)
    put(tmp_path, "b.json", [entry("gather tiny float32", 2.0)], "b" * 40)
    os.mkfifo(tmp_path / "pipe.json")  # to open it would wait for ever
    (tmp_path / "gone.json").symlink_to("nowhere")
    assert oner_fast.cli.main(["bench", "history", str(tmp_path), "--repository", str(tmp_path)]) == 0
    said = capsys.readouterr()
    assert "2 records" in said.out and "left out: pipe.json: it is no regular file" in said.err
    assert "left out: gone.json" in said.err
    assert "\ufffd?[2J.json" in (tmp_path / "history.html").read_text()
