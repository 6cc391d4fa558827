// One block of the logits: its statistics (forward), and what it adds to both sides' gradients (backward).
#include "cpu/isa/mixup_info_nce.h"

#include "cpu/isa/mixed_rows.h"

namespace oner_fast {
namespace {

constexpr int64_t kRowsAtOnce = 128;  // rows of logits that are in the second-level cache together
constexpr int64_t kSkew = 16;         // added to a row of logits, so that a column does not fall on a few cache sets

// Scratch memory in 64-byte steps; with `base` null it only counts.
struct Arena {
  char* base;
  int64_t used = 0;
  template <typename T>
  T* take(int64_t count) {
    T* at = reinterpret_cast<T*>(base + used);
    used += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return at;
  }
};

template <typename P>
struct Scratch {
  using T = typename P::Out;
  using E = typename P::Element;
  int64_t length, logits_row;
  E *row_elements, *column_elements, *column_transposed;  // packed rows; their transpose in panels
  E *column_panels, *row_panels;                          // backward: panels along the columns, along the rows of a part
  T *logits, *row_rest, *column_rest, *column_buffer, *column_more, *row_buffer;
  E *gradient_rows, *gradient_transposed;  // Pairs: G and its transpose
  int64_t gradient_row, gradient_column;

  Scratch(Arena& arena, int64_t rows, int64_t columns, int64_t width, bool backward) {
    constexpr int64_t kDepth = P::kDepth;
    length = packed_length<P>(width);
    const int64_t wide = padded<T>(columns), part = rows < kRowsAtOnce ? rows : kRowsAtOnce;
    logits_row = wide + kSkew;
    row_elements = arena.take<E>(round_up(rows, P::kRowsRead) * length);
    column_elements = arena.take<E>(columns * length);
    column_transposed = arena.take<E>(wide * length);
    logits = arena.take<T>(part * logits_row);
    row_rest = arena.take<T>(rows);
    column_rest = arena.take<T>(wide);
    column_buffer = arena.take<T>(wide);
    column_more = arena.take<T>(wide);
    row_buffer = arena.take<T>(part);
    column_panels = row_panels = gradient_rows = gradient_transposed = nullptr;
    gradient_row = gradient_column = 0;
    if (!backward) return;
    const int64_t column_steps = steps<P>(columns), part_steps = steps<P>(part);
    column_panels = arena.take<E>(column_steps * padded<T>(width));
    row_panels = arena.take<E>(part_steps * padded<T>(width));
    if constexpr (kDepth == 2) {
      gradient_row = column_steps + kSkew;
      gradient_column = part_steps + kSkew;
      gradient_rows = arena.take<E>(round_up(part, P::kRowsRead) * gradient_row);
      gradient_transposed = arena.take<E>(round_up(columns, P::kRowsRead) * gradient_column);
    }
  }
};

template <typename P>
int64_t scratch_bytes(int64_t rows, int64_t columns, int64_t width, bool backward) {
  Arena arena{nullptr};
  const Scratch<P> counted(arena, rows, columns, width, backward);
  static_cast<void>(counted);
  return arena.used;
}

template <typename P>
void pack_block(const ContrastBlock& block, const Scratch<P>& s) {
  using T = typename P::Out;
  const int64_t width = block.columns.width;
  pack_mixed<P>(block.rows, block.row_first, block.row_count, s.row_elements, s.row_rest);
  pack_mixed<P>(block.columns, block.column_first, block.column_count, s.column_elements, s.column_rest);
  for (int64_t j = block.column_count; j < padded<T>(block.column_count); ++j) s.column_rest[j] = 0;
  pack_b_transposed<P>(s.column_transposed, numbers_of<P>(s.column_elements), s.length * P::kDepth, block.column_count, width);
}

// The logits of `count` rows from `first` on (of the block), -inf behind the last column.
template <typename P>
void logits_of(const ContrastBlock& block, const Scratch<P>& s, int64_t first, int64_t count) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  multiply<P, false>(count, block.column_count, steps<P>(block.columns.width), s.row_elements + first * s.length, s.length, 1, s.column_transposed,
                     s.logits, s.logits_row);
  const int64_t whole = block.column_count / W * W, all = padded<T>(block.column_count);
  for (int64_t i = 0; i < count; ++i) {
    T* row = s.logits + i * s.logits_row;
    const Vec<T> factor = broadcast(static_cast<T>(block.scale) * s.row_rest[first + i]);
    for (int64_t j = 0; j < all; j += W) {
      if constexpr (P::kDepth == 1)
        store(row + j, load(row + j) * factor);
      else
        store(row + j, load(row + j) * (factor * load(s.column_rest + j)));
    }
    if (whole < all) store(row + whole, load_part(row + whole, block.column_count - whole, -static_cast<T>(INFINITY)));
  }
}

// (max, sum) of exp(x - max) takes in another pair; a NaN in either sum stays.
template <typename T>
void merge(T& max, T& sum, T other_max, T other_sum) {
  const T high = other_max > max ? other_max : max;
  sum = sum * std::exp(max - high) + other_sum * std::exp(other_max - high);
  max = high;
}

template <typename T>
void merge_columns(T* max, T* sum, Vec<T> other_max, Vec<T> other_sum) {
  const Vec<T> old = load(max), high = larger<T>(old, other_max);
  store(sum, load(sum) * exp_of(old - high) + other_sum * exp_of(other_max - high));
  store(max, high);
}

template <typename T>
void merge_part(T* max, T* sum, Vec<T> other_max, Vec<T> other_sum, int64_t count) {
  T full_max[kLanes<T>], full_sum[kLanes<T>];
  store(full_max, load_part<T>(max, count, 0));
  store(full_sum, load_part<T>(sum, count, 0));
  merge_columns<T>(full_max, full_sum, other_max, other_sum);
  std::memcpy(max, full_max, static_cast<size_t>(count) * sizeof(T));
  std::memcpy(sum, full_sum, static_cast<size_t>(count) * sizeof(T));
}

template <typename P>
void forward(const ContrastBlock& block, const ContrastStatistics& out, void* memory) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<P> s(arena, block.row_count, block.column_count, block.columns.width, false);
  const Tiles tiles;
  pack_block<P>(block, s);
  T* row_max = static_cast<T*>(out.row_max) + block.row_first;
  T* row_sum = static_cast<T*>(out.row_sum) + block.row_first;
  const bool both = out.column_max != nullptr;
  T* column_max = both ? static_cast<T*>(out.column_max) + block.column_first : nullptr;
  T* column_sum = both ? static_cast<T*>(out.column_sum) + block.column_first : nullptr;
  const int64_t n = block.column_count, all = padded<T>(n);
  const T infinity = static_cast<T>(INFINITY);

