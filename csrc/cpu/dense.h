// Helpers for sizes and strides that several ops share.
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>

namespace oner_fast {

inline int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

// `x` where the numbers of a row are adjacent, else a contiguous copy.
inline at::Tensor with_dense_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

}  // namespace oner_fast
