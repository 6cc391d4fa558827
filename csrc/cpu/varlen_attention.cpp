// varlen_attention: checks, the division into tasks, and their schedule; the kernels are in isa/varlen_attention.cpp.
#include "cpu/isa/varlen_attention.h"

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "common/ops.h"
#include "common/parallel.h"
#include "cpu/kinds.h"
#include "cpu/sizes.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "varlen_attention";
constexpr int64_t kOverhead = 64;        // the cost of a row besides its scores, counted in scores
constexpr int64_t kWorthAThread = 4096;  // scores

AttentionInput input(const Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
AttentionOutput output(const Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1)}; }

// Either half of the statistics (2, T, H).
AttentionInput half(const Tensor& statistics, int64_t which) {
  const int64_t bytes = which * statistics.stride(0) * item_size(statistics);
  return {static_cast<const char*>(statistics.const_data_ptr()) + bytes, statistics.stride(1), statistics.stride(2)};
}
AttentionOutput half_to_write(const Tensor& statistics, int64_t which) {
  const AttentionInput from = half(statistics, which);
  return {const_cast<void*>(from.data), from.row, from.head};
}

template <typename Operand>
Operand moved(Operand x, int64_t size, int64_t row, int64_t head) {
  using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(x.data)>>, const char*, char*>;
  if (x.data != nullptr) x.data = static_cast<Bytes>(x.data) + (row * x.row + head * x.head) * size;
  return x;
}

const int32_t* boundaries(const char* name, const Tensor& cu_seqlens, int64_t rows) {
  CHECK_TYPE(type_of(cu_seqlens) == kInt, kOp, ": ", name, " must be int32, got ", type_of(cu_seqlens));
  CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, kOp, ": ", name, " must have shape (B + 1,), got ",
              cu_seqlens.sizes());
  const int32_t* values = static_cast<const int32_t*>(cu_seqlens.const_data_ptr());
  const int64_t last = cu_seqlens.size(0) - 1;
  CHECK_VALUE(values[0] == 0 && values[last] == rows, kOp, ": ", name, " must begin with 0 and end with ", rows,
              ", got ", values[0], " and ", values[last]);
  CHECK_VALUE(std::is_sorted(values, values + last + 1), kOp, ": ", name, " must never decrease");
  return values;
}

void check_like(const char* name, const Tensor& x, const Tensor& like) {
  CHECK_VALUE(x.sizes().equals(like.sizes()), kOp, ": ", name, " must have shape ", like.sizes(), ", got ", x.sizes());
  CHECK_TYPE(type_of(x) == type_of(like), kOp, ": ", name, " must have dtype ", type_of(like), ", got ", type_of(x));
}

Tensor heads_of(const char* name, const Tensor& x) {
  CHECK_VALUE(x.dim() == 3, kOp, ": ", name, " must have shape (T, H, Dh), got ", x.sizes());
  return with_dense_rows(x);
}

// The checked arguments, and where each sequence lies.
class Batch {
 public:
  Batch(const Tensor& query_in, const Tensor& key_in, const Tensor& value_in, const Tensor& cu_seqlens_q,
        const OptionalTensor& cu_seqlens_k, bool causal, double scale)
      : query(heads_of("query", query_in)),
        key(heads_of("key", key_in)),
        value(heads_of("value", value_in)),
        kind(kind_of(kOp, "query", type_of(query_in))),
        starts_q_(dense(cu_seqlens_q)),
        starts_k_(cu_seqlens_k.has_value() ? dense(*cu_seqlens_k) : starts_q_),
        causal_(causal),
        scale_(scale) {
    CHECK_VALUE(key_in.size(2) == query_in.size(2), kOp, ": key must have shape (Tk, Hk, ", query_in.size(2), "), got ",
                key_in.sizes());
    CHECK_TYPE(type_of(key_in) == type_of(query_in), kOp, ": key must have dtype ", type_of(query_in),
               " like query, got ", type_of(key_in));
    check_like("value", value_in, key_in);
    heads = query.size(1), key_heads = key.size(1), width_ = query.size(2);
    CHECK_VALUE(key_heads > 0 && heads % key_heads == 0, kOp, ": the heads of key and value must divide the ", heads,
                " heads of query, got ", key_heads);
    q_ = boundaries("cu_seqlens_q", starts_q_, query.size(0));
    k_ = boundaries("cu_seqlens_k", starts_k_, key.size(0));
    CHECK_VALUE(starts_q_.size(0) == starts_k_.size(0), kOp, ": cu_seqlens_k must have shape (", starts_q_.size(0),
                ",) like cu_seqlens_q, got ", starts_k_.sizes());
    sequences = starts_q_.size(0) - 1;
    size = item_size(query);
  }