  for (int64_t first = 0; first < block.row_count; first += kRowsAtOnce) {
    const int64_t count = block.row_count - first < kRowsAtOnce ? block.row_count - first : kRowsAtOnce;
    logits_of<P>(block, s, first, count);
    T* highest = s.column_buffer;
    T* sums = s.column_more;
    for (int64_t j = 0; j < all; ++j) highest[j] = -infinity, sums[j] = 0;
    for (int64_t i = 0; i < count; ++i) {
      const T* row = s.logits + i * s.logits_row;
      Vec<T> high = broadcast(-infinity);
      for (int64_t j = 0; j < all; j += W) {
        const Vec<T> l = load(row + j);
        high = larger<T>(l, high);
        if (both) store(highest + j, larger<T>(l, load(highest + j)));
      }
      s.row_buffer[i] = max_of<T>(high);
      const int64_t row_index = block.row_first + first + i;
      const int64_t own = block.own + row_index - block.column_first;
      if (own >= 0 && own < n) static_cast<T*>(out.own_logit)[row_index] = row[own];
      if (block.partner == nullptr) continue;
      const int64_t partner = block.partner[row_index] - block.column_first;
      if (partner >= 0 && partner < n) static_cast<T*>(out.partner_logit)[row_index] = row[partner];
    }
    for (int64_t i = 0; i < count; ++i) {
      const T* row = s.logits + i * s.logits_row;
      const Vec<T> from = broadcast(s.row_buffer[i]);
      Vec<T> total{};
      for (int64_t j = 0; j < all; j += W) {
        const Vec<T> l = load(row + j);
        total += exp_of(l - from);
        if (both) store(sums + j, load(sums + j) + exp_of(l - load(highest + j)));
      }
      merge<T>(row_max[first + i], row_sum[first + i], s.row_buffer[i], sum_of<T>(total));
    }
    for (int64_t j = 0; both && j < n; j += W) {
      if (j + W <= n)
        merge_columns<T>(column_max + j, column_sum + j, load(highest + j), load(sums + j));
      else
        merge_part<T>(column_max + j, column_sum + j, load(highest + j), load(sums + j), n - j);
    }
  }
}

