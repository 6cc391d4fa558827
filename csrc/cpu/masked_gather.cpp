// masked_gather: copies the kept rows, adds their positions and prepends the prefix. Bound by memory.

#include <algorithm>
#include <cstring>
#include <vector>

#include "common/kept.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "cpu/isa/rows.h"
#include "cpu/kinds.h"
#include "cpu/large_pages.h"
#include "cpu/output.h"
#include "cpu/sizes.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "masked_gather";
constexpr int64_t kGrainBytes = 1 << 16;  // less than this is not worth another thread
constexpr int64_t kBlock = 128;           // elements at a time, so that reads and writes overlap
constexpr int64_t kLine = 64;             // elements: threads never share a cache line of a row

const char* bytes(const Tensor& x) { return static_cast<const char*>(x.const_data_ptr()); }

void check_rows(const char* name, const OptionalTensor& rows, const Tensor& tokens) {
  if (!rows.has_value()) return;
  CHECK_TYPE(type_of(*rows) == type_of(tokens), kOp, ": ", name, " must have dtype ", type_of(tokens),
             " like tokens, got ", type_of(*rows));
  CHECK_VALUE(rows->dim() == 2 && rows->size(1) == tokens.size(2), kOp, ": ", name, " must have ", tokens.size(2),
              " columns, got ", rows->sizes());
}

OptionalTensor rows_of(const OptionalTensor& x) {
  return x.has_value() ? OptionalTensor(with_dense_rows(*x)) : std::nullopt;
}

// The view of the incoming gradient that all gradients share: entry i of sample b is output row i + (b + 1) * prefix.
struct Gradient {
  const char* rows;
  int64_t width, size, prefix;
  const char* of_entry(int64_t sample, int64_t entry, int64_t column) const {
    return rows + ((entry + (sample + 1) * prefix) * width + column) * size;
  }
  const char* of_prefix(const Kept& kept, int64_t sample, int64_t row, int64_t column) const {
    return rows + ((kept.begin(sample) + sample * prefix + row) * width + column) * size;
  }
};

// Writes one row of the tokens' gradient from the entries [first, last) of (sample, cell), in ascending order, summed
// in float32 (float64 for float64 rows). Where `sums` is given (positions), adds every entry to it too. `soon` is the
// next entry, or null.
void write_row(char* out, char* scratch, char* sums, const Gradient& grad, const int64_t* first, const int64_t* last,
               const int64_t* soon, int64_t sample, int64_t column, int64_t columns, Kind kind, const RowKernels& row,
               const Output& output) {
  const bool is_double = kind == kF64;
  const int64_t wide = is_double ? 8 : 4;
  if (out != nullptr && first == last) {
    output.zero(out, columns * grad.size);
  } else if (out != nullptr && last - first == 1) {
    const char* from = grad.of_entry(sample, *first, column);
    const char* next = soon == nullptr ? nullptr : grad.of_entry(sample, *soon, column);
    for (int64_t c = 0; c < columns; c += kBlock) {
      const int64_t count = std::min(kBlock, columns - c);
      if (sums != nullptr) row.accumulate[kind][is_double](sums + c * wide, from + c * grad.size, count);
      output.copy(out + c * grad.size, from + c * grad.size, count * grad.size,
                  next == nullptr ? nullptr : next + c * grad.size);
    }
  } else {
    if (out != nullptr) std::memset(scratch, 0, static_cast<size_t>(columns * wide));
    for (const int64_t* entry = first; entry != last; ++entry) {
      const char* from = grad.of_entry(sample, *entry, column);
      if (sums != nullptr) row.accumulate[kind][is_double](sums, from, columns);
      if (out != nullptr) row.accumulate[kind][is_double](scratch, from, columns);
    }
    if (out != nullptr) row.store[kind][is_double](out, scratch, columns);
  }
}

}  // namespace

