// Attention within sequences of at most 256 tokens: what forward and backward share.
//
// A task is a sequence and some of its heads. A block keeps all rows of its heads in shared memory, and a head takes as
// many warps as its rows are tiles of 32. Short sequences leave room for several heads side by side. Blocks take tasks
// from a table in turn, so that a launch needs no length on the host, and no block is started for nothing.
#pragma once

#include "cuda/numbers.cuh"
#include "cuda/tensor_core.cuh"

namespace oner_fast::cuda {

constexpr int kWarp = 32, kTileRows = 32, kMostTokens = 256, kMostThreads = kMostTokens / kTileRows * kWarp;
constexpr int kHalfWords = 8;  // numbers of 16 bits in 16 bytes
constexpr float kLog2E = 1.4426950408889634f;

__host__ __device__ __forceinline__ int ceiling(int count, int each) { return (count + each - 1) / each; }
__host__ __device__ __forceinline__ int max_of(int a, int b) { return a > b ? a : b; }
__host__ __device__ __forceinline__ int in_sixteens(int count) { return (count + 15) & ~15; }

// Rows of each tensor in a block's shared memory, and the block's warps; short batches have room for four tiles.
__host__ __device__ __forceinline__ int rows_of_block(int longest) {
  return max_of(in_sixteens(longest), 4 * kTileRows);
}
__host__ __device__ __forceinline__ int warps_of_block(int longest) {
  return ceiling(rows_of_block(longest), kTileRows);
}

// Heads of a sequence that a block computes at once, dividing them evenly among as few tasks as possible.
__device__ __forceinline__ int heads_at_once(int length, int longest, int heads) {
  const int fitting = min(rows_of_block(longest) / max(in_sixteens(length), 1),
                          warps_of_block(longest) / max(ceiling(length, kTileRows), 1));
  return ceiling(heads, ceiling(heads, max(min(fitting, heads), 1)));
}

// The place of 16 bytes of a row of kWidth 16-bit numbers, rotated so that 8 rows of a matrix use every bank once.
template <int kWidth>
__device__ __forceinline__ int place_in_rows(int row, int part) {
  static_assert(kWidth == 64 || kWidth == 32);
  constexpr int kRowBytes = kWidth * 2;
  return row * kRowBytes + ((kWidth == 64 ? part ^ (row & 7) : part ^ (row >> 1 & 3)) << 4);
}

// The same number, computed where it is needed: what follows from it is not kept in registers across a loop.
template <typename Integer>
__device__ __forceinline__ Integer anew(Integer x) {
  if constexpr (sizeof x == 8)
    asm volatile("" : "+l"(x));
  else
    asm volatile("" : "+r"(x));
  return x;
}

// What a lane adds to the address of a matrix to load it by ldmatrix: rows lane % 16 and then the next 8 columns, or
// both columns of 8 rows and then the next rows. Places of further columns differ by an exclusive or, those of further
// 8 rows by a sum, so that a lane needs no other offsets.
template <int kWidth>
__device__ __forceinline__ uint32_t rows_first(int lane) {
  return place_in_rows<kWidth>(lane % 16, lane / 16);
}
template <int kWidth>
__device__ __forceinline__ uint32_t columns_first(int lane) {
  return place_in_rows<kWidth>(lane % 8 + lane / 16 * 8, lane / 8 % 2);
}
// The same for what a lane holds of a row of sums: two columns of row lane / 4.
template <int kWidth>
__device__ __forceinline__ uint32_t of_sums(int lane) {
  return place_in_rows<kWidth>(lane / 4, 0) + lane % 4 * 4;
}
template <int kWidth>
__device__ __forceinline__ uint32_t moved(uint32_t lane_offset, int row, int part) {
  return row * kWidth * 2 + (lane_offset ^ part << 4);
}

__device__ __forceinline__ void store_word(uint32_t to, uint32_t word) {
  asm volatile("st.shared.b32 [%0], %1;\n" ::"r"(to), "r"(word) : "memory");
}
__device__ __forceinline__ void store_words(uint32_t to, uint4 words) {
  asm volatile("st.shared.v4.b32 [%0], {%1, %2, %3, %4};\n" ::"r"(to), "r"(words.x), "r"(words.y), "r"(words.z),
               "r"(words.w)
               : "memory");
}
__device__ __forceinline__ uint4 load_words(uint32_t from) {
  uint4 found;
  asm volatile("ld.shared.v4.b32 {%0, %1, %2, %3}, [%4];\n"
               : "=r"(found.x), "=r"(found.y), "=r"(found.z), "=r"(found.w)
               : "r"(from)
               : "memory");
  return found;
}
__device__ __forceinline__ float2 load_pair(uint32_t from) {
  float2 found;
  asm volatile("ld.shared.v2.f32 {%0, %1}, [%2];\n" : "=f"(found.x), "=f"(found.y) : "r"(from) : "memory");
  return found;
}

// The first row of a sequence and its length, inside of the tensor even where the boundaries are corrupt.
struct Extent {
  int begin, length;
  __device__ __forceinline__ Extent(const int32_t* starts, int sequence, int rows) {
    begin = min(max(__ldg(starts + sequence), 0), rows);
    length = min(max(__ldg(starts + sequence + 1), begin), rows) - begin;
  }
};

// A task of the table. It fits where no length is beyond the bound, and where the table is of these boundaries.
struct Task {
  Extent q, k;
  int head, heads;
  bool fits;

