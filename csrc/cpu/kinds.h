// Converts ATen's dtypes to the kinds of the row kernels.
#pragma once

#include <c10/core/ScalarType.h>
#include <c10/util/Exception.h>

#include "cpu/isa/rows.h"

namespace oner_fast {

// The dtype of sums and statistics: float32, or float64 for a float64 input.
inline at::ScalarType statistics_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

inline Kind kind_of(const char* op, const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kF32;
    case at::kDouble:
      return kF64;
    case at::kHalf:
      return kF16;
    case at::kBFloat16:
      return kBF16;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", type);
  }
}

}  // namespace oner_fast
