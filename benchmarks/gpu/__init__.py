"""Examine GPU kernels without a GPU: their machine code, and their behaviour when emulated."""
