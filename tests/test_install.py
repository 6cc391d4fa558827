"""Real installs into temporary virtual environments, which see this one's torch and build tools by a .pth file."""

from __future__ import annotations

import json
import os
import re
import runpy
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from dataclasses import dataclass
from fnmatch import fnmatch
from importlib import metadata
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.install

ROOT = Path(__file__).resolve().parents[1]
OUTER = Path(torch.__file__).parents[1]  # where the packages of this environment are
PARTS = (
    "csrc",
    "kernels",
    "train",
    "benchmarks",
    "oner_fast",
    "setup.py",
    "build_backend.py",
    "MANIFEST.in",
    "CMakeLists.txt",
    "pyproject.toml",
    "README.md",
    "LICENSE",
)

CHECK = """
import importlib.util, torch, warnings
import oner_fast, oner_fast.kernels, oner_fast.train, oner_fast.benchmarks
from oner_fast import _extension
from oner_fast.ops import masked_gather
from oner_fast.data.ragged import pack, pack_python
for name in ("kernels", "train", "benchmarks"):
    spec = importlib.util.find_spec(name)
    assert spec is None or "oner" not in (spec.origin or ""), spec
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    out = masked_gather(torch.arange(6.0).view(1, 2, 3), torch.tensor([[1, 1]]))
assert out.tolist() == [[[3.0, 4.0, 5.0]] * 2], out
told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(told) == (0 if _extension.status().loaded else 1), told
print(oner_fast.__file__, _extension.status().loaded, pack is not pack_python)
"""

CLIENT = """
import oner_fast.kernels
import torch
from oner_fast.ops import masked_gather
from oner_fast.train.engine import signals

out: torch.Tensor = masked_gather(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64))
wrong: int = masked_gather(torch.zeros(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64))
"""


def run(*command: str | Path, env: dict[str, str] | None = None) -> subprocess.CompletedProcess[str]:
    environment = {
        name: value for name, value in os.environ.items() if name not in ("PYTHONPATH", "VIRTUAL_ENV", "CXX")
    }
    environment["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), environment["PATH"]])
    environment.update(env or {})
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, cwd="/", check=False
    )


def ok(done: subprocess.CompletedProcess[str]) -> str:
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    return done.stdout


@dataclass
class Environment:
    """A virtual environment without pip, into which this one's pip installs."""

    folder: Path

    @property
    def python(self) -> Path:
        return self.folder / "bin" / "python"

    def install(self, *arguments: str | Path, env: dict[str, str] | None = None) -> None:
        pip = (sys.executable, "-m", "pip", "--python", self.python, "install", "--no-deps", "--ignore-installed")
        ok(run(*pip, "--no-index", "--no-build-isolation", *arguments, env=env))

    def check(self) -> list[str]:
        return ok(run(self.python, "-c", CHECK)).split()

    def doctor(self) -> str:
        return " ".join(ok(run(self.folder / "bin" / "oner-fast", "doctor")).split())

    def type_check(self, client: Path, cache: Path) -> str:
        client.write_text(CLIENT)
        done = run(sys.executable, "-m", "mypy", "--python-executable", self.python, "--cache-dir", cache, client)
        return done.stdout


def environment(folder: Path) -> Environment:
    ok(run(sys.executable, "-m", "venv", "--without-pip", folder))
    made = Environment(folder)
    inner = ok(run(made.python, "-c", "import sysconfig; print(sysconfig.get_path('purelib'))")).strip()
    (Path(inner) / "outer.pth").write_text(f"{OUTER}\n")
    return made


def clean_environment(folder: Path) -> Environment:
    """Make a virtual environment that holds torch, what torch requires, and nothing else: links to this one's files."""
    ok(run(sys.executable, "-m", "venv", "--without-pip", folder))
    (site,) = folder.glob("lib/python3*/site-packages")
    waiting, found = ["torch"], set[str]()
    while waiting:
        if (name := waiting.pop()) in found:
            continue
        found.add(name)
        package = metadata.distribution(name)
        for top in {file.parts[0] for file in package.files or []} - {"..", "__pycache__"}:
            if not (site / top).exists():
                (site / top).symlink_to(Path(str(package.locate_file(top))))
        required = [line for line in package.requires or [] if "extra ==" not in line]
        waiting += [re.split(r"[^A-Za-z0-9._-]", line)[0] for line in required]
    return Environment(folder)


