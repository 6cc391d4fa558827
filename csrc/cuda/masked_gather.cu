// masked_gather: copies kept rows, 16 bytes for each thread and load, adds positions and prepends the prefix. Bound by
// memory.
//
// Traffic in rows of `w` bytes:
//   forward    R = B (P + K) rows written, B K read, N of the positions; the ideal, since a kept token is read once.
//   backward   B (P + K) rows read, B N written. With positions, the thread that writes a cell's gradients also adds
//              them up over 32 samples. The partial sums take 8 bytes for each number and 32 samples. That is 4 % more
//              than the ideal for float32 and 8 % more for half types. A table of 8 bytes for each (sample, cell) says
//              which entries chose a cell.
#include "cuda/kept.cuh"
#include "cuda/numbers.cuh"

namespace oner_fast::cuda {
namespace {

constexpr int kThreads = 256, kTogether = 4;  // loads that a thread has under way

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) masked_gather_forward(const MaskedGather a, int log_lanes) {
  const int64_t row = blockIdx.x * int64_t{kThreads >> log_lanes} + (threadIdx.x >> log_lanes);
  if (row >= a.kept.total + a.kept.samples * a.prefix_rows) return;
  const T *from = nullptr, *place = nullptr;
  if (a.kept.samples > 0) {
    const int64_t sample = sample_of_row(a.kept, row, a.prefix_rows);
    const int64_t within = row - first_entry(a.kept, sample) - sample * a.prefix_rows;
    const int64_t entry = row - (sample + 1) * a.prefix_rows;
    if (a.prefix_rows > 0 && within < a.prefix_rows) {
      from = static_cast<const T*>(a.prefix) + (within < 0 ? 0 : within) * a.prefix_stride;
    } else if (entry >= 0 && entry < a.kept.total) {
      const int64_t cell = __ldg(a.kept.values + entry);
      if (cell >= 0 && cell < a.kept.cells) {
        from = static_cast<const T*>(a.tokens) + sample * a.sample_stride + cell * a.token_stride;
        if (a.positions != nullptr) place = static_cast<const T*>(a.positions) + cell * a.position_stride;
      }
    }
  }
  T* to = static_cast<T*>(a.out) + row * a.width;
  const int lanes = 1 << log_lanes, step = lanes * N;
  for (int first = (threadIdx.x & (lanes - 1)) * N; first < a.width; first += step * kTogether) {
    Bits<T, N> bits[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = first + i * step;
      bits[i] = from != nullptr && column < a.width ? read<T, N>(from + column) : zeros<T, N>();
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const int column = first + i * step;
      if (column >= a.width) break;
      if (place != nullptr) {
        WideOf<T> token[N], position[N];
        widen(bits[i], token);
        widen(read<T, N>(place + column), position);
#pragma unroll
        for (int j = 0; j < N; ++j) token[j] += position[j];
        bits[i] = narrow<T>(token);
      }
      write(to + column, bits[i]);
    }
  }
}

// A thread owns N columns of one cell in all samples of a split: the gradients of tokens, and their sum for positions.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads)
    masked_gather_backward(const MaskedGatherBackward a, int64_t splits, int64_t samples_each) {
  using Wide = WideOf<T>;
  const int words = a.width / N;
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x, cell = divided(thread, words);
  if (cell >= a.kept.cells) return;
  const int64_t column = (thread - cell * words) * N;
  const T* grad = static_cast<const T*>(a.grad) + column;
  for (int64_t split = blockIdx.y; split < splits; split += gridDim.y) {
    Wide sums[N] = {};
    const int64_t end = between((split + 1) * samples_each, 0, a.kept.samples);
    for (int64_t first = split * samples_each; first < end; first += kTogether) {
      Choice choice[kTogether];
      Bits<T, N> bits[kTogether];
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        choice[i] = {0, 0};
        if (first + i < end) choice[i] = a.choices[(first + i) * a.kept.cells + cell];
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        bits[i] = zeros<T, N>();
        if (choice[i].count > 0)
          bits[i] = read<T, N>(grad + row_of_entry(a.kept, first + i, choice[i].first, a.prefix_rows) * a.width);
      }
#pragma unroll
      for (int i = 0; i < kTogether; ++i) {
        const int64_t sample = first + i;
        if (sample >= end) break;
        Wide sum[N];
        widen(bits[i], sum);
        if (choice[i].count > 1) {
          for_each_repeat(a.kept, sample, cell, choice[i], [&](int64_t entry) {
            Wide more[N];
            widen(read<T, N>(grad + row_of_entry(a.kept, sample, entry, a.prefix_rows) * a.width), more);
#pragma unroll
            for (int j = 0; j < N; ++j) sum[j] += more[j];
          });
          bits[i] = narrow<T>(sum);
        }
#pragma unroll
        for (int j = 0; j < N; ++j) sums[j] += sum[j];
        if (a.to_tokens == nullptr) continue;
        write(static_cast<T*>(a.to_tokens) + (sample * a.kept.cells + cell) * a.width + column, bits[i]);
      }
    }
    if (a.to_positions == nullptr) continue;
    Wide* to = static_cast<Wide*>(a.position_partials) + (split * a.kept.cells + cell) * a.width + column;
    write(to, narrow<Wide>(sums));
  }
}

