#include <tuple>

#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "short_attention";
constexpr int64_t kMostTokens = 256, kMostHeads = 32767;

Tensor boundaries(const Tensor& x) {
  CHECK_TYPE(x.scalar_type() == kInt, kOp, ": boundaries must be int32, got ", x.scalar_type());
  CHECK_VALUE(x.dim() == 1 && x.size(0) > 0, kOp, ": boundaries must have shape (S + 1,), got ", x.sizes());
  return dense(x);
}

// Rows, heads and their words of 16 bytes as the kernels read them, or a copy.
Tensor in_words(const Tensor& x) {
  const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
  return aligned && x.stride(2) == 1 && x.stride(0) % 8 == 0 && x.stride(1) % 8 == 0 ? x
                                                                                     : torch::stable::clone(dense(x));
}

int32_t longest_of(int64_t longest) {
  CHECK_VALUE(longest >= 1 && longest <= kMostTokens, kOp, ": longest must be in [1, ", kMostTokens, "], got ",
              longest);
  return static_cast<int32_t>(longest);
}

// The boundaries of both sides, with what forward and backward take alike.
struct Packed {
  Tensor query, key, value, starts_q, starts_k, table;

  Packed(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& cu_seqlens_q,
         const OptionalTensor& cu_seqlens_k, const Tensor& table_in)
      : query(query_in),
        key(key_in),
        value(value_in),
        starts_q(boundaries(cu_seqlens_q)),
        starts_k(cu_seqlens_k.has_value() ? boundaries(*cu_seqlens_k) : starts_q),
        table(table_in) {
    CHECK_VALUE(query.dim() == 3 && key.dim() == 3 && value.dim() == 3, kOp,
                ": query, key and value must have shape (T, H, Dh), got ", query.sizes(), ", ", key.sizes(), " and ",
                value.sizes());
    const ScalarType type = query.scalar_type();
    CHECK_TYPE(type == kHalf || type == kBFloat16, kOp, ": query must be float16 or bfloat16, got ", type);
    CHECK_TYPE(key.scalar_type() == type && value.scalar_type() == type, kOp,
               ": query, key and value must have one dtype");
    CHECK_VALUE(query.size(2) == 64 || query.size(2) == 32, kOp, ": heads must have 64 or 32 numbers, got ",
                query.size(2));
    CHECK_VALUE(key.sizes().equals(value.sizes()) && key.size(1) == query.size(1) && key.size(2) == query.size(2), kOp,
                ": key and value must have the heads of query ", query.sizes(), ", got ", key.sizes(), " and ",
                value.sizes());
    CHECK_VALUE(starts_q.size(0) == starts_k.size(0), kOp, ": both sides must have equally many sequences");
    CHECK_VALUE(query.size(1) <= kMostHeads, kOp, ": at most ", kMostHeads, " heads, got ", query.size(1));
    CHECK_VALUE(table.scalar_type() == kInt && table.dim() == 1 && table.is_contiguous() &&
                    table.size(0) == 2 + 2 * (starts_q.size(0) - 1) * query.size(1),
                kOp, ": the table has ", table.sizes(), " numbers, not those of these sequences and heads");
    query = in_words(query);
    key = in_words(key);
    value = in_words(value);
  }
  // Without queries, or without keys and sequences, no kernel runs.
  bool nothing() const { return starts_q.size(0) == 1 || query.size(1) == 0; }

  template <typename Call>
  void fill(Call& call, int64_t longest, bool causal, double scale) const {
    CHECK_VALUE(scale > 0, kOp, ": scale must be positive, got ", scale);
    call.query = data(query);
    call.key = data(key);
    call.value = data(value);
    call.starts_q = static_cast<const int32_t*>(data(starts_q));
    call.starts_k = static_cast<const int32_t*>(data(starts_k));
    call.table = static_cast<const int32_t*>(data(table));
    call.query_row = query.stride(0);
    call.query_head = query.stride(1);
    call.key_row = key.stride(0);
    call.key_head = key.stride(1);
    call.value_row = value.stride(0);
    call.value_head = value.stride(1);
    call.scale = static_cast<float>(scale);
    call.sequences = narrow_size(kOp, "the number of sequences", starts_q.size(0) - 1);
    call.queries = narrow_size(kOp, "the number of queries", query.size(0));
    call.keys = narrow_size(kOp, "the number of keys", key.size(0));
    call.heads = static_cast<int32_t>(query.size(1));
    call.head_dim = static_cast<int32_t>(query.size(2));
    call.longest = longest_of(longest);
    call.causal = causal ? 1 : 0;
    call.number = number_of(kOp, "query", query.scalar_type());
  }
};

}  // namespace

