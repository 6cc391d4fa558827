// Packing of the operands of gemm.h from rows that lie one after the other.
#pragma once

#include "cpu/isa/convert.h"
#include "cpu/isa/gemm.h"

namespace oner_fast {
namespace {

template <typename E>
inline Vec<E> zip(Vec<E> a, Vec<E> b, bool upper) {
  constexpr int W = kLanes<E>;
#if defined(__clang__)
  Vec<E> out;
  for (int i = 0; i < W; ++i) out[i] = (i % 2 ? b : a)[(upper ? W / 2 : 0) + i / 2];
  return out;
#else
  using I = Vec<typename IntegerOf<E>::type>;
  I from;
  for (int i = 0; i < W; ++i) from[i] = (upper ? W / 2 : 0) + i / 2 + (i % 2 ? W : 0);
  return __builtin_shuffle(a, b, from);
#endif
}

// rows[i][j] becomes rows[j][i]: each round of zips moves one bit of the index from the row to the lane.
template <typename E>
inline void transpose(Vec<E> (&rows)[kLanes<E>]) {
  constexpr int W = kLanes<E>;
#pragma GCC unroll 4
  for (int round = 1; round < W; round *= 2) {
    Vec<E> next[W];
#pragma GCC unroll 16
    for (int i = 0; i < W / 2; ++i) {
      next[2 * i] = zip<E>(rows[i], rows[i + W / 2], false);
      next[2 * i + 1] = zip<E>(rows[i], rows[i + W / 2], true);
    }
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i) rows[i] = next[i];
  }
}

// Panels (k x n) of the transpose of `rows` (n x k, k readable up to a multiple of kLanes): B of a product with rows^T.
template <typename P>
void pack_transposed(const typename P::Element* rows, int64_t row, int64_t n, int64_t k, typename P::Element* out) {
  using E = typename P::Element;
  constexpr int W = kLanes<E>;
  for (int64_t first = 0; first < n; first += kPanel<P>) {
    const int64_t left = padded<E>(n - first), width = left < kPanel<P> ? left : kPanel<P>;
    for (int64_t v = 0; v < width; v += W) {
      E* to = out + first * k + v;
      for (int64_t i = 0; i < k; i += W) {
        Vec<E> block[W];
        for (int r = 0; r < W; ++r) {
          const int64_t which = first + v + r;
          block[r] = which < n ? load(rows + which * row + i) : Vec<E>{};
        }
        transpose<E>(block);
        for (int r = 0; r < W && i + r < k; ++r) store(to + (i + r) * width, block[r]);
      }
    }
  }
}

// Panels (k x n) of `rows` (k x n, n readable up to a multiple of kLanes).
template <typename T>
void pack_plain(const T* rows, int64_t row, int64_t k, int64_t n, T* out) {
  constexpr int W = kLanes<T>;
  for (int64_t first = 0; first < n; first += kPanel<Plain<T>>) {
    const int64_t left = padded<T>(n - first), width = left < kPanel<Plain<T>> ? left : kPanel<Plain<T>>;
    T* to = out + first * k;
    for (int64_t i = 0; i < k; ++i, to += width)
      for (int64_t v = 0; v < width; v += W) store(to + v, load(rows + i * row + first + v));
  }
}

#if defined(__AVX512BF16__)
// How many pairs `count` numbers along k take, whole steps of the product.
constexpr int64_t pair_steps(int64_t count) { return round_up((count + 1) / 2, Pairs::kSteps); }

inline Vec<uint32_t> pairs_of(Vec<float> low, Vec<float> high) {
  const __m512i l = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(low))));
  const __m512i h = _mm512_cvtepu16_epi32(reinterpret_cast<__m256i>(_mm512_cvtneps_pbh(reinterpret_cast<__m512>(high))));
  return reinterpret_cast<Vec<uint32_t>>(_mm512_or_si512(l, _mm512_slli_epi32(h, 16)));
}

// Panels of `rows` (count x n bfloat16, `row` numbers apart, n readable up to a multiple of 16), consecutive rows paired.
inline void pack_pairs(const BFloat* rows, int64_t row, int64_t count, int64_t n, uint32_t* out) {
  const int64_t k = pair_steps(count);
  for (int64_t first = 0; first < n; first += kPanel<Pairs>) {
    const int64_t left = padded<float>(n - first), width = left < kPanel<Pairs> ? left : kPanel<Pairs>;
    uint32_t* to = out + first * k;
    for (int64_t i = 0; i < k; ++i, to += width) {
      for (int64_t v = 0; v < width; v += 16) {
        const auto at = [&](int64_t r) {
          return r < count ? _mm512_cvtepu16_epi32(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(rows + r * row + first + v)))
                           : _mm512_setzero_si512();
        };
        _mm512_storeu_si512(to + v, _mm512_or_si512(at(2 * i), _mm512_slli_epi32(at(2 * i + 1), 16)));
      }
    }
  }
}
#endif

}  // namespace
}  // namespace oner_fast
