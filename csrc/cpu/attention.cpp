// Attention, packed or padded: the division into tasks, and their schedule. The kernels are in
// isa/varlen_attention.cpp.
#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>

#include "common/parallel.h"
#include "cpu/attention_batch.h"

namespace oner_fast {
namespace {

constexpr int64_t kOverhead = 64;        // the cost of a row besides its scores, counted in scores
constexpr int64_t kWorthAThread = 4096;  // scores

AttentionRows<AttentionInput> input(const AttentionBatch& batch, const Tensor& x) {
  const int64_t row = batch.is_padded ? 1 : 0;
  return batch.rows(AttentionInput{x.const_data_ptr(), x.stride(row), x.stride(row + 1)}, x.stride(0), x);
}
AttentionRows<AttentionOutput> output(const AttentionBatch& batch, const Tensor& x) {
  const int64_t row = batch.is_padded ? 1 : 0;
  return batch.rows(AttentionOutput{x.mutable_data_ptr(), x.stride(row), x.stride(row + 1)}, x.stride(0), x);
}

// Either half of the statistics, (2, T, H) or (2, B, N, H).
AttentionRows<AttentionInput> half(const AttentionBatch& batch, const Tensor& statistics, int64_t which) {
  const int64_t bytes = which * statistics.stride(0) * item_size(statistics), row = batch.is_padded ? 2 : 1;
  const char* data = static_cast<const char*>(statistics.const_data_ptr()) + bytes;
  return batch.rows(AttentionInput{data, statistics.stride(row), statistics.stride(row + 1)}, statistics.stride(1),
                    statistics);
}
AttentionRows<AttentionOutput> half_to_write(const AttentionBatch& batch, const Tensor& statistics, int64_t which) {
  const AttentionRows<AttentionInput> from = half(batch, statistics, which);
  return {{const_cast<void*>(from.operand.data), from.operand.row, from.operand.head}, from.batch, from.size};
}

void clear_rows(const AttentionRows<AttentionOutput>& rows, const AttentionSequence& s, int64_t first, int64_t row,
                int64_t count) {
  if (count > 0 && rows.operand.data != nullptr)
    std::memset(rows.of(s, first, row, 0).data, 0, static_cast<size_t>(count * rows.operand.row * rows.size));
}

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

IntList statistics_shape(const Tensor& query) {
  IntList shape{2};
  for (int64_t i = 0; i + 1 < query.dim(); ++i) shape.push_back(query.size(i));
  return shape;
}

}  // namespace

std::tuple<Tensor, Tensor> attention(const AttentionBatch& batch) {
  const ScalarType type = type_of(batch.query);
  const Tensor out = empty(batch.query.sizes(), type, batch.query);
  const Tensor statistics = empty(statistics_shape(batch.query), statistics_type(type), batch.query);
  if (out.numel() == 0) {
    fill_with_zeros(statistics);
    return {out, statistics};
  }
  const auto to_out = output(batch, out), maximum = half_to_write(batch, statistics, 0),
             inverse = half_to_write(batch, statistics, 1);
  const auto from_query = input(batch, batch.query), from_key = input(batch, batch.key),
             from_value = input(batch, batch.value);

  const AttentionKernels& kernels = attention_kernels();
  const int64_t each = kernels.queries_each[batch.kind];
  std::vector<AttentionForward> tasks;
  std::vector<int64_t> costs;
  for (const AttentionSequence& s : batch.sequences) {
    for (const auto& rows : {to_out, maximum, inverse}) clear_rows(rows, s, s.row_q, 0, s.blind);
    const AttentionSizes sizes = batch.sizes(s);
    for (int64_t h = 0; h < batch.heads; ++h)
      for (int64_t first = 0; first < sizes.queries; first += each) {
        const int64_t last = std::min(first + each, sizes.queries), key_head = h / batch.group();
        tasks.push_back({sizes, first, last, from_query.of_query(s, s.blind, h), from_key.of_key(s, 0, key_head),
                         from_value.of_key(s, 0, key_head), to_out.of_query(s, s.blind, h),
                         maximum.of_query(s, s.blind, h), inverse.of_query(s, s.blind, h), batch.dropout(s, h)});
        costs.push_back(cost_of(last - first, sizes.keys));
      }
  }
  run_all(batch.query, tasks, costs, kernels.forward_scratch[batch.kind], kernels.forward[batch.kind]);
  return {out, statistics};
}

std::tuple<Tensor, Tensor, Tensor> attention_backward(const AttentionBatch& batch, const Tensor& grad_in,
                                                      const Tensor& out_in, const Tensor& statistics, bool need_query,
                                                      bool need_key) {
  batch.check_like("the gradient", grad_in, batch.query);
  batch.check_like("out", out_in, batch.query);
  const ScalarType type = type_of(batch.query), wide = statistics_type(type);
  const IntList shape = statistics_shape(batch.query);
  const Sizes expected = shape;
  CHECK_VALUE(statistics.sizes().equals(expected), batch.op, ": statistics must have shape ", expected, ", got ",
              statistics.sizes());
  CHECK_TYPE(type_of(statistics) == wide, batch.op, ": statistics must have dtype ", wide, ", got ",
             type_of(statistics));
  const Tensor grad = with_dense_rows(grad_in), out = with_dense_rows(out_in);
  const auto gradient = [&](bool need, const Tensor& like) {
    return need ? empty(like.sizes(), type, like) : empty({0}, type, like);
  };
  const Tensor to_query = gradient(need_query, batch.query), to_key = gradient(need_key, batch.key),
               to_value = gradient(need_key, batch.value);
  if (batch.width == 0 || batch.heads == 0) {
    if (need_key) fill_with_zeros(to_key), fill_with_zeros(to_value);
    return {to_query, to_key, to_value};
  }

  const AttentionKernels& kernels = attention_kernels();
  const int64_t queries_each = kernels.queries_each[batch.kind], keys_each = kernels.keys_each[batch.kind];
  const int64_t group = batch.group(), workers = threads();
  const auto from_query = input(batch, batch.query), from_key = input(batch, batch.key),
             from_value = input(batch, batch.value), from_out = input(batch, out), from_grad = input(batch, grad),
             maximum = half(batch, statistics, 0), inverse = half(batch, statistics, 1);
  const AttentionRows<AttentionOutput> none{{nullptr, 0, 0}, 0, 0};
  const auto query_out = need_query ? output(batch, to_query) : none, key_out = need_key ? output(batch, to_key) : none,
             value_out = need_key ? output(batch, to_value) : none;
  int64_t total = 0;
  for (const AttentionSequence& s : batch.sequences)
    total += batch.heads * cost_of(batch.sizes(s).queries, batch.sizes(s).keys);
  std::vector<AttentionBackward> tasks;
  std::vector<int64_t> costs;
  for (const AttentionSequence& s : batch.sequences) {
    clear_rows(query_out, s, s.row_q, 0, s.blind);
    for (const auto& rows : {key_out, value_out}) clear_rows(rows, s, s.row_k, s.keys, s.all_keys - s.keys);
    const AttentionSizes sizes = batch.sizes(s);
    const int64_t cost = cost_of(sizes.queries, sizes.keys);
    if (sizes.queries == 0 || sizes.keys == 0) continue;
    // A whole sequence takes five products, ranges of one take seven. Ranges are for sequences so long that other
    // threads would wait for them.
    const bool whole = group * cost * workers <= total + total / 4;
    for (int64_t h = 0; h < batch.key_heads; ++h) {
      const auto task = [&](int64_t head, int64_t heads, bool for_query, bool for_key) -> AttentionBackward {
        const auto of_query = [&](const auto& x) { return x.of_query(s, s.blind, h * group + head); };
        const auto of_key = [&](const auto& x) { return x.of_key(s, 0, h); };
        return {sizes,
                heads,
                0,
                sizes.queries,
                0,
                sizes.keys,
                for_query,
                for_key,
                of_query(from_query),
                of_key(from_key),
                of_key(from_value),
                of_query(from_out),
                of_query(maximum),
                of_query(inverse),
                of_query(from_grad),
                of_query(for_query ? query_out : none),
                of_key(for_key ? key_out : none),
                of_key(for_key ? value_out : none),
                batch.dropout(s, h * group + head)};
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
  run_all(batch.query, tasks, costs, kernels.backward_scratch[batch.kind], kernels.backward[batch.kind]);
  return {to_query, to_key, to_value};
}

}  // namespace oner_fast
