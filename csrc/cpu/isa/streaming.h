// Non-temporal stores and prefetches for the sources of this folder: internal linkage, see isa.h.
#pragma once

#include <cstdint>
#include <cstring>

#if defined(__SSE2__)
#include <immintrin.h>
#endif

namespace oner_fast {
namespace {

constexpr int64_t kLine = 64;  // bytes of a cache line

#if defined(__AVX512F__)
using Vector = __m512i;
inline Vector load_vector(const char* from) { return _mm512_loadu_si512(from); }
inline void stream(char* to, Vector x) { _mm512_stream_si512(reinterpret_cast<__m512i*>(to), x); }
#elif defined(__AVX__)
using Vector = __m256i;
inline Vector load_vector(const char* from) { return _mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)); }
inline void stream(char* to, Vector x) { _mm256_stream_si256(reinterpret_cast<__m256i*>(to), x); }
#elif defined(__SSE2__)
using Vector = __m128i;
inline Vector load_vector(const char* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
inline void stream(char* to, Vector x) { _mm_stream_si128(reinterpret_cast<__m128i*>(to), x); }
#endif

// Fetches the cache lines of `bytes` at `from`; an address outside every object is harmless.
[[maybe_unused]] inline void fetch(const void* from, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += kLine) __builtin_prefetch(static_cast<const char*>(from) + i);
}

// to = from: whole cache lines of `to` are streamed, the parts before and after them are copied normally.
[[maybe_unused]] inline void stream_copy(char* to, const char* from, int64_t bytes) {
#if defined(__SSE2__)
  int64_t i = static_cast<int64_t>(-reinterpret_cast<uintptr_t>(to) & static_cast<uintptr_t>(kLine - 1));
  if (i > bytes) i = bytes;
  if (i > 0) std::memcpy(to, from, static_cast<size_t>(i));
  for (; i + kLine <= bytes; i += kLine)
    for (int64_t j = 0; j < kLine; j += static_cast<int64_t>(sizeof(Vector)))
      stream(to + i + j, load_vector(from + i + j));
  if (i < bytes) std::memcpy(to + i, from + i, static_cast<size_t>(bytes - i));
#else
  std::memcpy(to, from, static_cast<size_t>(bytes));
#endif
}

}  // namespace
}  // namespace oner_fast
