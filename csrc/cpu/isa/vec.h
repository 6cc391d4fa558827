// Vectors as wide as the registers of the instruction set that a source is compiled for, by vector extensions.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace oner_fast {
namespace {

#if defined(__AVX512F__)
constexpr int kVectorBytes = 64;
#elif defined(__AVX2__)
constexpr int kVectorBytes = 32;
#else
constexpr int kVectorBytes = 16;
#endif

template <typename T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kVectorBytes)));
};
template <typename T>
using Vec = typename VectorOf<T>::type;
template <typename T>
constexpr int kLanes = kVectorBytes / static_cast<int>(sizeof(T));

template <typename T>
struct IntegerOf;
template <>
struct IntegerOf<float> {
  using type = int32_t;
};
template <>
struct IntegerOf<uint32_t> {
  using type = int32_t;
};
template <>
struct IntegerOf<double> {
  using type = int64_t;
};

template <typename T>
inline Vec<T> load(const T* from) {
  Vec<T> v;
  std::memcpy(&v, from, sizeof v);
  return v;
}

template <typename T>
inline void store(T* to, Vec<T> v) {
  std::memcpy(to, &v, sizeof v);
}

template <typename T>
inline Vec<T> broadcast(T x) {
  return x - Vec<T>{};  // minus, so that -0 stays -0
}

// The first `count` elements, followed by `fill`.
template <typename T>
inline Vec<T> load_part(const T* from, int64_t count, T fill) {
  Vec<T> v = broadcast(fill);
  std::memcpy(&v, from, static_cast<size_t>(count) * sizeof(T));
  return v;
}

template <typename T>
inline T sum_of(Vec<T> v) {
  T total = 0;
  for (int i = 0; i < kLanes<T>; ++i) total += v[i];
  return total;
}

template <typename T>
inline T max_of(Vec<T> v) {
  T best = v[0];
  for (int i = 1; i < kLanes<T>; ++i) best = v[i] > best ? v[i] : best;
  return best;
}

template <typename T>
inline Vec<T> larger(Vec<T> a, Vec<T> b) {
  return a > b ? a : b;
}

// Returns x as it is, so that the compiler cannot fuse the product that made x with a later difference. A fused
// difference keeps what rounding took from the product, which is no small number where the product is large.
template <typename T>
inline Vec<T> rounded(Vec<T> x) {
#if defined(ONER_FAST_X86)
  asm("" : "+v"(x));
#elif defined(__aarch64__)
  asm("" : "+w"(x));
#else
  asm("" : "+m"(x));
#endif
  return x;
}

// exp for x <= 88: within 2 units in the last place, exactly 0 below -87.33 (whatever is computed there) and at -inf;
// NaN stays NaN.
inline Vec<float> exp_of(Vec<float> x) {
  using V = Vec<float>;
  using U = Vec<uint32_t>;
  const V low = broadcast(-87.33f), round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V shifted = x * 1.44269504f + round;
  const V n = shifted - round;
  V r = x - n * 0.693359375f;
  r = r - n * -2.12194440e-4f;
  V p = broadcast(1.3981999507e-3f);
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  const V power = reinterpret_cast<V>((reinterpret_cast<U>(shifted) << 23) + 0x3F800000u);
  return x < low ? V{} : p * power;
}

// float64 is for gradcheck, not for speed.
inline Vec<double> exp_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp(x[i]);
  return x;
}

// log(1 + x) for x in [0, 1], within 2 units in the last place; NaN stays NaN. The polynomial is that of log(1 + x) / x
// at ten Chebyshev nodes.
inline Vec<float> log1p_of(Vec<float> x) {
  Vec<float> p = broadcast(-3.1760570127516985e-3f);
  p = p * x + 1.9542526453733444e-2f;
  p = p * x + -5.6373611092567444e-2f;
  p = p * x + 1.0543623566627502e-1f;
  p = p * x + -1.5269666910171509e-1f;
  p = p * x + 1.9663274288177490e-1f;
  p = p * x + -2.4951615929603577e-1f;
  p = p * x + 3.3329710364341736e-1f;
  p = p * x + -4.9999892711639404e-1f;
  return (p * x + 1.0f) * x;
}

inline Vec<double> log1p_of(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_log1p(x[i]);
  return x;
}

}  // namespace
}  // namespace oner_fast
