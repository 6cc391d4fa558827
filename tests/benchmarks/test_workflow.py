"""Run the shell steps of the benchmark workflow on repositories of this machine, with stand-ins for what measures."""

from __future__ import annotations

import os
import re
import subprocess
import textwrap
from pathlib import Path

import pytest

WORKFLOW = Path(__file__).resolve().parents[2] / ".github" / "workflows" / "benchmarks.yml"
NONE = "0" * 40


def script(name: str) -> str:
    """Return the shell script of a step, by the step's name."""
    text = WORKFLOW.read_text(encoding="utf-8")
    (found,) = re.findall(
        rf"- name: {re.escape(name)}\n(?:        .*\n)*?        run: \|\n((?:          .*\n|\n)+)", text
    )
    return textwrap.dedent(found)


class Clone:
    """A clone of an empty repository, in which steps run as GitHub runs them."""

    def __init__(self, root: Path, origin: Path, name: str = "clone") -> None:
        self.path, self.root, self.summary = root / name, root, root / f"{name}.summary"
        self.summary.touch()
        subprocess.run(["git", "clone", "--quiet", str(origin), str(self.path)], check=True, capture_output=True)
        self.git("config", "user.name", "a")
        self.git("config", "user.email", "a@example.org")

    def git(self, *arguments: str) -> str:
        done = subprocess.run(["git", "-C", str(self.path), *arguments], check=True, capture_output=True, text=True)
        return done.stdout.strip()

    def commit(self, branch: str = "main") -> str:
        self.git("commit", "--quiet", "--allow-empty", "-m", "x")
        self.git("push", "--quiet", "origin", f"HEAD:{branch}")
        self.git("fetch", "--quiet", "origin")
        return self.git("rev-parse", "HEAD")

    def run(self, step: str, ref: str = "refs/heads/main", **more: str) -> subprocess.CompletedProcess[str]:
        environment = {
            **os.environ,
            "PATH": f"{self.root / 'bin'}:{os.environ['PATH']}",
            "GITHUB_REF": ref,
            "GITHUB_SHA": self.git("rev-parse", "HEAD"),
            "GITHUB_STEP_SUMMARY": str(self.summary),
            "PAUSE": "0",
            **more,
        }
        return subprocess.run(
            ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script(step)],
            cwd=self.path,
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )


@pytest.fixture
def origin(tmp_path: Path) -> Path:
    subprocess.run(["git", "init", "--quiet", "--bare", "-b", "main", str(tmp_path / "origin")], check=True)
    (tmp_path / "bin").mkdir()
    make = tmp_path / "bin" / "make"
    make.write_text('#!/bin/sh\necho "make $*"\n')
    make.chmod(0o755)
    return tmp_path / "origin"


@pytest.fixture
def clone(tmp_path: Path, origin: Path) -> Clone:
    return Clone(tmp_path, origin)


COMPARE = "Compare with the commit before"
KEEP = "Keep the record and the page"
DRAW = "Draw the page of this commit and the history"


def test_main_is_compared_with_what_it_was_before_the_push(clone: Clone) -> None:
    first = clone.commit()
    for before in (NONE, "", "f" * 40):  # a first push, no push, and a commit that a forced push took away
        done = clone.run(COMPARE, BEFORE=before, TARGET="main")
        assert (done.returncode, done.stdout) == (0, "")
    assert clone.summary.read_text().count("No earlier commit was compared") == 3
    second, third = clone.commit(), clone.commit()
    for before, base in ((first, first), (NONE, second), ("f" * 40, second), (third, second)):
        assert clone.run(COMPARE, BEFORE=before, TARGET="main").stdout == f"make bench-against BASE={base}\n"


def test_another_branch_is_compared_with_the_merge_base(clone: Clone) -> None:
    base = clone.commit()
    clone.git("checkout", "--quiet", "-b", "work")
    assert clone.run(COMPARE, "refs/heads/work", BEFORE=NONE, TARGET="main").stdout == ""
    clone.commit("work")
    done = clone.run(COMPARE, "refs/heads/work", BEFORE=NONE, TARGET="main")
    assert done.stdout == f"make bench-against BASE={base}\n"
    clone.git("checkout", "--quiet", "--orphan", "alone")
    clone.commit("alone")
    done = clone.run(COMPARE, "refs/heads/alone", BEFORE=NONE, TARGET="main")
    assert (done.returncode, done.stdout) == (0, "")


