"""Take one fixed configuration where autotuning would time several: without a GPU nothing can be timed."""

from __future__ import annotations

from typing import Any

from triton.runtime.autotuner import Autotuner


class FixedConfiguration:
    """Replace the benchmark of Triton's `Autotuner`.

    Args:
        index: the place of the configuration to take, in the order in which they are written. Pruned ones are never
            taken.
    """

    def __init__(self, index: int = 0) -> None:
        self.index = index
        self._stock: Any = None

    def install(self) -> None:
        """Make autotuning take the configuration from now on."""

        def bench(tuner: Any, *args: Any, config: Any, **meta: Any) -> list[float]:
            wanted = tuner.configs[self.index % len(tuner.configs)]
            return [0.0 if config is wanted else 1.0] * 3

        self._stock, Autotuner._bench = Autotuner._bench, bench

    def uninstall(self) -> None:
        """Restore Triton's own benchmark."""
        Autotuner._bench = self._stock
