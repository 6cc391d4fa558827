// Numbers in memory and in registers: loads of whole words of up to 16 bytes, sums in float (double for double).
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <type_traits>

#include "cuda/launch.h"

namespace oner_fast::cuda {

template <int kBytes>
struct WordOf;
template <>
struct WordOf<1> {
  using Type = unsigned char;
};
template <>
struct WordOf<2> {
  using Type = unsigned short;
};
template <>
struct WordOf<4> {
  using Type = unsigned int;
};
template <>
struct WordOf<8> {
  using Type = uint2;
};
template <>
struct WordOf<16> {
  using Type = uint4;
};

// N numbers of type T in memory, aligned to their total size or to 16 bytes.
template <typename T, int N>
struct Bits {
  static constexpr int kBytes = N * static_cast<int>(sizeof(T)), kWord = kBytes < 16 ? kBytes : 16;
  static constexpr int kWords = kBytes / kWord;
  using Word = typename WordOf<kWord>::Type;
  Word word[kWords];
};

template <typename T, int N>
__device__ __forceinline__ Bits<T, N> read(const T* from) {
  Bits<T, N> bits;
  using Word = typename Bits<T, N>::Word;
#pragma unroll
  for (int i = 0; i < Bits<T, N>::kWords; ++i) bits.word[i] = __ldg(reinterpret_cast<const Word*>(from) + i);
  return bits;
}

template <typename T, int N>
__device__ __forceinline__ void write(T* to, const Bits<T, N>& bits) {
  using Word = typename Bits<T, N>::Word;
#pragma unroll
  for (int i = 0; i < Bits<T, N>::kWords; ++i) reinterpret_cast<Word*>(to)[i] = bits.word[i];
}

template <typename T, int N>
__device__ __forceinline__ Bits<T, N> zeros() {
  Bits<T, N> bits;
  memset(&bits, 0, sizeof bits);
  return bits;
}

// The type of a sum over numbers of type T.
template <typename T>
using WideOf = std::conditional_t<std::is_same_v<T, double>, double, float>;

template <typename Wide, typename T>
__device__ __forceinline__ Wide widened(T x) {
  return static_cast<Wide>(static_cast<float>(x));
}
template <typename Wide>
__device__ __forceinline__ Wide widened(double x) {
  return static_cast<Wide>(x);
}

template <typename T, typename Wide>
__device__ __forceinline__ T narrowed(Wide x) {
  if constexpr (std::is_same_v<T, Wide>)
    return x;
  else
    return static_cast<T>(static_cast<float>(x));
}

template <typename Wide, typename T, int N>
__device__ __forceinline__ void widen(const Bits<T, N>& bits, Wide (&out)[N]) {
  T numbers[N];
  memcpy(numbers, &bits, sizeof numbers);
#pragma unroll
  for (int i = 0; i < N; ++i) out[i] = widened<Wide>(numbers[i]);
}

template <typename T, typename Wide, int N>
__device__ __forceinline__ Bits<T, N> narrow(const Wide (&values)[N]) {
  T numbers[N];
#pragma unroll
  for (int i = 0; i < N; ++i) numbers[i] = narrowed<T>(values[i]);
  Bits<T, N> bits;
  memcpy(&bits, numbers, sizeof numbers);
  return bits;
}

constexpr double kLeastNorm = 1e-12;  // a shorter row counts as a row of zeros

// A row divided by this is a unit vector. The quotient is 0 for a row that counts as zeros, and NaN for a row whose
// squares overflow: a loss of diverged rows must not look finite.
template <typename Wide>
__device__ __forceinline__ Wide divisor_of(Wide norm) {
  if (norm < static_cast<Wide>(kLeastNorm)) return static_cast<Wide>(INFINITY);
  return isinf(norm) ? static_cast<Wide>(NAN) : norm;
}

// Number `at` of a row whose type is known only at run time, for rare pairs of types and unaligned rows.
template <typename Wide>
__device__ __forceinline__ Wide read_any(const void* row, int32_t number, int64_t at) {
  switch (number) {
    case kF32:
      return static_cast<Wide>(__ldg(static_cast<const float*>(row) + at));
    case kF64:
      return static_cast<Wide>(__ldg(static_cast<const double*>(row) + at));
    case kF16:
      return static_cast<Wide>(__half2float(__ldg(static_cast<const __half*>(row) + at)));
    case kBF16:
      return static_cast<Wide>(__bfloat162float(__ldg(static_cast<const __nv_bfloat16*>(row) + at)));
    default:
      return static_cast<Wide>(__ldg(static_cast<const unsigned char*>(row) + at));
  }
}

template <typename Wide>
__device__ __forceinline__ void write_any(void* row, int32_t number, int64_t at, Wide value) {
  switch (number) {
    case kF32:
      static_cast<float*>(row)[at] = static_cast<float>(value);
      return;
    case kF64:
      static_cast<double*>(row)[at] = static_cast<double>(value);
      return;
    case kF16:
      static_cast<__half*>(row)[at] = __float2half_rn(static_cast<float>(value));
      return;
    default:
      static_cast<__nv_bfloat16*>(row)[at] = __float2bfloat16_rn(static_cast<float>(value));
  }
}

// --- on the host
// ------------------------------------------------------------------------------------------------------

inline bool aligned(const void* pointer, int64_t bytes) { return reinterpret_cast<uintptr_t>(pointer) % bytes == 0; }

inline int64_t blocks_for(int64_t items, int64_t each) { return (items + each - 1) / each; }

// Threads of a warp that share a row of `items` words: a power of two.
inline int lanes_of(int64_t items) {
  int log_lanes = 0;
  while (log_lanes < 5 && (int64_t{1} << log_lanes) < items) ++log_lanes;
  return log_lanes;
}

// Calls launch(T()) with the floating type of a Number.
template <typename Launch>
cudaError_t with_type(int32_t number, const Launch& launch) {
  switch (number) {
    case kF32:
      launch(float());
      break;
    case kF64:
      launch(double());
      break;
    case kF16:
      launch(__half());
      break;
    case kBF16:
      launch(__nv_bfloat16());
      break;
    default:
      return cudaErrorInvalidValue;
  }
  return cudaGetLastError();
}

}  // namespace oner_fast::cuda