Tensor masked_gather(const Tensor& tokens_in, const Tensor& kept_in, const OptionalTensor& positions_in,
                     const OptionalTensor& prefix_in, const OptionalTensor& cu_seqlens) {
  CHECK_VALUE(tokens_in.dim() == 3, kOp, ": tokens must have shape (B, N, D), got ", tokens_in.sizes());
  const Kind kind = kind_of(kOp, "tokens", type_of(tokens_in));
  const Tensor tokens = with_dense_rows(tokens_in);
  const int64_t samples = tokens.size(0), cells = tokens.size(1), width = tokens.size(2), size = item_size(tokens);
  check_rows("positions", positions_in, tokens);
  check_rows("prefix", prefix_in, tokens);
  CHECK_VALUE(!positions_in.has_value() || positions_in->size(0) == cells, kOp, ": positions must have ", cells,
              " rows, got ", positions_in->sizes());
  const OptionalTensor positions = rows_of(positions_in), prefix = rows_of(prefix_in);
  const int64_t length = prefix.has_value() ? prefix->size(0) : 0;
  const Kept kept(kOp, kept_in, cu_seqlens, samples, cells);

  const int64_t rows = kept.total() + samples * length;
  const ScalarType type = type_of(tokens);
  const Tensor out = with_large_pages(kept.ragged() ? empty({rows, width}, type, tokens)
                                                    : empty({samples, kept_in.size(1) + length, width}, type, tokens));
  if (out.numel() == 0) return out;

  const RowKernels& row = row_kernels();
  char* to = static_cast<char*>(out.mutable_data_ptr());
  const char* from = bytes(tokens);
  const char* place = positions.has_value() ? bytes(*positions) : nullptr;
  const char* front = length ? bytes(*prefix) : nullptr;
  const int64_t sample_stride = tokens.stride(0) * size, token_stride = tokens.stride(1) * size;
  const int64_t place_stride = place ? positions->stride(0) * size : 0,
                front_stride = front ? prefix->stride(0) * size : 0;

  const Output output(rows * width * size);

  parallel_for(0, rows, ceil_div(kGrainBytes, width * size), [&](int64_t first, int64_t last) {
    int64_t b = kept.sample_of_row(first, length);
    double sum[kBlock];  // room for every kind
    for (int64_t r = first; r < last; ++r) {
      while (r >= kept.begin(b + 1) + (b + 1) * length) ++b;
      const int64_t within = r - kept.begin(b) - b * length;
      char* target = to + r * width * size;
      if (within < length) {
        output.copy(target, front + within * front_stride, width * size, nullptr);
        continue;
      }
      const int64_t entry = kept.begin(b) + within - length, n = kept[entry];
      const char* source = from + b * sample_stride + n * token_stride;
      const bool more = entry + 1 < kept.begin(b + 1);
      const char* next = more ? from + b * sample_stride + kept[entry + 1] * token_stride : nullptr;
      for (int64_t c = 0; c < width; c += kBlock) {
        const int64_t count = std::min(kBlock, width - c);
        const void* part = source + c * size;
        if (place != nullptr) {
          row.add[kind](sum, part, place + n * place_stride + c * size, count);
          part = sum;
        }
        output.copy(target + c * size, part, count * size, more ? next + c * size : nullptr);
      }
    }
    output.finish();
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> masked_gather_backward(const Tensor& grad_in, const Tensor& kept_in,
                                                          const OptionalTensor& cu_seqlens, int64_t samples,
                                                          int64_t cells, int64_t length, bool need_tokens,
                                                          bool need_positions, bool need_prefix) {
  const Kind kind = kind_of(kOp, "the gradient", type_of(grad_in));
  CHECK_VALUE(length >= 0, kOp, ": the prefix has ", length, " rows");
  CHECK_VALUE(grad_in.dim() == (cu_seqlens.has_value() ? 2 : 3), kOp, ": the gradient has shape ", grad_in.sizes());
  const Kept kept(kOp, kept_in, cu_seqlens, samples, cells);
  const Tensor grad = dense(grad_in);
  const int64_t width = grad.size(grad.dim() - 1), size = item_size(grad);
  CHECK_VALUE(grad.numel() == (kept.total() + samples * length) * width, kOp, ": the gradient has shape ", grad.sizes(),
              ", needed ", kept.total() + samples * length, " rows");
  const ScalarType type = type_of(grad);
  const Tensor to_tokens =
      need_tokens ? with_large_pages(empty({samples, cells, width}, type, grad)) : empty({0}, type, grad);
  const Tensor to_positions = need_positions ? zeros({cells, width}, type, grad) : empty({0}, type, grad);
  const Tensor to_prefix = need_prefix ? zeros({length, width}, type, grad) : empty({0}, type, grad);

  const RowKernels& row = row_kernels();
  const Output output(need_tokens ? samples * cells * width * size : 0);
  const Gradient view{bytes(grad), width, size, length};
  const bool is_double = kind == kF64;
  const int64_t wide = is_double ? 8 : 4;

  if ((need_tokens || need_positions) && samples > 0 && cells > 0 && width > 0) {
    const Inverse inverse(kept, cells);
    char* tokens_out = need_tokens ? static_cast<char*>(to_tokens.mutable_data_ptr()) : nullptr;
    if (!need_positions) {
      parallel_for(0, samples * cells, ceil_div(kGrainBytes, width * size), [&](int64_t first, int64_t last) {
        std::vector<char> scratch(static_cast<size_t>(width * wide));
        for (int64_t i = first; i < last; ++i) {
          const int64_t b = i / cells, n = i % cells;
          const int64_t *entry = inverse.begin(b, n), *until = inverse.end(b, n);
          write_row(tokens_out + i * width * size, scratch.data(), nullptr, view, entry, until,
                    until == inverse.end(b, cells - 1) ? nullptr : until, b, 0, width, kind, row, output);
        }
        output.finish();
      });
    } else {
      // A thread owns a range of cells (and of columns where there are few cells) in all samples. The sum over samples
      // then has one owner and one order for any number of threads, and the gradient is read once for both results.
      const int64_t workers = threads(), cell_parts = std::min(cells, workers);
      const int64_t column_parts = std::min(ceil_div(workers, cell_parts), ceil_div(width, kLine));
      const int64_t columns_each = ceil_div(ceil_div(width, column_parts), kLine) * kLine;
      char* positions_out = static_cast<char*>(to_positions.mutable_data_ptr());
      parallel_for(0, cell_parts * column_parts, 1, [&](int64_t first_part, int64_t last_part) {
        for (int64_t part = first_part; part < last_part; ++part) {
          const int64_t low = cells * (part % cell_parts) / cell_parts,
                        high = cells * (part % cell_parts + 1) / cell_parts;
          const int64_t column = (part / cell_parts) * columns_each;
          const int64_t columns = std::min(columns_each, width - column);
          if (columns <= 0) continue;
          std::vector<char> scratch(static_cast<size_t>(columns * wide));
          std::vector<char> sums(static_cast<size_t>((high - low) * columns * wide));
          for (int64_t b = 0; b < samples; ++b) {
            for (int64_t n = low; n < high; ++n) {
              const int64_t *from = inverse.begin(b, n), *until = inverse.end(b, n);
              write_row(tokens_out == nullptr ? nullptr : tokens_out + ((b * cells + n) * width + column) * size,
                        scratch.data(), sums.data() + (n - low) * columns * wide, view, from, until,
                        until == inverse.end(b, high - 1) ? nullptr : until, b, column, columns, kind, row, output);
            }
          }
          output.finish();
          for (int64_t n = low; n < high; ++n)
            row.store[kind][is_double](positions_out + (n * width + column) * size,
                                       sums.data() + (n - low) * columns * wide, columns);
        }
      });
    }
  }

  if (need_prefix && length > 0 && width > 0 && samples > 0) {
    char* prefix_out = static_cast<char*>(to_prefix.mutable_data_ptr());
    const int64_t blocks = ceil_div(width, kLine);
    parallel_for(0, length * blocks, ceil_div(kGrainBytes, samples * kLine * size), [&](int64_t first, int64_t last) {
      for (int64_t i = first; i < last; ++i) {
        const int64_t p = i / blocks, column = (i % blocks) * kLine, columns = std::min(kLine, width - column);
        double sums[kLine] = {};  // room for either accumulator
        for (int64_t b = 0; b < samples; ++b)
          row.accumulate[kind][is_double](sums, view.of_prefix(kept, b, p, column), columns);
        row.store[kind][is_double](prefix_out + (p * width + column) * size, sums, columns);
      }
    });
  }
  return {to_tokens, to_positions, to_prefix};
}

}  // namespace oner_fast
