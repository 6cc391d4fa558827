// Conversions and sums over rows. Built without contraction into FMA: every instruction set gives the same bits.
#include "cpu/isa/rows.h"

#include <cstring>

#if defined(__F16C__)
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

uint32_t bits_of(float x) {
  uint32_t u;
  std::memcpy(&u, &x, sizeof u);
  return u;
}

float float_of(uint32_t u) {
  float x;
  std::memcpy(&x, &u, sizeof x);
  return x;
}

float widen(BFloat x) { return float_of(static_cast<uint32_t>(x.bits) << 16); }

BFloat narrow_bfloat(float x) {
  const uint32_t u = bits_of(x);
  const uint32_t rounded = (u + 0x7FFFu + ((u >> 16) & 1u)) >> 16;
  return {static_cast<uint16_t>((u & 0x7FFFFFFFu) > 0x7F800000u ? 0x7FC0u : rounded)};
}

float widen(Half x) {
  const uint32_t sign = static_cast<uint32_t>(x.bits & 0x8000u) << 16;
  const uint32_t magnitude = static_cast<uint32_t>(x.bits & 0x7FFFu) << 13;
  // Scaling by 2^112 moves the exponent to float32's bias and makes subnormals exact; infinities and NaN keep a full exponent.
  const float scaled = float_of(magnitude) * float_of(0x77800000u);
  const uint32_t full = magnitude >= 0x0F800000u ? 0x7F800000u : 0u;
  return float_of(bits_of(scaled) | full | sign);
}

Half narrow_half(float x) {
  const uint32_t u = bits_of(x), sign = (u >> 16) & 0x8000u, magnitude = u & 0x7FFFFFFFu;
  if (magnitude > 0x7F800000u) return {static_cast<uint16_t>(sign | 0x7E00u)};
  if (magnitude >= 0x477FF000u) return {static_cast<uint16_t>(sign | 0x7C00u)};
  if (magnitude < 0x38800000u) {  // subnormal: adding 0.5 lets the float32 unit round at bit 2^-24
    return {static_cast<uint16_t>(sign | (bits_of(float_of(magnitude) + 0.5f) - 0x3F000000u))};
  }
  return {static_cast<uint16_t>(sign | ((magnitude - 0x38000000u + 0xFFFu + ((magnitude >> 13) & 1u)) >> 13))};
}

template <typename Wide, typename T>
void load(Wide* wide, const T* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<Wide>(row[i]);
}

template <typename Wide>
void load(Wide* wide, const BFloat* row, int64_t count) {
  for (int64_t i = 0; i < count; ++i) wide[i] = static_cast<Wide>(widen(row[i]));
}

template <typename Wide>
void load(Wide* wide, const Half* row, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    alignas(32) float part[8];
    _mm256_store_ps(part, _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(row + i))));
    for (int64_t j = 0; j < 8; ++j) wide[i + j] = static_cast<Wide>(part[j]);
  }
#endif
  for (; i < count; ++i) wide[i] = static_cast<Wide>(widen(row[i]));
}

template <typename Wide, typename T>
void save(T* row, const Wide* wide, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] = static_cast<T>(wide[i]);
}

template <typename Wide>
void save(BFloat* row, const Wide* wide, int64_t count) {
  for (int64_t i = 0; i < count; ++i) row[i] = narrow_bfloat(static_cast<float>(wide[i]));
}

template <typename Wide>
void save(Half* row, const Wide* wide, int64_t count) {
  int64_t i = 0;
#if defined(__F16C__)
  for (; i + 8 <= count; i += 8) {
    alignas(32) float part[8];
    for (int64_t j = 0; j < 8; ++j) part[j] = static_cast<float>(wide[i + j]);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(row + i),
                     _mm256_cvtps_ph(_mm256_load_ps(part), _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
  }
#endif
  for (; i < count; ++i) row[i] = narrow_half(static_cast<float>(wide[i]));
}

template <typename T, typename Wide>
void add(void* out, const void* a, const void* b, int64_t count) {
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = count - i < kChunk ? count - i : kChunk;
    Wide x[kChunk], y[kChunk];
    load(x, static_cast<const T*>(a) + i, n);
    load(y, static_cast<const T*>(b) + i, n);
    for (int64_t j = 0; j < n; ++j) x[j] += y[j];
    save(static_cast<T*>(out) + i, x, n);
  }
}

