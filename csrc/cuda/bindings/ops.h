// The raw ops that have CUDA C++ kernels; common/ops.h says what they compute.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oner_fast::cuda {

at::Tensor masked_gather(const at::Tensor& tokens, const at::Tensor& kept, const std::optional<at::Tensor>& positions,
                         const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& cu_seqlens);

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_gather_backward(const at::Tensor& grad, const at::Tensor& kept,
                                                                      const std::optional<at::Tensor>& cu_seqlens,
                                                                      int64_t samples, int64_t tokens, int64_t prefix,
                                                                      bool need_tokens, bool need_positions,
                                                                      bool need_prefix);

at::Tensor gather_patches(const at::Tensor& images, const at::Tensor& kept, int64_t patch_size,
                          const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& std,
                          at::ScalarType dtype, const std::optional<at::Tensor>& cu_seqlens);

at::Tensor gather_patches_backward(const at::Tensor& grad, const at::Tensor& kept, int64_t patch_size,
                                   const std::optional<at::Tensor>& std, at::IntArrayRef image_shape,
                                   at::ScalarType dtype, const std::optional<at::Tensor>& cu_seqlens);

std::tuple<at::Tensor, at::Tensor> token_alignment(const at::Tensor& student, const at::Tensor& teacher,
                                                   const std::optional<at::Tensor>& kept);

at::Tensor token_alignment_backward(const at::Tensor& grad, const at::Tensor& student, const at::Tensor& teacher,
                                    const std::optional<at::Tensor>& kept, const at::Tensor& factors);

// Takes float16 and bfloat16 alone. Unlike on the CPU, first_pair may be any number: a target outside the keys has the
// logit 0.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_statistics(
    const at::Tensor& query, const std::optional<at::Tensor>& query_other, const std::optional<at::Tensor>& query_mix,
    const std::optional<at::Tensor>& query_inverse_norm, const at::Tensor& key,
    const std::optional<at::Tensor>& key_other, const std::optional<at::Tensor>& key_mix,
    const std::optional<at::Tensor>& key_inverse_norm, const at::Tensor& logit_scale,
    const std::optional<at::Tensor>& partner, int64_t first_pair, bool columns_too);

}  // namespace oner_fast::cuda
