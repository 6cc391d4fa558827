// Checks and conversions of torch tensors to the launches of cuda/launch.h, shared by the bindings.
#pragma once

#include <ATen/core/Tensor.h>
#include <c10/cuda/CUDAException.h>
#include <c10/cuda/CUDAGuard.h>
#include <c10/cuda/CUDAStream.h>
#include <c10/util/Exception.h>

#include <cstdint>
#include <limits>
#include <optional>

#include "cuda/launch.h"

namespace oner_fast::cuda {

using OptionalTensor = std::optional<at::Tensor>;

inline int32_t number_of(const char* op, const char* name, at::ScalarType type) {
  switch (type) {
    case at::kFloat:
      return kF32;
    case at::kDouble:
      return kF64;
    case at::kHalf:
      return kF16;
    case at::kBFloat16:
      return kBF16;
    case at::kByte:
      return kU8;
    default:
      TORCH_CHECK_TYPE(false, op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", type);
  }
}

// The dtype of sums and statistics: float32, or float64 for a float64 input.
inline at::ScalarType statistics_type(at::ScalarType type) { return type == at::kDouble ? at::kDouble : at::kFloat; }

// Kernels count columns in 32 bits; rows, offsets and sizes in 64.
inline int32_t narrow_size(const char* op, const char* name, int64_t size) {
  TORCH_CHECK_VALUE(size >= 0 && size <= std::numeric_limits<int32_t>::max() / 2, op, ": ", name, " is ", size,
                    ", more than a kernel can count");
  return static_cast<int32_t>(size);
}

// `x` where the numbers of a row are adjacent, else a contiguous copy, since kernels read whole words of a row.
inline at::Tensor with_dense_rows(const at::Tensor& x) {
  return x.stride(-1) == 1 || x.size(-1) == 1 ? x : x.contiguous();
}

inline const void* data(const at::Tensor& x) { return x.defined() ? x.const_data_ptr() : nullptr; }
inline void* result(const at::Tensor& x) { return x.defined() && x.numel() > 0 ? x.mutable_data_ptr() : nullptr; }

inline void same_device(const char* op, const at::Tensor& first, std::initializer_list<OptionalTensor> others) {
  for (const OptionalTensor& other : others)
    TORCH_CHECK_VALUE(!other.has_value() || other->device() == first.device(), op, ": one tensor is on ",
                      first.device(), ", another on ", other->device());
}

// `kept` as the kernels take it. Its values are not read here: the kernels keep every index within its tensor.
struct KeptTensor {
  at::Tensor values, starts;  // keep contiguous copies alive
  Kept kept{};

  KeptTensor(const char* op, const at::Tensor& kept_in, const OptionalTensor& cu_seqlens, int64_t samples,
             int64_t cells) {
    TORCH_CHECK_TYPE(kept_in.scalar_type() == at::kLong, op, ": kept must be int64, got ", kept_in.scalar_type());
    values = kept_in.contiguous();
    kept = {static_cast<const int64_t*>(values.const_data_ptr()), nullptr, samples, cells, 0, kept_in.numel()};
    if (cu_seqlens.has_value()) {
      TORCH_CHECK_TYPE(cu_seqlens->scalar_type() == at::kInt, op, ": cu_seqlens must be int32, got ",
                       cu_seqlens->scalar_type());
      TORCH_CHECK_VALUE(kept_in.dim() == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) == samples + 1, op,
                        ": kept (T,) and cu_seqlens (B + 1,) = (", samples + 1, ",) come together, got ",
                        kept_in.sizes(), " and ", cu_seqlens->sizes());
      starts = cu_seqlens->contiguous();
      kept.starts = static_cast<const int32_t*>(starts.const_data_ptr());
    } else {
      TORCH_CHECK_VALUE(kept_in.dim() == 2 && kept_in.size(0) == samples, op,
                        ": kept must have shape (B, K) with B = ", samples, ", got ", kept_in.sizes());
      kept.per_sample = kept_in.size(1);
    }
    // Choices count a sample's entries in 32 bits.
    narrow_size(op, "the number of entries of a sample", cu_seqlens.has_value() ? kept.total : kept.per_sample);
  }
};

}  // namespace oner_fast::cuda
