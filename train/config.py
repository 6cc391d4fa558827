"""Recipes by name, overrides on the command line, and configurations as JSON."""

from __future__ import annotations

import dataclasses
import difflib
import re
import sys
import typing
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import tyro

from oner_fast.train.plain import from_dict, load_json, save_json, to_dict

__all__ = [
    "UnknownRecipe",
    "from_dict",
    "get_recipe",
    "load_json",
    "parse",
    "recipe",
    "recipes",
    "save_json",
    "to_dict",
]

C = TypeVar("C")
Recipe = Callable[[], Any]

_RECIPES: dict[str, Recipe] = {}
_NAME = re.compile(r"[a-z0-9]+(_[a-z0-9]+){2,}")


class UnknownRecipe(ValueError):
    """No recipe has this name; the text lists those that exist."""


def recipe(function: Callable[[], C]) -> Callable[[], C]:
    """Register a function ``model_data_hardware() -> dataclass instance`` under its own name.

    Raises:
        ValueError: the name has not three parts in lower case, its docstring is missing, or it is taken.
    """
    name = function.__name__
    if not _NAME.fullmatch(name):
        raise ValueError(f"a recipe is named model_data_hardware in lower case, got {name!r}")
    if not (function.__doc__ or "").strip():
        raise ValueError(f"recipe {name!r} needs a docstring: its first line is what --list-recipes prints")
    known = _RECIPES.get(name)
    if known is not None and (known.__module__, known.__qualname__) != (function.__module__, function.__qualname__):
        raise ValueError(f"recipe {name!r} is already defined in {known.__module__}")
    _RECIPES[name] = function
    return function


def recipes(kind: type = object) -> dict[str, Recipe]:
    """Every registered recipe by name, in alphabetical order; those that give a ``kind`` where one is asked for."""
    return {name: make for name, make in sorted(_RECIPES.items()) if kind is object or isinstance(make(), kind)}


def get_recipe(name: str, kind: type = object) -> Any:
    """Build the configuration of the recipe ``name``.

    Raises:
        UnknownRecipe: there is none of this name that gives a ``kind``; the text names the nearest and lists all.
    """
    known = recipes(kind)
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise UnknownRecipe(f"unknown recipe {name!r}.{hint} Known recipes: {', '.join(known) or 'none'}")
    config = _RECIPES[name]()
    if not dataclasses.is_dataclass(config) or isinstance(config, type):
        raise TypeError(f"recipe {name!r} must return a dataclass instance, got {type(config).__name__}")
    return config


def parse(argv: Sequence[str], default_recipe: str, prog: str, kind: type = object) -> Any:
    """Read a command line into a configuration.

    ``--recipe NAME`` picks the recipe whose values are the defaults; every field, nested ones too, is a flag
    (``--optim.lr 1e-3``), whose last part is enough where only one flag ends so (``--lr 1e-3``). Help shows the
    short flags where that holds for all of them, else the long ones. ``--list-recipes`` prints the recipes and
    ``--help`` every flag with its default; both exit with status 0. An error is printed on stderr and exits with
    status 2.

    Args:
        argv: the arguments without the program's name.
        default_recipe: the recipe where ``--recipe`` is not given.
        prog: the program's name in messages.
        kind: the dataclass of the configuration; recipes of others are unknown here.

    Returns:
        An instance of the dataclass that the recipe returns.
    """
    name, rest = _take_option(list(argv), "--recipe", prog, kind)
    if "--list-recipes" in rest:
        width = max((len(known) for known in recipes(kind)), default=0)
        for known, function in recipes(kind).items():
            mark = "*" if known == default_recipe else " "
            print(f"{mark} {known:<{width}}  {(function.__doc__ or '').strip().splitlines()[0]}")
        print("(* is the default; choose with --recipe NAME)")
        raise SystemExit(0)
    chosen = default_recipe if name is None else name
    try:
        default = get_recipe(chosen, kind)
    except UnknownRecipe as error:
        _exit(prog, str(error))
    summary = (_RECIPES[chosen].__doc__ or "").strip().splitlines()[0]
    description = f"Recipe {chosen}: {summary} Another one: --recipe NAME; all of them: --list-recipes."
    flags = _flags(default)
    short = len({_last(flag) for flag in flags}) == len(flags)
    try:
        return tyro.cli(
            type(default),
            prog=prog,
            description=description,
            args=_respell(rest, flags, short),
            default=default,
            config=(tyro.conf.AvoidSubcommands, *((tyro.conf.OmitArgPrefixes,) if short else ())),
        )
    except (ValueError, TypeError) as error:
        # A dataclass may refuse values of the right type in its __post_init__.
        _exit(prog, str(error))


def _flags(config: Any, prefix: str = "") -> list[str]:
    """The flags of every field of ``config`` without dashes before, such as ``optim.max-norm``."""
    found = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        found += _flags(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return found


def _last(flag: str) -> str:
    return flag.rpartition(".")[2]


def _respell(argv: list[str], flags: list[str], short: bool) -> list[str]:
    """``argv`` with every flag in the one spelling that the parser knows, short (``--lr``) or long (``--optim.lr``)."""
    prefixes = {flag.removesuffix(_last(flag)) for flag in flags}
    lasts = [_last(flag) for flag in flags]
    single = {last: flag.removesuffix(last) for last, flag in zip(lasts, flags, strict=True) if lasts.count(last) == 1}
    words = []
    for word in argv:
        name, equals, value = word.removeprefix("--").partition("=")
        name = name.replace("_", "-")
        last = _last(name)
        if word.startswith("--") and short and name.removesuffix(last) in prefixes:
            word = f"--{last}{equals}{value}"
        elif word.startswith("--") and not short and name.removeprefix("no-") in single:
            word = f"--{single[name.removeprefix('no-')]}{name}{equals}{value}"
        words.append(word)
    return words


def _take_option(argv: list[str], flag: str, prog: str, kind: type) -> tuple[str | None, list[str]]:
    """Remove ``flag VALUE`` or ``flag=VALUE`` from ``argv``; the last one wins."""
    value, rest, position = None, [], 0
    while position < len(argv):
        word = argv[position]
        if word == flag:
            if position + 1 >= len(argv) or argv[position + 1].startswith("-"):
                _exit(prog, f"{flag} needs a name. Known recipes: {', '.join(recipes(kind)) or 'none'}")
            value = argv[position + 1]
            position += 1
        elif word.startswith(flag + "="):
            value = word[len(flag) + 1 :]
        else:
            rest.append(word)
        position += 1
    return value, rest


def _exit(prog: str, message: str) -> typing.NoReturn:
    print(f"{prog}: error: {message}", file=sys.stderr)
    raise SystemExit(2)
