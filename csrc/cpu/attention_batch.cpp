#include "cpu/attention_batch.h"

#include <algorithm>

namespace oner_fast {
namespace {

const int32_t* boundaries(const char* op, const char* name, const Tensor& cu_seqlens, int64_t rows) {
  CHECK_TYPE(type_of(cu_seqlens) == kInt, op, ": ", name, " must be int32, got ", type_of(cu_seqlens));
  CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, op, ": ", name, " must have shape (B + 1,), got ",
              cu_seqlens.sizes());
  const int32_t* values = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.size(0) - 1;
  CHECK_VALUE(values[0] == 0 && values[last] == rows, op, ": ", name, " must begin with 0 and end with ", rows,
              ", got ", values[0], " and ", values[last]);
  CHECK_VALUE(std::is_sorted(values, values + last + 1), op, ": ", name, " must never decrease");
  return values;
}

Tensor heads_of(const char* op, const char* name, const Tensor& x, bool is_padded) {
  CHECK_VALUE(x.dim() == (is_padded ? 4 : 3), op, ": ", name, " must have shape ",
              is_padded ? "(B, N, H, Dh)" : "(T, H, Dh)", ", got ", x.sizes());
  return with_dense_rows(x);
}

}  // namespace

AttentionBatch::AttentionBatch(const char* op_in, bool is_padded_in, const Tensor& query_in, const Tensor& key_in,
                               const Tensor& value_in, bool causal_in, double scale_in)
    : op(op_in),
      is_padded(is_padded_in),
      causal(causal_in),
      scale(scale_in),
      query(heads_of(op, "query", query_in, is_padded)),
      key(heads_of(op, "key", key_in, is_padded)),
      value(heads_of(op, "value", value_in, is_padded)),
      kind(kind_of(op, "query", type_of(query_in))) {
  const int64_t last = query.dim() - 1;
  heads = query.size(last - 1), key_heads = key.size(last - 1), width = query.size(last);
  CHECK_VALUE(key.size(last) == width && (!is_padded || key.size(0) == query.size(0)), op, ": key must have shape ",
              is_padded ? "(B, Nk, Hk, " : "(Tk, Hk, ", width, "), got ", key.sizes());
  CHECK_TYPE(type_of(key) == type_of(query), op, ": key must have dtype ", type_of(query), " like query, got ",
             type_of(key));
  check_like("value", value, key);
  CHECK_VALUE(key_heads > 0 && heads % key_heads == 0, op, ": the heads of key and value must divide the ", heads,
              " heads of query, got ", key_heads);
}

AttentionBatch AttentionBatch::packed(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool causal,
                                      double scale) {
  AttentionBatch batch("varlen_attention", false, query, key, value, causal, scale);
  const Tensor starts_q = dense(cu_seqlens_q), starts_k = cu_seqlens_k.has_value() ? dense(*cu_seqlens_k) : starts_q;
  const int32_t* q = boundaries(batch.op, "cu_seqlens_q", starts_q, query.size(0));
  const int32_t* k = boundaries(batch.op, "cu_seqlens_k", starts_k, key.size(0));
  CHECK_VALUE(starts_q.size(0) == starts_k.size(0), batch.op, ": cu_seqlens_k must have shape (", starts_q.size(0),
              ",) like cu_seqlens_q, got ", starts_k.sizes());
  batch.sequences.reserve(static_cast<size_t>(starts_q.size(0) - 1));
  for (int64_t s = 0; s + 1 < starts_q.size(0); ++s) {
    const int64_t queries = q[s + 1] - q[s], keys = k[s + 1] - k[s];
    const int64_t blind = keys == 0 ? queries : causal ? std::max<int64_t>(queries - keys, 0) : 0;
    batch.sequences.push_back({s, q[s], queries, k[s], queries == 0 ? 0 : keys, blind, keys, nullptr});
  }
  return batch;
}

AttentionBatch AttentionBatch::padded(const Tensor& query, const Tensor& key, const Tensor& value,
                                      const OptionalTensor& seen_in, double scale) {
  const bool of_queries = seen_in.has_value() && seen_in->dim() == 2;
  AttentionBatch batch("padded_attention", true, query, key, value, of_queries, scale);
  const int64_t samples = query.size(0), queries = query.size(1), all_keys = key.size(1);
  const int32_t* seen = nullptr;
  if (seen_in.has_value()) {
    const Tensor values = dense(*seen_in);
    CHECK_TYPE(type_of(values) == kInt, batch.op, ": seen must be int32, got ", type_of(values));
    CHECK_VALUE(values.dim() >= 1 && values.dim() <= 2 && values.size(0) == samples &&
                    (!of_queries || values.size(1) == queries),
                batch.op, ": seen must have shape (B,) or (B, N), got ", values.sizes());
    seen = static_cast<const int32_t*>(values.const_data_ptr());
    CHECK_VALUE(std::all_of(seen, seen + values.numel(), [&](int32_t n) { return n >= 0 && n <= all_keys; }), batch.op,
                ": seen must be in [0, ", all_keys, "]");
    batch.kept_alive_.push_back(values);
  }
  batch.sequences.reserve(static_cast<size_t>(samples));
  for (int64_t s = 0; s < samples; ++s) {
    AttentionSequence one{s, 0, queries, 0, all_keys, 0, all_keys, nullptr};
    if (queries == 0) {
      one.keys = 0;
    } else if (of_queries) {
      one.seen = seen + s * queries;
      CHECK_VALUE(std::is_sorted(one.seen, one.seen + queries), batch.op, ": seen must never decrease");
      one.keys = one.seen[queries - 1];
      one.blind = std::upper_bound(one.seen, one.seen + queries, 0) - one.seen;
    } else if (seen != nullptr) {
      one.keys = seen[s];
    }
    if (one.keys == 0) one.blind = queries;
    batch.sequences.push_back(one);
  }
  return batch;
}

void AttentionBatch::drop(int64_t dropped, const OptionalTensor& seed) {
  if (dropped == 0) return;
  CHECK_VALUE(dropped > 0 && dropped < 65536 && seed.has_value(), op,
              ": dropped must be in [0, 65536), with a seed where it is not 0, got ", dropped);
  CHECK_TYPE(type_of(*seed) == kLong && seed->numel() == 1, op, ": dropout_seed must be one int64, got ",
             type_of(*seed), " ", seed->sizes());
  const auto bits = static_cast<uint64_t>(*static_cast<const int64_t*>(seed->const_data_ptr()));
  dropout_.low = static_cast<uint32_t>(bits), dropout_.high = static_cast<uint32_t>(bits >> 32);
  dropout_.dropped = static_cast<int32_t>(dropped);
  dropout_.factor = 65536.0 / static_cast<double>(65536 - dropped);
}

void AttentionBatch::check_like(const char* name, const Tensor& x, const Tensor& like) const {
  CHECK_VALUE(x.sizes().equals(like.sizes()), op, ": ", name, " must have shape ", like.sizes(), ", got ", x.sizes());
  CHECK_TYPE(type_of(x) == type_of(like), op, ": ", name, " must have dtype ", type_of(like), ", got ", type_of(x));
}

}  // namespace oner_fast
