// Checks and conversions of PyTorch's tensors to the launches of cuda/launch.h, shared by the bindings. Only the stable
// ABI is used, as in common/tensor.h; its functions for CUDA are those of libtorch_cuda.
#pragma once

#include <torch/csrc/stable/accelerator.h>
#include <torch/csrc/stable/macros.h>
#include <torch/csrc/stable/ops.h>

#include <cstdint>
#include <initializer_list>
#include <limits>

#include "common/tensor.h"
#include "cuda/launch.h"

namespace oner_fast::cuda {

// Makes the GPU of a tensor the current one while it lives, and knows the stream on which PyTorch computes there.
class Launch {
 public:
  explicit Launch(const Tensor& x) : guard_(x.get_device_index()) {
    void* stream = nullptr;
    TORCH_ERROR_CODE_CHECK(aoti_torch_get_current_cuda_stream(x.get_device_index(), &stream));
    stream_ = static_cast<cudaStream_t>(stream);
  }
  cudaStream_t stream() const { return stream_; }

 private:
  torch::stable::accelerator::DeviceGuard guard_;
  cudaStream_t stream_;
};

inline int32_t number_of(const char* op, const char* name, ScalarType type) {
  switch (type) {
    case kFloat:
      return kF32;
    case kDouble:
      return kF64;
    case kHalf:
      return kF16;
    case kBFloat16:
      return kBF16;
    case kByte:
      return kU8;
    default:
      fail<std::invalid_argument>(op, ": ", name, " must be float32, float16, bfloat16 or float64, got ", type);
  }
}

// Kernels count columns in 32 bits; rows, offsets and sizes in 64.
inline int32_t narrow_size(const char* op, const char* name, int64_t size) {
  CHECK_VALUE(size >= 0 && size <= std::numeric_limits<int32_t>::max() / 2, op, ": ", name, " is ", size,
              ", more than a kernel can count");
  return static_cast<int32_t>(size);
}

inline const void* data(const Tensor& x) { return x.const_data_ptr(); }
inline const void* data(const OptionalTensor& x) { return x.has_value() ? data(*x) : nullptr; }
inline void* result(const Tensor& x) { return x.numel() > 0 ? x.mutable_data_ptr() : nullptr; }
inline void* result(const OptionalTensor& x) { return x.has_value() ? result(*x) : nullptr; }

inline void same_device(const char* op, const Tensor& first, std::initializer_list<OptionalTensor> others) {
  const auto name = [](const Tensor& x) {
    return x.is_cpu() ? std::string("the CPU") : "GPU " + std::to_string(x.get_device_index());
  };
  for (const OptionalTensor& other : others)
    CHECK_VALUE(!other.has_value() || other->device() == first.device(), op, ": one tensor is on ", name(first),
                ", another on ", name(*other));
}

// `kept` as the kernels take it. Its values are not read here: the kernels keep every index within its tensor.
struct KeptTensor {
  Tensor values;  // keep contiguous copies alive
  OptionalTensor starts;
  Kept kept{};

  KeptTensor(const char* op, const Tensor& kept_in, const OptionalTensor& cu_seqlens, int64_t samples, int64_t cells)
      : values(dense(kept_in)) {
    CHECK_TYPE(kept_in.scalar_type() == kLong, op, ": kept must be int64, got ", kept_in.scalar_type());
    kept = {static_cast<const int64_t*>(data(values)), nullptr, samples, cells, 0, kept_in.numel()};
    if (cu_seqlens.has_value()) {
      CHECK_TYPE(cu_seqlens->scalar_type() == kInt, op, ": cu_seqlens must be int32, got ", cu_seqlens->scalar_type());
      CHECK_VALUE(kept_in.dim() == 1 && cu_seqlens->dim() == 1 && cu_seqlens->size(0) == samples + 1, op,
                  ": kept (T,) and cu_seqlens (B + 1,) = (", samples + 1, ",) come together, got ", kept_in.sizes(),
                  " and ", cu_seqlens->sizes());
      starts = dense(*cu_seqlens);
      kept.starts = static_cast<const int32_t*>(data(starts));
    } else {
      CHECK_VALUE(kept_in.dim() == 2 && kept_in.size(0) == samples, op,
                  ": kept must have shape (B, K) with B = ", samples, ", got ", kept_in.sizes());
      kept.per_sample = kept_in.size(1);
    }
    // Choices count a sample's entries in 32 bits.
    narrow_size(op, "the number of entries of a sample", cu_seqlens.has_value() ? kept.total : kept.per_sample);
  }
};

}  // namespace oner_fast::cuda
