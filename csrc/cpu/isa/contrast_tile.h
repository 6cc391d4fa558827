// One block of the logits, of any contrast: its operands, its products, and what becomes of a gradient with respect to
// it. What is made of the logits in between stands in mixup_info_nce.cpp and sigmoid_loss.cpp.
#pragma once

#include <limits>

#include "cpu/isa/mixed_rows.h"
#include "cpu/isa/mixup_info_nce.h"
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
void for_same(const SamePairs& same, bool positive, const Call& call) {
  if (same.row_code == nullptr)
    call.template operator()<kNone>();
  else if (positive)
    call.template operator()<kPositive>();
  else
    call.template operator()<kIgnored>();
}

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
inline void narrow_gradient(const Scratch<Pairs>& s, const float* g, int64_t first, int64_t count, int64_t columns,
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

// Computes the products of the block's rows with its columns, some rows at a time. turn(first, count) turns those of
// rows first..first + count, at the start of s.logits, into G, which is 0 beyond the last column.
template <typename P, typename Turn>
void gradients_of_rows(const ContrastBlock& block, const Scratch<P>& s, bool to_columns, const Turn& turn) {
  const RowOperand<P> rows = take_rows<P>(block, s);
  if (to_columns) pack_row_panels<P>(block, s, rows);
  for (int64_t first = 0; first < block.row_count; first += kRowsAtOnce<P>) {
    const int64_t count = smaller(block.row_count - first, kRowsAtOnce<P>);
    multiply_rows<P>(block, s, rows, first, count, s.logits);
    turn(first, count);
#if defined(__AVX512BF16__)
    if constexpr (P::kDepth == 2) narrow_gradient(s, s.logits, first, count, block.column_count, to_columns);
#endif
  }
}

}  // namespace
}  // namespace oner_fast