template <typename T>
void add_plain(void* out, const void* a, const void* b, int64_t count) {
  T* __restrict o = static_cast<T*>(out);
  const T* x = static_cast<const T*>(a);
  const T* y = static_cast<const T*>(b);
  for (int64_t i = 0; i < count; ++i) o[i] = x[i] + y[i];
}

template <typename T, typename Wide>
void accumulate(void* sum, const void* row, int64_t count) {
  Wide* total = static_cast<Wide*>(sum);
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = count - i < kChunk ? count - i : kChunk;
    Wide x[kChunk];
    load(x, static_cast<const T*>(row) + i, n);
    for (int64_t j = 0; j < n; ++j) total[i + j] += x[j];
  }
}

template <typename T, typename Wide>
void store(void* row, const void* sum, int64_t count) {
  save(static_cast<T*>(row), static_cast<const Wide*>(sum), count);
}

template <typename In, typename Out, typename Wide>
void normalise(void* out, const void* pixels, int64_t stride, int64_t side, double shift, double divisor) {
  const Wide s = static_cast<Wide>(shift), d = static_cast<Wide>(divisor);
  for (int64_t y = 0; y < side; ++y) {
    const In* line = static_cast<const In*>(pixels) + y * stride;
    Out* row = static_cast<Out*>(out) + y * side;
    for (int64_t i = 0; i < side; i += kChunk) {
      const int64_t n = side - i < kChunk ? side - i : kChunk;
      Wide x[kChunk];
      load(x, line + i, n);
      for (int64_t j = 0; j < n; ++j) x[j] = (x[j] - s) / d;
      save(row + i, x, n);
    }
  }
}

template <typename In, typename Wide>
void fill_normalise(void (*(&table)[kKinds])(void*, const void*, int64_t, int64_t, double, double)) {
  table[kF32] = normalise<In, float, Wide>;
  table[kF64] = normalise<In, double, double>;
  table[kF16] = normalise<In, Half, Wide>;
  table[kBF16] = normalise<In, BFloat, Wide>;
}

RowKernels make_table() {
  RowKernels table{};
  table.add[kF32] = add_plain<float>;
  table.add[kF64] = add_plain<double>;
  table.add[kF16] = add<Half, float>;
  table.add[kBF16] = add<BFloat, float>;
  table.accumulate[kF32][0] = accumulate<float, float>;
  table.accumulate[kF32][1] = accumulate<float, double>;
  table.accumulate[kF64][0] = accumulate<double, float>;
  table.accumulate[kF64][1] = accumulate<double, double>;
  table.accumulate[kF16][0] = accumulate<Half, float>;
  table.accumulate[kF16][1] = accumulate<Half, double>;
  table.accumulate[kBF16][0] = accumulate<BFloat, float>;
  table.accumulate[kBF16][1] = accumulate<BFloat, double>;
  table.store[kF32][0] = store<float, float>;
  table.store[kF32][1] = store<float, double>;
  table.store[kF64][0] = store<double, float>;
  table.store[kF64][1] = store<double, double>;
  table.store[kF16][0] = store<Half, float>;
  table.store[kF16][1] = store<Half, double>;
  table.store[kBF16][0] = store<BFloat, float>;
  table.store[kBF16][1] = store<BFloat, double>;
  fill_normalise<float, float>(table.normalise[kF32]);
  fill_normalise<double, double>(table.normalise[kF64]);
  fill_normalise<Half, float>(table.normalise[kF16]);
  fill_normalise<BFloat, float>(table.normalise[kBF16]);
  fill_normalise<uint8_t, float>(table.normalise[kU8]);
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(RowKernels, row_kernels, make_table)

}  // namespace oner_fast
