// varlen_attention for sequences of at most 256 tokens, forward: the table of tasks, and softmax(scale Q K^T) V.
//
// Keys and values of a head stay in shared memory, whose rows are read by ldmatrix. A warp owns 32 queries, or 16 at a
// sequence's end, and goes through the keys in blocks of 32, of which the last is cut to 8. FLOPs: 4 Lq Lk Dh for each
// head, with Lq rounded up to 16 and Lk to 8. Bytes: Q, K, V and the result once, and 8 for each query and head.
#include "cuda/short_attention.cuh"

namespace oner_fast::cuda {
namespace {

constexpr int kTableThreads = 512;
constexpr float kInfinity = INFINITY;

// Counting sort of the sequences by their longer side, longest first. Which of two equally long ones comes first is
// left open: no result depends on it.
__global__ void __launch_bounds__(kTableThreads) short_attention_table(const ShortAttentionTable a) {
  __shared__ int next[kTableThreads], sums[2][kTableThreads];
  const int own = kMostTokens - static_cast<int>(threadIdx.x);  // the length whose tasks this thread counts
  const auto length_of = [&](int sequence) {
    const Extent q(a.starts_q, sequence, a.queries), k(a.starts_k, sequence, a.keys);
    return min(max(q.length, k.length), kMostTokens);
  };
  const auto tasks_of = [&](int length) {
    return length <= 0 ? 0 : ceiling(a.heads, heads_at_once(length, a.longest, a.heads));
  };
  next[threadIdx.x] = 0;
  __syncthreads();
  for (int i = threadIdx.x; i < a.sequences; i += kTableThreads) atomicAdd(next + kMostTokens - length_of(i), 1);
  __syncthreads();
  const int count = next[threadIdx.x] * tasks_of(own);
  sums[0][threadIdx.x] = count;
  __syncthreads();
  int from = 0;
  for (int step = 1; step < kTableThreads; step *= 2) {
    const int before = static_cast<int>(threadIdx.x) >= step ? sums[from][threadIdx.x - step] : 0;
    sums[1 - from][threadIdx.x] = sums[from][threadIdx.x] + before;
    from = 1 - from;
    __syncthreads();
  }
  next[threadIdx.x] = sums[from][threadIdx.x] - count;
  if (threadIdx.x == kTableThreads - 1) a.table[0] = sums[from][threadIdx.x];
  __syncthreads();
  for (int i = threadIdx.x; i < a.sequences; i += kTableThreads) {
    const int length = length_of(i), tasks = tasks_of(length);
    if (tasks == 0) continue;
    const int heads = heads_at_once(length, a.longest, a.heads);
    int2* to = reinterpret_cast<int2*>(a.table) + 1 + atomicAdd(next + kMostTokens - length, tasks);
    for (int task = 0; task < tasks; ++task) to[task] = {i, task * heads * 65536 + min(heads, a.heads - task * heads)};
  }
}

// The sums of a warp's queries, 16 kTiles of them: a lane has rows group and group + 8 of each 16.
template <int kWidth, int kTiles>
struct Sums {
  float out[kTiles][kWidth / 8][4], max[kTiles][2], total[kTiles][2];
};

// Adds 32 keys. At an edge only the first `pieces` 8 of them are multiplied, and row r of the lane sees those up to
// last[r].
template <typename T, int kWidth, int kTiles, bool kEdge>
__device__ __forceinline__ void add_keys(Sums<kWidth, kTiles>& sums, uint32_t queries, int query_row, uint32_t keys,
                                         uint32_t values, int key_row, float scale, int pieces,
                                         const int (&last)[kTiles][2]) {
  const int lane = threadIdx.x % kWarp, quad = lane % 4;
  const uint32_t by_rows = rows_first<kWidth>(lane), by_columns = columns_first<kWidth>(lane);
  float scores[kTiles][4][4] = {};
#pragma unroll
  for (int part = 0; part < kWidth / kHalfWords; part += 2) {
    uint32_t x[kTiles][4], y[2][4];
#pragma unroll
    for (int i = 0; i < kTiles; ++i) load_matrices(x[i], queries + moved<kWidth>(by_rows, query_row + i * 16, part));
#pragma unroll
    for (int j = 0; j < 2; ++j)
      if (!kEdge || 2 * j < pieces) load_matrices(y[j], keys + moved<kWidth>(by_columns, key_row + j * 16, part));
#pragma unroll
    for (int j = 0; j < 4; ++j)
      if (!kEdge || j < pieces)
#pragma unroll
        for (int i = 0; i < kTiles; ++i) multiply<T>(scores[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
  }

  uint32_t weights[kTiles][2][4];
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float max = -kInfinity;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float& score = scores[i][c / 2][r * 2 + c % 2];
        if (kEdge && c / 2 * 8 + quad * 2 + c % 2 > last[i][r]) score = -kInfinity;
        max = fmaxf(max, score);
      }
#pragma unroll
      for (int other = 1; other < 4; other *= 2) max = fmaxf(max, __shfl_xor_sync(~0u, max, other));
      max = fmaxf(sums.max[i][r], max * scale);
      const float base = kEdge && max == -kInfinity ? 0.0f : max, shrink = power_of_two(sums.max[i][r] - base);
      sums.max[i][r] = max;
      float total = sums.total[i][r] * shrink;
#pragma unroll
      for (int c = 0; c < 8; ++c) {
        float& score = scores[i][c / 2][r * 2 + c % 2];
        score = power_of_two(score * scale - base);
        total += score;
      }
      sums.total[i][r] = total;
#pragma unroll
      for (int j = 0; j < 4; ++j)
        weights[i][j / 2][j % 2 * 2 + r] = packed<T>(scores[i][j][r * 2], scores[i][j][r * 2 + 1]);
#pragma unroll
      for (int d = 0; d < kWidth / 8; ++d) {
        sums.out[i][d][r * 2] *= shrink;
        sums.out[i][d][r * 2 + 1] *= shrink;
      }
    }

#pragma unroll
  for (int j = 0; j < 2; ++j) {
    if (kEdge && 2 * j >= pieces) break;
    const bool half = kEdge && 2 * j + 1 >= pieces;
#pragma unroll
    for (int d = 0; d < kWidth / 8; d += 2) {
      uint32_t y[4];
      load_transposed(y, values + moved<kWidth>(by_rows, key_row + j * 16, d));
#pragma unroll
      for (int i = 0; i < kTiles; ++i) {
        if (half) {
          multiply_half<T>(sums.out[i][d], weights[i][j], y[0]);
          multiply_half<T>(sums.out[i][d + 1], weights[i][j], y[2]);
        } else {
          multiply<T>(sums.out[i][d], weights[i][j], y[0], y[1]);
          multiply<T>(sums.out[i][d + 1], weights[i][j], y[2], y[3]);
        }
      }
    }
  }
}

// Where a warp's queries are: their place in shared memory and in their sequence, and their head.
struct Queries {
  uint32_t rows, keys, values;
  int row, key_row, first, head;
};

template <typename T, int kWidth, int kTiles>
__device__ __forceinline__ void attend(const ShortAttention& a, const Extent& q, const Extent& k, const Queries& own) {
  const int lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  const int offset = k.length - q.length;  // under a causal mask, query i sees the keys up to i + offset
  const float scale = a.scale * kLog2E;
  Sums<kWidth, kTiles> sums;
  memset(sums.out, 0, sizeof sums.out);
  int last[kTiles][2];  // the last key that a row of the lane sees, counted from the block of keys
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      sums.max[i][r] = -kInfinity;
      sums.total[i][r] = 0;
      last[i][r] = k.length - 1;
      if (a.causal != 0) last[i][r] = min(last[i][r], own.first + i * 16 + r * 8 + group + offset);
    }
  const int until = a.causal != 0 ? min(own.first + kTiles * 16 + offset, k.length) : k.length;
  const int whole = a.causal != 0 ? min(own.first + offset + 1, k.length) : k.length;  // keys that every row sees
  int start = 0;
  for (; start + kTileRows <= whole; start += kTileRows)
    add_keys<T, kWidth, kTiles, false>(sums, own.rows, own.row, own.keys, own.values, own.key_row + start, scale, 4,
                                       last);
#pragma unroll
  for (int i = 0; i < kTiles * 2; ++i) last[i / 2][i % 2] -= start;
  for (; start < until; start += kTileRows) {
    add_keys<T, kWidth, kTiles, true>(sums, own.rows, own.row, own.keys, own.values, own.key_row + start, scale,
                                      min(ceiling(until - start, 8), 4), last);
#pragma unroll
    for (int i = 0; i < kTiles * 2; ++i) last[i / 2][i % 2] -= kTileRows;
  }

