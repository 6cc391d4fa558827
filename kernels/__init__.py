"""Triton kernels, one file an op; imported as ``oner_fast.kernels``.

A file holds the op's kernels and the functions that launch them, whose arguments are those of the raw op of the same
name. Shapes of tiles come from `configurations`, never from autotuning at run time; `compilations` of each file lists
what a GPU would compile, for checks that have none.
"""
