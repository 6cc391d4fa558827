"""Replace attributes of another project's modules, and put the same objects back."""

from __future__ import annotations

from types import TracebackType
from typing import Any


class Replaced:
    """Hold the attributes that are replaced at present; leaving a `with` block puts them back."""

    def __init__(self) -> None:
        self._held: list[tuple[Any, str, Any, Any]] = []

    def put(self, owner: Any, name: str, new: Any) -> None:
        """Replace `owner.name`."""
        self._held.append((owner, name, getattr(owner, name), new))
        setattr(owner, name, new)

    def undo(self) -> None:
        """Put every replaced object back, except where somebody else has replaced ours since."""
        while self._held:
            owner, name, old, new = self._held.pop()
            if getattr(owner, name, None) is new:
                setattr(owner, name, old)

    def __enter__(self) -> Replaced:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.undo()
