// The raw ops that have CUDA C++ kernels; common/ops.h says what they compute.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace oner_fast::cuda {

Tensor masked_gather(const Tensor& tokens, const Tensor& kept, const OptionalTensor& positions,
                     const OptionalTensor& prefix, const OptionalTensor& cu_seqlens);

std::tuple<Tensor, Tensor, Tensor> masked_gather_backward(const Tensor& grad, const Tensor& kept,
                                                          const OptionalTensor& cu_seqlens, int64_t samples,
                                                          int64_t tokens, int64_t prefix, bool need_tokens,
                                                          bool need_positions, bool need_prefix);

Tensor gather_patches(const Tensor& images, const Tensor& kept, int64_t patch_size, const OptionalTensor& mean,
                      const OptionalTensor& std, ScalarType dtype, const OptionalTensor& cu_seqlens);

Tensor gather_patches_backward(const Tensor& grad, const Tensor& kept, int64_t patch_size, const OptionalTensor& std,
                               const IntList& image_shape, ScalarType dtype, const OptionalTensor& cu_seqlens);

std::tuple<Tensor, Tensor> token_alignment(const Tensor& student, const Tensor& teacher, const OptionalTensor& kept);

Tensor token_alignment_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                const OptionalTensor& kept, const Tensor& factors);

// Takes float16 and bfloat16 alone. Unlike on the CPU, first_pair may be any number: a target outside the keys has the
// logit 0.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixup_info_nce_statistics(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& partner, int64_t first_pair, bool columns_too, const OptionalTensor& query_code,
    const OptionalTensor& key_code, const OptionalTensor& row_share, const OptionalTensor& column_share);

// Attention within sequences of at most 256 tokens, as varlen_attention of common/ops.h.
Tensor short_attention_table(const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t queries,
                             int64_t keys, int64_t heads, int64_t longest);

std::tuple<Tensor, Tensor> short_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                           const Tensor& table, int64_t longest, bool causal, double scale);

std::tuple<Tensor, Tensor, Tensor> short_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                            const Tensor& value, const Tensor& out,
                                                            const Tensor& statistics, const Tensor& cu_seqlens_q,
                                                            const OptionalTensor& cu_seqlens_k, const Tensor& table,
                                                            int64_t longest, bool causal, double scale, bool need_query,
                                                            bool need_key);

}  // namespace oner_fast::cuda