  const uint32_t by_sums = of_sums<kWidth>(lane);
  __syncwarp();  // the warp's queries are read, and its results take their place
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r) {
      float total = sums.total[i][r];
#pragma unroll
      for (int other = 1; other < 4; other *= 2) total += __shfl_xor_sync(~0u, total, other);
      const int in_tile = i * 16 + r * 8 + group, row = own.first + in_tile;
      const bool blind = k.length == 0 || (a.causal != 0 && row + offset < 0);
      const float inverse = blind ? 0.0f : 1.0f / total;
      if (quad == 0 && row < q.length) {
        const int64_t at = static_cast<int64_t>(q.begin + row) * a.heads + own.head;
        a.statistics[at] = blind ? 0.0f : sums.max[i][r];
        a.statistics[at + static_cast<int64_t>(a.queries) * a.heads] = inverse;
      }
#pragma unroll
      for (int d = 0; d < kWidth / 8; ++d)
        store_word(own.rows + moved<kWidth>(by_sums, own.row + i * 16 + r * 8, d),
                   packed<T>(sums.out[i][d][r * 2] * inverse, sums.out[i][d][r * 2 + 1] * inverse));
    }
  __syncwarp();
  store_rows<kWidth, kTiles * 16>(own.rows, own.row, static_cast<T*>(a.out), q.begin + own.first, own.head, a.heads,
                                  q.length - own.first);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 1) short_attention(const ShortAttention a) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int bytes = rows_of_block(a.longest) * kWidth * 2, warp = threadIdx.x / kWarp;
  const uint32_t queries = static_cast<uint32_t>(__cvta_generic_to_shared(memory)), keys = queries + bytes,
                 values = keys + bytes;
  for (int task = blockIdx.x; task < __ldg(a.table); task += gridDim.x) {
    const Task now(a, task);
    if (!now.fits) {  // a bound that is wrong must not look right
      for (int head = now.head; head < now.head + now.heads; ++head)
        spoil_rows<kWidth>(static_cast<T*>(a.out), now.q, head, a.heads);
      continue;
    }
    __syncthreads();  // every warp has finished with the rows of the task before
    for (int i = 0; i < now.heads; ++i) {
      const Head<T> query(a.query, a.query_row, a.query_head, now.q.begin, now.head + i),
          key(a.key, a.key_row, a.key_head, now.k.begin, now.head + i),
          value(a.value, a.value_row, a.value_head, now.k.begin, now.head + i);
      load_rows<kWidth>(queries, i * now.stride(), query, now.q.length);
      load_rows<kWidth>(keys, i * now.stride(), key, now.k.length);
      load_rows<kWidth>(values, i * now.stride(), value, now.k.length);
    }
    commit_copies();
    wait_copies<0>();
    __syncthreads();
    const int place = warp / now.warps(), first = warp % now.warps() * kTileRows, row = place * now.stride();
    if (place >= now.heads || first >= now.q.length) continue;
    const Queries own{queries, keys, values, row + first, row, first, now.head + place};
    if (now.q.length - first > 16)
      attend<T, kWidth, 2>(a, now.q, now.k, own);
    else
      attend<T, kWidth, 1>(a, now.q, now.k, own);
  }
}

