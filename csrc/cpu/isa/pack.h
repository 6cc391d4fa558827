// Rows of numbers as operands of gemm.h: `rows` X of X's shape (count x width), with any distance between the rows.
//
// Every function pads with zeros, beyond count and width, to the whole steps and vectors of the operand.
#pragma once

#include "cpu/isa/convert_vectors.h"
#include "cpu/isa/gemm.h"

namespace oner_fast {
namespace {

template <int... I>
struct Lanes {};
template <int N, int... I>
struct CountLanes : CountLanes<N - 1, N - 1, I...> {};
template <int... I>
struct CountLanes<0, I...> {
  using type = Lanes<I...>;
};

// Swaps the off-diagonal blocks in 2 x 2 blocks of D x D elements, which rows a and b, D apart, hold.
template <int D, typename V, int... I>
inline void exchange(V& a, V& b, Lanes<I...>) {
  constexpr int W = sizeof...(I);
  const V upper = __builtin_shufflevector(a, b, (I & D ? W + I - D : I)...);
  b = __builtin_shufflevector(a, b, (I & D ? W + I : I + D)...);
  a = upper;
}

template <int D = 1, typename V, int W>
inline void transpose(V (&rows)[W]) {
  if constexpr (D < W) {
#pragma GCC unroll 16
    for (int i = 0; i < W; ++i)
      if ((i & D) == 0) exchange<D>(rows[i], rows[i + D], typename CountLanes<W>::type{});
    transpose<2 * D>(rows);
  }
}

// The number of steps of P that hold `count` numbers along k.
template <typename P>
constexpr int64_t steps(int64_t count) {
  return round_up((count + P::kDepth - 1) / P::kDepth, P::kSteps);
}

// Elements of a row from number `from` on: a vector of them, along k.
template <typename P, typename In>
inline Vec<typename P::Element> along(const In* row, int64_t from, int64_t width) {
  if constexpr (P::kDepth == 1) {
    return read(row + from, width - from);
  } else {
    constexpr int W = 2 * kLanes<float>;
    Vec<typename P::Element> v{};
    if (from + W <= width)
      std::memcpy(&v, row + from, sizeof v);
    else if (from < width)
      std::memcpy(&v, row + from, static_cast<size_t>(width - from) * sizeof(In));
    return v;
  }
}

// Elements whose k runs over the rows, at the columns from `from` on; `left` rows exist.
template <typename P, typename In>
inline Vec<typename P::Element> across(const In* rows, int64_t stride, int64_t left, int64_t from, int64_t width) {
  using V = Vec<typename P::Element>;
  if (left <= 0) return V{};
  if constexpr (P::kDepth == 1) {
    return read(rows + from, width - from);
  } else {
    constexpr int W = kLanes<float>;
    Narrow low{}, high{};
    if (from + W <= width) {
      std::memcpy(&low, rows + from, sizeof low);
      if (left > 1) std::memcpy(&high, rows + stride + from, sizeof high);
    } else {
      const size_t bytes = static_cast<size_t>(width - from) * sizeof(In);
      std::memcpy(&low, rows + from, bytes);
      if (left > 1) std::memcpy(&high, rows + stride + from, bytes);
    }
    return __builtin_convertvector(low, V) | (__builtin_convertvector(high, V) << 16);
  }
}

// A = X: k runs along a row. Rows of `to` are `to_row` >= padded steps apart.
template <typename P, typename In>
void pack_a(typename P::Element* to, int64_t to_row, const In* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int W = kLanes<typename P::Out>;
  for (int64_t r = 0; r < count; ++r)
    for (int64_t s = 0; s < steps<P>(width); s += W)
      store(to + r * to_row + s, along<P>(rows + r * stride, s * P::kDepth, width));
}

// A = X^T of Pairs: k runs over X's rows; `to` has `width` rows, `to_row` >= steps<P>(count) apart.
template <typename P, typename In>
void pack_a_transposed(typename P::Element* to, int64_t to_row, const In* rows, int64_t stride, int64_t count,
                       int64_t width) {
  constexpr int W = kLanes<typename P::Out>;
  Vec<typename P::Element> block[W];
  for (int64_t s = 0; s < steps<P>(count); s += W)
    for (int64_t d = 0; d < width; d += W) {
      const In* from = rows + s * P::kDepth * stride;
      if ((s + W) * P::kDepth <= count && d + W <= width) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = across<P>(from + i * P::kDepth * stride, stride, P::kDepth, d, d + W);
      } else {
        for (int i = 0; i < W; ++i)
          block[i] = across<P>(from + i * P::kDepth * stride, stride, count - (s + i) * P::kDepth, d, width);
      }
      transpose(block);
      for (int i = 0; i < W && d + i < width; ++i) store(to + (d + i) * to_row + s, block[i]);
    }
}

// B = X: k runs over X's rows, in panels of kPanel columns.
template <typename P, typename In>
void pack_b(typename P::Element* to, const In* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int W = kLanes<typename P::Out>;
  const int64_t k = steps<P>(count);
  for (int64_t n = 0; n < width; n += kPanel<P>) {
    const int64_t end = width - n < kPanel<P> ? width : n + kPanel<P>;
    for (int64_t s = 0; s < k; ++s)
      for (int64_t d = n; d < end; d += W, to += W)
        store(to, across<P>(rows + s * P::kDepth * stride, stride, count - s * P::kDepth, d, width));
  }
}

// B = X^T: k runs along X's rows, in panels of kPanel rows of X.
template <typename P, typename In>
void pack_b_transposed(typename P::Element* to, const In* rows, int64_t stride, int64_t count, int64_t width) {
  constexpr int W = kLanes<typename P::Out>;
  const int64_t k = steps<P>(width);
  Vec<typename P::Element> block[W];
  for (int64_t n = 0; n < count; n += kPanel<P>) {
    const int64_t columns = padded<typename P::Out>(count - n < kPanel<P> ? count - n : kPanel<P>);
    for (int64_t c = 0; c < columns; c += W)
      for (int64_t s = 0; s < k; s += W) {
        const In* from = rows + (n + c) * stride;
        if (n + c + W <= count && (s + W) * P::kDepth <= width) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) block[i] = along<P>(from + i * stride + s * P::kDepth, 0, W * P::kDepth);
        } else {
          for (int i = 0; i < W; ++i)
            block[i] =
                n + c + i < count ? along<P>(from + i * stride, s * P::kDepth, width) : Vec<typename P::Element>{};
        }
        transpose(block);
        if (s + W <= k) {
#pragma GCC unroll 16
          for (int i = 0; i < W; ++i) store(to + (s + i) * columns + c, block[i]);
        } else {
          for (int i = 0; s + i < k; ++i) store(to + (s + i) * columns + c, block[i]);
        }
      }
    to += k * columns;
  }
}