// Logits become G, the gradient of the loss with respect to them; 0 behind the last column.
template <typename P>
void gradient_of(const ContrastBlock& block, const ContrastGradient& gradient, const Scratch<P>& s, int64_t first,
                 int64_t count) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  const int64_t n = block.column_count, all = padded<T>(n);
  const T* row_max = static_cast<const T*>(gradient.row_max) + block.row_first + first;
  const T* row_weight = static_cast<const T*>(gradient.row_weight) + block.row_first + first;
  const bool both = gradient.column_max != nullptr;
  T* column_max = s.column_buffer;
  T* column_weight = s.column_more;
  for (int64_t j = 0; both && j < all; ++j) {
    column_max[j] = j < n ? static_cast<const T*>(gradient.column_max)[block.column_first + j] : T(0);
    column_weight[j] = j < n ? static_cast<const T*>(gradient.column_weight)[block.column_first + j] : T(0);
  }
  for (int64_t i = 0; i < count; ++i) {
    T* row = s.logits + i * s.logits_row;
    const Vec<T> from = broadcast(row_max[i]), weight = broadcast(row_weight[i]);
    for (int64_t j = 0; j < all; j += W) {
      const Vec<T> l = load(row + j);
      Vec<T> g = exp_of(l - from) * weight;
      if (both) g += exp_of(l - load(column_max + j)) * load(column_weight + j);
      store(row + j, g);
    }
    const int64_t row_index = block.row_first + first + i;
    const int64_t target = block.own + row_index - block.column_first;
    if (target >= 0 && target < n) row[target] -= static_cast<const T*>(gradient.own_weight)[row_index];
    if (block.partner == nullptr) continue;
    const int64_t partner = block.partner[row_index] - block.column_first;
    if (partner >= 0 && partner < n) row[partner] -= static_cast<const T*>(gradient.partner_weight)[row_index];
  }
}

#if defined(__AVX512BF16__)
// Two vectors as pairs, the first in the lower halves.
inline Vec<uint32_t> pairs_of(Vec<float> low, Vec<float> high) {
  const auto narrowed = [](Vec<float> x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
  };
  return reinterpret_cast<Vec<uint32_t>>(_mm512_or_si512(narrowed(low), _mm512_slli_epi32(narrowed(high), 16)));
}

// G in bfloat16, times what is left of the unit vectors it will meet: rows of pairs along the columns, and the transpose.
void narrow_gradient(const Scratch<Pairs>& s, int64_t first, int64_t count, int64_t columns, bool rows, bool transposed) {
  const int64_t all = padded<float>(columns);
  if (rows) {
    for (int64_t i = 0; i < count; ++i) {
      BFloat* to = reinterpret_cast<BFloat*>(s.gradient_rows + i * s.gradient_row);
      for (int64_t j = 0; j < all; j += 16) {
        const Vec<float> g = load(s.logits + i * s.logits_row + j) * load(s.column_rest + j);
        _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                            reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(g))));
      }
      std::memset(to + all, 0, static_cast<size_t>(2 * steps<Pairs>(columns) - all) * sizeof *to);
    }
  }
  if (!transposed) return;
  for (int64_t i = 0; i < count; i += 32) {
    for (int64_t j = 0; j < all; j += 16) {
      Vec<uint32_t> block[16];
      for (int64_t r = 0; r < 16; ++r) {
        const int64_t low = i + 2 * r, high = low + 1;
        const auto at = [&](int64_t x) {
          return x < count ? load(s.logits + x * s.logits_row + j) * s.row_rest[first + x] : Vec<float>{};
        };
        block[r] = pairs_of(at(low), at(high));
      }
      transpose(block);
      for (int64_t r = 0; r < 16; ++r) store(s.gradient_transposed + (j + r) * s.gradient_column + i / 2, block[r]);
    }
  }
}
#endif

