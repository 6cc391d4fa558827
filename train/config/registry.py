"""Recipes: named functions that return a whole configuration, registered under their own names."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import importlib
import importlib.util
import pkgutil
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

from oner_fast.train.config.python_file import describe_error, import_file, split_reference

C = TypeVar("C")
Recipe = Callable[[], Any]

_PACKAGE = "oner_fast.train"
_RECIPES: dict[str, Recipe] = {}
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+){2,}")


class UnknownRecipe(ValueError):
    """No recipe of this kind has this name. The message lists the recipes that exist."""


def recipe(function: Callable[[], C]) -> Callable[[], C]:
    """Register a function `model_data_hardware() -> dataclass instance` under its own name.

    The name is stored in the configuration's field `run.recipe`, if it has that field.

    Raises:
        ValueError: the name does not have three parts in lower case, the docstring is missing, or the name is taken.
    """
    name = function.__name__
    if not _NAME.fullmatch(name):
        raise ValueError(f"a recipe is named model_data_hardware in lower case, got {name!r}")
    if not (function.__doc__ or "").strip():
        raise ValueError(f"recipe {name!r} needs a docstring: its first line is what --list-recipes prints")
    known = _RECIPES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(f"recipe {name!r} is already defined in {known.__module__}")

    @functools.wraps(function)
    def named() -> C:
        found: C = _stamped(function(), name)
        return found

    _RECIPES[name] = named
    return named


def recipes(kind: type = object) -> dict[str, Recipe]:
    """Return the registered recipes by name in alphabetical order; only those that return a `kind` if one is given."""
    return {name: make for name, make in sorted(_RECIPES.items()) if kind is object or isinstance(make(), kind)}


def get_recipe(name: str, kind: type = object) -> Any:
    """Build the configuration of the recipe `name`, or of `FILE.py:NAME`.

    Raises:
        UnknownRecipe: as in `find_recipe`.
        TypeError: the recipe returns something else than a dataclass instance.
    """
    config = find_recipe(name, kind)()
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"recipe {name!r} must return a dataclass instance, got {type(config).__name__}")
    return config


def find_recipe(name: str, kind: type = object) -> Recipe:
    """Find the recipe `name`, or the one that `FILE.py:NAME` names, whose file is imported first.

    Raises:
        UnknownRecipe: no recipe of this name returns a `kind`, or the file cannot be imported. The message names the
            command that the recipe belongs to, or else the nearest name and all known ones. A recipe from a file may
            also raise it, or another `ValueError`, when the recipe is called.
    """
    reference = split_reference(name)
    if reference is not None:
        return _find_in_file(name, *reference, kind)
    known = recipes(kind)
    if name not in known:
        import_all_recipes()
        if name in _RECIPES:
            raise UnknownRecipe(f"recipe {name!r} belongs to '{command_of(_RECIPES[name]())}'")
        raise UnknownRecipe(f"unknown recipe {name!r}.{_suggest(name, known)}")
    return known[name]


def _find_in_file(reference: str, path: Path, name: str, kind: type) -> Recipe:
    try:
        module = import_file(path)
    except ValueError as error:
        raise UnknownRecipe(f"--recipe {reference}: {error}") from error
    found = {each: make for each, make in recipes().items() if make.__module__ == module.__name__}
    if not found:
        raise UnknownRecipe(f"{path} has no recipes: decorate functions with @recipe of {__name__}")
    if name not in found:
        problem = f"has no recipe {name!r}.{_suggest(name, found)}" if name else f"has recipes: {', '.join(found)}"
        raise UnknownRecipe(f"{path} {problem}" + ("" if name else f"; choose with --recipe {path}:NAME"))
    make = found[name]

    @functools.wraps(make)
    def named_by_file() -> Any:
        try:
            config = make()
        except Exception as error:
            raise ValueError(f"recipe {reference!r} fails: {describe_error(error, path)}") from error
        if isinstance(config, kind):
            return _in_own_folder(_stamped(config, reference), make)
        if type(config).__module__.startswith(_PACKAGE + "."):
            raise UnknownRecipe(f"recipe {reference!r} belongs to '{command_of(config)}'")
        raise ValueError(f"recipe {reference!r} must return a {kind.__name__}, got {type(config).__name__}")

    return named_by_file


def _suggest(name: str, known: dict[str, Recipe]) -> str:
    near = difflib.get_close_matches(name, known, n=1)
    hint = f" Did you mean {near[0]!r}?" if near else ""
    return f"{hint} Known recipes: {', '.join(known) or 'none'}"


def _stamped(config: Any, name: str) -> Any:
    """Put a recipe's name into its configuration, where that has a field `run.recipe`."""
    if not hasattr(getattr(config, "run", None), "recipe"):
        return config
    return dataclasses.replace(config, run=dataclasses.replace(config.run, recipe=name))


def _in_own_folder(config: Any, make: Recipe) -> Any:
    """Give a recipe from a file a run folder of its own, where it names the one of a recipe of the package."""
    run: Any = getattr(config, "run", None)
    name = str(getattr(make, "__name__", ""))
    ours = [each for each in _RECIPES.values() if each.__module__.startswith(_PACKAGE + ".")]
    if not hasattr(run, "run_dir") or run.run_dir not in {_run_dir(each) for each in ours}:
        return config
    return dataclasses.replace(config, run=dataclasses.replace(run, run_dir=f"runs/{name}"))


def _run_dir(make: Recipe) -> str | None:
    return getattr(getattr(make(), "run", None), "run_dir", None)


def command_of(config: Any) -> str:
    """Return the command that trains a configuration, after the folder of `train/` that defines its class."""
    return f"oner-fast train {type(config).__module__.removeprefix(_PACKAGE + '.').partition('.')[0]}"


def import_all_recipes() -> None:
    """Import `recipes.py` of every system in `train/`, so that all their recipes are registered."""
    for found in pkgutil.iter_modules(importlib.import_module(_PACKAGE).__path__):
        name = f"{_PACKAGE}.{found.name}.recipes"
        if found.ispkg and importlib.util.find_spec(name) is not None:
            importlib.import_module(name)