  // The first query that sees a key, and the sizes from there on; under a causal mask the first queries may see none.
  int64_t begin_q(int64_t s) const { return q_[s] + blind(s); }
  int64_t begin_k(int64_t s) const { return k_[s]; }
  AttentionSizes sizes(int64_t s) const { return {queries(s) - blind(s), keys(s), width_, causal_, scale_}; }
  bool some_blind() const {
    for (int64_t s = 0; s < sequences; ++s)
      if (blind(s) > 0) return true;
    return false;
  }
  bool some_unseen() const {
    for (int64_t s = 0; s < sequences; ++s)
      if (queries(s) == 0 && keys(s) > 0) return true;
    return false;
  }
  int64_t group() const { return heads / key_heads; }

  Tensor query, key, value;
  Kind kind;
  int64_t heads, key_heads, sequences, size;

 private:
  int64_t queries(int64_t s) const { return q_[s + 1] - q_[s]; }
  int64_t keys(int64_t s) const { return k_[s + 1] - k_[s]; }
  int64_t blind(int64_t s) const {
    return keys(s) == 0 ? queries(s) : causal_ ? std::max<int64_t>(queries(s) - keys(s), 0) : 0;
  }

  Tensor starts_q_, starts_k_;  // keep the dense copies alive
  const int32_t *q_, *k_;
  int64_t width_;
  bool causal_;
  double scale_;
};

int64_t cost_of(int64_t queries, int64_t keys) { return queries * keys + (queries + keys) * kOverhead; }

// Runs the tasks, the most expensive first, each on the first free thread. No two tasks write the same memory.
template <typename Task>
void run_all(const Tensor& like, const std::vector<Task>& tasks, const std::vector<int64_t>& costs,
             int64_t (*scratch_of)(const Task&), void (*run)(const Task&, const Task*, char*)) {
  if (tasks.empty()) return;
  std::vector<size_t> order(tasks.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  int64_t scratch = 0;
  for (const Task& task : tasks) scratch = std::max(scratch, scratch_of(task));
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
  const int64_t workers = std::min<int64_t>({threads(), static_cast<int64_t>(tasks.size()), total / kWorthAThread + 1});
  const Tensor memory = empty({workers * scratch}, kByte, like);
  char* begin = static_cast<char*>(memory.mutable_data_ptr());
  std::atomic<size_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t first, int64_t) {
    for (size_t i = next++; i < order.size();) {
      const size_t after = next++;
      run(tasks[order[i]], after < order.size() ? &tasks[order[after]] : nullptr, begin + first * scratch);
      i = after;
    }
  });
}

}  // namespace

