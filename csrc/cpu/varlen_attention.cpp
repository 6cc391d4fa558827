// varlen_attention: checks, the division into tasks, and their schedule; the kernels are in isa/varlen_attention.cpp.
#include "cpu/isa/varlen_attention.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <numeric>
#include <vector>

#include "common/ops.h"
#include "cpu/dense.h"
#include "cpu/kinds.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "varlen_attention";
constexpr int64_t kOverhead = 64;        // the cost of a row besides its scores, counted in scores
constexpr int64_t kWorthAThread = 4096;  // scores

AttentionInput input(const at::Tensor& x) { return {x.const_data_ptr(), x.stride(0), x.stride(1)}; }
AttentionOutput output(const at::Tensor& x) { return {x.mutable_data_ptr(), x.stride(0), x.stride(1)}; }

template <typename Operand>
Operand moved(Operand x, int64_t size, int64_t row, int64_t head) {
  using Bytes = std::conditional_t<std::is_const_v<std::remove_pointer_t<decltype(x.data)>>, const char*, char*>;
  if (x.data != nullptr) x.data = static_cast<Bytes>(x.data) + (row * x.row + head * x.head) * size;
  return x;
}

void check_boundaries(const char* name, const at::Tensor& cu_seqlens, int64_t rows) {
  TORCH_CHECK_TYPE(cu_seqlens.scalar_type() == at::kInt, kOp, ": ", name, " must be int32, got ",
                   cu_seqlens.scalar_type());
  TORCH_CHECK_VALUE(cu_seqlens.dim() == 1 && cu_seqlens.size(0) >= 1, kOp, ": ", name,
                    " must have shape (B + 1,), got ", cu_seqlens.sizes());
  const int32_t* values = cu_seqlens.const_data_ptr<int32_t>();
  const int64_t last = cu_seqlens.size(0) - 1;
  TORCH_CHECK_VALUE(values[0] == 0 && values[last] == rows, kOp, ": ", name, " must begin with 0 and end with ", rows,
                    ", got ", values[0], " and ", values[last]);
  TORCH_CHECK_VALUE(std::is_sorted(values, values + last + 1), kOp, ": ", name, " must never decrease");
}

void check_like(const char* name, const at::Tensor& x, const at::Tensor& like) {
  TORCH_CHECK_VALUE(x.sizes() == like.sizes(), kOp, ": ", name, " must have shape ", like.sizes(), ", got ", x.sizes());
  TORCH_CHECK_TYPE(x.scalar_type() == like.scalar_type(), kOp, ": ", name, " must have dtype ", like.scalar_type(),
                   ", got ", x.scalar_type());
}

// The checked arguments, and where each sequence lies.
class Batch {
 public:
  Batch(const at::Tensor& query_in, const at::Tensor& key_in, const at::Tensor& value_in,
        const at::Tensor& cu_seqlens_q, const std::optional<at::Tensor>& cu_seqlens_k, bool causal, double scale)
      : causal_(causal), scale_(scale) {
    TORCH_CHECK_VALUE(query_in.dim() == 3, kOp, ": query must have shape (T, H, Dh), got ", query_in.sizes());
    TORCH_CHECK_VALUE(key_in.dim() == 3 && key_in.size(2) == query_in.size(2), kOp, ": key must have shape (Tk, Hk, ",
                      query_in.size(2), "), got ", key_in.sizes());
    TORCH_CHECK_TYPE(key_in.scalar_type() == query_in.scalar_type(), kOp, ": key must have dtype ",
                     query_in.scalar_type(), " like query, got ", key_in.scalar_type());
    check_like("value", value_in, key_in);
    kind = kind_of(kOp, "query", query_in.scalar_type());
    query = with_dense_rows(query_in), key = with_dense_rows(key_in), value = with_dense_rows(value_in);
    heads = query.size(1), key_heads = key.size(1);
    TORCH_CHECK_VALUE(key_heads > 0 && heads % key_heads == 0, kOp, ": the heads of key and value must divide the ",
                      heads, " heads of query, got ", key_heads);
    starts_q_ = cu_seqlens_q.contiguous();
    starts_k_ = cu_seqlens_k.has_value() ? cu_seqlens_k->contiguous() : starts_q_;
    check_boundaries("cu_seqlens_q", starts_q_, query.size(0));
    check_boundaries("cu_seqlens_k", starts_k_, key.size(0));
    TORCH_CHECK_VALUE(starts_q_.size(0) == starts_k_.size(0), kOp, ": cu_seqlens_k must have shape (",
                      starts_q_.size(0), ",) like cu_seqlens_q, got ", starts_k_.sizes());
    sequences = starts_q_.size(0) - 1;
    size = query.element_size();
  }

