// gather_patches: reads only the kept patches, and normalises, casts and stores them as rows. A thread writes 16 bytes
// of the result from adjacent pixels of a line. Bound by memory.
//
// B K C p^2 pixels are read and as many numbers written. A line of 16 bytes (uint8, p = 16) is half a 32-byte sector;
// where its neighbour is not kept, the other half is read in vain, which no order of the work can avoid.
#include "cuda/kept.cuh"
#include "cuda/numbers.cuh"

namespace oner_fast::cuda {
namespace {

constexpr int kThreads = 256, kTogether = 4;

template <typename Wide>
__device__ __forceinline__ Wide per_channel(const double* values, int channel, double scale, double otherwise) {
  return static_cast<Wide>((values == nullptr ? otherwise : __ldg(values + channel)) * scale);
}

// The corner of the patch of a kept entry in channel 0 as an offset in the images, or -1.
__device__ __forceinline__ int64_t corner_of(const GatherPatches& a, int64_t entry) {
  if (a.kept.samples == 0) return -1;
  const int64_t sample = sample_of_row(a.kept, entry, 0), cell = __ldg(a.kept.values + entry);
  if (cell < 0 || cell >= a.kept.cells) return -1;
  const int64_t down = divided(cell, a.across);
  return sample * a.sample_stride + down * a.patch * a.line_stride + (cell - down * a.across) * a.patch;
}

// The offset of the pixel for number `at` of a row of the result, from the corner on.
struct Pixel {
  int channel;
  int64_t offset;
  __device__ __forceinline__ Pixel(const GatherPatches& a, unsigned at) {
    const unsigned square = static_cast<unsigned>(a.patch) * a.patch, within = at % square, line = within / a.patch;
    channel = static_cast<int>(at / square);
    offset = channel * a.channel_stride + line * a.line_stride + (within - line * a.patch);
  }
};

// (x - mean) / std of a channel; for bytes (x - 255 mean) / (255 std). The reciprocal is computed once, except for
// double.
template <typename Wide>
struct Normalise {
  Wide shift, divisor, factor;
  __device__ __forceinline__ Normalise(const GatherPatches& a, int channel) {
    const double scale = a.image_number == kU8 ? 255.0 : 1.0;
    shift = per_channel<Wide>(a.mean, channel, scale, 0.0);
    divisor = per_channel<Wide>(a.std, channel, scale, 1.0);
    factor = Wide(1) / divisor;
  }
  __device__ __forceinline__ Wide operator()(Wide x) const {
    if constexpr (std::is_same_v<Wide, double>)
      return (x - shift) / divisor;
    else
      return (x - shift) * factor;
  }
};

template <typename In, typename Out, int N>
__global__ void __launch_bounds__(kThreads) gather_patches_forward(const GatherPatches a, int log_lanes) {
  using Wide = WideOf<Out>;
  const int64_t entry = blockIdx.x * int64_t{kThreads >> log_lanes} + (threadIdx.x >> log_lanes);
  if (entry >= a.kept.total) return;
  const int64_t corner = corner_of(a, entry);
  const unsigned width = static_cast<unsigned>(a.channels) * a.patch * a.patch;
  const In* from = static_cast<const In*>(a.images) + corner;
  Out* to = static_cast<Out*>(a.out) + entry * width;
  const unsigned lanes = 1u << log_lanes, step = lanes * N;
  for (unsigned first = (threadIdx.x & (lanes - 1)) * N; first < width; first += step * kTogether) {
    Bits<In, N> bits[kTogether];
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      bits[i] = zeros<In, N>();
      if (corner >= 0 && first + i * step < width) bits[i] = read<In, N>(from + Pixel(a, first + i * step).offset);
    }
#pragma unroll
    for (int i = 0; i < kTogether; ++i) {
      const unsigned at = first + i * step;
      if (at >= width) break;
      Wide x[N];
      widen(bits[i], x);
      const Normalise<Wide> normalise(a, Pixel(a, at).channel);
#pragma unroll
      for (int j = 0; j < N; ++j) x[j] = corner >= 0 ? normalise(x[j]) : Wide(0);
      write(to + at, narrow<Out>(x));
    }
  }
}

// Any two types and any alignment, one number at a time.
template <typename Wide>
__global__ void __launch_bounds__(kThreads) gather_patches_any(const GatherPatches a, int log_lanes) {
  const int64_t entry = blockIdx.x * int64_t{kThreads >> log_lanes} + (threadIdx.x >> log_lanes);
  if (entry >= a.kept.total) return;
  const int64_t corner = corner_of(a, entry);
  const unsigned width = static_cast<unsigned>(a.channels) * a.patch * a.patch, lanes = 1u << log_lanes;
  for (unsigned at = threadIdx.x & (lanes - 1); at < width; at += lanes) {
    const Pixel pixel(a, at);
    Wide x = 0;
    if (corner >= 0)
      x = Normalise<Wide>(a, pixel.channel)(read_any<Wide>(a.images, a.image_number, corner + pixel.offset));
    write_any(a.out, a.out_number, entry * width + at, x);
  }
}

// Pixel (sample, channel, y, x) of the images' gradient; every pixel is written, kept or not.
struct Target {
  int64_t sample, cell, column;  // column: within a row of the gradient
  int channel;
  __device__ __forceinline__ Target(const GatherPatchesBackward& a, int64_t pixel) {
    const int64_t width = static_cast<int64_t>(a.across) * a.patch, height = static_cast<int64_t>(a.down) * a.patch;
    int64_t rest = divided(pixel, width);
    const unsigned x = static_cast<unsigned>(pixel - rest * width);
    const int64_t plane = divided(rest, height);
    const unsigned y = static_cast<unsigned>(rest - plane * height), patch = a.patch;
    sample = divided(plane, a.channels);
    channel = static_cast<int>(plane - sample * a.channels);
    const unsigned down = y / patch, right = x / patch;
    cell = static_cast<int64_t>(down) * a.across + right;
    column = (static_cast<int64_t>(channel) * patch + (y - down * patch)) * patch + (x - right * patch);
  }
};

template <typename T, int N>
__global__ void __launch_bounds__(kThreads) gather_patches_backward(const GatherPatchesBackward a, int64_t words) {
  using Wide = WideOf<T>;
  const int64_t word = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (word >= words) return;
  const Target target(a, word * N);
  const int64_t width = static_cast<int64_t>(a.channels) * a.patch * a.patch;
  const Choice choice = a.choices[target.sample * a.kept.cells + target.cell];
  const T* grad = static_cast<const T*>(a.grad) + target.column;
  Wide sum[N] = {};
  if (choice.count > 0) {
    widen(read<T, N>(grad + row_of_entry(a.kept, target.sample, choice.first, 0) * width), sum);
    for_each_repeat(a.kept, target.sample, target.cell, choice, [&](int64_t entry) {
      Wide more[N];
      widen(read<T, N>(grad + row_of_entry(a.kept, target.sample, entry, 0) * width), more);
#pragma unroll
      for (int j = 0; j < N; ++j) sum[j] += more[j];
    });
    const Wide divisor = per_channel<Wide>(a.std, target.channel, 1.0, 1.0);
#pragma unroll
    for (int j = 0; j < N; ++j) sum[j] /= divisor;
  }
  write(static_cast<T*>(a.to_images) + word * N, narrow<T>(sum));
}

template <typename Wide>
__global__ void __launch_bounds__(kThreads) gather_patches_backward_any(const GatherPatchesBackward a, int64_t pixels) {
  const int64_t pixel = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  if (pixel >= pixels) return;
  const Target target(a, pixel);
  const int64_t width = static_cast<int64_t>(a.channels) * a.patch * a.patch;
  const Choice choice = a.choices[target.sample * a.kept.cells + target.cell];
  const Wide divisor = per_channel<Wide>(a.std, target.channel, 1.0, 1.0);
  Wide sum = 0;
  if (choice.count > 0) {
    const auto add = [&](int64_t entry) {
      sum +=
          read_any<Wide>(a.grad, a.grad_number, row_of_entry(a.kept, target.sample, entry, 0) * width + target.column);
    };
    add(choice.first);
    for_each_repeat(a.kept, target.sample, target.cell, choice, add);
    sum /= divisor;
  }
  write_any(a.to_images, a.image_number, pixel, sum);
}

template <typename In, typename Out>
bool fits(const GatherPatches& a) {
  constexpr int64_t kNumbers = 16 / sizeof(Out), kBytes = kNumbers * sizeof(In) < 16 ? kNumbers * sizeof(In) : 16;
  const int64_t strides = a.sample_stride | a.channel_stride | a.line_stride;
  return a.patch % kNumbers == 0 && strides * static_cast<int64_t>(sizeof(In)) % kBytes == 0 &&
         aligned(a.images, kBytes) && aligned(a.out, 16);
}

template <typename In, typename Out>
bool launch_if(const GatherPatches& a, int32_t in, int32_t out, cudaStream_t stream) {
  if (a.image_number != in || a.out_number != out || !fits<In, Out>(a)) return false;
  constexpr int kNumbers = 16 / sizeof(Out);
  const int log_lanes = lanes_of(static_cast<int64_t>(a.channels) * a.patch * a.patch / kNumbers);
  const dim3 grid(static_cast<unsigned>(blocks_for(a.kept.total, kThreads >> log_lanes)));
  gather_patches_forward<In, Out, kNumbers><<<grid, kThreads, 0, stream>>>(a, log_lanes);
  return true;
}

template <typename T>
bool launch_back_if(const GatherPatchesBackward& a, int32_t number, int64_t pixels, cudaStream_t stream) {
  constexpr int kNumbers = 16 / sizeof(T);
  if (a.grad_number != number || a.image_number != number || a.patch % kNumbers != 0) return false;
  if (!aligned(a.grad, 16) || !aligned(a.to_images, 16)) return false;
  const dim3 grid(static_cast<unsigned>(blocks_for(pixels / kNumbers, kThreads)));
  gather_patches_backward<T, kNumbers><<<grid, kThreads, 0, stream>>>(a, pixels / kNumbers);
  return true;
}

}  // namespace