Tensor short_attention_table(const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, int64_t queries,
                             int64_t keys, int64_t heads, int64_t longest) {
  same_device(kOp, cu_seqlens_q, {cu_seqlens_k});
  const Launch launch(cu_seqlens_q);
  const Tensor starts_q = boundaries(cu_seqlens_q), starts_k = cu_seqlens_k ? boundaries(*cu_seqlens_k) : starts_q;
  CHECK_VALUE(starts_q.size(0) == starts_k.size(0), kOp, ": both sides must have equally many sequences");
  CHECK_VALUE(heads >= 0 && heads <= kMostHeads, kOp, ": at most ", kMostHeads, " heads, got ", heads);
  const int64_t sequences = starts_q.size(0) - 1;
  const Tensor table = empty({2 + 2 * sequences * heads}, kInt, cu_seqlens_q);
  if (sequences == 0 || heads == 0) {
    fill_with_zeros(table);
    return table;
  }
  ShortAttentionTable call{};
  call.starts_q = static_cast<const int32_t*>(data(starts_q));
  call.starts_k = static_cast<const int32_t*>(data(starts_k));
  call.table = static_cast<int32_t*>(result(table));
  call.sequences = narrow_size(kOp, "the number of sequences", sequences);
  call.queries = narrow_size(kOp, "the number of queries", queries);
  call.keys = narrow_size(kOp, "the number of keys", keys);
  call.heads = static_cast<int32_t>(heads);
  call.longest = longest_of(longest);
  STD_CUDA_CHECK(oner_fast_short_attention_table(&call, launch.stream()));
  return table;
}

std::tuple<Tensor, Tensor> short_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                           const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k,
                                           const Tensor& table, int64_t longest, bool causal, double scale) {
  same_device(kOp, query, {key, value, cu_seqlens_q, cu_seqlens_k, table});
  const Launch launch(query);
  const Packed packed(query, key, value, cu_seqlens_q, cu_seqlens_k, table);
  ShortAttention call{};
  packed.fill(call, longest, causal, scale);
  const Tensor out = empty(query.sizes(), query.scalar_type(), query),
               statistics = empty({2, query.size(0), query.size(1)}, kFloat, query);
  call.out = result(out);
  call.statistics = static_cast<float*>(result(statistics));
  if (!packed.nothing()) STD_CUDA_CHECK(oner_fast_short_attention(&call, launch.stream()));
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> short_attention_backward(
    const Tensor& grad_in, const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& out_in,
    const Tensor& statistics_in, const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, const Tensor& table,
    int64_t longest, bool causal, double scale, bool need_query, bool need_key) {
  same_device(kOp, query, {grad_in, key, value, out_in, statistics_in, cu_seqlens_q, cu_seqlens_k, table});
  const Launch launch(query);
  const Packed packed(query, key, value, cu_seqlens_q, cu_seqlens_k, table);
  for (const Tensor& each : {grad_in, out_in})
    CHECK_VALUE(each.sizes().equals(query.sizes()) && each.scalar_type() == query.scalar_type(), kOp,
                ": the result and its gradient must be like query ", query.sizes(), ", got ", each.sizes());
  CHECK_VALUE(statistics_in.numel() == 2 * query.size(0) * query.size(1) && statistics_in.scalar_type() == kFloat, kOp,
              ": statistics must be (2, T, H) of float32, got ", statistics_in.sizes());
  const Tensor grad = in_words(grad_in), out = in_words(out_in), statistics = dense(statistics_in);
  ShortAttentionBackward call{};
  packed.fill(call, longest, causal, scale);
  const ScalarType type = query.scalar_type();
  const Tensor to_query = empty(need_query ? query.sizes() : Sizes({0}), type, query),
               to_key = empty(need_key ? key.sizes() : Sizes({0}), type, query),
               to_value = empty(need_key ? value.sizes() : Sizes({0}), type, query);
  call.grad = data(grad);
  call.out = data(out);
  call.statistics = static_cast<const float*>(data(statistics));
  call.grad_row = grad.stride(0);
  call.grad_head = grad.stride(1);
  call.out_row = out.stride(0);
  call.out_head = out.stride(1);
  call.to_query = result(to_query);
  call.to_key = result(to_key);
  call.to_value = result(to_value);
  if (!packed.nothing()) STD_CUDA_CHECK(oner_fast_short_attention_backward(&call, launch.stream()));
  return {to_query, to_key, to_value};
}

}  // namespace oner_fast::cuda
