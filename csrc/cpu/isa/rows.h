// Kernels over one row of numbers.
#pragma once

#include <cstddef>
#include <cstdint>

#include "cpu/isa/isa.h"

namespace oner_fast {

enum Kind { kF32 = 0, kF64, kF16, kBF16, kKinds, kU8 = kKinds, kPixelKinds };

struct RowKernels {
  // out = a + b; the sum of half types is taken in float32 and rounded once.
  void (*add[kKinds])(void* out, const void* a, const void* b, int64_t count);
  // sum += row, the sum in float32 ([0]) or float64 ([1]).
  void (*accumulate[kKinds][2])(void* sum, const void* row, int64_t count);
  // row = sum
  void (*store[kKinds][2])(void* row, const void* sum, int64_t count);
  // out (side * side, dense) = (pixels - shift) * (1 / divisor) for a square of pixels; its lines are `stride` elements
  // apart.
  void (*normalise[kPixelKinds][kKinds])(void* out, const void* pixels, int64_t stride, int64_t side, double shift,
                                         double divisor);
};

ONER_FAST_DECLARE_KERNELS(RowKernels, row_kernels)

}  // namespace oner_fast
