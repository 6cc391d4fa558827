from __future__ import annotations

import json
import os
import subprocess
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import oner_fast
import oner_fast.cli
from oner_fast.benchmarks import against, checkout, noise, turns
from oner_fast.benchmarks.alone import alone
from oner_fast.benchmarks.cases import OURS
from oner_fast.benchmarks.comparison import SAME, SLOWER, compare
from oner_fast.benchmarks.noise import Settings
from oner_fast.benchmarks.record import read
from oner_fast.benchmarks.rows import OUTPUTS
from oner_fast.benchmarks.source import commit_of_this
from oner_fast.benchmarks.turns import AFTER, BEFORE, PYTORCH, Failed, Process, Side, Subject, Turns, _ordered

OP = "token_alignment"
# Stands for a build: it writes what the real one leaves behind.
SETUP = """
import json, os, pathlib, sys
assert sys.argv[1:] == ["-q", "build_ext", "--inplace"] and "ONER_FAST_LIBRARY" not in os.environ
count = pathlib.Path(sys.argv[0]).resolve().parents[1] / "builds"
count.write_text(count.read_text() + "b" if count.exists() else "b")
reason = pathlib.Path("csrc").read_text()
package = pathlib.Path("oner_fast")
(package / "_C.so").write_text("library")
(package / "_build.json").write_text(json.dumps({"extension": {"built": not reason, "reason": reason}}))
"""


def git(root: Path, *arguments: str) -> None:
    identity = ["-c", "user.name=a", "-c", "user.email=a@example.org"]
    subprocess.run(["git", "-C", str(root), *identity, *arguments], check=True, capture_output=True)


