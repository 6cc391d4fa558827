"""Choose the implementation of an op. Every choice is made here.

An implementation is a plain function with an op's arguments. It is registered under a name, with the device types it
runs on, a preference, and a predicate that lists every reason why it cannot run. A call takes the implementation of the
highest preference that has no reason against it. The argument `implementation=` of any op forces one. So do the
environment variables `ONER_FAST_<OP>_IMPLEMENTATION` (one op) and `ONER_FAST_IMPLEMENTATION` (all ops that have one of
that name). The argument wins over both variables, and the op's own variable wins over `ONER_FAST_IMPLEMENTATION`.

What decides about a call is its facts. The module of each op has a function `facts`, which takes the op's arguments
and returns them without computing anything. The op passes them to `choose`. A tool that wants to know which
implementation a call would take does the same, and need not make the call.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from oner_fast import _cuda_extension, _extension

REFERENCE = "reference"
Facts = tuple[str, str, dict[str, Any]]  # a call's op, device type, and the values that implementations ask about


def _no_reasons(device: str, **facts: Any) -> list[str]:
    return []


@dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Args:
        op: the name of the op.
        name: unique among the op's implementations.
        function: takes the op's arguments.
        devices: the device types it runs on; None for all.
        preference: the highest is tried first.
        reasons: `reasons(device, **facts)` lists why it cannot run.
        compiled: it needs the C++ extension.
        on_request: further device types, on which it runs only where its name is forced.
    """

    op: str
    name: str
    function: Callable[..., Any]
    devices: tuple[str, ...] | None
    preference: int
    reasons: Callable[..., list[str]]
    compiled: bool
    on_request: tuple[str, ...] = ()

    def reasons_against(self, device: str, asked_for: bool = False, **facts: Any) -> list[str]:
        """List every reason why this implementation cannot run on `device`; empty where it can.

        `asked_for` says that its name is forced.
        """
        found = []
        if self.devices is not None and device not in self.devices and not (asked_for and device in self.on_request):
            asked = f", and on {' and '.join(self.on_request)} when asked for by name" if self.on_request else ""
            found.append(f"runs on {' and '.join(self.devices)}{asked}, not on {device}")
        if self.compiled and (missing := _extension.status().reason):
            found.append(missing)
        found.extend(self.reasons(device, **facts))
        return found


_registry: dict[str, dict[str, Implementation]] = {}


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
    """Register `function` as the implementation `name` of `op`, in the place of one that had the name.

    Args:
        op: the name of the op, known or new.
        name: the name to force it by.
        function: takes the op's arguments.
        devices: the device types ("cpu", "cuda") it runs on; None for all.
        preference: the highest that can run is chosen. Reference implementations have -10, and run only when asked for.
        reasons: `reasons(device, **facts)` lists why it cannot run. The facts are those of a call (dtype=...,
            head_dim=...). Without facts, as the doctor asks, the list is about the machine alone.
        compiled: it needs the C++ extension.
        on_request: further device types, on which it runs only where its name is forced.
    """
    known = _registry.setdefault(op, {})
    known[name] = Implementation(op, name, function, devices, preference, reasons, compiled, on_request)
    _registry[op] = dict(sorted(known.items(), key=lambda item: (-item[1].preference, item[0])))


def ops() -> list[str]:
    """Return the names of all registered ops, sorted."""
    return sorted(_registry)


def implementations(op: str) -> dict[str, Implementation]:
    """Return the implementations of `op` by name, the highest preference first.

    Raises ValueError for an unknown op, listing the known ones.
    """
    if op not in _registry:
        raise ValueError(f"unknown op {op!r}; known ops: {', '.join(ops()) or 'none'}")
    return _registry[op]


def forced(op: str, implementation: str | None = None) -> tuple[str, str] | None:
    """Return the name forced for `op` and what forces it, or None where the choice is free."""
    if implementation is not None:
        if not isinstance(implementation, str):
            raise TypeError(f"{op}: implementation must be a name or None, got {type(implementation).__name__}")
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
    """Choose the implementation for a call of `op` on the device type `device`.

    Args:
        op: the name of the op.
        device: the device type of the call ("cpu", "cuda").
        implementation: the name that the caller forces, if any.
        facts: what the op tells about the call.

    Raises:
        ValueError: the op or the forced name is unknown. The message lists the known ones.
        RuntimeError: the forced implementation cannot run, or none can. The message lists every reason.
    """
    known = implementations(op)
    wanted = forced(op, implementation)
    if wanted is not None:
        name, source = wanted
        if name not in known:
            listed = ", ".join(known)
            raise ValueError(f"{op} has no implementation {name!r} (asked for by {source}); known ones: {listed}")
        against = known[name].reasons_against(device, asked_for=True, **facts)
        if against:
            raise RuntimeError(f"{op}: {name!r} (asked for by {source}) cannot run this call: {'; '.join(against)}")
        return known[name]
    for candidate in known.values():
        if candidate.devices is not None and device not in candidate.devices:
            continue  # other reasons, which take longer to find, are for the error alone
        against = candidate.reasons_against(device, **facts)
        if not against:
            return candidate
        if candidate.compiled:
            _extension.warn_if_missing()
            if device == "cuda":
                _cuda_extension.warn_if_unusable()
    every = "; ".join(f"{name}: {', '.join(i.reasons_against(device, **facts))}" for name, i in known.items())
    raise RuntimeError(f"{op}: no implementation can run this call on {device}: {every}")


@dataclass(frozen=True)
class Choice:
    """The implementation chosen for an op on a device type, why, and the reasons against every other implementation.

    `chosen` is the name of the chosen implementation, or None where none can run.
    """

    op: str
    device: str
    chosen: str | None
    why: str
    others: dict[str, list[str]]


def explain(device: str = "cpu") -> list[Choice]:
    """Explain for every op which implementation is chosen on `device`, and why (for `oner-fast doctor`)."""
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
            chosen = able[0] if able else None
            why = "the most preferred that can run" if able else "none can run"
        elif wanted[0] in able:
            chosen, why = wanted[0], f"asked for by {wanted[1]}"
        else:
            known_or_not = "cannot run" if wanted[0] in known else f"is unknown (known: {', '.join(known)})"
            chosen, why = None, f"{wanted[0]!r}, asked for by {wanted[1]}, {known_or_not}"
        others = {
            name: reasons or ["can run, but is less preferred"] for name, reasons in against.items() if name != chosen
        }
        choices.append(Choice(op, device, chosen, why, others))
    return choices
