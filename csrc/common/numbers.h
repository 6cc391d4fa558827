// Single numbers in tensors on the CPU.
#pragma once

#include <torch/headeronly/util/BFloat16.h>
#include <torch/headeronly/util/Half.h>

#include <algorithm>

#include "common/tensor.h"

namespace oner_fast {

// The number in a tensor of one element.
inline double number_in(const char* op, const char* name, const Tensor& x) {
  CHECK_VALUE(x.numel() == 1, op, ": ", name, " must hold one number, got shape ", x.sizes());
  const void* at = x.const_data_ptr();
  switch (type_of(x)) {
    case kFloat:
      return *static_cast<const float*>(at);
    case kDouble:
      return *static_cast<const double*>(at);
    case kHalf:
      return static_cast<float>(*static_cast<const torch::headeronly::Half*>(at));
    case kBFloat16:
      return static_cast<float>(*static_cast<const torch::headeronly::BFloat16*>(at));
    default:
      fail<std::invalid_argument>(op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", type_of(x));
  }
}

// x[...] = value, for a tensor of float32 or float64.
inline void fill(const Tensor& x, double value) {
  if (type_of(x) == kDouble)
    std::fill_n(static_cast<double*>(x.mutable_data_ptr()), x.numel(), value);
  else
    std::fill_n(static_cast<float*>(x.mutable_data_ptr()), x.numel(), static_cast<float>(value));
}

}  // namespace oner_fast
