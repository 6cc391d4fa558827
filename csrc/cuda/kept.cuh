// `kept` on the device: the source of an output row, and the entries that chose a cell. Its values were never checked,
// so every index computed from them is clamped to its tensor here.
#pragma once

#include "cuda/launch.h"

namespace oner_fast::cuda {

// a / b of non-negative numbers, in 32 bits where they fit: 64-bit division takes several times as long.
__device__ __forceinline__ int64_t divided(int64_t a, int64_t b) {
  return (a | b) >> 32 ? a / b : static_cast<int64_t>(static_cast<uint32_t>(a) / static_cast<uint32_t>(b));
}

__device__ __forceinline__ int64_t between(int64_t x, int64_t low, int64_t high) {
  return x < low ? low : x > high ? high : x;
}

__device__ __forceinline__ int64_t first_entry(const Kept& kept, int64_t sample) {
  return kept.starts == nullptr ? sample * kept.per_sample : between(__ldg(kept.starts + sample), 0, kept.total);
}

// The sample of output row `row`, where every sample has `prefix` more rows. There is at least one sample.
__device__ __forceinline__ int64_t sample_of_row(const Kept& kept, int64_t row, int64_t prefix) {
  if (kept.starts == nullptr) return divided(row, kept.per_sample + prefix);
  int64_t low = 0, high = kept.samples;  // the last sample whose first row is not after `row`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (first_entry(kept, middle) + middle * prefix <= row ? low : high) = middle;
  }
  return low;
}

// Entry i of sample b is output row first_entry(b) + i + (b + 1) * prefix.
__device__ __forceinline__ int64_t row_of_entry(const Kept& kept, int64_t sample, int64_t entry, int64_t prefix) {
  return first_entry(kept, sample) + entry + (sample + 1) * prefix;
}

// Computes choices[sample, cell], one sample in each block, with integer atomics, whose results depend on no order.
static __global__ void __launch_bounds__(256) invert_kept(const Kept kept, Choice* choices) {
  for (int64_t sample = blockIdx.x; sample < kept.samples; sample += gridDim.x) {
    Choice* mine = choices + sample * kept.cells;
    for (int64_t cell = threadIdx.x; cell < kept.cells; cell += blockDim.x) mine[cell] = {INT32_MAX, 0};
    __syncthreads();
    const int64_t begin = first_entry(kept, sample), end = first_entry(kept, sample + 1);
    for (int64_t i = begin + threadIdx.x; i < end; i += blockDim.x) {
      const int64_t cell = __ldg(kept.values + i);
      if (cell < 0 || cell >= kept.cells) continue;
      atomicMin(&mine[cell].first, static_cast<int32_t>(i - begin));
      atomicAdd(&mine[cell].count, 1);
    }
  }
}

// Calls take(entry) for the entries of a sample that chose `cell`, after the first of `choice`, in ascending order.
template <typename Take>
__device__ __forceinline__ void for_each_repeat(const Kept& kept, int64_t sample, int64_t cell, Choice choice,
                                                const Take& take) {
  const int64_t begin = first_entry(kept, sample);
  int left = choice.count - 1;
  for (int64_t i = choice.first + int64_t{1}; left > 0; ++i) {
    if (__ldg(kept.values + begin + i) != cell) continue;
    take(i);
    --left;
  }
}

constexpr int64_t kMostBlocks = 65535;  // in y, and for the inversion

inline void launch_inversion(const Kept& kept, Choice* choices, cudaStream_t stream) {
  const int64_t blocks = kept.samples < kMostBlocks ? kept.samples : kMostBlocks;
  if (blocks > 0 && kept.cells > 0) invert_kept<<<static_cast<unsigned>(blocks), 256, 0, stream>>>(kept, choices);
}

}  // namespace oner_fast::cuda
