// One block of the logits: its statistics (forward) and its part of both sides' gradients (backward).
#include "cpu/isa/mixup_info_nce.h"

#include <limits>

#include "cpu/isa/mixed_rows.h"
#include "cpu/isa/pieces.h"

namespace oner_fast {
namespace {

constexpr int64_t kSkew = 16;     // added to a row of logits, so that a column spreads over many cache sets
constexpr int64_t kTogether = 2;  // rows that share the loads of the columns

// Rows of logits that are computed before they are used. AMX tiles are fast in short products, so 32 rows stay in the
// first-level cache. Elsewhere B passes through that cache once for all rows.
#if defined(__AMX_BF16__)
template <typename P>
constexpr int64_t kRowsAtOnce = P::kDepth == 2 ? 32 : 1 << 30;
#else
template <typename P>
constexpr int64_t kRowsAtOnce = 1 << 30;
#endif

constexpr int64_t smaller(int64_t a, int64_t b) { return a < b ? a : b; }

// What pairs with equal codes are.
enum Same { kNone, kIgnored, kPositive };

// Calls call<Same>() for the pairs of a block.
template <typename Call>
void for_same(const SamePairs& same, const Call& call) {
  if (same.row_code == nullptr)
    call.template operator()<kNone>();
  else if (same.column_share == nullptr)
    call.template operator()<kIgnored>();
  else
    call.template operator()<kPositive>();
}

// The logit of an ignored pair: its exponential is 0 beside any other, and no difference of two of these is NaN.
template <typename T>
constexpr T kIgnoredLogit = -std::numeric_limits<T>::max() / 4;

template <typename P>
struct Scratch {
  using T = typename P::Out;
  using E = typename P::Element;
  using Code = typename IntegerOf<T>::type;
  static constexpr bool kNarrow = P::kDepth == 2;  // G is rounded for its products
  int64_t length, logits_row;
  // Of the columns: packed, their transpose in panels, and for backward the panels along them.
  E *column_elements, *column_transposed, *column_panels;
  T *column_rest, *column_buffer, *column_more;
  // Of a unit of rows: packed, in panels along the unit, and what is found of each row.
  E *row_elements, *row_panels;
  T *row_rest, *row_high, *row_total, *row_lanes;
  T* logits;
  // Of pairs with equal codes: the codes and shares of columns, and of each row the sum over its targets.
  Code* column_code;
  T *column_share, *row_target;
  E *gradient_rows, *gradient_transposed;  // G and its transpose, narrowed
  int64_t gradient_row, gradient_column;

  Scratch(Pieces& pieces, int64_t rows, int64_t columns, int64_t width, bool backward, bool same) {
    length = packed_length<P>(width);
    const int64_t wide = padded<T>(columns), column_steps = steps<P>(columns), row_steps = steps<P>(rows);
    logits_row = wide + kSkew;
    column_elements = pieces.take<E>(columns * length);
    column_transposed = pieces.take<E>(wide * length);
    column_rest = pieces.take<T>(wide);
    column_buffer = pieces.take<T>(wide);
    column_more = pieces.take<T>(wide);
    row_elements = pieces.take<E>(round_up(rows, P::kRowsRead) * length);
    row_rest = pieces.take<T>(padded<T>(rows));
    row_high = pieces.take<T>(padded<T>(rows));
    row_total = pieces.take<T>(padded<T>(rows));
    row_lanes = pieces.take<T>(padded<T>(rows) * kLanes<T>);
    logits = pieces.take<T>((backward && kNarrow ? smaller(rows, kRowsAtOnce<P>) : rows) * logits_row);
    column_code = same ? pieces.take<Code>(wide) : nullptr;
    column_share = same ? pieces.take<T>(wide) : nullptr;
    row_target = same ? pieces.take<T>(padded<T>(rows)) : nullptr;
    column_panels = row_panels = gradient_rows = gradient_transposed = nullptr;
    gradient_row = gradient_column = 0;
    if (!backward) return;
    column_panels = pieces.take<E>(column_steps * padded<T>(width));
    row_panels = pieces.take<E>(row_steps * padded<T>(width));
    if constexpr (kNarrow) {
      gradient_row = column_steps + kSkew;
      gradient_column = row_steps + kSkew;
      gradient_rows = pieces.take<E>(round_up(rows, P::kRowsRead) * gradient_row);
      gradient_transposed = pieces.take<E>(round_up(columns, P::kRowsRead) * gradient_column);
    }
  }