template <typename T, int kWidth>
cudaError_t launch_forward(const ShortAttention& a, cudaStream_t stream) {
  const int bytes = 3 * rows_of_block(a.longest) * kWidth * 2;
  return launch_tasks(short_attention<T, kWidth>, a, bytes, stream);
}

template <int kWidth>
cudaError_t launch_of_width(const ShortAttention& a, cudaStream_t stream) {
  if (a.number == kF16) return launch_forward<__half, kWidth>(a, stream);
  return a.number == kBF16 ? launch_forward<__nv_bfloat16, kWidth>(a, stream) : cudaErrorInvalidValue;
}

}  // namespace

extern "C" cudaError_t oner_fast_short_attention_table(const ShortAttentionTable* call, cudaStream_t stream) {
  if (call->longest < 1 || call->longest > kMostTokens) return cudaErrorInvalidValue;
  short_attention_table<<<1, kTableThreads, 0, stream>>>(*call);
  return cudaGetLastError();
}

extern "C" cudaError_t oner_fast_short_attention(const ShortAttention* call, cudaStream_t stream) {
  if (call->longest < 1 || call->longest > kMostTokens) return cudaErrorInvalidValue;
  if (call->head_dim == 64) return launch_of_width<64>(*call, stream);
  return call->head_dim == 32 ? launch_of_width<32>(*call, stream) : cudaErrorInvalidValue;
}

}  // namespace oner_fast::cuda
