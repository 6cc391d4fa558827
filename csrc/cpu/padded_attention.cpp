// padded_attention: attention of a padded batch, whose tensors are read by their strides.
#include "cpu/attention_batch.h"

namespace oner_fast {

std::tuple<Tensor, Tensor> padded_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const OptionalTensor& seen, double scale, int64_t dropped,
                                            const OptionalTensor& dropout_seed) {
  AttentionBatch batch = AttentionBatch::padded(query, key, value, seen, scale);
  batch.drop(dropped, dropout_seed);
  return attention(batch);
}

std::tuple<Tensor, Tensor, Tensor> padded_attention_backward(const Tensor& grad, const Tensor& query, const Tensor& key,
                                                             const Tensor& value, const Tensor& out,
                                                             const Tensor& statistics, const OptionalTensor& seen,
                                                             double scale, bool need_query, bool need_key,
                                                             int64_t dropped, const OptionalTensor& dropout_seed) {
  AttentionBatch batch = AttentionBatch::padded(query, key, value, seen, scale);
  batch.drop(dropped, dropout_seed);
  return attention_backward(batch, grad, out, statistics, need_query, need_key);
}

}  // namespace oner_fast