@pytest.fixture
def repository(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A repository of commits "empty", "good", "same" (other Python files alone) and "bad" (cannot be built)."""
    root = tmp_path / "root"
    (root / "benchmarks").mkdir(parents=True)
    (root / "oner_fast").mkdir()
    git(root, "init", "--quiet")

    def commit(name: str, files: dict[str, str]) -> None:
        for path, text in files.items():
            (root / path).write_text(text)
        git(root, "add", "--all")
        git(root, "commit", "--quiet", "-m", name)
        git(root, "tag", name)

    commit("empty", {"README": ""})
    commit("good", {"setup.py": SETUP, "csrc": "", "oner_fast/__init__.py": "1", "benchmarks/old.py": ""})
    commit("same", {"oner_fast/__init__.py": "2"})
    commit("bad", {"csrc": "no compiler was found"})
    (root / "benchmarks" / "old.py").unlink()
    (root / "benchmarks" / "new.py").write_text("")
    monkeypatch.setattr(checkout, "repository", lambda: root)
    monkeypatch.setenv("ONER_FAST_LIBRARY", "another build")
    return root


def test_a_commit_is_built_with_these_benchmarks(repository: Path, tmp_path: Path) -> None:
    made = checkout.check_out("good", tmp_path / "kept")
    package = made.package / "oner_fast"
    assert [path.name for path in made.package.iterdir()] == ["oner_fast"]
    assert (package / "__init__.py").read_text() == "1" and (package / "_C.so").read_text() == "library"
    assert [path.name for path in (package / "benchmarks").iterdir()] == ["new.py"]
    assert made.commit == checkout.commit_of(repository, "good")


def test_equal_sources_are_built_once(repository: Path, tmp_path: Path) -> None:
    for name in ("good", "same", "good"):
        made = checkout.check_out(name, tmp_path / "kept")
        assert (made.package / "oner_fast" / "_C.so").read_text() == "library"
    assert (tmp_path / "kept" / "builds").read_text() == "b"


def test_a_commit_that_cannot_be_built_is_named(repository: Path, tmp_path: Path) -> None:
    for name, said in (
        ("nowhere", "'nowhere' is no commit in .*root$"),
        ("--help", "'--help' is no commit"),
        ("empty", "has no package oner_fast with a setup.py"),
        ("bad", "extension of commit .* was not built: no compiler was found"),
    ):
        with pytest.raises(checkout.NoBuild, match=said):
            checkout.check_out(name, tmp_path / "kept")


def test_a_shallow_clone_is_told_how_to_get_the_rest(repository: Path, tmp_path: Path) -> None:
    git(tmp_path, "clone", "--quiet", "--depth", "1", repository.as_uri(), "shallow")
    with pytest.raises(checkout.NoBuild, match="the clone is shallow, and `git fetch --unshallow` brings the rest"):
        checkout.commit_of(tmp_path / "shallow", "good")


def test_a_commit_that_cannot_be_unpacked_is_named(repository: Path, tmp_path: Path) -> None:
    (repository / "oner_fast" / "away").symlink_to("/etc/passwd")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "absolute link")
    with pytest.raises(checkout.NoBuild, match="cannot be unpacked: .*away"):
        checkout.check_out("HEAD", tmp_path / "kept")


def test_a_build_that_is_interrupted_leaves_nothing_of_it(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupt(*arguments: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(checkout.shutil, "copy2", interrupt)
        with pytest.raises(KeyboardInterrupt):
            checkout.check_out("good", tmp_path / "kept")
    assert list((tmp_path / "kept" / "libraries").iterdir()) == []
    checkout.check_out("good", tmp_path / "kept")
    assert len(list((tmp_path / "kept" / "libraries").iterdir())) == 1


def test_a_folder_with_spaces_and_names_of_any_bytes_is_built(repository: Path, tmp_path: Path) -> None:
    open(os.path.join(os.fsencode(repository), b"oner_fast/\xff.txt"), "w").close()
    git(repository, "config", "core.quotePath", "false")
    git(repository, "add", "--all")
    git(repository, "commit", "--quiet", "-m", "odd names")
    git(repository, "revert", "--no-edit", "HEAD~1")  # "bad", which cannot be built
    made = checkout.check_out("HEAD", tmp_path / "a folder of builds")
    assert (made.package / "oner_fast" / "_C.so").exists()
    assert commit_of_this(repository) == (made.commit, False)


def test_git_says_why_it_refuses_a_folder_of_another_owner(
    repository: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    monkeypatch.setenv("GIT_CONFIG_NOSYSTEM", "1")
    with pytest.raises(checkout.NoBuild, match="dubious ownership .*git config --global --add safe.directory"):
        checkout.commit_of(repository, "good")
    assert commit_of_this(repository) == ("", False)
    assert "no commit is named: fatal: detected dubious ownership" in capsys.readouterr().err


def test_a_hook_of_another_repository_does_not_decide_the_commit(
    repository: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    commit = checkout.commit_of(repository, "good")
    monkeypatch.setenv("GIT_DIR", str(tmp_path / "other.git"))
    assert checkout.commit_of(repository, "good") == commit


def test_without_git_the_command_says_that_it_is_needed(repository: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "")
    with pytest.raises(checkout.NoBuild, match="git is needed"):
        checkout.commit_of(repository, "good")
    assert commit_of_this(repository) == ("", False)


def test_one_process_measures_in_a_folder(repository: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with alone(repository / "build" / "against"), alone(tmp_path / "pairs"):
        for arguments in (
            ["against", "good", "--out", str(tmp_path / "o")],
            ["noise", "--out", str(tmp_path / "pairs")],
        ):
            assert oner_fast.cli.main(["bench", *arguments]) == 2
            assert "another process measures in" in capsys.readouterr().err
    with alone(tmp_path / "pairs"):  # it was let go
        pass


def test_the_command_refuses_bad_input(
    repository: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for arguments, said in (
        (["nowhere"], "'nowhere' is no commit"),
        (["good", "--op", "other"], "unknown op 'other'; known: masked_gather"),
        (["good", "--threads", "0"], "--threads must be at least 1, got 0"),
        (["good", "--seconds", "nan"], "--seconds must be positive, got nan"),
        (["good", "--margin", "-1"], "--margin must be 0 or more"),
        (["good", "--out", __file__], "--out must be a folder"),
    ):
        assert oner_fast.cli.main(["bench", "against", *arguments]) == 2
        assert said in capsys.readouterr().err


def test_the_builds_swap_in_every_other_round() -> None:
    runners = [(BEFORE, OURS), (AFTER, OURS), (PYTORCH, "a"), (PYTORCH, "b")]
    assert _ordered(runners, False) == runners
    assert _ordered(runners, True) == [runners[1], runners[0], *runners[2:]]


def test_slow_baselines_are_left_out_and_short_rounds_are_many() -> None:
    subject = Subject("key", "op", "op", "", "float32")
    for runner, took in (
        ((BEFORE, OURS), 1),
        ((AFTER, OURS), 9),
        ((PYTORCH, "a"), 2),
        ((PYTORCH, "b"), 2.4),
        ((PYTORCH, "c"), 3),
    ):
        subject.wall[runner], subject.busy[runner] = [took * 1e-3] * 4, [took * 1e-3] * 4
    subject.screen()
    assert list(subject.wall) == [(BEFORE, OURS), (AFTER, OURS), (PYTORCH, "a"), (PYTORCH, "b")]
    assert not any(subject.wall.values()) and not any(subject.busy.values())
    assert subject.rounds_in_a_visit == 10  # of 14.4 ms


def test_a_process_takes_memory_in_huge_pages(monkeypatch: pytest.MonkeyPatch) -> None:
    started: list[dict[str, str]] = []
    monkeypatch.setattr(turns.subprocess, "Popen", lambda *_, env, **__: started.append(env))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    for _ in range(2):
        Process(Side("before")).said.close()
        monkeypatch.setenv("GLIBC_TUNABLES", "glibc.malloc.arena_max=2")
    assert [each["GLIBC_TUNABLES"] for each in started] == [
        "glibc.malloc.hugetlb=1",
        "glibc.malloc.arena_max=2:glibc.malloc.hugetlb=1",
    ]


def test_a_process_that_ends_says_why() -> None:
    process = Process(Side("before", None, ("--unknown",)))
    try:
        with pytest.raises(
            Failed, match="the process of before ended with status 2: .*unrecognized arguments: --unknown"
        ):
            process.ask("describe")
    finally:
        process.close()


PAIRS_BROKEN: list[tuple[Callable[[dict[str, Any]], Any], str]] = [
    (lambda data: data.pop("subjects"), "has no 'subjects'; remove the file, and it is measured again"),
    (lambda data: data.update(format=2), "has format version 2"),
    (lambda data: data["described"].pop("before"), "described has no 'before'"),
    (lambda data: data["subjects"][0].pop("served"), "has no 'served'"),
    (lambda data: data["subjects"][0]["wall"].pop(0), "lacks the rounds of a build"),
    (lambda data: data["subjects"][0]["busy"][0].pop(), "needs a side, a contender and its seconds"),
    (lambda data: data["subjects"][0]["busy"][0].__setitem__(2, [0.0]), "is 0.0, and needs to lie between 1e-09"),
    (lambda data: data["subjects"][0].update(key=""), "key has an empty name"),
    (lambda data: data["subjects"][0].update(rounds_in_a_visit=None), "needs to be an integer"),
]


class Sleeping(Process):
    """A process that stands for a worker: it writes what it is told to, and waits."""

    def __init__(self, side: Side) -> None:
        self.side = side
        self.said = tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            ["sh", "-c", side.options[0]], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said, text=True
        )


@pytest.mark.parametrize("said", ["", '{"answer": '])
def test_a_process_that_is_killed_is_named_with_the_signal(said: str) -> None:
    process = Sleeping(Side("after", None, (f"printf '%s' '{said}'; kill -9 $$",)))
    with pytest.raises(Failed, match="the process of after was ended by SIGKILL; the system does so where memory"):
        process.ask("describe")
    process.close()


def test_no_process_is_left_after_an_interrupt_or_where_one_does_not_start(monkeypatch: pytest.MonkeyPatch) -> None:
    made: list[Sleeping] = []

    def start(side: Side) -> Sleeping:
        if side.name == PYTORCH and fails:
            raise OSError("no more processes")
        made.append(Sleeping(side))
        return made[-1]

    monkeypatch.setattr(turns, "Process", start)
    # It does not end by itself when its pipe is closed, as a process that compiles.
    sides = [Side(name, None, ("exec sleep 60",)) for name in (BEFORE, AFTER, PYTORCH)]
    fails = False
    at = time.monotonic()
    with pytest.raises(KeyboardInterrupt), Turns(sides):
        raise KeyboardInterrupt
    fails = True
    with pytest.raises(OSError, match="no more processes"), Turns(sides):
        pass
    assert len(made) == 5 and all(one.process.poll() is not None for one in made) and time.monotonic() - at < 8


def test_counts_that_one_build_cannot_make_are_left_out() -> None:
    answers = {BEFORE: '{"error": "RuntimeError: no such op"}', AFTER: '{"answer": {"flops": 3}}'}
    script = "while read line; do echo '{}'; done"
    together = Turns([])
    together.processes = {
        side: Sleeping(Side(side, None, (script.format(answer),))) for side, answer in answers.items()
    }
    subject = Subject("key", "op", "op", "", "float32", served={BEFORE: "cpp", AFTER: "cpp"})
    told: list[str] = []
    with together:
        together.count([subject], told.append)
    assert subject.counts == {AFTER: {"flops": 3}}
    assert told[-1] == "key is not counted before: RuntimeError: no such op"


def test_three_processes_take_turns_and_a_planted_slow_down_is_caught(tmp_path: Path) -> None:
    """Compare this build with itself, and one op made three times as slow, which is more than any noise."""
    settings = Settings((OP,), 0.1, 1, ((OP, 3.0),))
    (path,) = noise.collect(tmp_path, 1, settings)
    before, after = noise._load(path, settings, "cpu")
    (row,) = compare(before, after).rows
    assert row.verdict == SLOWER and row.change is not None and row.change == pytest.approx(-2 / 3, abs=0.2)
    assert before.facts["interleaved"] == after.facts["interleaved"]
    assert before.facts["interleaved"]["clock"] == "cpu" and before.entries[0].served == after.entries[0].served != ""
    assert len(before.entries[0].seconds[OURS]) == len(after.entries[0].seconds[before.entries[0].best]) >= 16
    assert before.entries[0].errors[OURS][OUTPUTS] < 1e-4
    # The pair is not measured again, and belongs to its settings.
    at = path.stat().st_mtime_ns
    assert noise.collect(tmp_path, 1, settings) == [path] and path.stat().st_mtime_ns == at
    assert noise.caught(noise.judge([path], settings)[noise.IN_TURN], OP) == 1
    with pytest.raises(ValueError, match="are asked for; give another folder with --out"):
        noise.collect(tmp_path, 1, Settings((OP,), 0.1, 1))
    # A file that is no pair is refused in one sentence, and a field of a later version is passed over.
    text = path.read_text()
    path.write_text(json.dumps({**json.loads(text), "later": 1}))
    assert noise.collect(tmp_path, 1, settings) == [path]
    for change, said in PAIRS_BROKEN:
        broken = json.loads(text)
        change(broken)
        path.write_text(json.dumps(broken))
        with pytest.raises(ValueError, match=said):
            noise.collect(tmp_path, 1, settings)


def test_a_subject_that_a_build_lacks_is_new_and_one_that_fails_now_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The command without its processes: what they answer is made up."""

    class Made:
        def __init__(self, sides: Any) -> None:
            self.package = sides[0].package

        def __enter__(self) -> Made:
            return self

        def __exit__(self, *error: object) -> None: ...

        def describe(self) -> dict[str, Any]:
            facts = {"kernels": "avx2", "oner_fast": "1.0"}
            packages = {BEFORE: self.package / "oner_fast", AFTER: Path(oner_fast.__file__).parent}
            return {side: {"package": str(each), "line": side, "facts": facts} for side, each in packages.items()}

        def prepare(self, ops: Any, steps: Any, tell: Any, keys: Any) -> list[Subject]:
            assert (ops, steps) == (["token_alignment"], ("oner", "uta", "clip"))
            asked.append(keys)
            made = [Subject(f"key {i}", "op", "op", "", "float32") for i in range(3)]
            if keys is not None:
                return [one for one in made if one.key in keys]
            made[1].missing[BEFORE, OURS] = "ValueError: no such case"
            if broken:
                made[2].missing[AFTER, OURS] = "result 0: relative error 1, allowed 0.1"
            return made

        def count(self, subjects: list[Subject], tell: Any) -> None: ...

        def measure(self, subjects: list[Subject], seconds: float, tell: Any) -> None:
            for one in subjects:
                one.rounds_in_a_visit = 2
                for runner in ((BEFORE, OURS), (AFTER, OURS), (PYTORCH, "eager")):
                    if runner not in one.missing:
                        one.served[runner[0]] = "cpp"
                        unlucky = slow and len(subjects) == 3 and (one.key, runner) == ("key 0", (AFTER, OURS))
                        one.wall[runner], one.busy[runner] = [2.0] * 16, [1.3 if unlucky else 1.0] * 16

    place = tmp_path / "path"
    place.mkdir()
    monkeypatch.setattr(against, "Turns", Made)
    monkeypatch.setattr(checkout, "check_out", lambda name, folder: checkout.Checkout("b" * 40, place))
    command = ["bench", "against", "main", "--op", OP, "--steps", "--out", str(tmp_path / "out")]
    broken = slow = False
    asked: list[Any] = []
    assert oner_fast.cli.main(command) == 0 and asked == [None]
    said = capsys.readouterr()
    assert "2 keys compared" in said.out and "not measured: key 1: oner_fast before: ValueError" in said.err
    assert read(tmp_path / "out" / "before.json").commit == "b" * 40
    found = json.loads((tmp_path / "out" / "comparison.json").read_text())
    assert found["paired"] and [row["verdict"] for row in found["rows"]] == [SAME, SAME, "new"]
    assert "| key 0 |" in (tmp_path / "out" / "comparison.md").read_text()
    # One of the first processes was unlucky; the second three say so.
    slow = True
    assert oner_fast.cli.main(command) == 0 and asked == [None, None, ["key 0"]]
    assert "slower in the first processes (-23.1%) and not in others (-0.0%)" in capsys.readouterr().out
    slow, broken = False, True
    assert oner_fast.cli.main(command) == 1
    assert "not measured: key 2: oner_fast after: result 0: relative error" in capsys.readouterr().err
