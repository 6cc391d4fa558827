"""Triton kernels, one file an op; imported as ``oner_fast.kernels``."""