  static Scratch of(const ContrastBlock& block, void* memory, bool backward) {
    Pieces pieces(static_cast<char*>(memory));
    return Scratch(pieces, block.largest_row_count, block.column_count, block.columns.width, backward,
                   block.same.row_code != nullptr);
  }
};

template <typename P>
int64_t scratch_bytes(int64_t rows, int64_t columns, int64_t width, bool backward, bool same) {
  Pieces pieces(nullptr);
  const Scratch<P> counted(pieces, rows, columns, width, backward, same);
  static_cast<void>(counted);
  return pieces.bytes();
}

template <typename P>
void take_columns(const ContrastBlock& block, bool backward, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, backward);
  const int64_t n = block.column_count, width = block.columns.width, row = s.length * P::kDepth;
  pack_mixed<P>(block.columns, block.column_first, n, s.column_elements, s.column_rest);
  for (int64_t j = n; j < padded<T>(n); ++j) s.column_rest[j] = 0;
  pack_b_transposed<P>(s.column_transposed, numbers_of<P>(s.column_elements), row, n, width);
  if (backward) pack_b<P>(s.column_panels, numbers_of<P>(s.column_elements), row, n, width);
  if (block.same.row_code == nullptr) return;
  constexpr int32_t kNoCode = std::numeric_limits<int32_t>::min();
  const auto* share = static_cast<const T*>(block.same.column_share);
  for (int64_t j = 0; j < padded<T>(n); ++j) {
    s.column_code[j] = j < n ? block.same.column_code[block.column_first + j] : kNoCode;
    s.column_share[j] = j < n && share != nullptr ? share[block.column_first + j] : T(0);
  }
}

// The pairs of a row whose codes are equal, as masks of a vector of columns of the block.
template <typename P>
struct EqualCodes {
  using Code = typename Scratch<P>::Code;
  Vec<Code> code, own;

  EqualCodes(const ContrastBlock& block, int64_t row)
      : code(broadcast(static_cast<Code>(block.same.row_code[row]))),
        own(broadcast(static_cast<Code>(block.column_of(block.own + row)))) {}

  // Of the columns from j on: those that are further pairs of the row, and those that are further pairs or its own.
  Vec<Code> further(const Scratch<P>& s, int64_t j) const { return equal(s, j) & ~is_own(j); }
  Vec<Code> targets(const Scratch<P>& s, int64_t j) const { return equal(s, j) | is_own(j); }

