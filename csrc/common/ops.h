// The compiled ops. Their schemas are defined in Python (oner_fast/ops), so that an op exists even where this library was not built.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oner_fast {

at::Tensor masked_gather(const at::Tensor& tokens, const at::Tensor& kept, const std::optional<at::Tensor>& positions,
                         const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& cu_seqlens);

// Gradients to tokens, positions and prefix; one that is not needed comes back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_gather_backward(const at::Tensor& grad, const at::Tensor& kept,
                                                                      const std::optional<at::Tensor>& cu_seqlens,
                                                                      int64_t samples, int64_t tokens, int64_t prefix,
                                                                      bool need_tokens, bool need_positions,
                                                                      bool need_prefix);

at::Tensor gather_patches(const at::Tensor& images, const at::Tensor& kept, int64_t patch_size,
                          const std::optional<at::Tensor>& mean, const std::optional<at::Tensor>& std,
                          at::ScalarType dtype, const std::optional<at::Tensor>& cu_seqlens);

at::Tensor gather_patches_backward(const at::Tensor& grad, const at::Tensor& kept, int64_t patch_size,
                                   const std::optional<at::Tensor>& std, at::IntArrayRef image_shape, at::ScalarType dtype,
                                   const std::optional<at::Tensor>& cu_seqlens);

// The result and the log-sum-exp of every query's scores (T, H), float32 (float64 for float64).
std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
                                                    const at::Tensor& cu_seqlens_q,
                                                    const std::optional<at::Tensor>& cu_seqlens_k, bool causal, double scale);

// Gradients to query, key and value; those that are not needed come back empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value, const at::Tensor& out,
    const at::Tensor& lse, const at::Tensor& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
    double scale, bool need_query, bool need_key);

}  // namespace oner_fast
