// varlen_attention: attention of packed sequences.
#include "cpu/attention_batch.h"

namespace oner_fast {

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool causal,
                                            double scale, int64_t dropped, const OptionalTensor& dropout_seed) {
  AttentionBatch batch = AttentionBatch::packed(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale);
  batch.drop(dropped, dropout_seed);
  return attention(batch);
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& statistics, const Tensor& cu_seqlens_q,
                                                             const OptionalTensor& cu_seqlens_k, bool causal,
                                                             double scale, bool need_query, bool need_key,
                                                             int64_t dropped, const OptionalTensor& dropout_seed) {
  AttentionBatch batch = AttentionBatch::packed(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale);
  batch.drop(dropped, dropout_seed);
  return attention_backward(batch, grad, out, statistics, need_query, need_key);
}

}  // namespace oner_fast
