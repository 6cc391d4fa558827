// The compiled ops. Python defines their schemas (oner_fast/ops), so that an op exists even where this library was not
// built.
#pragma once

#include <ATen/core/Tensor.h>

#include <optional>
#include <tuple>

namespace oner_fast {

at::Tensor masked_gather(const at::Tensor& tokens, const at::Tensor& kept, const std::optional<at::Tensor>& positions,
                         const std::optional<at::Tensor>& prefix, const std::optional<at::Tensor>& cu_seqlens);

// Gradients of tokens, positions and prefix; one that is not needed is empty.
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

// 1 / norm of the rows (1 - mix) x + mix other, as in common/norm.h: (N,), float32 or, for float64, float64.
at::Tensor mixup_inverse_norms(const at::Tensor& x, const std::optional<at::Tensor>& other,
                               const std::optional<at::Tensor>& mix);

// Statistics of the logits of M queries and N keys: max and sum of exp(logit - max) of each row and of each column
// (empty unless wanted), the logit of each row's own pair (key first_pair + i) and, with partners, of its partner. A
// pair outside these keys, which may be one block of many, has the logit 0. Rows without inverse norms enter the logits
// as they are, mixed.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_statistics(
    const at::Tensor& query, const std::optional<at::Tensor>& query_other, const std::optional<at::Tensor>& query_mix,
    const std::optional<at::Tensor>& query_inverse_norm, const at::Tensor& key,
    const std::optional<at::Tensor>& key_other, const std::optional<at::Tensor>& key_mix,
    const std::optional<at::Tensor>& key_inverse_norm, const at::Tensor& logit_scale,
    const std::optional<at::Tensor>& partner, int64_t first_pair, bool columns_too);

// Gradients of query, query_other, the mix of each row, key, key_other, the mix of each key, and logit_scale, from G[i,
// j] = row_weight[i] exp(l - row_max[i]) + column_weight[j] exp(l - column_max[j]) - own_weight[i] (at the own pair) -
// partner_weight[i] (at the partner). Pairs outside these keys subtract nothing. A gradient that does not exist or is
// not needed is empty. With key_sums that of key is with respect to the keys of the logits, in the dtype of statistics.
std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_backward(
    const at::Tensor& query, const std::optional<at::Tensor>& query_other, const std::optional<at::Tensor>& query_mix,
    const std::optional<at::Tensor>& query_inverse_norm, const at::Tensor& key,
    const std::optional<at::Tensor>& key_other, const std::optional<at::Tensor>& key_mix,
    const std::optional<at::Tensor>& key_inverse_norm, const at::Tensor& logit_scale,
    const std::optional<at::Tensor>& partner, int64_t first_pair, const at::Tensor& row_max,
    const at::Tensor& row_weight, const std::optional<at::Tensor>& column_max,
    const std::optional<at::Tensor>& column_weight, const at::Tensor& own_weight,
    const std::optional<at::Tensor>& partner_weight, bool need_key, bool key_sums);

// The loss, and for each row two factors that the gradient needs besides the inputs: (B * K, 2).
std::tuple<at::Tensor, at::Tensor> token_alignment(const at::Tensor& student, const at::Tensor& teacher,
                                                   const std::optional<at::Tensor>& kept);

at::Tensor token_alignment_backward(const at::Tensor& grad, const at::Tensor& student, const at::Tensor& teacher,
                                    const std::optional<at::Tensor>& kept, const at::Tensor& factors);

// The result, and statistics (2, T, H) of every query's scores in base 2: the maximum and 1 / sum of 2^(score -
// maximum), in float32 (float64 for float64), 0 where no key is seen. From them backward computes exactly the weights
// of forward.
std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& query, const at::Tensor& key,
                                                    const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                                    const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
                                                    double scale);

// Gradients of query, key and value; one that is not needed is empty.
std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward(
    const at::Tensor& grad, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out, const at::Tensor& statistics, const at::Tensor& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, bool causal, double scale, bool need_query, bool need_key);

}  // namespace oner_fast
