// Loads stored numbers as vectors of the type of the computation, and stores them: float16 and bfloat16 become float32.
#pragma once

#include "cpu/isa/convert.h"
#include "cpu/isa/vec.h"

namespace oner_fast {
namespace {

template <typename In>
struct WideOf {
  using type = float;
};
template <>
struct WideOf<double> {
  using type = double;
};

typedef uint16_t Narrow __attribute__((vector_size(kVectorBytes / 2)));

inline Vec<float> widen(Narrow bits, BFloat) {
  return reinterpret_cast<Vec<float>>(__builtin_convertvector(bits, Vec<uint32_t>) << 16);
}

inline Vec<float> widen(Narrow bits, Half) {
  using U = Vec<uint32_t>;
  const U x = __builtin_convertvector(bits, U), sign = (x & 0x8000u) << 16, magnitude = (x & 0x7FFFu) << 13;
  // Scaling by 2^112 moves the exponent to float32's bias and makes subnormals exact; infinities and NaN keep a full
  // one.
  const U scaled = reinterpret_cast<U>(reinterpret_cast<Vec<float>>(magnitude) * 0x1p112f);
  const U full = magnitude >= 0x0F800000u ? U{} + 0x7F800000u : U{};
  return reinterpret_cast<Vec<float>>(scaled | full | sign);
}

inline Narrow narrow(Vec<float> x, BFloat) {
  using U = Vec<uint32_t>;
  const U u = reinterpret_cast<U>(x), rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return __builtin_convertvector((u & 0x7FFFFFFFu) > 0x7F800000u ? U{} + 0x7FC0u : rounded, Narrow);
}

inline Narrow narrow(Vec<float> x, Half) {
  using U = Vec<uint32_t>;
  const U u = reinterpret_cast<U>(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  const U normal = (magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13;
  // Adding 0.5 lets float32's unit round a subnormal at bit 2^-24.
  const U subnormal = reinterpret_cast<U>(reinterpret_cast<Vec<float>>(magnitude) + 0.5f) - 0x3F000000u;
  U result = magnitude < 0x38800000u ? subnormal : normal;
  result = magnitude >= 0x477FF000u ? U{} + 0x7C00u : result;
  result = magnitude > 0x7F800000u ? U{} + 0x7E00u : result;
  return __builtin_convertvector(result | sign, Narrow);
}

// Loads the `count` numbers at `from` (at most a vector), followed by zeros.
template <typename In>
inline Vec<typename WideOf<In>::type> read(const In* from, int64_t count) {
  using T = typename WideOf<In>::type;
  if constexpr (sizeof(In) == sizeof(T)) {
    return count >= kLanes<T> ? load(from) : load_part(from, count, T{0});
  } else {
    Narrow bits{};
    if (count >= kLanes<T>)
      std::memcpy(&bits, from, sizeof bits);
    else
      std::memcpy(&bits, from, static_cast<size_t>(count) * sizeof(In));
    return widen(bits, In{});
  }
}

// Stores the first `count` numbers of x (at most a vector).
template <typename In>
inline void write(In* to, Vec<typename WideOf<In>::type> x, int64_t count) {
  using T = typename WideOf<In>::type;
  if constexpr (sizeof(In) == sizeof(T)) {
    if (count >= kLanes<T>)
      store(to, x);
    else
      std::memcpy(to, &x, static_cast<size_t>(count) * sizeof(In));
  } else {
    const Narrow bits = narrow(x, In{});
    if (count >= kLanes<T>)
      std::memcpy(to, &bits, sizeof bits);
    else
      std::memcpy(to, &bits, static_cast<size_t>(count) * sizeof(In));
  }
}

}  // namespace
}  // namespace oner_fast
