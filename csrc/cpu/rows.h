// Kernels over one row of numbers, compiled once for each instruction set (rows.cpp) and chosen at run time (capability.cpp).
// Only plain types here: an inline function of a library header, compiled for a newer instruction set, could be linked in for all.
#pragma once

#include <cstddef>
#include <cstdint>

namespace oner_fast {

enum Kind { kF32 = 0, kF64, kF16, kBF16, kKinds, kU8 = kKinds, kPixelKinds };

struct RowKernels {
  // out = a + b; the sum of half types is taken in float32 and rounded once.
  void (*add[kKinds])(void* out, const void* a, const void* b, int64_t count);
  // sum += row, the sum in float32 ([0]) or float64 ([1]).
  void (*accumulate[kKinds][2])(void* sum, const void* row, int64_t count);
  // row = sum
  void (*store[kKinds][2])(void* row, const void* sum, int64_t count);
  // out (side * side, dense) = (pixels - shift) / divisor for a square of pixels, consecutive lines `stride` elements apart.
  void (*normalise[kPixelKinds][kKinds])(void* out, const void* pixels, int64_t stride, int64_t side, double shift,
                                         double divisor);
};

const RowKernels& row_kernels_portable();
#ifdef ONER_FAST_X86
const RowKernels& row_kernels_avx2();
const RowKernels& row_kernels_avx512();
#endif

// Those of cpu_capability().
const RowKernels& row_kernels();

}  // namespace oner_fast
