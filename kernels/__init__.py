"""Triton kernels, one file an op; imported as `oner_fast.kernels`.

A file holds the op's kernels and the functions that launch them, which take the arguments of the raw op of the same
name. Tile shapes come from `configurations`, never from autotuning at run time. The function `compilations` of each
file lists what a GPU would compile, for checks without a GPU. Kernels import no module of ops or data: code that they
share is in neutral modules of `oner_fast`.
"""