 private:
  Vec<Code> equal(const Scratch<P>& s, int64_t j) const { return load(s.column_code + j) == code; }
  Vec<Code> is_own(int64_t j) const {
    Vec<Code> column;
    for (int i = 0; i < kLanes<Code>; ++i) column[i] = static_cast<Code>(j + i);
    return column == own;
  }
};

// Rows as the first operand of a product, `stride` elements apart.
template <typename P>
struct RowOperand {
  const typename P::Element* elements;
  int64_t stride;
};

// Whether the block's rows can be multiplied in place; the factor that makes them unit vectors is applied to the
// logits.
template <typename P>
bool serve_as_given(const ContrastBlock& block) {
  using T = typename P::Out;
  const MixedRows& rows = block.rows;
  constexpr Kind kKind = P::kDepth == 2 ? kBF16 : sizeof(T) == sizeof(double) ? kF64 : kF32;
  if (rows.other != nullptr || rows.kind != kKind || rows.width % (P::kDepth * P::kSteps) != 0 ||
      rows.stride % P::kDepth != 0 || block.row_count % P::kRowsRead != 0 ||
      reinterpret_cast<uintptr_t>(rows.x) % sizeof(typename P::Element) != 0)
    return false;
  for (int64_t i = 0; rows.inverse_norm != nullptr && i < block.row_count; ++i)
    if (!is_moderate(static_cast<const T*>(rows.inverse_norm)[block.row_first + i])) return false;
  return true;
}

template <typename P>
RowOperand<P> take_rows(const ContrastBlock& block, const Scratch<P>& s) {
  using T = typename P::Out;
  const MixedRows& rows = block.rows;
  if (!serve_as_given<P>(block)) {
    pack_mixed<P>(rows, block.row_first, block.row_count, s.row_elements, s.row_rest);
    return {s.row_elements, s.length};
  }
  for (int64_t i = 0; i < block.row_count; ++i)
    s.row_rest[i] = rows.inverse_norm == nullptr ? T(1) : static_cast<const T*>(rows.inverse_norm)[block.row_first + i];
  const void* first = row_of(rows.x, rows.stride, rows.kind, block.row_first);
  return {static_cast<const typename P::Element*>(first), rows.stride / P::kDepth};
}

// The products of rows first..first + count with all columns, before the factors that make them logits.
template <typename P>
void multiply_rows(const ContrastBlock& block, const Scratch<P>& s, const RowOperand<P>& rows, int64_t first,
                   int64_t count, typename P::Out* to) {
  multiply<P, false>(count, block.column_count, steps<P>(block.columns.width), rows.elements + first * rows.stride,
                     rows.stride, 1, s.column_transposed, to, s.logits_row);
}

// The factor that makes a product a logit: that of its row and, for columns packed without scaling, of its column.
template <typename P>
Vec<typename P::Out> row_factor(const ContrastBlock& block, const Scratch<P>& s, int64_t i) {
  return broadcast(static_cast<typename P::Out>(block.scale) * s.row_rest[i]);
}

// Backward must compute exactly the logit that forward found to be the largest.
template <typename P>
Vec<typename P::Out> logit_of(Vec<typename P::Out> product, Vec<typename P::Out> factor,
                              const typename P::Out* column_rest) {
  return rounded<typename P::Out>(product * (P::kDepth == 1 ? factor : factor * load(column_rest)));
}

// Calls rows<R>(first, ...) with R = kTogether as often as possible, then for single rows.
template <typename Rows>
void in_groups(int64_t first, int64_t last, const Rows& rows) {
  for (; first + kTogether <= last; first += kTogether) rows.template operator()<kTogether>(first);
  for (; first < last; ++first) rows.template operator()<1>(first);
}

// out[i] = the sum (or the largest) of the lanes of row i, for `count` rows and up to the next whole vector.
template <bool kSum, typename T>
void over_lanes(const T* lanes, int64_t count, T* out) {
  constexpr int W = kLanes<T>;
  Vec<T> rows[W];
  for (int64_t i = 0; i < count; i += W) {
    for (int r = 0; r < W; ++r) rows[r] = load(lanes + (i + r) * W);
    transpose(rows);
#pragma GCC unroll 4
    for (int half = W / 2; half > 0; half /= 2)
#pragma GCC unroll 8
      for (int r = 0; r < half; ++r) rows[r] = kSum ? rows[r] + rows[r + half] : larger<T>(rows[r], rows[r + half]);
    store(out + i, rows[0]);
  }
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
  if (out.column_max == nullptr) {
    for_same(block.same, [&]<Same kSame> { forward_sums<P, false, kSame>(block, s); });
  } else {
    for_same(block.same, [&]<Same kSame> { forward_sums<P, true, kSame>(block, s); });
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

#if defined(__AVX512BF16__)
// Two vectors as pairs, the first in the lower halves.
inline Vec<uint32_t> paired(Vec<float> low, Vec<float> high) {
  const auto narrowed = [](Vec<float> x) {
    return _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
  };
  return reinterpret_cast<Vec<uint32_t>>(_mm512_or_si512(narrowed(low), _mm512_slli_epi32(narrowed(high), 16)));
}

// Rounds G at `g` to bfloat16, times the remaining factor of the unit vectors that it will be multiplied by: as rows of
// pairs along the columns, and transposed. `first` is a multiple of 32.
void narrow_gradient(const Scratch<Pairs>& s, const float* g, int64_t first, int64_t count, int64_t columns,
                     bool transposed) {
  const int64_t all = padded<float>(columns);
  for (int64_t i = 0; i < count; ++i) {
    BFloat* to = reinterpret_cast<BFloat*>(s.gradient_rows + (first + i) * s.gradient_row);
    for (int64_t j = 0; j < all; j += 16) {
      const Vec<float> x = load(g + i * s.logits_row + j) * load(s.column_rest + j);
      _mm256_storeu_si256(reinterpret_cast<__m256i*>(to + j),
                          reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(x))));
    }
    std::memset(to + all, 0, static_cast<size_t>(2 * steps<Pairs>(columns) - all) * sizeof *to);
  }
  if (!transposed) return;
  for (int64_t i = 0; i < count; i += 32) {
    for (int64_t j = 0; j < all; j += 16) {
      Vec<uint32_t> block[16];
#pragma GCC unroll 16
      for (int64_t r = 0; r < 16; ++r) {
        const auto at = [&](int64_t x) {
          return x < count ? load(g + x * s.logits_row + j) * s.row_rest[first + x] : Vec<float>{};
        };
        block[r] = paired(at(i + 2 * r), at(i + 2 * r + 1));
      }
      transpose(block);
#pragma GCC unroll 16
      for (int64_t r = 0; r < 16; ++r)
        store(s.gradient_transposed + (j + r) * s.gradient_column + (first + i) / 2, block[r]);
    }
  }
}
#endif

// Packs panels along the unit's rows, as unit vectors except for the factor that Pairs leave to G.
template <typename P>
void pack_row_panels(const ContrastBlock& block, const Scratch<P>& s, const RowOperand<P>& rows) {
  using T = typename P::Out;
  const int64_t width = block.rows.width;
  if constexpr (P::kDepth == 1) {
    T* to = s.row_panels;
    for (int64_t n = 0; n < width; n += kPanel<P>) {
      const int64_t end = smaller(width, n + kPanel<P>);
      for (int64_t i = 0; i < block.row_count; ++i) {
        const Vec<T> rest = broadcast(s.row_rest[i]);
        for (int64_t d = n; d < end; d += kLanes<T>, to += kLanes<T>)
          store(to, read(rows.elements + i * rows.stride + d, width - d) * rest);
      }
    }
  } else {
    pack_b<P>(s.row_panels, numbers_of<P>(rows.elements), rows.stride * P::kDepth, block.row_count, width);
  }
}

template <typename P>
void gradient_of(const ContrastBlock& block, const ContrastGradient& gradient, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  const int64_t n = block.column_count;
  const bool both = gradient.column_max != nullptr, to_columns = gradient.to_columns != nullptr;
  const RowOperand<P> rows = take_rows<P>(block, s);
  if (to_columns) pack_row_panels<P>(block, s, rows);
  if (both) {
    for (int64_t j = 0; j < padded<T>(n); ++j) {
      s.column_buffer[j] = j < n ? static_cast<const T*>(gradient.column_max)[block.column_first + j] : T(0);
      s.column_more[j] = j < n ? static_cast<const T*>(gradient.column_weight)[block.column_first + j] : T(0);
    }
  }
  for (int64_t first = 0; first < block.row_count; first += kRowsAtOnce<P>) {
    const int64_t count = smaller(block.row_count - first, kRowsAtOnce<P>);
    multiply_rows<P>(block, s, rows, first, count, s.logits);
    for_same(block.same, [&]<Same kSame> {
      in_groups(first, first + count, [&]<int R>(int64_t i) {
        T* at = s.logits + (i - first) * s.logits_row;
        if (both)
          gradient_of_rows<P, true, kSame, R>(block, gradient, s, i, at);
        else
          gradient_of_rows<P, false, kSame, R>(block, gradient, s, i, at);
      });
    });
#if defined(__AVX512BF16__)
    if constexpr (P::kDepth == 2) narrow_gradient(s, s.logits, first, count, n, to_columns);
#endif
  }
}

template <typename P>
void to_rows(const ContrastBlock& block, const ContrastGradient& gradient, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  T* out = static_cast<T*>(gradient.to_rows) + block.row_first * gradient.to_rows_stride;
  const int64_t width = block.columns.width, k = steps<P>(block.column_count);
  if constexpr (P::kDepth == 1)
    multiply<P, true>(block.row_count, width, k, s.logits, s.logits_row, 1, s.column_panels, out,
                      gradient.to_rows_stride);
  else
    multiply<P, true>(block.row_count, width, k, s.gradient_rows, s.gradient_row, 1, s.column_panels, out,
                      gradient.to_rows_stride);
}

template <typename P>
void to_columns(const ContrastBlock& block, const ContrastGradient& gradient, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  T* out = static_cast<T*>(gradient.to_columns);
  const int64_t width = block.columns.width, k = steps<P>(block.row_count);
  if constexpr (P::kDepth == 1)  // a transposed A costs nothing
    multiply<P, true>(block.column_count, width, k, s.logits, 1, s.logits_row, s.row_panels, out,
                      gradient.to_columns_stride);
  else
    multiply<P, true>(block.column_count, width, k, s.gradient_transposed, s.gradient_column, 1, s.row_panels, out,
                      gradient.to_columns_stride);
}

template <typename P>
constexpr ContrastKernels kernels_of() {
  return {scratch_bytes<P>, take_columns<P>, forward<P>, forward_rows<P>, gradient_of<P>, to_rows<P>, to_columns<P>};
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
