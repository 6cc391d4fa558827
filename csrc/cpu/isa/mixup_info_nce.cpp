// One block of the logits: its statistics (forward) and its part of both sides' gradients (backward).
#include "cpu/isa/mixup_info_nce.h"

#include <limits>

#include "cpu/isa/contrast_tile.h"

namespace oner_fast {
namespace {

// The logit of an ignored pair: its exponential is 0 beside any other, and no difference of two of these is NaN.
template <typename T>
constexpr T kIgnoredLogit = -std::numeric_limits<T>::max() / 4;

// Backward must compute exactly the logit that forward found to be the largest.
template <typename P>
Vec<typename P::Out> logit_of(Vec<typename P::Out> product, Vec<typename P::Out> factor,
                              const typename P::Out* column_rest) {
  return rounded<typename P::Out>(product * (P::kDepth == 1 ? factor : factor * load(column_rest)));
}

// Merges another pair into (max, sum of exp(x - max)), lane by lane; a NaN in either sum stays.
template <typename T>
void merge(T* max, T* sum, Vec<T> other_max, Vec<T> other_sum) {
  const Vec<T> old = load(max), high = larger<T>(old, other_max);
  store(sum, load(sum) * exp_of(old - high) + other_sum * exp_of(other_max - high));
  store(max, high);
}

template <typename T>
void merge_all(T* max, T* sum, const T* other_max, const T* other_sum, int64_t count) {
  constexpr int W = kLanes<T>;
  int64_t j = 0;
  for (; j + W <= count; j += W) merge<T>(max + j, sum + j, load(other_max + j), load(other_sum + j));
  if (j == count) return;
  T full_max[W], full_sum[W];
  store(full_max, load_part<T>(max + j, count - j, 0));
  store(full_sum, load_part<T>(sum + j, count - j, 0));
  merge<T>(full_max, full_sum, load(other_max + j), load(other_sum + j));
  std::memcpy(max + j, full_max, static_cast<size_t>(count - j) * sizeof(T));
  std::memcpy(sum + j, full_sum, static_cast<size_t>(count - j) * sizeof(T));
}

// Turns products into logits, -inf beyond the last column, and finds the largest of each row's lanes and of each
// column.
template <typename P, bool kBoth, Same kSame, int R>
void find_largest(const ContrastBlock& block, const Scratch<P>& s, int64_t first) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  const int64_t n = block.column_count, whole = n / W * W;
  T* rows = s.logits + first * s.logits_row;
  Vec<T> factor[R], high[R];
  for (int r = 0; r < R; ++r) {
    factor[r] = row_factor<P>(block, s, first + r);
    high[r] = broadcast(-static_cast<T>(INFINITY));
  }
  const auto take = [&]<bool kWhole>(int64_t j) {
    Vec<T> column{};
    if constexpr (kBoth) column = load(s.column_buffer + j);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* at = rows + r * s.logits_row + j;
      Vec<T> l = logit_of<P>(load(at), factor[r], s.column_rest + j);
      if constexpr (kSame == kIgnored)
        l = EqualCodes<P>(block, block.row_first + first + r).further(s, j) ? broadcast(kIgnoredLogit<T>) : l;
      store(at, l);
      if constexpr (!kWhole) {
        l = load_part(at, n - j, -static_cast<T>(INFINITY));
        store(at, l);
      }
      high[r] = larger<T>(l, high[r]);
      if constexpr (kBoth) column = larger<T>(l, column);
    }
    if constexpr (kBoth) store(s.column_buffer + j, column);
  };
  for (int64_t j = 0; j < whole; j += W) take.template operator()<true>(j);
  if (whole < n) take.template operator()<false>(whole);
  for (int r = 0; r < R; ++r) store(s.row_lanes + (first + r) * W, high[r]);
}

// Sums of exp(logit - largest), of each row's lanes and of each column.
template <typename P, bool kBoth, Same kSame, int R>
void add_up(const ContrastBlock& block, const Scratch<P>& s, int64_t first) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  const T* rows = s.logits + first * s.logits_row;
  Vec<T> from[R], total[R], target[R];
  for (int r = 0; r < R; ++r) {
    from[r] = broadcast(s.row_high[first + r]);
    total[r] = target[r] = Vec<T>{};
  }
  for (int64_t j = 0; j < padded<T>(block.column_count); j += W) {
    Vec<T> high{}, column{};
    if constexpr (kBoth) {
      high = load(s.column_buffer + j);
      column = load(s.column_more + j);
    }
    for (int r = 0; r < R; ++r) {
      const Vec<T> l = load(rows + r * s.logits_row + j);
      total[r] += exp_of(l - from[r]);
      if constexpr (kSame == kPositive) {
        const int64_t row = block.row_first + first + r;
        const Vec<T> weight = load(s.column_share + j) + static_cast<const T*>(block.same.row_share)[row];
        target[r] += EqualCodes<P>(block, row).targets(s, j) ? l * weight : Vec<T>{};
      }
      if constexpr (kBoth) column += exp_of(l - high);
    }
    if constexpr (kBoth) store(s.column_more + j, column);
  }
  for (int r = 0; r < R; ++r) {
    store(s.row_lanes + (first + r) * W, total[r]);
    if constexpr (kSame == kPositive) s.row_target[first + r] = sum_of<T>(target[r]);
  }
}

