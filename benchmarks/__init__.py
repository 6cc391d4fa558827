"""Benchmarks of ops, steps and loaders; imported as ``oner_fast.benchmarks``."""
