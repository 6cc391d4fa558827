"""Format figures for readers: times, errors, sizes, verdicts."""

from __future__ import annotations

from collections.abc import Callable

from oner_fast.benchmarks.rows import Row

MIB = 2**20
CRITERIA: dict[str, Callable[[float], str]] = {
    "speedup": lambda value: f"{value:g}x of the best",
    "eager": lambda value: f"{value:g}x of eager",
    "share": lambda value: f"{value:.0%} of the limit",
    "memory_share": lambda value: f"memory at most 1/{1 / value:.3g} of compiled",
    "memory_bytes": lambda value: f"memory at most {value / 1e6:.0f} MB",
}
LOSSES = ("mixup_info_nce", "sigmoid_loss", "token_alignment")


def milliseconds(seconds: float) -> str:
    """Format seconds as milliseconds with three digits."""
    return f"{seconds * 1e3:.3g}" if seconds < 1 else f"{seconds * 1e3:.0f}"


def error(value: float | None) -> str:
    """Format a relative error; empty without one."""
    return "" if value is None else f"{value:.1e}" if value else "0"


def outputs_of(row: Row) -> str:
    """Name what the row's op returns."""
    return "loss" if row.op in LOSSES or "step" in row.op else "output"


def verdict(row: Row) -> str:
    """State which of the row's targets were met and which were not."""
    if row.wrong:
        return "REFUSED"
    if not row.target:
        return "no target"
    words = {True: "met", False: "MISSED", None: "not measured"}
    return "; ".join(f"{CRITERIA[name](value)}: {words[row.met.get(name)]}" for name, value in row.target.items())


def share(row: Row) -> str:
    """Format the row's share of the machine's limit; empty without a limit."""
    if row.share is None:
        return ""
    return f"{row.share:.0%}: {row.rate / 1e9:.3g} of {row.limit_rate / 1e9:.3g} {row.limit_unit}"


def remarks(row: Row) -> list[str]:
    """List what a reader of the row's figures needs beside them."""
    found = [f"refused, wrong: {name}: {why}" for name, why in row.refused.items()]
    found += [f"cannot run here: {name}: {why}" for name, why in row.unavailable.items()]
    if row.tolerance is not None:
        found.append(f"errors are relative to float64; allowed: {row.tolerance:.1e}")
    if row.graph_breaks is not None:
        found.append(f"graph breaks of ours under torch.compile: {row.graph_breaks}")
    return found + row.notes