def checkout(folder: Path) -> Path:
    """Copy the files of a clone, with nothing built."""
    folder.mkdir(parents=True)
    ignored = shutil.ignore_patterns("_C*.so", "_native*.so", "_build.json", "__pycache__")
    for part in PARTS:
        source = ROOT / part
        if source.is_dir():
            shutil.copytree(source, folder / part, symlinks=True, ignore=ignored)
        else:
            shutil.copy2(source, folder / part)
    return folder


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One checkout for the tests that build it successfully, so that they share CMake's work."""
    return checkout(tmp_path_factory.mktemp("source") / "clone")


@pytest.fixture(scope="module")
def mypy_cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One cache for all tests, since torch takes most of the work."""
    return tmp_path_factory.mktemp("mypy")


def wheel(source: Path, into: Path, python: Path | str = sys.executable, env: dict[str, str] | None = None) -> Path:
    pip = (sys.executable, "-m", "pip", "--python", python, "wheel", "--no-deps", "--no-index", "--no-build-isolation")
    ok(run(*pip, "--wheel-dir", into, source, env=env))
    (made,) = into.glob("*.whl")
    return made


def sdist(source: Path, into: Path) -> Path:
    program = "import sys; sys.path.insert(0, '.'); import build_backend; print(build_backend.build_sdist(sys.argv[1]))"
    into.mkdir(parents=True, exist_ok=True)
    done = subprocess.run(
        [sys.executable, "-c", program, into], cwd=source, capture_output=True, text=True, check=False
    )
    return into / ok(done).splitlines()[-1]


def test_wheel(source: Path, tmp_path: Path, mypy_cache: Path) -> None:
    made = wheel(source, tmp_path / "dist")
    assert not made.name.endswith("none-any.whl"), made.name
    with zipfile.ZipFile(made) as archive:
        names = archive.namelist()
    assert {"oner_fast/_C.so", "oner_fast/_build.json", "oner_fast/py.typed", "oner_fast/kernels/__init__.py"} <= set(
        names
    )
    assert {"oner_fast/train/__init__.py", "oner_fast/benchmarks/__init__.py"} <= set(names)
    emulator = "oner_fast/benchmarks/gpuless/ptx"
    assert {f"{emulator}/{name}" for name in ("kernel.py", "runtime.cpp", "runtime.h")} <= set(names)
    assert any(name.startswith("oner_fast/_native.") for name in names)
    assert any(name.startswith("oner_fast/report/") and name.endswith(".html.j2") for name in names)
    tops = {name.split("/")[0] for name in names}
    assert {top for top in tops if not top.endswith(".dist-info")} == {"oner_fast"}
    inside = environment(tmp_path / "venv")
    inside.install(made)
    file, loaded, packer = inside.check()
    assert Path(file).is_relative_to(inside.folder) and (loaded, packer) == ("True", "True")
    assert "masked_gather (cpu) cpp" in inside.doctor()
    assert ok(run(inside.folder / "bin" / "oner-fast", "--version")).startswith("oner-fast ")
    said = inside.type_check(tmp_path / "client.py", mypy_cache)
    assert 'expression has type "Tensor", variable has type "int"' in said and "Found 1 error" in said, said


def test_editable(source: Path, tmp_path: Path, mypy_cache: Path) -> None:
    inside = environment(tmp_path / "venv")
    inside.install("-e", source)
    file, loaded, packer = inside.check()
    assert Path(file).resolve() == source / "oner_fast" / "__init__.py" and (loaded, packer) == ("True", "True")
    new = source / "kernels" / "new_kernel.py"
    new.write_text("answer = 42\n")
    assert (
        ok(run(inside.python, "-c", "from oner_fast.kernels.new_kernel import answer; print(answer)")).strip() == "42"
    )
    new.unlink()
    said = inside.type_check(tmp_path / "client.py", mypy_cache)
    assert 'expression has type "Tensor", variable has type "int"' in said and "Found 1 error" in said, said


def installs_all_the_same(
    source: Path, tmp_path: Path, inside: Environment, env: dict[str, str], *reasons: str
) -> None:
    made = wheel(source, tmp_path / "dist", inside.python, env=env)
    assert made.name.endswith("-py3-none-any.whl")
    inside.install(made)
    file, loaded, packer = inside.check()
    assert Path(file).is_relative_to(inside.folder) and (loaded, packer) == ("False", "False")
    said = inside.doctor()
    for reason in (*reasons, "masked_gather (cpu) portable", "not cpp: the C++ extension is not built"):
        assert reason in said, said


def test_without_a_compiler(tmp_path: Path) -> None:
    source, inside = checkout(tmp_path / "clone"), environment(tmp_path / "venv")
    env = {"CXX": "/nonexistent/c++"}
    installs_all_the_same(source, tmp_path, inside, env, "CXX=/nonexistent/c++ was not found", "apt install g++")
    other = environment(tmp_path / "other")
    other.install("-e", source, env=env)
    file, loaded, _ = other.check()
    assert Path(file).resolve() == source / "oner_fast" / "__init__.py" and loaded == "False"


def test_without_cmake(tmp_path: Path) -> None:
    source, inside = checkout(tmp_path / "clone"), environment(tmp_path / "venv")
    tools = tmp_path / "tools"
    tools.mkdir()
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("this machine has no C++ compiler")
    (tools / "c++").symlink_to(compiler)
    installs_all_the_same(source, tmp_path, inside, {"PATH": str(tools)}, "cmake was not found", "'cmake>=3.22'")


def test_with_sources_that_do_not_compile(tmp_path: Path) -> None:
    source, inside = checkout(tmp_path / "clone"), environment(tmp_path / "venv")
    for path in source.glob("csrc/*/*.cpp"):
        path.write_text("#error broken on purpose\n")
    stale = source / "build" / "cmake" / "CMakeCache.txt"  # left by a build in another folder, and deleted
    stale.parent.mkdir(parents=True)
    stale.write_text("CMAKE_HOME_DIRECTORY:INTERNAL=/somewhere/else\n")
    installs_all_the_same(source, tmp_path, inside, {}, "compiling failed", "broken on purpose")


@pytest.mark.slow
def test_an_isolated_build_finds_the_torch_that_is_installed(source: Path, tmp_path: Path) -> None:
    inside = clean_environment(tmp_path / "venv")
    pip = (sys.executable, "-m", "pip", "--python", inside.python, "wheel", "--no-deps", "--wheel-dir")
    done = run(*pip, tmp_path / "dist", sdist(source, tmp_path / "sdist"))
    if "Could not find a version that satisfies the requirement" in done.stdout + done.stderr:
        pytest.skip("no package index can be reached")
    ok(done)
    (made,) = (tmp_path / "dist").glob("*.whl")
    assert not made.name.endswith("none-any.whl"), made.name
    inside.install(made)
    file, loaded, _ = inside.check()
    assert Path(file).is_relative_to(inside.folder) and loaded == "True"


def test_a_build_asks_for_torch_only_where_none_is_installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    backend = runpy.run_path(str(ROOT / "build_backend.py"))
    assert backend["torch_folder"]() == Path(torch.__file__).parent and backend["_torch"]() == []
    monkeypatch.setitem(sys.modules, "torch", None)
    monkeypatch.setattr(sysconfig, "get_path", lambda name: str(tmp_path))
    assert backend["torch_folder"]() is None and backend["_torch"]() == ["torch>=2.10"]
    for name in ("include", "lib"):
        (tmp_path / "torch" / name).mkdir(parents=True)
    assert backend["torch_folder"]() == tmp_path / "torch"


def test_the_torch_of_a_build_is_the_oldest_that_is_promised() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    assert project["dependencies"] == [runpy.run_path(str(ROOT / "build_backend.py"))["TORCH"]]


def test_a_required_extension_ends_a_build_that_cannot_have_it(tmp_path: Path) -> None:
    source = checkout(tmp_path / "clone")
    env = {"CXX": "/nonexistent/c++", "ONER_FAST_REQUIRED": "1"}
    pip = (sys.executable, "-m", "pip", "wheel", "--no-deps", "--no-index", "--no-build-isolation", "--wheel-dir")
    done = run(*pip, tmp_path / "dist", source, env=env)
    assert done.returncode and "ONER_FAST_REQUIRED=1, and the extension is not built: the C++ compiler" in done.stderr


def test_the_source_distribution_holds_what_a_build_needs_and_no_tests(source: Path, tmp_path: Path) -> None:
    made = sdist(source, tmp_path)
    with tarfile.open(made) as archive:
        names = {name.partition("/")[2] for name in archive.getnames()}
    compiled = {path.relative_to(ROOT).as_posix() for path in (ROOT / "csrc").rglob("*.*") if path.is_file()}
    assert compiled | {"setup.py", "build_backend.py", "pyproject.toml", "CMakeLists.txt", "LICENSE"} <= names
    assert {"oner_fast/train/__init__.py", "oner_fast/kernels/__init__.py", "oner_fast/py.typed"} <= names
    others = {name.split("/")[0] for name in names} - {"csrc", "oner_fast", "oner_fast.egg-info"}
    assert others <= {"", *PARTS, "PKG-INFO", "setup.cfg"}, others
    assert not [name for name in names if name.endswith((".so", ".pyc", "_build.json"))]
    assert made.stat().st_size < 2_000_000


def test_the_wheel_holds_the_package_alone(source: Path, tmp_path: Path) -> None:
    made = wheel(source, tmp_path, env={"ONER_FAST_CUDA": "0"})
    with zipfile.ZipFile(made) as archive:
        sizes = {entry.filename: entry.file_size for entry in archive.infolist()}
        report = json.loads(archive.read("oner_fast/_build.json"))
    ours = {name for name in sizes if not name.partition("/")[0].endswith(".dist-info")}
    python = {
        path.relative_to(ROOT).as_posix()
        for folder in ("", "train", "kernels", "benchmarks")
        for path in (ROOT / "oner_fast" / folder).rglob("*.py")
    }
    assert {name for name in ours if name.endswith(".py")} == python
    rest = {name for name in ours - python if not name.startswith(("oner_fast/_C.so", "oner_fast/_native."))}
    patterns = (
        "*/py.typed",
        "*/_build.json",
        "*/ptx/runtime.*",
        "*/configurations/*.json",
        "*/ablation/*.j2",
        "*/report/*.j2",
        "*/page/*.j2",
        "*/explorer/*.j2",
        "*/explorer/*.css",
        "*/explorer/*.js",
    )
    assert [name for name in rest if not any(fnmatch(name, pattern) for pattern in patterns)] == []
    assert report["cuda"]["reason"].startswith("ONER_FAST_CUDA=0") and report["extension"]["built"]
    assert made.stat().st_size < 3_000_000 and sizes["oner_fast/_C.so"] < 6_000_000


def test_auditwheel_finds_a_tag_and_adds_no_library(source: Path, tmp_path: Path) -> None:
    pytest.importorskip("auditwheel", reason="auditwheel is not installed (pip install 'oner_fast[dev]')")
    made = wheel(source, tmp_path / "built")
    audit = (sys.executable, "-m", "auditwheel", "repair", "--exclude", "libtorch*.so", "--exclude", "libc10.so")
    ok(run(*audit, "--wheel-dir", tmp_path / "dist", made))
    (repaired,) = (tmp_path / "dist").glob("*.whl")
    assert "manylinux_2_" in repaired.name and "linux_x86_64" not in repaired.name.split("-")[-1].split("."), repaired
    before, after = (set(zipfile.ZipFile(one).namelist()) for one in (made, repaired))
    assert {name for name in after - before if not name.endswith("/")} == set()
    inside = clean_environment(tmp_path / "venv")
    inside.install(repaired)
    file, loaded, _ = inside.check()
    assert Path(file).is_relative_to(inside.folder) and loaded == "True"
    assert "masked_gather (cpu) cpp" in inside.doctor()