// N columns of one prefix row, over the samples of a split.
template <typename T, int N>
__global__ void __launch_bounds__(kThreads) prefix_sums(const MaskedGatherBackward a, int64_t splits) {
  using Wide = WideOf<T>;
  const int words = a.width / N;
  const int64_t thread = blockIdx.x * int64_t{kThreads} + threadIdx.x, row = divided(thread, words);
  if (row >= a.prefix_rows) return;
  const int64_t column = (thread - row * words) * N;
  for (int64_t split = blockIdx.y; split < splits; split += gridDim.y) {
    Wide sums[N] = {};
    const int64_t end = between((split + 1) * kSamplesPerSplit, 0, a.kept.samples);
#pragma unroll 4
    for (int64_t sample = split * kSamplesPerSplit; sample < end; ++sample) {
      const int64_t from = first_entry(a.kept, sample) + sample * a.prefix_rows + row;
      Wide one[N];
      widen(read<T, N>(static_cast<const T*>(a.grad) + from * a.width + column), one);
#pragma unroll
      for (int j = 0; j < N; ++j) sums[j] += one[j];
    }
    Wide* to = static_cast<Wide*>(a.prefix_partials) + (split * a.prefix_rows + row) * a.width + column;
    write(to, narrow<Wide>(sums));
  }
}

// out (count,): the sum of the partials (splits, count) in order.
template <typename T>
__global__ void __launch_bounds__(kThreads)
    add_partials(const WideOf<T>* partials, T* out, int64_t count, int64_t splits) {
  const int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (at >= count) return;
  WideOf<T> sum = 0;
#pragma unroll 4
  for (int64_t split = 0; split < splits; ++split) sum += __ldg(partials + split * count + at);
  out[at] = narrowed<T>(sum);
}

dim3 grid_of(int64_t items, int64_t splits) {
  const int64_t y = splits < kMostBlocks ? splits : kMostBlocks;
  return dim3(static_cast<unsigned>(blocks_for(items, kThreads)), static_cast<unsigned>(y));
}

template <typename T>
void add_up(const void* partials, void* out, int64_t count, int64_t splits, cudaStream_t stream) {
  const dim3 grid(static_cast<unsigned>(blocks_for(count, kThreads)));
  const auto* from = static_cast<const WideOf<T>*>(partials);
  add_partials<T><<<grid, kThreads, 0, stream>>>(from, static_cast<T*>(out), count, splits);
}

template <typename T, int N>
void launch_forward(const MaskedGather& a, cudaStream_t stream) {
  const int log_lanes = lanes_of(a.width / N);
  const int64_t rows = a.kept.total + a.kept.samples * a.prefix_rows;
  const dim3 grid(static_cast<unsigned>(blocks_for(rows, kThreads >> log_lanes)));
  masked_gather_forward<T, N><<<grid, kThreads, 0, stream>>>(a, log_lanes);
}

template <typename T, int N>
void launch_backward(const MaskedGatherBackward& a, cudaStream_t stream) {
  const int64_t words = a.width / N, splits = blocks_for(a.kept.samples, kSamplesPerSplit);
  if ((a.to_tokens != nullptr || a.to_positions != nullptr) && a.kept.cells > 0) {
    launch_inversion(a.kept, a.choices, stream);
    // Without positions there is no sum over samples, so more threads take fewer samples each.
    const int64_t each = a.to_positions != nullptr ? kSamplesPerSplit : kTogether,
                  parts = blocks_for(a.kept.samples, each);
    masked_gather_backward<T, N><<<grid_of(a.kept.cells * words, parts), kThreads, 0, stream>>>(a, parts, each);
  }
  if (a.to_positions != nullptr && a.kept.cells > 0)
    add_up<T>(a.position_partials, a.to_positions, a.kept.cells * a.width, splits, stream);
  if (a.to_prefix != nullptr && a.prefix_rows > 0) {
    prefix_sums<T, N><<<grid_of(a.prefix_rows * words, splits), kThreads, 0, stream>>>(a, splits);
    add_up<T>(a.prefix_partials, a.to_prefix, a.prefix_rows * a.width, splits, stream);
  }
}

}  // namespace

extern "C" cudaError_t oner_fast_masked_gather(const MaskedGather* call, cudaStream_t stream) {
  const MaskedGather& a = *call;
  if (a.kept.total + a.kept.samples * a.prefix_rows == 0 || a.width == 0) return cudaSuccess;
  const int64_t size = bytes_of(a.number);
  const int64_t strides = a.sample_stride | a.token_stride | a.position_stride | a.prefix_stride | a.width;
  const bool whole = strides * size % 16 == 0 && aligned(a.tokens, 16) && aligned(a.positions, 16) &&
                     aligned(a.prefix, 16) && aligned(a.out, 16);
  return with_type(a.number, [&](auto type) {
    using T = decltype(type);
    whole ? launch_forward<T, 16 / sizeof(T)>(a, stream) : launch_forward<T, 1>(a, stream);
  });
}

extern "C" cudaError_t oner_fast_masked_gather_backward(const MaskedGatherBackward* call, cudaStream_t stream) {
  const MaskedGatherBackward& a = *call;
  if (a.kept.samples == 0 || a.width == 0) return cudaSuccess;
  const bool whole = a.width * bytes_of(a.number) % 16 == 0 && aligned(a.grad, 16) && aligned(a.to_tokens, 16) &&
                     aligned(a.position_partials, 16) && aligned(a.prefix_partials, 16);
  return with_type(a.number, [&](auto type) {
    using T = decltype(type);
    whole ? launch_backward<T, 16 / sizeof(T)>(a, stream) : launch_backward<T, 1>(a, stream);
  });
}

}  // namespace oner_fast::cuda
