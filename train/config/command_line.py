"""Command lines: a recipe gives the defaults, and every field is a flag."""

from __future__ import annotations

import dataclasses
import itertools
import os
import sys
import typing
from collections.abc import Sequence
from typing import Any

import tyro

from oner_fast.train.config.registry import find_recipe, recipes

DRY_RUN = "--dry-run"
"""The flag that makes a training take a few steps, report memory, pace and hours, and keep nothing."""


def parse(argv: Sequence[str], default_recipe: str, prog: str, kind: type = object) -> Any:
    """Read a command line into a configuration.

    `--recipe NAME` picks the recipe whose values are the defaults, `--recipe FILE.py:NAME` one in a file of your own.
    Every field, nested ones too, is a flag (`--optim.lr 1e-3`). Its last part alone is accepted where it is unambiguous
    (`--lr 1e-3`). The help shows the short flags if all of them are unambiguous, else the long ones. `--list-recipes`
    prints the recipes and `--help` prints every flag with its default; both exit with status 0. An error is printed on
    stderr and exits with status 2.

    Args:
        argv: the arguments without the program's name.
        default_recipe: the recipe used without `--recipe`.
        prog: the program's name in messages.
        kind: the dataclass of the configuration; recipes of other kinds are refused.

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
        make = find_recipe(chosen, kind)
        default = make()
    except ValueError as error:
        _exit(prog, str(error))
    summary = (make.__doc__ or "").strip().splitlines()[0]
    description = (
        f"Recipe {chosen}: {summary} Another one: --recipe NAME (or FILE.py:NAME); all of them: --list-recipes. "
        f"Memory, pace and hours, by a step that leaves nothing: {DRY_RUN}."
    )
    flags = _flags(default)
    default = _with_shorter_warmup(default, rest, prog)
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


def _with_shorter_warmup(default: Any, argv: list[str], prog: str) -> Any:
    """Shorten a recipe's warm-up in proportion, where `--steps` alone is given and is not above the warm-up."""
    steps, warmup = (_value(argv, name) for name in ("steps", "warmup"))
    if steps is None or warmup is not None or not (steps.isdecimal() and steps.isascii()) or int(steps) < 1:
        return default
    optim: Any = getattr(default, "optim", None)
    if not hasattr(optim, "warmup") or int(steps) > optim.warmup:
        return default
    fewer = optim.warmup * int(steps) // optim.steps
    if os.environ.get("RANK", "0") == "0":
        print(f"{prog}: {steps} steps are fewer than the recipe's warm-up; --warmup {optim.warmup} becomes {fewer}")
    return dataclasses.replace(default, optim=dataclasses.replace(optim, steps=int(steps), warmup=fewer))


def _value(argv: list[str], name: str) -> str | None:
    """Return the value of `--name` or `--optim.name` in `argv`, the last one."""
    found = None
    for word, following in itertools.pairwise([*argv, ""]):
        flag, equals, value = word.partition("=")
        if flag in (f"--{name}", f"--optim.{name}"):
            found = value if equals else following
    return found


def _flags(config: Any, prefix: str = "") -> list[str]:
    """Return the flags of every field of `config` without leading dashes, such as `optim.max-norm`."""
    found = []
    for field in dataclasses.fields(config):
        name, value = prefix + field.name.replace("_", "-"), getattr(config, field.name)
        found += _flags(value, name + ".") if dataclasses.is_dataclass(value) else [name]
    return found


def _last(flag: str) -> str:
    return flag.rpartition(".")[2]


def _respell(argv: list[str], flags: list[str], short: bool) -> list[str]:
    """Return `argv` with every flag in the one spelling that the parser knows, `--lr` or `--optim.lr`."""
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
    """Remove `flag VALUE` or `flag=VALUE` from `argv`; the last one wins."""
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