// X = factor * C for C of multiply, its rows `c_row` apart.
template <typename In, typename T>
void write_rows(In* rows, int64_t stride, const T* c, int64_t c_row, int64_t count, int64_t width, T factor) {
  for (int64_t r = 0; r < count; ++r)
    for (int64_t d = 0; d < width; d += kLanes<T>)
      write(rows + r * stride + d, load(c + r * c_row + d) * broadcast(factor), width - d);
}

// X = C^T with column i of C multiplied by factor[i], and 0 where that is 0, whatever C holds.
template <typename In, typename T>
void write_transposed(In* rows, int64_t stride, const T* c, int64_t c_row, int64_t count, int64_t width,
                      const T* factor) {
  constexpr int W = kLanes<T>;
  Vec<T> block[W];
  for (int64_t n = 0; n < count; n += W) {
    const Vec<T> by = load(factor + n);
    for (int64_t d = 0; d < width; d += W) {
      if (d + W <= width) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) block[i] = by != 0 ? load(c + (d + i) * c_row + n) * by : Vec<T>{};
      } else {
        for (int i = 0; i < W; ++i) {
          block[i] = Vec<T>{};
          if (d + i < width) block[i] = by != 0 ? load(c + (d + i) * c_row + n) * by : Vec<T>{};
        }
      }
      transpose(block);
      if (d + W <= width && n + W <= count) {
#pragma GCC unroll 16
        for (int i = 0; i < W; ++i) write(rows + (n + i) * stride + d, block[i], W);
      } else {
        for (int i = 0; i < W && n + i < count; ++i) write(rows + (n + i) * stride + d, block[i], width - d);
      }
    }
  }
}

}  // namespace
}  // namespace oner_fast
