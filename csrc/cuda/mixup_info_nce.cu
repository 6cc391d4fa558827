// mixup_info_nce, the pass over the logits: tiles of 128 x 128 on tensor cores, of which only the maxima and sums of
// exponentials of rows and columns are stored.
//
// The tiles are divided into at most 32 x 32 chunks (more chunks of columns where there are few rows). A block
// processes the tiles of its chunk row by row. It keeps the statistics of its rows in registers, and those of its
// columns in a slice of scratch memory that no other block touches. A second kernel merges the chunks in order. The
// scratch takes 8 bytes for each row and chunk of columns and for each column and chunk of rows, O(N) in all.
//
// FLOPs: 2 M N D on tensor cores and M N exponentials (twice with columns). Bytes that must move: both sides once, and
// the statistics. A tile reads 128 rows of either side, after the first time from the second-level cache.
#include "cuda/kept.cuh"
#include "cuda/numbers.cuh"
#include "cuda/tensor_core.cuh"

namespace oner_fast::cuda {
namespace {

constexpr int kThreads = 256, kTile = 128, kDepth = 32, kStages = 3;  // kDepth: numbers of a row in a stage
constexpr int kWarpRows = 64, kWarpColumns = 32;                      // 2 x 4 warps
constexpr int kRowBytes = kDepth * 2, kSideBytes = kTile * kRowBytes, kStageBytes = 2 * kSideBytes;
constexpr int kChunks = 32, kBlocks = 1024;
constexpr float kInfinity = INFINITY;

struct Shared {
  unsigned char stages[kStages][kStageBytes];  // of each: rows, then columns
  float row_factor[kTile];
  int own[kTile], partner[kTile];  // the columns of a row's targets, or -1
  float2 columns[2][kTile];        // (max, sum) by the warps of a column, of a row
  float2 rows[4][kTile];
};

// What pairs with equal codes are.
enum Same { kNone, kIgnored, kPositive };
constexpr float kIgnoredLogit = -1e38f;  // its exponential is 0, and no difference of two of these is NaN

// Of pairs with equal codes, behind Shared.
struct SharedCodes {
  int row_code[kTile], column_code[kTile];
  float row_share[kTile], column_share[kTile];
  float targets[4][kTile];  // the sum over a row's targets, by the warps of a row
};

// The place of 16 bytes of a row in a stage, rotated so that 8 rows of a matrix use every bank once.
__device__ __forceinline__ int place_of(int row, int part) { return row * kRowBytes + ((part ^ (row >> 1 & 3)) << 4); }

// exp(x - max), where max is -inf before the first number.
__device__ __forceinline__ float finite(float max) { return max == -kInfinity ? 0.0f : max; }

// Merges another pair into (max, sum); a NaN in either sum stays.
__device__ __forceinline__ float2 merged(float2 a, float2 b) {
  const float max = fmaxf(a.x, b.x), from = finite(max);
  return {max, a.y * __expf(a.x - from) + b.y * __expf(b.x - from)};
}

// The next stage of the tiles of a chunk, row of tiles by row of tiles.
struct Cursor {
  int row_tile, column_tile, depth;
  __device__ __forceinline__ void advance(int depths, int first_column, int last_column) {
    if (++depth < depths) return;
    depth = 0;
    if (++column_tile < last_column) return;
    column_tile = first_column;
    ++row_tile;
  }
};

template <typename T>
__device__ __forceinline__ void load_side(uint32_t to, const T* side, int64_t stride, int count, int width, int tile,
                                          int depth) {
#pragma unroll
  for (int i = 0; i < kTile * kRowBytes / 16 / kThreads; ++i) {
    const int chunk = threadIdx.x + i * kThreads, row = chunk / 4, part = chunk % 4;
    const int at = tile * kTile + row, column = depth * kDepth + part * 8;
    const bool inside = at < count && column < width;
    copy_async(to + place_of(row, part), side + (inside ? at * stride + column : 0), inside ? 16 : 0);
  }
}

// The column of a target, or -1 where there is none.
__device__ __forceinline__ int column_of(int64_t target, int columns) {
  return target >= 0 && target < columns ? static_cast<int>(target) : -1;
}

// Stores the logit of a target at column `at` of a warp's tile, if this lane has it. It is selected bit by bit, because
// an index would put all sums in local memory.
__device__ __forceinline__ void take_target(const float (&logits)[8], int at, int quad, float* to) {
  if (at < 0 || at >= kWarpColumns || at % 8 / 2 != quad) return;
  const bool odd = at & 1, second = at & 8, third = at & 16;
  const float low = second ? (odd ? logits[3] : logits[2]) : (odd ? logits[1] : logits[0]);
  const float high = second ? (odd ? logits[7] : logits[6]) : (odd ? logits[5] : logits[4]);
  *to = third ? high : low;
}

// Blocks that share a multiprocessor. Beside another block, ignored pairs would spill a few registers on sm_90, and
// rows alone with codes on every GPU.
template <bool kColumns, Same kSame>
constexpr int kResident = kSame == kNone || (kColumns && kSame == kPositive) ? 2 : 1;

template <typename T, bool kColumns, Same kSame>
__global__ void __launch_bounds__(kThreads, kResident<kColumns, kSame>) mixup_statistics(const MixupStatistics a) {
  extern __shared__ __align__(128) unsigned char memory[];
  Shared& s = *reinterpret_cast<Shared*>(memory);
  SharedCodes& codes = *reinterpret_cast<SharedCodes*>(memory + sizeof(Shared));  // there where kSame is not kNone
  const uint32_t stages = static_cast<uint32_t>(__cvta_generic_to_shared(s.stages));
  const int lane = threadIdx.x % 32, warp = threadIdx.x / 32, group = lane / 4, quad = lane % 4;
  const int warp_row = warp / 4 * kWarpRows, warp_column = warp % 4 * kWarpColumns;
  const int row_tiles = (a.rows + kTile - 1) / kTile, column_tiles = (a.columns + kTile - 1) / kTile;
  const int first_row = blockIdx.y * a.row_tiles_each, last_row = min(first_row + a.row_tiles_each, row_tiles);
  const int first_column = blockIdx.x * a.column_tiles_each;
  const int last_column = min(first_column + a.column_tiles_each, column_tiles);
  const int depths = max((a.width + kDepth - 1) / kDepth, 1);
  const int64_t steps = static_cast<int64_t>(last_row - first_row) * (last_column - first_column) * depths;
  const float scale = __ldg(a.scale);

  const auto load = [&](const Cursor& at, int stage) {
    const uint32_t to = stages + stage * kStageBytes;
    load_side(to, static_cast<const T*>(a.query), a.query_stride, a.rows, a.width, at.row_tile, at.depth);
    load_side(to + kSideBytes, static_cast<const T*>(a.key), a.key_stride, a.columns, a.width, at.column_tile,
              at.depth);
  };

  Cursor ahead{first_row, first_column, 0}, now = ahead;
  for (int stage = 0; stage < kStages - 1; ++stage) {
    if (stage < steps) {
      load(ahead, stage);
      ahead.advance(depths, first_column, last_column);
    }
    commit_copies();
  }

  float sums[4][4][4] = {};      // [16 rows, 8 columns, numbers of a lane]
  float row_max[8], row_sum[8];  // of a lane's rows and columns
#pragma unroll
  for (int r = 0; r < 8; ++r) {
    row_max[r] = -kInfinity;
    row_sum[r] = 0;
  }
  int stage = 0;
  for (int64_t step = 0; step < steps; ++step) {
    wait_copies<kStages - 2>();
    __syncthreads();
    if (step + kStages - 1 < steps) {  // into the stage that all warps have finished
      load(ahead, stage == 0 ? kStages - 1 : stage - 1);
      ahead.advance(depths, first_column, last_column);
    }
    commit_copies();
    const int row0 = now.row_tile * kTile, column0 = now.column_tile * kTile;

    if (now.depth == 0 && now.column_tile == first_column) {
      if (threadIdx.x < kTile) {
        const int row = row0 + threadIdx.x;
        float factor = 0;
        int own = -1, partner = -1;
        if (row < a.rows) {
          factor = scale * (a.query_factor == nullptr ? 1.0f : __ldg(a.query_factor + row));
          own = column_of(a.first_pair + row, a.columns);
          if (a.partner != nullptr) partner = column_of(__ldg(a.partner + row), a.columns);
          if (kSame != kPositive && first_column == 0 && own < 0) a.own[row] = 0;
          if (first_column == 0 && partner < 0 && a.partner != nullptr) a.shared[row] = 0;
        }
        s.row_factor[threadIdx.x] = factor;
        s.own[threadIdx.x] = own;
        s.partner[threadIdx.x] = partner;
        if constexpr (kSame != kNone) codes.row_code[threadIdx.x] = row < a.rows ? __ldg(a.query_code + row) : -1;
        if constexpr (kSame == kPositive) {
          codes.row_share[threadIdx.x] = row < a.rows ? __ldg(a.row_share + row) : 0.0f;
#pragma unroll
          for (int i = 0; i < 4; ++i) codes.targets[i][threadIdx.x] = 0;
        }
      }
      __syncthreads();
    }
    if constexpr (kSame != kNone) {
      if (now.depth == 0) {
        if (threadIdx.x < kTile) {
          const int column = column0 + threadIdx.x;
          const bool inside = column < a.columns;
          codes.column_code[threadIdx.x] = inside ? __ldg(a.key_code + column) : INT32_MIN;  // no row's
          if constexpr (kSame == kPositive)
            codes.column_share[threadIdx.x] = inside ? __ldg(a.column_share + column) : 0.0f;
        }
        __syncthreads();
      }
    }

    const uint32_t rows = stages + stage * kStageBytes, columns = rows + kSideBytes;
#pragma unroll
    for (int part = 0; part < kDepth / 8; part += 2) {
      uint32_t x[4][4], y[2][4];
#pragma unroll
      for (int i = 0; i < 4; ++i) load_matrices(x[i], rows + place_of(warp_row + i * 16 + lane % 16, part + lane / 16));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        load_matrices(y[j], columns + place_of(warp_column + j * 16 + lane % 8 + lane / 16 * 8, part + lane / 8 % 2));
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j) multiply<T>(sums[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
    }
    stage = stage + 1 == kStages ? 0 : stage + 1;

    if (now.depth + 1 == depths) {  // the tile is whole: its products become logits
      float key_factor[8];
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        const int column = column0 + warp_column + c / 2 * 8 + quad * 2 + c % 2;
        key_factor[c] = a.key_factor == nullptr || column >= a.columns ? 1.0f : __ldg(a.key_factor + column);
      }
      if constexpr (kSame != kNone) {
        // Apart from the loop below, whose registers leave no room for this one's. Codes of columns are read again for
        // every row, for the same reason.
        const volatile int* row_code = codes.row_code;
        const volatile float* row_factor = s.row_factor;
        const volatile int* column_code = codes.column_code + warp_column + quad * 2;
        const volatile float* column_share = codes.column_share + warp_column + quad * 2;
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          const int row = warp_row + r / 2 * 16 + r % 2 * 8 + group;
          const int code = row_code[row], own = s.own[row] - column0 - warp_column - quad * 2;
          const float factor = row_factor[row];
          float targets = 0;
#pragma unroll
          for (int c = 0; c < 8; ++c) {
            const int at = c / 2 * 8 + c % 2;
            const bool is_equal = code == column_code[at], is_own = own == at;
            float& logit = sums[r / 2][c / 2][r % 2 * 2 + c % 2];
            logit = logit * factor * key_factor[c];
            if constexpr (kSame == kIgnored)
              logit = is_equal && !is_own ? kIgnoredLogit : logit;
            else
              targets += is_equal || is_own ? logit * (codes.row_share[row] + column_share[at]) : 0.0f;
          }
          if constexpr (kSame == kPositive) {
#pragma unroll
            for (int other = 1; other < 4; other *= 2) targets += __shfl_xor_sync(~0u, targets, other);
            if (quad == 0) codes.targets[warp % 4][row] += targets;
          }
        }
      }
      const bool edge = row0 + kTile > a.rows || column0 + kTile > a.columns;
#pragma unroll
      for (int r = 0; r < 8; ++r) {
        const int row = warp_row + r / 2 * 16 + r % 2 * 8 + group;
        const bool no_row = edge && row0 + row >= a.rows;
        const float factor = s.row_factor[row];
        float max = row_max[r], logits[8];
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float logit = sums[r / 2][c / 2][r % 2 * 2 + c % 2];
          if constexpr (kSame == kNone) logit = logit * factor * key_factor[c];
          const int column = column0 + warp_column + c / 2 * 8 + quad * 2 + c % 2;
          if (no_row || (edge && column >= a.columns)) logit = -kInfinity;
          max = fmaxf(max, logit);
          sums[r / 2][c / 2][r % 2 * 2 + c % 2] = logits[c] = logit;
        }
        const float from = finite(max);
        float sum = row_sum[r] * __expf(row_max[r] - from);
#pragma unroll
        for (int c = 0; c < 8; ++c) sum += __expf(logits[c] - from);
        row_max[r] = max;
        row_sum[r] = sum;

        if constexpr (kSame != kPositive)
          take_target(logits, s.own[row] - column0 - warp_column, quad, a.own + row0 + row);
        if (a.partner != nullptr)
          take_target(logits, s.partner[row] - column0 - warp_column, quad, a.shared + row0 + row);
      }

      if constexpr (kColumns) {
#pragma unroll
        for (int c = 0; c < 8; ++c) {
          float max = -kInfinity;
#pragma unroll
          for (int r = 0; r < 8; ++r) max = fmaxf(max, sums[r / 2][c / 2][r % 2 * 2 + c % 2]);
#pragma unroll
          for (int other = 4; other < 32; other *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, other));
          const float from = finite(max);
          float sum = 0;
#pragma unroll
          for (int r = 0; r < 8; ++r) sum += __expf(sums[r / 2][c / 2][r % 2 * 2 + c % 2] - from);
#pragma unroll
          for (int other = 4; other < 32; other *= 2) sum += __shfl_xor_sync(~0u, sum, other);
          if (group == 0) s.columns[warp / 4][warp_column + c / 2 * 8 + quad * 2 + c % 2] = {max, sum};
        }
        __syncthreads();
        const int column = column0 + threadIdx.x;
        if (threadIdx.x < kTile && column < a.columns) {
          float2 found = merged(s.columns[0][threadIdx.x], s.columns[1][threadIdx.x]);
          float* max = a.column_parts + static_cast<int64_t>(blockIdx.y) * a.columns + column;
          float* sum = max + static_cast<int64_t>(a.row_chunks) * a.columns;
          if (now.row_tile != first_row) found = merged({*max, *sum}, found);
          *max = found.x;
          *sum = found.y;
        }
      }