  // The first query that sees a key, and the sizes from there on; under a causal mask the first queries may see none.
  int64_t begin_q(int64_t s) const { return start(starts_q_, s) + blind(s); }
  int64_t begin_k(int64_t s) const { return start(starts_k_, s); }
  AttentionSizes sizes(int64_t s) const { return {queries(s) - blind(s), keys(s), query.size(2), causal_, scale_}; }
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

  at::Tensor query, key, value;
  Kind kind;
  int64_t heads, key_heads, sequences, size;

 private:
  static int64_t start(const at::Tensor& starts, int64_t s) { return starts.const_data_ptr<int32_t>()[s]; }
  int64_t queries(int64_t s) const { return start(starts_q_, s + 1) - start(starts_q_, s); }
  int64_t keys(int64_t s) const { return start(starts_k_, s + 1) - start(starts_k_, s); }
  int64_t blind(int64_t s) const {
    return keys(s) == 0 ? queries(s) : causal_ ? std::max<int64_t>(queries(s) - keys(s), 0) : 0;
  }

  at::Tensor starts_q_, starts_k_;
  bool causal_;
  double scale_;
};

int64_t cost_of(int64_t queries, int64_t keys) { return queries * keys + (queries + keys) * kOverhead; }

// Runs the tasks, the most expensive first, each on the first free thread. No two tasks write the same memory.
template <typename Task>
void run_all(const std::vector<Task>& tasks, const std::vector<int64_t>& costs, int64_t (*scratch_of)(const Task&),
             void (*run)(const Task&, const Task*, char*)) {
  if (tasks.empty()) return;
  std::vector<size_t> order(tasks.size());
  std::iota(order.begin(), order.end(), size_t{0});
  std::stable_sort(order.begin(), order.end(), [&](size_t a, size_t b) { return costs[a] > costs[b]; });
  int64_t scratch = 0;
  for (const Task& task : tasks) scratch = std::max(scratch, scratch_of(task));
  const int64_t total = std::accumulate(costs.begin(), costs.end(), int64_t{0});
  const int64_t workers =
      std::min<int64_t>({at::get_num_threads(), static_cast<int64_t>(tasks.size()), total / kWorthAThread + 1});
  const at::Tensor memory = at::empty({workers * scratch}, at::kByte);
  char* begin = static_cast<char*>(memory.mutable_data_ptr());
  std::atomic<size_t> next{0};
  at::parallel_for(0, workers, 1, [&](int64_t first, int64_t) {
    for (size_t i = next++; i < order.size();) {
      const size_t after = next++;
      run(tasks[order[i]], after < order.size() ? &tasks[order[after]] : nullptr, begin + first * scratch);
      i = after;
    }
  });
}

}  // namespace

