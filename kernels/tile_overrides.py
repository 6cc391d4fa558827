"""Change, list and count the committed tiles, for tuning and for lists of compilations; no launch needs this module.

An override changes the table that `kernels.launch` reads, not the code that reads it. A launch therefore costs the same
as without overrides, and torch.compile traces the same code.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager

from oner_fast.kernels import launch
from oner_fast.kernels.launch import REFERENCE_ARCHITECTURE, Configuration, committed_tiles, configuration

Key = tuple[str, str, str]  # op, kernel, class of shapes


def committed_keys() -> list[Key]:
    """Return the keys of all committed tiles, in the order of the files."""
    return [
        (op, kernel, shape_class)
        for op in sorted(path.stem for path in launch.CONFIGURATIONS.glob("*.json"))
        for kernel, classes in committed_tiles(op)[REFERENCE_ARCHITECTURE].items()
        for shape_class in classes
    ]


def reload_tiles() -> None:
    """Drop the cached tiles, after their files were changed."""
    committed_tiles.cache_clear()


@contextmanager
def override(op: str, kernel: str, shape_class: str, tile: Configuration) -> Iterator[None]:
    """Give `tile` to every architecture within the block, in every thread.

    Raises KeyError for a key that is not committed, ValueError where the blocks are not those of the kernel.
    """
    places = [kernels[kernel] for kernels in committed_tiles(op).values() if shape_class in kernels.get(kernel, {})]
    if not places:
        raise KeyError(f"{op}: no configuration of {kernel!r} for {shape_class!r} (kernels/configurations/{op}.json)")
    before = [classes[shape_class] for classes in places]
    if set(tile.blocks) != set(before[0].blocks):
        raise ValueError(f"{op} {kernel} has the blocks {sorted(before[0].blocks)}, got {sorted(tile.blocks)}")
    try:
        for classes in places:
            classes[shape_class] = tile
        yield
    finally:
        for classes, old in zip(places, before, strict=True):
            classes[shape_class] = old


@contextmanager
def tiles_of(architecture: int) -> Iterator[None]:
    """Give the tiles of `architecture` to every architecture within the block.

    The lists of compilations ask for sm_80, so this is how they list the kernels of another GPU.
    """
    with ExitStack() as stack:
        for op, kernel, shape_class in committed_keys():
            stack.enter_context(override(op, kernel, shape_class, configuration(op, kernel, shape_class, architecture)))
        yield


class _CountedClasses(dict[str, Configuration]):
    """A table of a kernel's tiles by class of shapes that counts how often each class is looked up."""

    def __init__(self, op: str, kernel: str, classes: Mapping[str, Configuration], lookups: Counter[Key]) -> None:
        super().__init__(classes)
        self.kernel, self.lookups = (op, kernel), lookups

    def __getitem__(self, shape_class: str) -> Configuration:
        self.lookups[*self.kernel, shape_class] += 1
        return super().__getitem__(shape_class)


@contextmanager
def counted_lookups() -> Iterator[Counter[Key]]:
    """Count by key how often each committed tile is looked up within the block."""
    lookups: Counter[Key] = Counter()
    places = [(op, kernels) for op in {op for op, _, _ in committed_keys()} for kernels in committed_tiles(op).values()]
    before = [dict(kernels) for _, kernels in places]
    try:
        for op, kernels in places:
            kernels.update({one: _CountedClasses(op, one, classes, lookups) for one, classes in kernels.items()})
        yield lookups
    finally:
        for (_, kernels), old in zip(places, before, strict=True):
            kernels.update(old)
