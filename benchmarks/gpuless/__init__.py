"""Check GPU kernels without a GPU, with four checkers; each catches faults that the one before cannot.

- `interpreter`: Triton's interpreter made strict (`TRITON_INTERPRET=1`). It checks the algorithm, masks, indices and
  races between programs.
- `aot`: compilation for GPUs that are not here. It reports compile errors, registers, spills, shared memory, occupancy
  and instructions.
- `emulate` (Triton) and `cuda` (CUDA C++): the compiled PTX, run on CPU tensors by `ptx`. They check what the compiler
  made: barriers, pipelining, bank conflicts.
- `estimate`: a rough time from the machine code, +-30 %.

Importing this package imports none of them. `tools` names the programs that they need and that are missing.
docs/gpuless.md is the guide.
"""