std::tuple<at::Tensor, at::Tensor> varlen_attention(const at::Tensor& query, const at::Tensor& key,
                                                    const at::Tensor& value, const at::Tensor& cu_seqlens_q,
                                                    const std::optional<at::Tensor>& cu_seqlens_k, bool causal,
                                                    double scale) {
  const Batch batch(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale);
  at::Tensor out = at::empty(query.sizes(), query.options());
  at::Tensor statistics =
      at::empty({2, query.size(0), query.size(1)}, query.options().dtype(statistics_type(query.scalar_type())));
  if (out.numel() == 0) return {out, statistics.zero_()};
  if (batch.some_blind()) out.zero_(), statistics.zero_();
  const at::Tensor maximum = statistics[0], inverse = statistics[1];

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
        tasks.push_back({sizes, first, last, moved(input(batch.query), size, row, h),
                         moved(input(batch.key), size, key_row, key_head),
                         moved(input(batch.value), size, key_row, key_head), moved(output(out), size, row, h),
                         moved(output(maximum), maximum.element_size(), row, h),
                         moved(output(inverse), inverse.element_size(), row, h)});
        costs.push_back(cost_of(last - first, sizes.keys));
      }
  }
  run_all(tasks, costs, kernels.forward_scratch[batch.kind], kernels.forward[batch.kind]);
  return {out, statistics};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> varlen_attention_backward(
    const at::Tensor& grad_in, const at::Tensor& query, const at::Tensor& key, const at::Tensor& value,
    const at::Tensor& out_in, const at::Tensor& statistics, const at::Tensor& cu_seqlens_q,
    const std::optional<at::Tensor>& cu_seqlens_k, bool causal, double scale, bool need_query, bool need_key) {
  const Batch batch(query, key, value, cu_seqlens_q, cu_seqlens_k, causal, scale);
  check_like("the gradient", grad_in, query);
  check_like("out", out_in, query);
  const int64_t shape[] = {2, query.size(0), query.size(1)};
  const at::IntArrayRef expected = shape;
  TORCH_CHECK_VALUE(statistics.sizes() == expected, kOp, ": statistics must have shape ", expected, ", got ",
                    statistics.sizes());
  TORCH_CHECK_TYPE(statistics.scalar_type() == statistics_type(query.scalar_type()), kOp,
                   ": statistics must have dtype ", statistics_type(query.scalar_type()), ", got ",
                   statistics.scalar_type());
  const at::Tensor maximum = statistics[0], inverse = statistics[1];
  const at::Tensor grad = with_dense_rows(grad_in), out = with_dense_rows(out_in);
  const auto empty = [&](bool need, const at::Tensor& like) {
    return need ? at::empty(like.sizes(), like.options()) : at::empty({0}, like.options());
  };
  at::Tensor to_query = empty(need_query, query), to_key = empty(need_key, key), to_value = empty(need_key, value);
  if (batch.query.size(2) == 0 || batch.heads == 0) {
    if (need_key) to_key.zero_(), to_value.zero_();
    return {to_query, to_key, to_value};
  }
  if (need_query && batch.some_blind()) to_query.zero_();
  if (need_key && batch.some_unseen()) to_key.zero_(), to_value.zero_();

  const AttentionKernels& kernels = attention_kernels();
  const int64_t queries_each = kernels.queries_each[batch.kind], keys_each = kernels.keys_each[batch.kind];
  const int64_t size = batch.size, group = batch.group();
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
    const bool whole = group * cost * at::get_num_threads() <= total + total / 4;
    for (int64_t h = 0; h < batch.key_heads; ++h) {
      const auto task = [&](int64_t head, int64_t heads, bool for_query, bool for_key) -> AttentionBackward {
        const auto of_query = [&](auto x, int64_t bytes) { return moved(x, bytes, row, h * group + head); };
        const auto of_key = [&](auto x) { return moved(x, size, key_row, h); };
        const AttentionOutput none{nullptr, 0, 0};
        return {sizes,
                heads,
                0,
                sizes.queries,
                0,
                sizes.keys,
                for_query,
                for_key,
                of_query(input(batch.query), size),
                of_key(input(batch.key)),
                of_key(input(batch.value)),
                of_query(input(out), size),
                of_query(input(maximum), maximum.element_size()),
                of_query(input(inverse), inverse.element_size()),
                of_query(input(grad), size),
                for_query ? of_query(output(to_query), size) : none,
                for_key ? of_key(output(to_key)) : none,
                for_key ? of_key(output(to_value)) : none};
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
  run_all(tasks, costs, kernels.backward_scratch[batch.kind], kernels.backward[batch.kind]);
  return {to_query, to_key, to_value};
}

}  // namespace oner_fast