      if (now.column_tile + 1 == last_column) {  // the rows are whole, as far as this block sees them
#pragma unroll
        for (int r = 0; r < 8; ++r) {
          float2 found{row_max[r], row_sum[r]};
#pragma unroll
          for (int other = 1; other < 4; other *= 2)
            found = merged(found, {__shfl_xor_sync(~0u, found.x, other), __shfl_xor_sync(~0u, found.y, other)});
          if (quad == 0) s.rows[warp % 4][warp_row + r / 2 * 16 + r % 2 * 8 + group] = found;
          row_max[r] = -kInfinity;
          row_sum[r] = 0;
        }
        __syncthreads();
        const int row = row0 + threadIdx.x;
        if (threadIdx.x < kTile && row < a.rows) {
          float2 found = s.rows[0][threadIdx.x];
#pragma unroll
          for (int i = 1; i < 4; ++i) found = merged(found, s.rows[i][threadIdx.x]);
          float* max = a.row_parts + static_cast<int64_t>(blockIdx.x) * a.rows + row;
          max[0] = found.x;
          max[static_cast<int64_t>(a.column_chunks) * a.rows] = found.y;
          if constexpr (kSame == kPositive) {
            float targets = 0;
#pragma unroll
            for (int i = 0; i < 4; ++i) targets += codes.targets[i][threadIdx.x];
            a.own_parts[static_cast<int64_t>(blockIdx.x) * a.rows + row] = targets;
          }
        }
      }
#pragma unroll
      for (int i = 0; i < 4; ++i)
#pragma unroll
        for (int j = 0; j < 4; ++j)
#pragma unroll
          for (int k = 0; k < 4; ++k) sums[i][j][k] = 0;
    }
    now.advance(depths, first_column, last_column);
  }
}

