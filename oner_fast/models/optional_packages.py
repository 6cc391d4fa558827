"""open_clip and timm, imported when a CLIP of theirs is asked for: they are optional."""

from __future__ import annotations

import importlib
import re
import sys
from functools import cache
from types import ModuleType
from typing import Any

import torch

_MISSING = re.compile(r"operator torchvision::(\w+) does not exist")
_libraries: list[Any] = []  # their declarations stand as long as they are held


@cache
def optional_package(name: str) -> ModuleType:
    """Import `open_clip` or `timm`.

    Both import torchvision, whose compiled ops are missing where its build does not fit torch's (PyPI's wheel beside a
    CPU build of torch). Neither calls one, so that the ops are declared and nothing more.

    Raises:
        ModuleNotFoundError: it is not installed; the text says how to install it.
    """
    while True:
        try:
            return importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name != name:
                raise
            package = {"open_clip": "open-clip-torch"}.get(name, name)
            raise ModuleNotFoundError(
                f"{name} is needed here and not installed: pip install {package}", name=name
            ) from error
        except RuntimeError as error:
            missing = _MISSING.search(str(error))
            if missing is None:
                raise
            library = torch.library.Library("torchvision", "FRAGMENT")
            library.define(f"{missing[1]}(Tensor dets) -> Tensor")
            _libraries.append(library)
            for each in [each for each in sys.modules if each.partition(".")[0] in ("torchvision", name)]:
                del sys.modules[each]