std::tuple<Tensor, Tensor> varlen_attention(const Tensor& query, const Tensor& key, const Tensor& value,
                                            const Tensor& cu_seqlens_q, const OptionalTensor& cu_seqlens_k, bool causal,
                                            double scale) {
  const Batch batch(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale);
  const ScalarType wide = statistics_type(type_of(query));
  const Tensor out = empty(query.sizes(), type_of(query), query);
  const Tensor statistics = empty({2, query.size(0), query.size(1)}, wide, query);
  const bool some_blind = batch.some_blind();
  if (some_blind) fill_with_zeros(out);
  if (some_blind || out.numel() == 0) fill_with_zeros(statistics);
  if (out.numel() == 0) return {out, statistics};
  const AttentionOutput to_out = output(out), maximum = half_to_write(statistics, 0),
                        inverse = half_to_write(statistics, 1);
  const AttentionInput from_query = input(batch.query), from_key = input(batch.key), from_value = input(batch.value);
  const int64_t wide_size = item_size(statistics);

  const AttentionKernels& kernels = attention_kernels();
  const int64_t each = kernels.queries_each[batch.kind], size = batch.size;
  std::vector<AttentionForward> tasks;
  std::vector<int64_t> costs;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const AttentionSizes sizes = batch.sizes(s);
    const int64_t row = batch.begin_q(s), key_row = batch.begin_k(s);
    for (int64_t h = 0; h < batch.heads; ++h)
      for (int64_t first = 0; first < sizes.queries; first += each) {
        const int64_t last = std::min(first + each, sizes.queries), key_head = h / batch.group();
        tasks.push_back({sizes, first, last, moved(from_query, size, row, h), moved(from_key, size, key_row, key_head),
                         moved(from_value, size, key_row, key_head), moved(to_out, size, row, h),
                         moved(maximum, wide_size, row, h), moved(inverse, wide_size, row, h)});
        costs.push_back(cost_of(last - first, sizes.keys));
      }
  }
  run_all(query, tasks, costs, kernels.forward_scratch[batch.kind], kernels.forward[batch.kind]);
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> varlen_attention_backward(const Tensor& grad_in, const Tensor& query,
                                                             const Tensor& key, const Tensor& value,
                                                             const Tensor& out_in, const Tensor& statistics,
                                                             const Tensor& cu_seqlens_q,
                                                             const OptionalTensor& cu_seqlens_k, bool causal,
                                                             double scale, bool need_query, bool need_key) {
  const Batch batch(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale);
  check_like("the gradient", grad_in, query);
  check_like("out", out_in, query);
  const ScalarType type = type_of(query), wide = statistics_type(type);
  const int64_t shape[] = {2, query.size(0), query.size(1)};
  const Sizes expected = shape;
  CHECK_VALUE(statistics.sizes().equals(expected), kOp, ": statistics must have shape ", expected, ", got ",
              statistics.sizes());
  CHECK_TYPE(type_of(statistics) == wide, kOp, ": statistics must have dtype ", wide, ", got ", type_of(statistics));
  const Tensor grad = with_dense_rows(grad_in), out = with_dense_rows(out_in);
  const auto gradient = [&](bool need, const Tensor& like) {
    return need ? empty(like.sizes(), type, like) : empty({0}, type, like);
  };
  const Tensor to_query = gradient(need_query, query), to_key = gradient(need_key, key),
               to_value = gradient(need_key, value);
  const bool nothing = query.size(2) == 0 || batch.heads == 0;
  if (need_key && (nothing || batch.some_unseen())) fill_with_zeros(to_key), fill_with_zeros(to_value);
  if (nothing) return {to_query, to_key, to_value};
  if (need_query && batch.some_blind()) fill_with_zeros(to_query);

  const AttentionKernels& kernels = attention_kernels();
  const int64_t queries_each = kernels.queries_each[batch.kind], keys_each = kernels.keys_each[batch.kind];
  const int64_t size = batch.size, group = batch.group(), wide_size = item_size(statistics), workers = threads();
  const AttentionInput from_query = input(batch.query), from_key = input(batch.key), from_value = input(batch.value),
                       from_out = input(out), from_grad = input(grad), maximum = half(statistics, 0),
                       inverse = half(statistics, 1);
  const AttentionOutput none{nullptr, 0, 0}, query_out = need_query ? output(to_query) : none,
                                             key_out = need_key ? output(to_key) : none,
                                             value_out = need_key ? output(to_value) : none;
  int64_t total = 0;
  for (int64_t s = 0; s < batch.sequences; ++s)
    total += batch.heads * cost_of(batch.sizes(s).queries, batch.sizes(s).keys);
  std::vector<AttentionBackward> tasks;
  std::vector<int64_t> costs;
  for (int64_t s = 0; s < batch.sequences; ++s) {
    const AttentionSizes sizes = batch.sizes(s);
    const int64_t row = batch.begin_q(s), key_row = batch.begin_k(s), cost = cost_of(sizes.queries, sizes.keys);
    if (sizes.queries == 0 || sizes.keys == 0) continue;
    // A whole sequence takes five products, ranges of one take seven. Ranges are for sequences so long that other
    // threads would wait for them.
    const bool whole = group * cost * workers <= total + total / 4;
    for (int64_t h = 0; h < batch.key_heads; ++h) {
      const auto task = [&](int64_t head, int64_t heads, bool for_query, bool for_key) -> AttentionBackward {
        const auto of_query = [&](auto x, int64_t bytes) { return moved(x, bytes, row, h * group + head); };
        const auto of_key = [&](auto x) { return moved(x, size, key_row, h); };
        return {sizes,
                heads,
                0,
                sizes.queries,
                0,
                sizes.keys,
                for_query,
                for_key,
                of_query(from_query, size),
                of_key(from_key),
                of_key(from_value),
                of_query(from_out, size),
                of_query(maximum, wide_size),
                of_query(inverse, wide_size),
                of_query(from_grad, size),
                for_query ? of_query(query_out, size) : none,
                for_key ? of_key(key_out) : none,
                for_key ? of_key(value_out) : none};
      };
      if (whole) {
        tasks.push_back(task(0, group, need_query, need_key));
        costs.push_back(group * cost);
        continue;
      }
      for (int64_t first = 0; need_key && first < sizes.keys; first += keys_each) {
        AttentionBackward part = task(0, group, false, true);
        part.first_key = first, part.last_key = std::min(first + keys_each, sizes.keys);
        tasks.push_back(part);
        costs.push_back(group * cost_of(sizes.queries, part.last_key - first));
      }
      for (int64_t i = 0; need_query && i < group; ++i)
        for (int64_t first = 0; first < sizes.queries; first += queries_each) {
          AttentionBackward part = task(i, 1, true, false);
          part.first_query = first, part.last_query = std::min(first + queries_each, sizes.queries);
          tasks.push_back(part);
          costs.push_back(cost_of(part.last_query - first, sizes.keys));
        }
    }
  }
  run_all(query, tasks, costs, kernels.backward_scratch[batch.kind], kernels.backward[batch.kind]);
  return {to_query, to_key, to_value};
}

}  // namespace oner_fast