// Merges the statistics of the chunks for each row and each column, in order.
__global__ void __launch_bounds__(kThreads) mixup_merge_chunks(const MixupStatistics a) {
  int64_t at = blockIdx.x * int64_t{kThreads} + threadIdx.x;
  const bool of_row = at < a.rows;
  if (!of_row) at -= a.rows;
  const int64_t count = of_row ? a.rows : a.columns;
  if (at >= count || (!of_row && a.column_max == nullptr)) return;
  const float* parts = of_row ? a.row_parts : a.column_parts;
  const int chunks = of_row ? a.column_chunks : a.row_chunks;
  float2 found{-kInfinity, 0};
#pragma unroll 4
  for (int chunk = 0; chunk < chunks; ++chunk) {
    const float* max = parts + chunk * count + at;
    found = merged(found, {__ldg(max), __ldg(max + chunks * count)});
  }
  (of_row ? a.row_max : a.column_max)[at] = found.x;
  (of_row ? a.row_sum : a.column_sum)[at] = found.y;
  if (!of_row || a.own_parts == nullptr) return;
  float targets = 0;
  for (int chunk = 0; chunk < chunks; ++chunk) targets += __ldg(a.own_parts + chunk * count + at);
  a.own[at] = targets;
}

// Packs a row with each warp: (1 - mix) x + mix other, scaled by a power of two to a norm of about 1 and rounded once.
// An unmixed row is copied unchanged.
template <typename T>
__global__ void __launch_bounds__(kThreads) mixup_pack(const MixupPack a) {
  const int64_t row = blockIdx.x * int64_t{kThreads / 32} + threadIdx.x / 32;
  if (row >= a.rows) return;
  const float inverse = a.inverse_norm == nullptr ? 1.0f : __ldg(a.inverse_norm + row);
  const bool as_it_is = a.other == nullptr || inverse == 0;  // a row of zeros has an inverse norm of 0
  const float power = as_it_is ? 1.0f : __uint_as_float(__float_as_uint(inverse) & 0x7F800000u);
  const float share = a.other == nullptr ? 0.0f : __ldg(a.mix + row * a.mix_step);
  const T *x = static_cast<const T*>(a.x) + row * a.row_stride, *other = static_cast<const T*>(a.other);
  if (other != nullptr) other += row * a.other_row_stride;
  T* to = static_cast<T*>(a.out) + row * a.padded;
  for (int i = threadIdx.x % 32; i < a.padded; i += 32) {
    float value = 0;
    if (i < a.width) {
      value = static_cast<float>(__ldg(x + i * a.column_stride));
      if (other != nullptr) {
        const float second = static_cast<float>(__ldg(other + i * a.other_column_stride));
        value = ((1 - share) * value + share * second) * power;
      }
    }
    to[i] = static_cast<T>(value);
  }
  if (threadIdx.x % 32 == 0) a.rest[row] = inverse / power;
}

