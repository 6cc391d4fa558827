"""Cost and requirements of `import oner_fast`, each tested in a process of its own."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import oner_fast

PACKAGE = Path(oner_fast.__file__).parent


def python(program: str, *path: Path, **env: str) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, **env}
    environment.pop("PYTHONPATH", None)
    if path:
        environment["PYTHONPATH"] = os.pathsep.join(map(str, path))
    return subprocess.run(
        [sys.executable, "-c", program], env=environment, capture_output=True, text=True, cwd="/", check=False
    )


def result_of(program: str, *path: Path, **env: str) -> str:
    done = python(program, *path, **env)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_import_starts_no_cuda_context() -> None:
    program = """
import torch
def refuse(*a, **k): raise AssertionError("CUDA was touched")
torch._C._cuda_init = refuse
torch.cuda.is_available = refuse
torch.cuda._lazy_init = refuse
import oner_fast, oner_fast.ops
print(torch.cuda.is_initialized())
"""
    assert result_of(program) == "False"


def test_import_needs_torch_alone() -> None:
    """No extra is imported or needed: importing one fails here."""
    program = """
import sys
extras = ["numpy", "PIL", "tokenizers", "webdataset", "tyro", "rich", "matplotlib", "safetensors", "jinja2", "triton"]
import torch
before = set(sys.modules)
class Refuse:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in extras:
            raise AssertionError(f"{name} was imported")
sys.meta_path.insert(0, Refuse())
import oner_fast, oner_fast.ops, oner_fast.cli, oner_fast.doctor, oner_fast.kernels
print(sorted(m for m in set(sys.modules) - before if m.split(".")[0] in extras))
"""
    assert result_of(program) == "[]"


def test_import_takes_little_longer_than_torchs() -> None:
    program = """
import torch, time
start = time.perf_counter()
import oner_fast, oner_fast.ops
print(time.perf_counter() - start)
"""
    assert min(float(result_of(program)) for _ in range(3)) < 0.5


def test_subpackages_are_imported_at_first_use() -> None:
    program = "import sys, oner_fast; print([m for m in sys.modules if m.startswith('oner_fast.')])"
    assert result_of(program) == "[]"


def test_lazy_names() -> None:
    assert "load" in dir(oner_fast) and "ops" in dir(oner_fast)
    assert oner_fast.ops.masked_gather.__module__ == "oner_fast.ops.masked_gather"
    with pytest.raises(AttributeError, match="has no attribute 'lode'; it has __version__, load, ops"):
        _ = oner_fast.lode  # type: ignore[attr-defined]


def test_the_repository_root_is_not_on_the_path() -> None:
    """`kernels` at the top level would shadow the package of that name which transformers imports."""
    program = """
import importlib.util, os, sys
import oner_fast, oner_fast.kernels, oner_fast.train, oner_fast.benchmarks
root = os.path.dirname(os.path.realpath(oner_fast.__file__))
root = os.path.dirname(root)
for name in ("kernels", "train", "benchmarks"):
    spec = importlib.util.find_spec(name)
    assert spec is None or not (spec.origin or "").startswith(root + os.sep), spec
installed = [os.path.realpath(entry) for entry in sys.path if entry]
print(os.path.exists(os.path.join(root, "pyproject.toml")) and root in installed)
"""
    assert result_of(program) == "False"


def test_tests_run_without_the_repository_root_on_the_path() -> None:
    root = Path(__file__).resolve().parents[1]
    found = [Path(entry or ".").resolve() for entry in sys.path]
    assert root not in found, "run 'pytest'; 'python -m pytest' puts the current folder on sys.path"


@pytest.fixture
def unbuilt(tmp_path: Path) -> Path:
    """A copy of the package as in a checkout, with nothing compiled."""
    ignored = shutil.ignore_patterns("_C.so", "_C_cuda.so", "_native*", "_build.json", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / "oner_fast", ignore=ignored)
    return tmp_path


def test_without_the_extension_plain_pytorch_is_chosen(unbuilt: Path) -> None:
    program = """
import warnings, torch, oner_fast
from oner_fast.ops import masked_gather
from oner_fast.data.ragged import pack
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    for _ in range(2):
        out = masked_gather(torch.ones(1, 2, 3), torch.zeros(1, 1, dtype=torch.int64))
told = [str(w.message) for w in caught if issubclass(w.category, RuntimeWarning)]
assert len(told) == 1 and "not built" in told[0] and "pip install" in told[0], told
assert "never built" in oner_fast._extension.status().reason
print(oner_fast.__file__, out.sum().item(), pack([[1, 2], []])[1].tolist())
"""
    assert result_of(program, unbuilt) == f"{unbuilt / 'oner_fast' / '__init__.py'} 3.0 [0, 2, 2]"


def test_an_extension_for_newer_torches_is_not_loaded(unbuilt: Path) -> None:
    (unbuilt / "oner_fast" / "_C.so").write_bytes(b"not a library")
    (unbuilt / "oner_fast" / "_build.json").write_text('{"torch": "9.2.0", "oldest_torch": "9.1"}')
    program = "from oner_fast import _extension; print(_extension.status().reason, _extension.status().remedy)"
    said = result_of(program, unbuilt)
    assert "the C++ extension serves torch 9.1 and newer, this is torch 2" in said
    assert "pip install 'torch>=9.1'" in said


def test_a_broken_extension_is_explained(unbuilt: Path) -> None:
    (unbuilt / "oner_fast" / "_C.so").write_bytes(b"not a library")
    (unbuilt / "oner_fast" / "_build.json").write_text('{"torch": "2.12.0", "oldest_torch": "2.10"}')
    program = "from oner_fast import _extension; print(_extension.status().reason)"
    said = result_of(program, unbuilt)
    assert "could not be loaded (built with torch 2.12.0; this is torch 2" in said and "_C.so" in said
