"""Import open_clip, timm and transformers, which are optional, when they are needed."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch

from oner_fast.remedies import install_command

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_libraries: list[Any] = []  # a library's declarations last as long as the object


@cache
def optional_package(name: str) -> ModuleType:
    """Import `open_clip`, `timm` or `transformers`.

    They import torchvision, whose compiled ops are missing where its build does not fit torch's (PyPI's wheel beside a
    CPU build of torch). None of them calls these ops, so declaring them is enough.

    Raises:
        ModuleNotFoundError: the package is not installed; the message says how to install it.
    """
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            command = install_command({"open_clip": "open_clip_torch"}.get(name, name))
            raise ModuleNotFoundError(f"{name} is needed here and not installed: {command}", name=name) from error
        except RuntimeError as error:
            missing = _MISSING.search(str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets) -> Tensor")
            _libraries.append(library)
            for each in [each for each in sys.modules if each.partition(".")[0] in ("torchvision", name)]:
                del sys.modules[each]