template <typename P, bool kBoth, Same kSame>
void forward_sums(const ContrastBlock& block, const Scratch<P>& s) {
  using T = typename P::Out;
  const int64_t n = block.column_count;
  const RowOperand<P> rows = take_rows<P>(block, s);
  for (int64_t j = 0; j < padded<T>(n); ++j) {
    s.column_buffer[j] = -static_cast<T>(INFINITY);
    s.column_more[j] = 0;
  }
  for (int64_t first = 0; first < block.row_count; first += kRowsAtOnce<P>) {
    const int64_t count = smaller(block.row_count - first, kRowsAtOnce<P>);
    multiply_rows<P>(block, s, rows, first, count, s.logits + first * s.logits_row);
    in_groups(first, first + count, [&]<int R>(int64_t i) { find_largest<P, kBoth, kSame, R>(block, s, i); });
  }
  over_lanes<false>(s.row_lanes, block.row_count, s.row_high);
  in_groups(0, block.row_count, [&]<int R>(int64_t i) { add_up<P, kBoth, kSame, R>(block, s, i); });
  over_lanes<true>(s.row_lanes, block.row_count, s.row_total);
}

template <typename P>
void forward(const ContrastBlock& block, const ContrastStatistics& out, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, false);
  const Tiles tiles;
  const bool positive = block.same.column_share != nullptr;
  if (out.column_max == nullptr) {
    for_same(block.same, positive, [&]<Same kSame> { forward_sums<P, false, kSame>(block, s); });
  } else {
    for_same(block.same, positive, [&]<Same kSame> { forward_sums<P, true, kSame>(block, s); });
    merge_all<T>(static_cast<T*>(out.column_max) + block.column_first,
                 static_cast<T*>(out.column_sum) + block.column_first, s.column_buffer, s.column_more,
                 block.column_count);
  }
  if (block.same.row_share != nullptr) return;  // forward_rows adds the targets
  for (int64_t i = 0; i < block.row_count; ++i) {
    const T* row = s.logits + i * s.logits_row;
    const int64_t at = block.row_first + i, own = block.column_of(block.own + at);
    if (own >= 0) static_cast<T*>(out.own_logit)[at] = row[own];
    if (block.partner == nullptr) continue;
    const int64_t partner = block.column_of(block.partner[at]);
    if (partner >= 0) static_cast<T*>(out.partner_logit)[at] = row[partner];
  }
}

template <typename P>
void forward_rows(const ContrastBlock& block, const ContrastStatistics& out, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, false);
  merge_all<T>(static_cast<T*>(out.row_max) + block.row_first, static_cast<T*>(out.row_sum) + block.row_first,
               s.row_high, s.row_total, block.row_count);
  if (block.same.row_share == nullptr) return;
  T* own = static_cast<T*>(out.own_logit) + block.row_first;
  for (int64_t i = 0; i < block.row_count; ++i) own[i] += s.row_target[i];
}

