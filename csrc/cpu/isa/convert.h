// Converts half-precision types to float32 or float64 and back. Internal linkage, see isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__F16C__) || defined(__AVX2__)
#include <immintrin.h>
#endif

namespace oner_fast {
namespace {

constexpr int64_t kChunk = 64;  // elements converted at a time; they stay in the first-level cache

struct Half {
  uint16_t bits;
};
struct BFloat {
  uint16_t bits;
};

inline uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

inline float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

inline float widen(BFloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

inline BFloat narrow_bfloat(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

inline float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  // Scaling by 2^112 moves the exponent to float32's bias and makes subnormals exact; infinities and NaN keep a full
  // exponent.
  const float scaled = float_of(magnitude) * float_of(0x77800000u);
  const uint32_t full = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return float_of(bits_of(scaled) | full | sign);
}

inline Half narrow_half(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float32 unit round at bit 2^-24
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13))};
}

template <typename Wide, typename T>
void widen_row(Wide* wide, const T* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<Wide>(row[i]);
}

#if defined(__AVX2__)
// On its own the compiler uses vectors of bytes, which short lines of pixels do not fill.
[[maybe_unused]] inline void widen_row(float* wide, const uint8_t* row, int64_t count) {
  const int64_t whole = count / 16 * 16;
  for (int64_t i = 0; i < whole; i += 16) {
    const __m128i pixels = _mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i));
#if defined(__AVX512F__)
    // Masked with all lanes on, because GCC 12 warns about the unmasked form in its own header.
    _mm512_storeu_ps(wide + i, _mm512_maskz_cvtepi32_ps(0xFFFF, _mm512_maskz_cvtepu8_epi32(0xFFFF, pixels)));
#else
    _mm256_storeu_ps(wide + i, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(pixels)));
    _mm256_storeu_ps(wide + i + 8, _mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(_mm_srli_si128(pixels, 8))));
#endif
  }
  for (int64_t i = whole; i < count; ++i) wide[i] = static_cast<float>(row[i]);
}
#endif

template <typename Wide>
void widen_row(Wide* wide, const BFloat* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<Wide>(widen(row[i]));
}

template <typename Wide>
void widen_row(Wide* wide, const Half* row, int64_t count) {
  int64_t whole = 0;  // done eight at a time
#if defined(__F16C__)
  whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    alignas(32) float part[8];
    _mm256_store_ps(part, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
    for (int64_t j = 0; j < 8; ++j) wide[i + j] = static_cast<Wide>(part[j]);
  }
#endif
  for (int64_t i = whole; i < count; ++i) wide[i] = static_cast<Wide>(widen(row[i]));
}

template <typename Wide, typename T>
void narrow_row(T* row, const Wide* wide, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] = static_cast<T>(wide[i]);
}

template <typename Wide>
void narrow_row(BFloat* row, const Wide* wide, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] = narrow_bfloat(static_cast<float>(wide[i]));
}

template <typename Wide>
void narrow_row(Half* row, const Wide* wide, int64_t count) {
  int64_t whole = 0;  // done eight at a time
#if defined(__F16C__)
  whole = count / 8 * 8;
  for (int64_t i = 0; i < whole; i += 8) {
    alignas(32) float part[8];
    for (int64_t j = 0; j < 8; ++j) part[j] = static_cast<float>(wide[i + j]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                     _mm256_cvtps_ph(_mm256_load_ps(part), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (int64_t i = whole; i < count; ++i) row[i] = narrow_half(static_cast<float>(wide[i]));
}

}  // namespace
}  // namespace oner_fast
