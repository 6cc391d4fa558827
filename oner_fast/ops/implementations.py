"""The one place that decides which implementation serves an op.

An implementation is a plain function with an op's arguments, registered under a name with the device types it runs on,
its place in the order of preference, and a predicate that lists every reason why it cannot serve. A call takes the
first one in that order without a reason against it. The argument ``implementation=`` of any op forces one; so do the
environment variables ``ONER_FAST_<OP>_IMPLEMENTATION`` (one op) and ``ONER_FAST_IMPLEMENTATION`` (all ops); the
argument wins, then the op's own variable.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oner_fast import _extension

REFERENCE = "reference"


def _no_reasons(device: str, **facts: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op. `devices` None means every device; a higher `preference` is tried first; on the
    devices of `on_request` it serves only where its name is given."""

    op: str
    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...] | None
    preference: int
    reasons: Callable[..., list[str]]
    compiled: bool
    on_request: tuple[str, ...] = ()

    def reasons_against(self, device: str, asked_for: bool = False, **facts: Any) -> list[str]:
        """Every reason why this implementation cannot serve on `device`; empty when it can. `asked_for`: by name."""
        found = []
        if self.devices is not None and device not in self.devices and not (asked_for and device in self.on_request):
            asked = f", and on {' and '.join(self.on_request)} when asked for by name" if self.on_request else ""
            found.append(f"runs on {' and '.join(self.devices)}{asked}, not on {device}")
        if self.compiled and (missing := _extension.status().reason):
            found.append(missing)
        found.extend(self.reasons(device, **facts))
        return found


_registry: dict[str, dict[str, Implementation]] = {}
_asked_about: str | None = None  # the op whose next choice `serving` waits for


class _Chosen(BaseException):
    """What was chosen, on its way to `serving`; nobody's `except Exception` stops it."""

    def __init__(self, chosen: Implementation) -> None:
        super().__init__(chosen.name)
        self.chosen = chosen


def register(
    op: str,
    name: str,
    function: Callable[..., Any],
    *,
    devices: tuple[str, ...] | None = None,
    preference: int = 0,
    reasons: Callable[..., list[str]] = _no_reasons,
    compiled: bool = False,
    on_request: tuple[str, ...] = (),
) -> None:
    """Make `function` known as the implementation `name` of `op`.

    `reasons(device, **facts)` returns why it cannot serve: `device` is a device type ("cpu", "cuda"), the facts are
    what the op tells about a call (dtype=..., head_dim=...); without facts, as the doctor asks, it speaks of the
    machine alone. `compiled` marks what the C++ extension holds. `preference`: the definition in `reference` has 0, the
    highest that can serve is taken. `on_request`: devices on which it serves too, but only when its name is given.
    Registering a name again replaces it.
    """
    known = _registry.setdefault(op, {})
    known[name] = Implementation(op, name, function, devices, preference, reasons, compiled, on_request)
    _registry[op] = dict(sorted(known.items(), key=lambda item: (-item[1].preference, item[0])))


def ops() -> list[str]:
    """The names of all ops that have an implementation."""
    return sorted(_registry)


def implementations(op: str) -> dict[str, Implementation]:
    """The implementations of `op` by name, best first. An unknown op raises ValueError listing the known ones."""
    if op not in _registry:
        raise ValueError(f"unknown op {op!r}; known ops: {', '.join(ops()) or 'none'}")
    return _registry[op]


def forced(op: str, implementation: str | None = None) -> tuple[str, str] | None:
    """Return the name forced for `op` and what forces it, or None where the choice is free."""
    if implementation is not None:
        return implementation, "the argument implementation="
    own = f"ONER_FAST_{op.upper()}_IMPLEMENTATION"
    if value := os.environ.get(own):
        return value, f"the environment variable {own}"
    value = os.environ.get("ONER_FAST_IMPLEMENTATION")
    # A name that only other ops have (masks have no "cpp") leaves this one free; a name that no op has is a mistake.
    if value and (value in _registry.get(op, ()) or not any(value in known for known in _registry.values())):
        return value, "the environment variable ONER_FAST_IMPLEMENTATION"
    return None


def choose(op: str, device: str, implementation: str | None = None, **facts: Any) -> Implementation:
    """The implementation that serves a call of `op` on the device type `device`.

    Raises ValueError when the forced name is unknown (listing the known ones) and RuntimeError when it cannot serve
    (listing every reason), or when nothing can.
    """
    chosen = _choose(op, device, implementation, facts)
    if _asked_about == op:
        raise _Chosen(chosen)
    return chosen


class NotAsked(ValueError):
    """A call that was said to call an op asks for no implementation of it."""


def serving(op: str, call: Callable[[], object]) -> Implementation:
    """What serves `call`, a call of `op`, by all that the op itself tells about it; the op does not run.

    Raises what `choose` raises, and NotAsked where `call` does not call the op.
    """
    global _asked_about
    before, _asked_about = _asked_about, op
    try:
        call()
    except _Chosen as found:
        return found.chosen
    finally:
        _asked_about = before
    raise NotAsked(f"the call asks for no implementation of {op!r}: it does not call it")


def _choose(op: str, device: str, implementation: str | None, facts: dict[str, Any]) -> Implementation:
    known = implementations(op)
    wanted = forced(op, implementation)
    if wanted is not None:
        name, source = wanted
        if name not in known:
            listed = ", ".join(known)
            raise ValueError(f"{op} has no implementation {name!r} (asked for by {source}); known ones: {listed}")
        against = known[name].reasons_against(device, asked_for=True, **facts)
        if against:
            raise RuntimeError(f"{op}: {name!r} (asked for by {source}) cannot serve this call: {'; '.join(against)}")
        return known[name]
    for candidate in known.values():
        against = candidate.reasons_against(device, **facts)
        if not against:
            return candidate
        if candidate.compiled and candidate.devices is not None and device in candidate.devices:
            _extension.warn_if_missing()
    every = "; ".join(f"{name}: {', '.join(i.reasons_against(device, **facts))}" for name, i in known.items())
    raise RuntimeError(f"{op}: nothing can serve this call on {device}: {every}")


@dataclass(frozen=True)
class Choice:
    """What serves an op on a device type, and what each of the others has against it."""

    op: str
    device: str
    serves: str | None
    why: str
    others: dict[str, list[str]]


def explain(device: str = "cpu") -> list[Choice]:
    """For every op: which implementation serves on `device`, why, and why not the others (for `oner-fast doctor`)."""
    choices = []
    for op in ops():
        known = implementations(op)
        against = {name: candidate.reasons_against(device) for name, candidate in known.items()}
        able = [name for name, reasons in against.items() if not reasons]
        wanted = forced(op)
        if wanted is not None and wanted[0] in known:
            against[wanted[0]] = known[wanted[0]].reasons_against(device, asked_for=True)
            able = [name for name, reasons in against.items() if not reasons]
        if wanted is None:
            serves = able[0] if able else None
            why = "the first in the order of preference that can serve" if able else "nothing can serve"
        elif wanted[0] in able:
            serves, why = wanted[0], f"asked for by {wanted[1]}"
        else:
            known_or_not = "cannot serve" if wanted[0] in known else f"is unknown (known: {', '.join(known)})"
            serves, why = None, f"{wanted[0]!r}, asked for by {wanted[1]}, {known_or_not}"
        others = {
            name: reasons or ["can serve, but stands lower in the order"]
            for name, reasons in against.items()
            if name != serves
        }
        choices.append(Choice(op, device, serves, why, others))
    return choices