// Turns products of R rows at `rows` into G, the gradient with respect to the logits; 0 beyond the last column.
template <typename P, bool kBoth, Same kSame, int R>
void gradient_of_rows(const ContrastBlock& block, const ContrastGradient& gradient, const Scratch<P>& s, int64_t first,
                      typename P::Out* rows) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  const int64_t n = block.column_count;
  Vec<T> factor[R], from[R], weight[R];
  for (int r = 0; r < R; ++r) {
    factor[r] = row_factor<P>(block, s, first + r);
    from[r] = broadcast(static_cast<const T*>(gradient.row_max)[block.row_first + first + r]);
    weight[r] = broadcast(static_cast<const T*>(gradient.row_weight)[block.row_first + first + r]);
  }
  for (int64_t j = 0; j < n; j += W) {
    Vec<T> column_from{}, column_weight{};
    if constexpr (kBoth) {
      column_from = load(s.column_buffer + j);
      column_weight = load(s.column_more + j);
    }
    for (int r = 0; r < R; ++r) {
      T* at = rows + r * s.logits_row + j;
      const Vec<T> l = logit_of<P>(load(at), factor[r], s.column_rest + j);
      Vec<T> g = exp_of(l - from[r]) * weight[r];
      if constexpr (kBoth) g += exp_of(l - column_from) * column_weight;
      if constexpr (kSame != kNone) {
        const int64_t row = block.row_first + first + r;
        const EqualCodes<P> codes(block, row);
        if constexpr (kSame == kIgnored) {
          g = codes.further(s, j) ? Vec<T>{} : g;
        } else {
          const Vec<T> share = load(s.column_share + j) + static_cast<const T*>(gradient.own_weight)[row];
          g = codes.targets(s, j) ? g - share : g;
        }
      }
      store(at, g);
    }
  }
  const int64_t whole = n / W * W;
  for (int r = 0; r < R; ++r) {
    T* row = rows + r * s.logits_row;
    if (whole < n) store(row + whole, load_part(row + whole, n - whole, T(0)));
    if constexpr (kSame == kPositive) continue;
    const int64_t at = block.row_first + first + r, own = block.column_of(block.own + at);
    if (own >= 0) row[own] -= static_cast<const T*>(gradient.own_weight)[at];
    if (block.partner == nullptr) continue;
    const int64_t partner = block.column_of(block.partner[at]);
    if (partner >= 0) row[partner] -= static_cast<const T*>(gradient.partner_weight)[at];
  }
}

template <typename P>
void gradient_of(const ContrastBlock& block, const ContrastGradient& gradient, bool to_columns, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  const int64_t n = block.column_count;
  const bool both = gradient.column_max != nullptr, positive = block.same.column_share != nullptr;
  if (both) {
    for (int64_t j = 0; j < padded<T>(n); ++j) {
      s.column_buffer[j] = j < n ? static_cast<const T*>(gradient.column_max)[block.column_first + j] : T(0);
      s.column_more[j] = j < n ? static_cast<const T*>(gradient.column_weight)[block.column_first + j] : T(0);
    }
  }
  gradients_of_rows<P>(block, s, to_columns, [&](int64_t first, int64_t count) {
    for_same(block.same, positive, [&]<Same kSame> {
      in_groups(first, first + count, [&]<int R>(int64_t i) {
        T* at = s.logits + (i - first) * s.logits_row;
        if (both)
          gradient_of_rows<P, true, kSame, R>(block, gradient, s, i, at);
        else
          gradient_of_rows<P, false, kSame, R>(block, gradient, s, i, at);
      });
    });
  });
}

template <typename P>
void to_rows(const ContrastBlock& block, const ContrastSums& sums, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  T* out = static_cast<T*>(sums.to_rows) + block.row_first * sums.to_rows_stride;
  const int64_t width = block.columns.width, k = steps<P>(block.column_count);
  if constexpr (P::kDepth == 1)
    multiply<P, true>(block.row_count, width, k, s.logits, s.logits_row, 1, s.column_panels, out, sums.to_rows_stride);
  else
    multiply<P, true>(block.row_count, width, k, s.gradient_rows, s.gradient_row, 1, s.column_panels, out,
                      sums.to_rows_stride);
}

template <typename P>
void to_columns(const ContrastBlock& block, const ContrastSums& sums, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  T* out = static_cast<T*>(sums.to_columns);
  const int64_t width = block.columns.width, k = steps<P>(block.row_count);
  if constexpr (P::kDepth == 1)  // a transposed A costs nothing
    multiply<P, true>(block.column_count, width, k, s.logits, 1, s.logits_row, s.row_panels, out,
                      sums.to_columns_stride);
  else
    multiply<P, true>(block.column_count, width, k, s.gradient_transposed, s.gradient_column, 1, s.row_panels, out,
                      sums.to_columns_stride);
}

template <typename P>
constexpr ContrastKernels kernels_of() {
  return {scratch_bytes<P>, take_columns<P>, forward<P>, forward_rows<P>, gradient_of<P>, to_rows<P>, to_columns<P>};
}

MixupInfoNceKernels make_table() {
#if defined(__AVX512BF16__)
  MixupInfoNceKernels table = mixup_info_nce_kernels_avx512();
  table.contrast[kContrastBF16] = kernels_of<Pairs>();
#else
  MixupInfoNceKernels table{};
  table.contrast[kContrastF32] = kernels_of<Plain<float>>();
  table.contrast[kContrastF64] = kernels_of<Plain<double>>();
  table.inverse_norms[0] = inverse_norms<float>;
  table.inverse_norms[1] = inverse_norms<double>;
  table.finish[0] = finish<float>;
  table.finish[1] = finish<double>;
#endif
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(MixupInfoNceKernels, mixup_info_nce_kernels, make_table)

}  // namespace oner_fast
