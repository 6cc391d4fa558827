// The few operations on tensors that the ops need, over PyTorch's stable ABI: one build serves every PyTorch from
// TORCH_TARGET_VERSION on. No header of ATen or c10 may be included, since what it inlines belongs to one version.
#pragma once

#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <optional>
#include <vector>

#include "common/check.h"

namespace oner_fast {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;  // never undefined: an absent tensor is an OptionalTensor
using OptionalTensor = std::optional<Tensor>;
using Sizes = torch::headeronly::IntHeaderOnlyArrayRef;
using IntList = std::vector<int64_t>;  // an int list of a schema

constexpr ScalarType kByte = ScalarType::Byte, kInt = ScalarType::Int, kLong = ScalarType::Long,
                     kHalf = ScalarType::Half, kBFloat16 = ScalarType::BFloat16, kFloat = ScalarType::Float,
                     kDouble = ScalarType::Double;

// The dtype of sums and statistics: float32, or float64 for a float64 input.
inline ScalarType statistics_type(ScalarType type) { return type == kDouble ? kDouble : kFloat; }

// As x.scalar_type(), which asks PyTorch for every dtype there is until one fits.
ScalarType type_of(const Tensor& x);
inline int64_t item_size(const Tensor& x) { return static_cast<int64_t>(x.element_size()); }

// Return dense tensors on the device of `like`. Nothing has written the memory of an empty one.
Tensor empty(Sizes sizes, ScalarType type, const Tensor& like);
Tensor zeros(Sizes sizes, ScalarType type, const Tensor& like);
void fill_with_zeros(const Tensor& x);

// Return `x` itself where it is already as asked for, else a copy.
Tensor dense(const Tensor& x);
Tensor of_type(const Tensor& x, ScalarType type);
Tensor with_dense_rows(const Tensor& x);  // the numbers of a row are adjacent

}  // namespace oner_fast