def keep(clone: Clone, text: str = "page") -> subprocess.CompletedProcess[str]:
    measured = clone.path / "measured"
    (measured / "history").mkdir(parents=True, exist_ok=True)
    (measured / "record.json").write_text(clone.git("rev-parse", "HEAD"))
    (measured / "history" / "index.html").write_text(text)
    return clone.run(KEEP)


def kept(origin: Path) -> list[str]:
    command = ["git", "-C", str(origin), "ls-tree", "-r", "--name-only", "benchmark-history"]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()


def test_the_first_record_makes_the_branch_and_a_job_may_run_again(clone: Clone, origin: Path) -> None:
    (clone.path / "source").write_text("x")
    clone.git("add", "source")
    sha = clone.commit()
    for _ in range(2):
        done = keep(clone)
        assert done.returncode == 0, done.stderr
        assert kept(origin) == [".nojekyll", "index.html", f"records/{sha}.json"]
    assert not (clone.path.parent / "history").exists()
    assert clone.git("rev-list", "--count", "origin/benchmark-history") == "1"


def test_records_that_are_pushed_at_the_same_time_are_all_kept(clone: Clone, origin: Path, tmp_path: Path) -> None:
    first = clone.commit()
    assert keep(clone).returncode == 0
    other = Clone(tmp_path, origin, "other")
    second = other.commit()
    # What the other job fetched is no longer the newest when it pushes.
    hook = origin / "hooks" / "pre-receive"
    hook.write_text("#!/bin/sh\nif [ -e refused ]; then exit 0; fi\ntouch refused\nexit 1\n")
    hook.chmod(0o755)
    done = keep(other, "newer page")
    assert done.returncode == 0, done.stderr
    assert sorted(kept(origin)) == [
        ".nojekyll",
        "index.html",
        *sorted(f"records/{sha}.json" for sha in (first, second)),
    ]


def test_a_repository_that_cannot_be_reached_fails_and_is_not_taken_for_a_new_one(clone: Clone, tmp_path: Path) -> None:
    clone.commit()
    clone.git("remote", "set-url", "origin", str(tmp_path / "gone"))
    assert keep(clone).returncode != 0
    (clone.path / "runs").mkdir()
    assert clone.run(DRAW, TOKEN="t").returncode != 0


@pytest.mark.parametrize("branch", [True, False])
def test_the_page_is_drawn_from_all_records(branch: bool, clone: Clone, tmp_path: Path) -> None:
    shas = [clone.commit()]
    if branch:
        assert keep(clone).returncode == 0
        shas.append(clone.commit())
    (clone.path / "runs").mkdir()
    (clone.path / "runs" / "record.json").write_text("newest")
    command = clone.path / ".venv" / "bin" / "oner-fast"
    command.parent.mkdir(parents=True)
    command.write_text('#!/bin/sh\necho "$@"\n')
    command.chmod(0o755)
    done = clone.run(DRAW, TOKEN="t")
    assert done.returncode == 0, done.stderr
    assert f"--commit {shas[-1]}" in done.stdout
    names = sorted(path.name for path in (clone.path / "runs" / "history" / "records").iterdir())
    assert names == sorted(f"{sha}.json" for sha in shas)


def test_the_summary_has_no_picture_that_it_cannot_show(clone: Clone) -> None:
    clone.commit()
    report = clone.path / "runs" / "bench" / "report.md"
    report.parent.mkdir(parents=True)
    report.write_text("# Benchmarks\n\n![speed](speed.svg)\n\n| op |\n")
    assert clone.run("Show the comparison and the report").returncode == 0
    assert clone.summary.read_text() == "# Benchmarks\n\n\n| op |\n\n"


def test_no_record_of_main_waits_in_a_group_whose_last_run_alone_is_kept() -> None:
    text = WORKFLOW.read_text(encoding="utf-8")
    assert text.count("concurrency:") == 1
    assert "group: ${{ github.workflow }}-${{ github.ref == 'refs/heads/main' && github.sha || github.ref }}" in text
