"""Tiles that a kernel may have besides its committed one, and the files in which tiles are committed."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace
from itertools import product
from typing import Any

from oner_fast.kernels import launch
from oner_fast.kernels.launch import Configuration
from oner_fast.kernels.tile_overrides import Key, reload_tiles

# Least and greatest size of a block, both powers of two. Blocks that are not listed are a row's length or are bounded
# by a patch, and stay. A product on tensor cores needs 16, and a tile of attention has at most 128.
_PRODUCTS = {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256)}
_ATTENTION = {"BLOCK_M": (16, 128), "BLOCK_N": (16, 128)}
LIMITS: dict[str, dict[str, dict[str, tuple[int, int]]]] = {
    "gather_patches": {"forward": {"PIXELS": (256, 8192)}, "backward": {"PIXELS": (256, 8192)}},
    "masked_gather": {
        "forward": {"BLOCK_R": (1, 64), "BLOCK_D": (32, 1024)},
        "backward": {"TOGETHER": (1, 16), "BLOCK_D": (32, 1024)},
        "pieces": {"BLOCK_D": (32, 1024)},
        "sum_groups": {"BLOCK": (64, 2048)},
        "lists": {"BLOCK_E": (32, 512)},
    },
    "patch_masks": {"masks": {}, "boundaries": {"BLOCK": (128, 8192)}},
    "mixup_info_nce": {
        "rows": {"BLOCK_M": (1, 128), "BLOCK_D": (32, 1024)},
        "merge": {"BLOCK_N": (32, 1024)},
        "partner_sums": {"BLOCK_M": (16, 256), "BLOCK_N": (16, 256)},
        "largest": {"BLOCK_N": (64, 1024)},
        "statistics": _PRODUCTS,
        "gradient": _PRODUCTS,
        "gradient_with_atomics": _PRODUCTS,
        "multiply": {**_PRODUCTS, "BLOCK_K": (16, 128)},
        "finish": {"BLOCK_M": (1, 128)},
    },
    "sigmoid_loss": {"sums": _PRODUCTS, "gradient": _PRODUCTS},
    "token_alignment": {"forward": {"BLOCK_D": (64, 4096)}, "backward": {"BLOCK_D": (64, 4096)}},
    "varlen_attention": {
        "forward": _ATTENTION, "rows": {"BLOCK_M": (16, 128)}, "query": _ATTENTION, "key": _ATTENTION,
        "forward_dropout": _ATTENTION, "query_dropout": _ATTENTION, "key_dropout": _ATTENTION,
    },
}  # fmt: skip
# In these classes rows are longer than any tile, so that BLOCK_K is a step along them.
DEEP = {"BLOCK_K": (16, 128)}
WARPS, STAGES = (1, 8), (1, 5)


def limits(key: Key) -> dict[str, tuple[int, int]]:
    """Return the least and greatest size of each block that tuning may change; KeyError for an unknown kernel."""
    op, kernel, shape_class = key
    deep = kernel in ("statistics", "sums") and "deep" in shape_class.split()
    return {**LIMITS[op][kernel], **(DEEP if deep else {})}


def neighbours(key: Key, tile: Configuration, changes: int = 2) -> list[Configuration]:
    """List tiles that differ from `tile` in 1 to `changes` numbers, the nearest first.

    A block or the number of warps is halved or doubled, and a stage is added or removed. Only kernels with more than
    one stage have loops that use stages.
    """
    options: dict[str, list[int]] = {
        block: _within(sizes, tile.blocks[block] // 2, tile.blocks[block] * 2) for block, sizes in limits(key).items()
    }
    options["num_warps"] = _within(WARPS, tile.num_warps // 2, tile.num_warps * 2)
    options["num_stages"] = [] if tile.num_stages == 1 else _within(STAGES, tile.num_stages - 1, tile.num_stages + 1)
    found: list[tuple[int, Configuration]] = []
    for chosen in product(*([None, *values] for values in options.values())):
        changed = {name: value for name, value in zip(options, chosen, strict=True) if value is not None}
        if 1 <= len(changed) <= changes:
            found.append((len(changed), _changed(tile, changed)))
    return [one for _, one in sorted(found, key=lambda each: each[0])]


def _within(limits: tuple[int, int], *values: int) -> list[int]:
    return [value for value in values if limits[0] <= value <= limits[1]]


def _changed(tile: Configuration, changed: Mapping[str, int]) -> Configuration:
    blocks = {name: changed.get(name, size) for name, size in tile.blocks.items()}
    options = {name: value for name, value in changed.items() if name not in blocks}
    return replace(tile, blocks=blocks, **options)


def label(tile: Configuration) -> str:
    """Name of a tile, such as BLOCK_M 64, BLOCK_N 32, 4 warps, 3 stages."""
    blocks = "".join(f"{name} {size}, " for name, size in tile.blocks.items())
    return f"{blocks}{tile.num_warps} warps, {tile.num_stages} stages"


def commit(key: Key, architecture: int, tile: Configuration) -> None:
    """Write `tile` into the op's file as the tile of an architecture (80 for sm_80), and let launches read it."""
    op, kernel, shape_class = key
    path = launch.CONFIGURATIONS / f"{op}.json"
    data = json.loads(path.read_text(encoding="utf-8"))
    known = data.setdefault(f"sm_{architecture}", {}).setdefault(kernel, {})
    known[shape_class] = tile.numbers
    path.write_text(text_of(data), encoding="utf-8")
    reload_tiles()


def text_of(data: Mapping[str, Mapping[str, Mapping[str, Any]]]) -> str:
    """Format a file of tiles: one tile a line, and a kernel with one class of shapes on one line."""
    architectures = []
    for architecture, kernels in data.items():
        lines = [f"    {json.dumps(kernel)}: {_classes(classes)}" for kernel, classes in kernels.items()]
        architectures.append(f"  {json.dumps(architecture)}: {{\n" + ",\n".join(lines) + "\n  }")
    return "{\n" + ",\n".join(architectures) + "\n}\n"


def _classes(classes: Mapping[str, Any]) -> str:
    if len(classes) == 1:
        return json.dumps(dict(classes))
    lines = [f"      {json.dumps(name)}: {json.dumps(tile)}" for name, tile in classes.items()]
    return "{\n" + ",\n".join(lines) + "\n    }"