template <typename T, bool kColumns, Same kSame>
cudaError_t launch_statistics(const MixupStatistics& a, cudaStream_t stream) {
  const auto kernel = mixup_statistics<T, kColumns, kSame>;
  constexpr int kBytes = sizeof(Shared) + (kSame == kNone ? 0 : sizeof(SharedCodes));
  const cudaError_t error = cudaFuncSetAttribute(kernel, cudaFuncAttributeMaxDynamicSharedMemorySize, kBytes);
  if (error != cudaSuccess) return error;
  const dim3 grid(static_cast<unsigned>(a.column_chunks), static_cast<unsigned>(a.row_chunks));
  kernel<<<grid, kThreads, kBytes, stream>>>(a);
  const int64_t count = static_cast<int64_t>(a.rows) + (kColumns ? a.columns : 0);
  mixup_merge_chunks<<<static_cast<unsigned>(blocks_for(count, kThreads)), kThreads, 0, stream>>>(a);
  return cudaGetLastError();
}

template <typename T, bool kColumns>
cudaError_t launch_for_same(const MixupStatistics& a, cudaStream_t stream) {
  if (a.query_code == nullptr) return launch_statistics<T, kColumns, kNone>(a, stream);
  return a.row_share == nullptr ? launch_statistics<T, kColumns, kIgnored>(a, stream)
                                : launch_statistics<T, kColumns, kPositive>(a, stream);
}

}  // namespace

