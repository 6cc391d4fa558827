"""The contracts of the imports see every folder: a wrong import planted in a copy of the tree is reported."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("importlinter", reason="import-linter is not installed (pip install 'oner_fast[dev]')")

ROOT = Path(__file__).parents[1]
PROGRAM = "import sys; from importlinter.cli import lint_imports_command; sys.exit(lint_imports_command())"


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    """A copy of the Python sources, with the links from oner_fast/ to the folders beside it."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__", "results")
    for name in ("oner_fast", "train", "kernels", "benchmarks"):
        shutil.copytree(ROOT / name, tmp_path / name, symlinks=True, ignore=ignored)
    shutil.copy(ROOT / "pyproject.toml", tmp_path)
    return tmp_path


def lint(tree: Path) -> tuple[int, str]:
    process = subprocess.run(
        [sys.executable, "-c", PROGRAM, "--no-cache"],
        cwd=tree,
        env={**os.environ, "PYTHONPATH": str(tree), "COLUMNS": "200"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    return process.returncode, process.stdout + process.stderr


@pytest.mark.parametrize(
    ("importer", "imported"),
    [
        ("oner_fast.train.engine.schedule", "oner_fast.train.oner.ema"),
        ("oner_fast.train.engine.schedule", "oner_fast.models.oner"),
        ("oner_fast.train.config.common", "oner_fast.train.engine.schedule"),
        ("oner_fast.train.clip.settings", "oner_fast.train.uta.settings"),
        ("oner_fast.train.lit.settings", "oner_fast.train.oner.settings"),
        ("oner_fast.data.batch", "oner_fast.train.engine.schedule"),
        ("oner_fast.evaluation.folder", "oner_fast.train.config.serialization"),
        ("oner_fast.kernels.launch", "oner_fast.nn.embeddings"),
        ("oner_fast.ops.reference", "oner_fast.models.oner"),
    ],
)
def test_a_planted_import_is_reported(importer: str, imported: str, tree: Path) -> None:
    path = tree / f"{importer.replace('.', '/')}.py"
    path.write_text(f"{path.read_text()}\n\nimport {imported}  # planted\n")
    status, output = lint(tree)
    assert status == 1, output
    assert f"{importer} -> {imported}" in output


def test_a_planted_cycle_of_neighbours_is_reported(tree: Path) -> None:
    path = tree / "train" / "engine" / "distributed.py"
    path.write_text(f"{path.read_text()}\n\nimport oner_fast.train.engine.replica  # planted\n")
    status, output = lint(tree)
    assert status == 1 and "No cycles are allowed in oner_fast.train.engine" in output, output
