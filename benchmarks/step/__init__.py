"""One OneR training step: ours, and the same step in plain PyTorch, eager and compiled."""

from oner_fast.benchmarks.step.run import main, rows

__all__ = ["main", "rows"]
