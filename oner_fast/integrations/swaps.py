"""Replace functions of another project's classes and modules, and put the same objects back.

A replacement serves what it can. For everything else it calls the function that stood there before, and says why, once.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from inspect import signature
from types import ModuleType, TracebackType
from typing import Any

from oner_fast.integrations.fallback import forget

Function = Callable[..., Any]
Owner = type | ModuleType
Place = tuple[Owner, str]  # a class or a module, and the name of what it holds


@dataclass(frozen=True)
class Swap:
    """A function of a class or a module, or a module that a module names, and what makes its replacement.

    Args:
        owner: the class or the module.
        name: the name that it has there.
        make: takes the object that stands there and returns the one that replaces it.
        title: how messages name the object.
    """

    owner: Owner
    name: str
    make: Callable[[Any], Any]
    title: str


class Swapped:
    """The functions that one call of `patch()` replaced. As a context manager it puts them back at the end."""

    def __init__(self, swaps: Swaps, places: list[Place]) -> None:
        self._swaps, self._places = swaps, places

    def __enter__(self) -> Swapped:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._swaps.put_back(self._places)


class Swaps:
    """The functions of one project that are replaced at the moment."""

    def __init__(self, project: str) -> None:
        self.project = project
        self._replaced: dict[Place, tuple[Any, Any]] = {}  # before, and now

    def replace(self, wanted: Iterable[Swap]) -> Swapped:
        """Replace the functions that are not replaced yet.

        Raises RuntimeError, and replaces nothing, where one is missing or takes other arguments than its replacement.
        """
        made: dict[Place, tuple[Any, Any]] = {}
        for swap in wanted:
            place = (swap.owner, swap.name)
            if place in self._replaced:
                continue
            if swap.name not in vars(swap.owner):
                raise RuntimeError(
                    f"the installed {self.project} has no {swap.title}; install a version that oner_fast names, or "
                    "leave this swap out"
                )
            before = vars(swap.owner)[swap.name]
            now = swap.make(before)
            found, known = (_parameters(x, follow_wrapped=x is before) for x in (before, now))
            if found != known:
                raise RuntimeError(
                    f"{swap.title} of the installed {self.project} takes ({', '.join(found)}), and its replacement was "
                    f"written for ({', '.join(known)}); install a version that oner_fast names, or leave this swap out"
                )
            made[place] = (before, now)
        for (owner, name), (_, now) in made.items():
            setattr(owner, name, now)
        self._replaced.update(made)
        return Swapped(self, list(made))

    def put_back(self, places: Iterable[Place] | None = None) -> None:
        """Put back what stood at these places, or at all; places that are not replaced any more are left alone.

        A module that was loaded again holds its own functions already. Raises RuntimeError, and changes nothing, where
        someone else replaced a function after us.
        """
        chosen = [place for place in (list(self._replaced) if places is None else places) if place in self._replaced]
        for owner, name in chosen:
            if not any(vars(owner).get(name) is own for own in self._replaced[owner, name]):
                raise RuntimeError(
                    f"{_path(owner)}.{name} was replaced again after patch(); undo that before unpatch()"
                )
        for owner, name in chosen:
            setattr(owner, name, self._replaced.pop((owner, name))[0])
        if not self._replaced:
            forget()


def _parameters(x: Any, follow_wrapped: bool) -> list[str]:
    return list(signature(x, follow_wrapped=follow_wrapped).parameters) if callable(x) else []


def _path(owner: Owner) -> str:
    return f"{owner.__module__}.{owner.__qualname__}" if isinstance(owner, type) else owner.__name__


def stands_for(replacement: Function, original: Function) -> Function:
    """Give a replacement the name and the documentation of the original, whose source TorchScript compiles."""
    replacement.__wrapped__ = original  # type: ignore[attr-defined]
    for name in ("__name__", "__qualname__", "__doc__"):
        setattr(replacement, name, getattr(original, name))
    return replacement