extern "C" cudaError_t oner_fast_gather_patches(const GatherPatches* call, cudaStream_t stream) {
  const GatherPatches& a = *call;
  const int64_t width = static_cast<int64_t>(a.channels) * a.patch * a.patch;
  if (a.kept.total == 0 || width == 0) return cudaSuccess;
  const bool done =
      launch_if<unsigned char, float>(a, kU8, kF32, stream) || launch_if<unsigned char, __half>(a, kU8, kF16, stream) ||
      launch_if<unsigned char, __nv_bfloat16>(a, kU8, kBF16, stream) ||
      launch_if<float, float>(a, kF32, kF32, stream) || launch_if<float, __half>(a, kF32, kF16, stream) ||
      launch_if<float, __nv_bfloat16>(a, kF32, kBF16, stream) || launch_if<__half, __half>(a, kF16, kF16, stream) ||
      launch_if<__nv_bfloat16, __nv_bfloat16>(a, kBF16, kBF16, stream) ||
      launch_if<double, double>(a, kF64, kF64, stream);
  if (!done) {
    const int log_lanes = lanes_of(width);
    const dim3 grid(static_cast<unsigned>(blocks_for(a.kept.total, kThreads >> log_lanes)));
    if (a.image_number == kF64 || a.out_number == kF64)
      gather_patches_any<double><<<grid, kThreads, 0, stream>>>(a, log_lanes);
    else
      gather_patches_any<float><<<grid, kThreads, 0, stream>>>(a, log_lanes);
  }
  return cudaGetLastError();
}

extern "C" cudaError_t oner_fast_gather_patches_backward(const GatherPatchesBackward* call, cudaStream_t stream) {
  const GatherPatchesBackward& a = *call;
  const int64_t pixels = a.kept.samples * a.channels * a.down * a.patch * a.across * a.patch;
  if (pixels == 0) return cudaSuccess;
  launch_inversion(a.kept, a.choices, stream);
  const bool done = launch_back_if<float>(a, kF32, pixels, stream) || launch_back_if<__half>(a, kF16, pixels, stream) ||
                    launch_back_if<__nv_bfloat16>(a, kBF16, pixels, stream);
  if (!done) {
    const dim3 grid(static_cast<unsigned>(blocks_for(pixels, kThreads)));
    if (a.grad_number == kF64 || a.image_number == kF64)
      gather_patches_backward_any<double><<<grid, kThreads, 0, stream>>>(a, pixels);
    else
      gather_patches_backward_any<float><<<grid, kThreads, 0, stream>>>(a, pixels);
  }
  return cudaGetLastError();
}

}  // namespace oner_fast::cuda
