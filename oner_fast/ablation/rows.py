"""The rows of the study, as data: a row is one line, and a factor is one line for all the rows that it changes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

Settings = Mapping[str, Any]

CLIP_FRAME = {
    "momentum_teacher": False, "symmetric": True, "learnable_temperature": True, "temperature": 0.07,
}  # fmt: skip
"""CLIP's form of the contrast: no teacher, no predictor, symmetric, learnt temperature."""
UNMASKED = {"mlm": 0.0, "mim": 0.0}
ITC = {"itc": 1.0, "xmc": 0.0, "cic": 0.0, "cmc": 0.0}
TWO_HEADS = {"shared_head": False}
TWO_TRUNKS = {"shared_head": False, "shared_trunk": False}


@dataclass(frozen=True)
class Paper:
    """The paper's figures of a row (CC3M, 40 epochs), in per cent.

    Attributes:
        imagenet: zero-shot top-1 on ImageNet.
        image_to_text, text_to_image: R@1 and R@5 on COCO.
    """

    imagenet: float
    image_to_text: tuple[float, float]
    text_to_image: tuple[float, float]


class AnyRow(Protocol):
    """The fields of a row that tables and runs of any study read."""

    @property
    def name(self) -> str: ...

    @property
    def title(self) -> str: ...

    @property
    def group(self) -> str: ...

    @property
    def against(self) -> tuple[str, ...]: ...

    @property
    def paper(self) -> Paper | None: ...


@dataclass(frozen=True)
class Row:
    """One row: the changes to a recipe of OneR that make it.

    Attributes:
        name: its name in folders and in `--rows`.
        title: its name in tables.
        objectives, model, data, optim: fields of the recipe's sections that it sets.
        clip: train open_clip's own architecture of the recipe's size by `oner-fast train clip` instead.
        group: the group that `--rows` can name.
        against: rows that it is compared with, seed by seed.
    """

    name: str
    title: str
    objectives: Settings = field(default_factory=dict)
    model: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    optim: Settings = field(default_factory=dict)
    clip: bool = False
    group: Literal["main", "factors", "scale"] = "main"
    against: tuple[str, ...] = ()

    @property
    def paper(self) -> Paper | None:
        """The paper's figures of the row, where it has some."""
        return PAPER.get(self.name)


@dataclass(frozen=True)
class Factor:
    """One factor: the changes that it makes to each of the rows `on`; with them it is a row of its own."""

    name: str
    title: str
    on: tuple[str, ...]
    objectives: Settings = field(default_factory=dict)
    model: Settings = field(default_factory=dict)
    data: Settings = field(default_factory=dict)
    optim: Settings = field(default_factory=dict)
    group: Literal["factors", "scale"] = "factors"


# The ladder of the paper's table. The recipe itself is the last row: ITC + CMC + MLM + MIM.
MAIN = (
    Row("clip", "Two towers, CLIP's own", clip=True),
    Row("two_towers", "Two towers, OneR's heads", {**ITC, **CLIP_FRAME, **UNMASKED}, TWO_TRUNKS, against=("clip",)),
    Row("two_heads", "One trunk, two heads, ITC", ITC, TWO_HEADS, against=("two_towers",)),
    Row("itc", "One tower, ITC", ITC, against=("two_heads", "two_towers")),
    Row("xmc", "+ XMC", {**ITC, "xmc": 1.0}, against=("itc",)),
    Row("xmc_cic", "+ XMC + CIC", {**ITC, "xmc": 1.0, "cic": 1.0}, against=("xmc",)),
    Row("cmc", "OneR: + CMC", {**ITC, "cmc": 1.0}, against=("xmc_cic", "xmc", "itc")),
)

