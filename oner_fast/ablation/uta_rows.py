"""The rows of the study of UTA, as data: each is a change to a recipe of UTA, and is trained towards each teacher."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal

Settings = Mapping[str, Any]
Group = Literal["teachers", "main", "factors"]


@dataclass(frozen=True)
class UTARow:
    """One row: the changes to a recipe of UTA that make it.

    Attributes:
        name: its name in folders and in `--rows`.
        title: its name in tables.
        alignment: fields of the recipe's section `alignment` that it sets.
        group: the group that `--rows` can name.
        against: rows that it is compared with, seed by seed.
        teacher: the teacher, once the row stands for one.
    """

    name: str
    title: str
    alignment: Settings = field(default_factory=dict)
    group: Group = "main"
    against: tuple[str, ...] = ()
    teacher: str = ""

    @property
    def paper(self) -> None:
        """Figures of a paper: there are none at this size."""
        return None

    def towards(self, teacher: str) -> UTARow:
        """Make the row of one teacher."""
        against = tuple(f"{teacher}.{name}" for name in self.against)
        return replace(self, name=f"{teacher}.{self.name}", against=against, teacher=teacher)


TEACHER = UTARow("teacher", "The teacher itself, which read the captions", group="teachers")
ROWS = (
    UTARow("uta", "Reversed block-wise masks (UTA)", against=("block", "random", "full")),
    UTARow("block", "Block-wise masks", {"mask": "block"}),
    UTARow("random", "Random masks", {"mask": "random"}, against=("block",)),
    UTARow("full", "No masks (feature distillation)", {"objective": "distillation"}),
    UTARow(
        "mask_token",
        "Mask tokens (EVA's masked image modelling)",
        {"objective": "mask_token", "mask": "block"},
        "factors",
        ("uta",),
    ),
    UTARow("drop_path", "UTA; stochastic depth 0.1", {"drop_path": 0.1}, "factors", ("uta",)),
    UTARow("teacher_mean", "UTA; head towards the teacher's mean", {"head_init": "teacher_mean"}, "factors", ("uta",)),
)
REFERENCE = ROWS[0]
"""The row whose operations and time the others are given in the comparisons at equal operations and at equal time."""
GROUPS = {"main": "the masks, and none", "factors": "another objective, stochastic depth, the head's start"}


def chosen_rows(names: Sequence[str]) -> list[UTARow]:
    """Return the rows that names and groups ask for, in the study's order; the reference is always among them.

    Raises:
        ValueError: a name is neither a row nor a group; the message lists both.
    """
    wanted = {REFERENCE.name}
    for name in names:
        found = {row.name for row in ROWS if name in (row.name, row.group)}
        if not found:
            rows = ", ".join(row.name for row in ROWS)
            raise ValueError(f"--rows {name}: no such row or group; groups: {', '.join(GROUPS)}; rows: {rows}")
        wanted |= found
    return [row for row in ROWS if row.name in wanted]
