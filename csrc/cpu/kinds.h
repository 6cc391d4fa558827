// Converts PyTorch's dtypes to the kinds of the row kernels.
#pragma once

#include "common/tensor.h"
#include "cpu/isa/rows.h"

namespace oner_fast {

inline Kind kind_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case kFloat:
      return kF32;
    case kDouble:
      return kF64;
    case kHalf:
      return kF16;
    case kBFloat16:
      return kBF16;
    default:
      fail<std::invalid_argument>(op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", type);
  }
}

}  // namespace oner_fast