extern "C" void oner_fast_mixup_plan(MixupStatistics* call) {
  const int64_t row_tiles = blocks_for(call->rows, kTile), column_tiles = blocks_for(call->columns, kTile);
  const int64_t row_chunks = row_tiles < kChunks ? row_tiles : kChunks;
  const int64_t most = kBlocks / (row_chunks > 0 ? row_chunks : 1);
  const int64_t column_chunks = column_tiles < most ? column_tiles : most;
  const auto each = [](int64_t tiles, int64_t chunks) {
    return static_cast<int32_t>(chunks > 0 ? blocks_for(tiles, chunks) : 1);
  };
  call->row_tiles_each = each(row_tiles, row_chunks);
  call->column_tiles_each = each(column_tiles, column_chunks);
  call->row_chunks = static_cast<int32_t>(blocks_for(row_tiles, call->row_tiles_each));
  call->column_chunks = static_cast<int32_t>(blocks_for(column_tiles, call->column_tiles_each));
}

extern "C" cudaError_t oner_fast_mixup_statistics(const MixupStatistics* call, cudaStream_t stream) {
  const MixupStatistics& a = *call;
  if (a.rows == 0 || a.columns == 0) return cudaErrorInvalidValue;
  const bool half = a.number == kF16;
  if (!half && a.number != kBF16) return cudaErrorInvalidValue;
  if (a.column_max != nullptr)
    return half ? launch_for_same<__half, true>(a, stream) : launch_for_same<__nv_bfloat16, true>(a, stream);
  return half ? launch_for_same<__half, false>(a, stream) : launch_for_same<__nv_bfloat16, false>(a, stream);
}

extern "C" cudaError_t oner_fast_mixup_pack(const MixupPack* call, cudaStream_t stream) {
  const MixupPack& a = *call;
  if (a.rows == 0) return cudaSuccess;
  const dim3 grid(static_cast<unsigned>(blocks_for(a.rows, kThreads / 32)));
  if (a.number == kF16)
    mixup_pack<__half><<<grid, kThreads, 0, stream>>>(a);
  else if (a.number == kBF16)
    mixup_pack<__nv_bfloat16><<<grid, kThreads, 0, stream>>>(a);
  else
    return cudaErrorInvalidValue;
  return cudaGetLastError();
}

}  // namespace oner_fast::cuda