PAPER = {
    "clip": Paper(17.1, (15.0, 34.8), (10.9, 26.7)),
    "two_heads": Paper(17.5, (10.4, 26.8), (10.7, 26.4)),
    "itc": Paper(1.6, (0.8, 2.5), (0.7, 2.2)),
    "xmc": Paper(22.1, (25.2, 48.1), (15.2, 33.6)),
    "xmc_cic": Paper(22.9, (25.4, 48.1), (16.3, 35.5)),
    "cmc": Paper(23.7, (25.5, 48.2), (16.9, 36.9)),
}

_PAIR, _TRIO, _SCALE = ("itc", "cmc"), ("itc", "two_heads", "cmc"), ("two_heads", "itc", "xmc")
_SECOND = {"teacher_view": "second"}
FACTORS = (
    Factor("no_predictor", "no predictor", _TRIO, {"predictor": "none"}),
    Factor("predictor_per_head", "a predictor a head", ("two_heads",), {"predictor": "per_head"}),
    Factor("equal_heads", "heads that begin equal", ("two_heads",), {"equal_heads": True}),
    Factor("mlp_head", "MoCo v3's projection head", (*_TRIO, "two_towers"), model={"projector_hidden": 768}),
    Factor("second_view", "the teacher sees a second crop", _PAIR, _SECOND),
    Factor("second_view_colour", "a second crop, colours changed", _PAIR, _SECOND, data={"aug_colour": 0.4}),
    Factor("unmasked", "without MLM and MIM", _TRIO, UNMASKED),
    Factor("learnt_temperature", "temperature learnt", _PAIR, {"learnable_temperature": True}),
    Factor("cold", "temperature 0.07, fixed", _PAIR, {"temperature": 0.07}),
    Factor("two_tau", "MoCo v3's factor 2 tau", _PAIR, {"temperature_factor": True}),
    Factor("wide_gap", "wide modality gap at the start", _PAIR, {"init_gap": 100.0}),
    Factor("plain", "CLIP's contrast", _TRIO, CLIP_FRAME),
    Factor("bare", "CLIP's contrast, without MLM and MIM", ("itc", "two_heads"), {**CLIP_FRAME, **UNMASKED}),
    Factor("deep", "twice the blocks", _SCALE, model={"depth": 2.0}, group="scale"),
    Factor("small_batch", "a quarter of the batch", _SCALE, optim={"batch_size": 0.25}, group="scale"),
    Factor("large_batch", "four times the batch", _SCALE, optim={"batch_size": 4.0}, group="scale"),
)
"""Numbers of the group `scale` multiply the recipe's own."""

GROUPS = {
    "main": "the ladder of the paper's table",
    "factors": "what no source decides, on some of these rows",
    "scale": "depth and batch",
    "decisive": "two_heads, itc, xmc and cmc",
}
DECISIVE = ("two_heads", "itc", "xmc", "cmc")
REFERENCE = "cmc"
"""The row whose operations the others are given in the comparison at equal FLOPs."""


def all_rows() -> dict[str, Row]:
    """Return every row by name: the ladder, then the factors in their order."""
    rows = {row.name: row for row in MAIN}
    for factor in FACTORS:
        for base in factor.on:
            row = rows[base]
            name = f"{base}.{factor.name}"
            rows[name] = Row(
                name,
                f"{row.title}; {factor.title}",
                {**row.objectives, **factor.objectives},
                {**row.model, **factor.model},
                {**row.data, **factor.data},
                {**row.optim, **factor.optim},
                group=factor.group,
                against=(base,),
            )
    return rows


def chosen_rows(names: Sequence[str]) -> list[Row]:
    """Return the rows that names and groups ask for, in the study's order.

    Raises:
        ValueError: a name is neither a row nor a group; the message lists both.
    """
    rows = all_rows()
    wanted: set[str] = set()
    for name in names:
        found = {row.name for row in rows.values() if row.group == name}
        found |= set(DECISIVE) if name == "decisive" else {name} & rows.keys()
        if not found:
            raise ValueError(
                f"--rows {name}: no such row or group; groups: {', '.join(GROUPS)}; rows: {', '.join(rows)}"
            )
        wanted |= found
    return [row for name, row in rows.items() if name in wanted]
