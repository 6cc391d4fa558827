"""Tell once, for each reason, that another project's code runs instead of ours."""

from __future__ import annotations

import warnings

from oner_fast.ops.library import constant

_told: set[str] = set()


class Fallback(UserWarning):
    """Warn that a call is left to the code of another project, and why."""


@constant
def tell(what: str, to: str, reason: str) -> None:
    """Warn that `what` is left to the code of another, and why; once for each reason until `forget` is called."""
    message = f"oner_fast leaves {what} to {to}: {reason}"
    if message not in _told:
        _told.add(message)
        warnings.warn(message, Fallback, stacklevel=3)


def forget() -> None:
    """Warn of every reason once more."""
    _told.clear()
