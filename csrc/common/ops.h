// The compiled ops. Python defines their schemas (oner_fast/ops), so that an op exists even where this library was not
// built.
#pragma once

#include <tuple>

#include "common/tensor.h"

namespace oner_fast {

Tensor masked_gather(const Tensor& tokens, const Tensor& kept, const OptionalTensor& positions,
                     const OptionalTensor& prefix, const OptionalTensor& cu_seqlens);

// Gradients of tokens, positions and prefix; one that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor> masked_gather_backward(const Tensor& grad, const Tensor& kept,
                                                          const OptionalTensor& cu_seqlens, int64_t samples,
                                                          int64_t tokens, int64_t prefix, bool need_tokens,
                                                          bool need_positions, bool need_prefix);

Tensor gather_patches(const Tensor& images, const Tensor& kept, int64_t patch_size, const OptionalTensor& mean,
                      const OptionalTensor& std, ScalarType dtype, const OptionalTensor& cu_seqlens);

Tensor gather_patches_backward(const Tensor& grad, const Tensor& kept, int64_t patch_size, const OptionalTensor& std,
                               const IntList& image_shape, ScalarType dtype, const OptionalTensor& cu_seqlens);

// 1 / norm of the rows (1 - mix) x + mix other, as in common/norm.h: (N,), float32 or, for float64, float64.
Tensor mixup_inverse_norms(const Tensor& x, const OptionalTensor& other, const OptionalTensor& mix);

// Statistics of the logits of M queries and N keys: max and sum of exp(logit - max) of each row and of each column
// (empty unless wanted), the logit of each row's own pair (key first_pair + i) and, with partners, of its partner. A
// pair outside these keys, which may be one block of many, has the logit 0. Rows without inverse norms enter the logits
// as they are, mixed. Codes and shares mark further pairs, as oner_fast/ops/mixup_info_nce_raw.py says.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixup_info_nce_statistics(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& partner, int64_t first_pair, bool columns_too, const OptionalTensor& query_code,
    const OptionalTensor& key_code, const OptionalTensor& row_share, const OptionalTensor& column_share);

// Gradients of query, query_other, the mix of each row, key, key_other, the mix of each key, and logit_scale, from G[i,
// j] = row_weight[i] exp(l - row_max[i]) + column_weight[j] exp(l - column_max[j]) - own_weight[i] (at the own pair) -
// partner_weight[i] (at the partner). Pairs outside these keys subtract nothing. A gradient that does not exist or is
// not needed is empty. With key_sums that of key is with respect to the keys of the logits, in the dtype of statistics.
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixup_info_nce_backward(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& partner, int64_t first_pair, const Tensor& row_max, const Tensor& row_weight,
    const OptionalTensor& column_max, const OptionalTensor& column_weight, const Tensor& own_weight,
    const OptionalTensor& partner_weight, bool need_key, bool key_sums, const OptionalTensor& query_code,
    const OptionalTensor& key_code, const OptionalTensor& column_share);

// The sum of the terms log(1 + exp(l)) - t l of each row, (M,), over N keys, with targets t and codes as
// oner_fast/ops/sigmoid_loss_raw.py says.
Tensor sigmoid_loss_sums(const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
                         const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
                         const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm,
                         const Tensor& logit_scale, const OptionalTensor& logit_bias, const OptionalTensor& partner,
                         const OptionalTensor& partner_weight, int64_t first_pair, const OptionalTensor& query_code,
                         const OptionalTensor& key_code, bool positive);

// Gradients as those of mixup_info_nce, and that of logit_bias, from G[i, j] = each (sigmoid(l) - t).
std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss_backward(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& logit_bias, const OptionalTensor& partner, const OptionalTensor& partner_weight,
    int64_t first_pair, const Tensor& each, bool need_key, bool key_sums, const OptionalTensor& query_code,
    const OptionalTensor& key_code, bool positive);

// The loss, and for each row two factors that the gradient needs besides the inputs: (B * K, 2).
std::tuple<Tensor, Tensor> token_alignment(const Tensor& student, const Tensor& teacher, const OptionalTensor& kept);

Tensor token_alignment_backward(const Tensor& grad, const Tensor& student, const Tensor& teacher,
                                const OptionalTensor& kept, const Tensor& factors);

// The result, and statistics (2, T, H) of every query's scores in base 2: the maximum and 1 / sum of 2^(score -
// maximum), in float32 (float64 for float64), 0 where no key is seen. From them backward computes exactly the weights
// of forward. `dropped` of 65536 weights are dropped, by draws of the seed (oner_fast/ops/attention_dropout.py).
std::tuple<Tensor, Tensor> varlen_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool causal,
                                            double scale, int64_t dropped, const OptionalTensor& dropout_seed);

// Gradients of query, key and value; one that is not needed is empty.
std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& statistics, const Tensor& cu_seqlens_q,
                                                             const OptionalTensor& cu_seqlens_k, bool causal,
                                                             double scale, bool need_query, bool need_key,
                                                             int64_t dropped, const OptionalTensor& dropout_seed);

// The same for a padded batch (B, N, H, Dh), with statistics (2, B, N, H). `seen` says how many keys, from the first
// on, the queries of a sample see: (B,), or (B, N) for each query, where no query sees fewer than the one before it.
std::tuple<Tensor, Tensor> padded_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const OptionalTensor& seen, double scale, int64_t dropped,
                                            const OptionalTensor& dropout_seed);

std::tuple<Tensor, Tensor, Tensor> padded_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& statistics, const OptionalTensor& seen,
                                                             double scale, bool need_query, bool need_key,
                                                             int64_t dropped, const OptionalTensor& dropout_seed);

}  // namespace oner_fast
