"""Find functions in a user's Python file: `my_recipes.py:name`."""

from __future__ import annotations

import hashlib
import importlib.util
import sys
import traceback
from pathlib import Path
from types import ModuleType


def split_reference(reference: str) -> tuple[Path, str] | None:
    """Split `FILE.py:NAME` into the file and the name; None where `reference` names no Python file.

    The name is empty in `FILE.py`.
    """
    file, colon, name = reference.rpartition(":")
    if not colon or name.endswith(".py"):
        file, name = reference, ""
    return (Path(file), name) if file.endswith(".py") else None


def import_file(path: Path) -> ModuleType:
    """Import a Python file by its path, once per process.

    Raises:
        ValueError: there is no such file, or its import fails; the message has the line and the exception.
    """
    path = path.resolve()
    # One module name for each path, so that files of the same name in two folders do not collide.
    name = f"{path.stem}_{hashlib.sha256(str(path).encode()).hexdigest()[:8]}"
    if name in sys.modules:
        return sys.modules[name]
    if not path.is_file():
        raise ValueError(f"there is no file {path}")
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # before it runs: dataclasses look their module up
    try:
        spec.loader.exec_module(module)
    except Exception as error:
        del sys.modules[name]
        raise ValueError(describe_error(error, path)) from error
    return module


def describe_error(error: Exception, path: Path) -> str:
    """Describe an exception that a file raised: `FILE, line N: KIND: message`."""
    path = path.resolve()
    if isinstance(error, SyntaxError):
        line = error.lineno
    else:
        lines = [frame.lineno for frame in traceback.extract_tb(error.__traceback__) if frame.filename == str(path)]
        line = lines[-1] if lines else None
    return f"{path}{f', line {line}' if line else ''}: {type(error).__name__}: {error}"