template <typename P>
void backward(const ContrastBlock& block, const ContrastGradient& gradient, void* memory) {
  using T = typename P::Out;
  using E = typename P::Element;
  Arena arena{static_cast<char*>(memory)};
  const Scratch<P> s(arena, block.row_count, block.column_count, block.columns.width, true);
  const Tiles tiles;
  pack_block<P>(block, s);
  const int64_t n = block.column_count, width = block.columns.width;
  T* to_rows = static_cast<T*>(gradient.to_rows);
  T* to_columns = static_cast<T*>(gradient.to_columns);
  const int64_t row = s.length * P::kDepth;
  if (to_rows != nullptr) pack_b<P>(s.column_panels, numbers_of<P>(s.column_elements), row, n, width);

  for (int64_t first = 0; first < block.row_count; first += kRowsAtOnce) {
    const int64_t count = block.row_count - first < kRowsAtOnce ? block.row_count - first : kRowsAtOnce;
    logits_of<P>(block, s, first, count);
    gradient_of<P>(block, gradient, s, first, count);
    T* rows_out = to_rows + (block.row_first + first) * gradient.to_rows_stride;
    T* columns_out = to_columns == nullptr ? nullptr : to_columns + block.column_first * gradient.to_columns_stride;
    if (to_columns != nullptr)
      pack_b<P>(s.row_panels, numbers_of<P>(s.row_elements + first * s.length), row, count, width);
    const E *g = nullptr, *g_transposed = nullptr;
    int64_t g_row = 0, g_transposed_row = 0, g_transposed_step = 1;
    if constexpr (P::kDepth == 1) {  // a transposed A costs nothing
      g = g_transposed = s.logits;
      g_row = g_transposed_step = s.logits_row;
      g_transposed_row = 1;
    }
#if defined(__AVX512BF16__)
    if constexpr (P::kDepth == 2) {
      narrow_gradient(s, first, count, n, to_rows != nullptr, to_columns != nullptr);
      g = s.gradient_rows, g_row = s.gradient_row;
      g_transposed = s.gradient_transposed, g_transposed_row = s.gradient_column;
    }
#endif
    if (to_rows != nullptr)
      multiply<P, true>(count, width, steps<P>(n), g, g_row, 1, s.column_panels, rows_out, gradient.to_rows_stride);
    if (to_columns != nullptr)
      multiply<P, true>(n, width, steps<P>(count), g_transposed, g_transposed_row, g_transposed_step, s.row_panels, columns_out,
                        gradient.to_columns_stride);
  }
}

template <typename P>
constexpr ContrastKernels kernels_of() {
  return {scratch_bytes<P>, forward<P>, backward<P>};
}

MixupInfoNceKernels make_table() {
  MixupInfoNceKernels table{};
  table.contrast[kContrastF32] = kernels_of<Plain<float>>();
  table.contrast[kContrastF64] = kernels_of<Plain<double>>();
#if defined(__AVX512BF16__)
  table.contrast[kContrastBF16] = kernels_of<Pairs>();
#endif
  table.inverse_norms[0] = inverse_norms<float>;
  table.inverse_norms[1] = inverse_norms<double>;
  table.finish[0] = finish<float>;
  table.finish[1] = finish<double>;
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(MixupInfoNceKernels, mixup_info_nce_kernels, make_table)

}  // namespace oner_fast
