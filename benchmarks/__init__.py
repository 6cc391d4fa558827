"""Benchmarks of the ops and of a training step, imported as `oner_fast.benchmarks`."""