  template <typename Call>
  __device__ __forceinline__ Task(const Call& a, int task)
      : Task(a, reinterpret_cast<const int2*>(a.table)[1 + task]) {}
  template <typename Call>
  __device__ __forceinline__ Task(const Call& a, int2 entry)
      : q(a.starts_q, entry.x, a.queries),
        k(a.starts_k, entry.x, a.keys),
        head(entry.y >> 16),
        heads(entry.y & 65535),
        fits(length() <= a.longest && heads <= heads_at_once(length(), a.longest, a.heads)) {}

  __device__ __forceinline__ int length() const { return max(q.length, k.length); }
  __device__ __forceinline__ int warps() const { return ceiling(length(), kTileRows); }  // of each head
  __device__ __forceinline__ int stride() const { return in_sixteens(length()); }        // rows from head to head
};

// One head of a packed tensor, from a sequence's first row on.
template <typename T>
struct Head {
  const T* rows;
  int64_t stride;
  __device__ __forceinline__ Head(const void* tensor, int64_t row_stride, int64_t head_stride, int begin, int head)
      : rows(static_cast<const T*>(tensor)), stride(anew(row_stride)) {
    rows += begin * stride + head * anew(head_stride);
  }
};

// Starts to copy the rows of a head, rounded up to 16; those behind the sequence become zeros.
template <int kWidth, typename T>
__device__ __forceinline__ void load_rows(uint32_t to, int first_row, const Head<T>& from, int length) {
  constexpr int kParts = kWidth / kHalfWords;
#pragma unroll 1
  for (int i = static_cast<int>(anew(threadIdx.x)); i < in_sixteens(length) * kParts; i += blockDim.x) {
    const int row = i / kParts, part = i % kParts;
    const bool inside = row < length;
    copy_async(to + place_in_rows<kWidth>(first_row + row, part),
               from.rows + (inside ? row * from.stride + part * kHalfWords : 0), inside ? 16 : 0);
  }
}

// Stores the first `length` of kRows rows of a warp, which lie in shared memory, to one head of a dense result.
template <int kWidth, int kRows, typename T>
__device__ __forceinline__ void store_rows(uint32_t from, int first_row, T* to, int64_t begin, int head, int heads,
                                           int length) {
  constexpr int kParts = kWidth / kHalfWords;
  const int lane = static_cast<int>(anew(threadIdx.x) % kWarp);
  heads = anew(heads);
#pragma unroll
  for (int i = 0; i < kRows * kParts / kWarp; ++i) {
    const int at = i * kWarp + lane, row = at / kParts, part = at % kParts;
    if (row < length)
      *reinterpret_cast<uint4*>(to + ((begin + row) * heads + head) * kWidth + part * kHalfWords) =
          load_words(from + place_in_rows<kWidth>(first_row + row, part));
  }
}

// Fills the rows of one head with NaN, with all threads of a block.
template <int kWidth, typename T>
__device__ __forceinline__ void spoil_rows(T* to, const Extent& rows, int head, int heads) {
#pragma unroll 1
  for (int64_t i = threadIdx.x; i < int64_t{rows.length} * kWidth; i += blockDim.x)
    to[((rows.begin + i / kWidth) * heads + head) * kWidth + i % kWidth] = static_cast<T>(NAN);
}

// 2^x; results below 2^-126 become 0.
__device__ __forceinline__ float power_of_two(float x) {
  float found;
  asm("ex2.approx.ftz.f32 %0, %1;\n" : "=f"(found) : "f"(x));
  return found;
}

// Two numbers of 16 bits in a word, the first in its low half.
template <typename T>
__device__ __forceinline__ uint32_t packed(float low, float high);

template <>
__device__ __forceinline__ uint32_t packed<__half>(float low, float high) {
  const __half2 both = __floats2half2_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}
template <>
__device__ __forceinline__ uint32_t packed<__nv_bfloat16>(float low, float high) {
  const __nv_bfloat162 both = __floats2bfloat162_rn(low, high);
  return *reinterpret_cast<const uint32_t*>(&both);
}

// Launches as many blocks as the GPU holds at once, at most one for each head of each sequence.
template <typename Call>
cudaError_t launch_tasks(void (*kernel)(Call), const Call& call, int bytes, cudaStream_t stream) {
  const int threads = warps_of_block(call.longest) * kWarp;
  int device = 0, multiprocessors = 0, resident = 0;
  cudaError_t error = cudaGetDevice(&device);
  if (error == cudaSuccess) error = cudaDeviceGetAttribute(&multiprocessors, cudaDevAttrMultiProcessorCount, device);
  if (error == cudaSuccess) error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, bytes);
  if (error == cudaSuccess) error = cudaOccupancyMaxActiveBlocksPerMultiprocessor(&resident, kernel, threads, bytes);
  if (error != cudaSuccess) return error;
  const int64_t held = int64_t{multiprocessors} * max_of(resident, 1), most = int64_t{call.sequences} * call.heads;
  if (most == 0) return cudaSuccess;
  kernel<<<static_cast<unsigned>(held < most ? held : most), threads, bytes, stream>>>(call);
  return cudaGetLastError();
}

}  // namespace oner_fast::cuda
