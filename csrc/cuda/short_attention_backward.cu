// varlen_attention for sequences of at most 256 tokens, backward in one launch: five products and no atomics.
//
// Q, K, V and dO of a head stay in shared memory. A warp owns 32 keys, or 16 at a sequence's end, and sums their dK and
// dV in registers over all queries. Queries come in blocks of 64: once every warp has stored its dS in shared memory,
// the warps share dQ = dS K out among themselves, each 32 queries by 16 numbers, and add over all keys in order. So dQ
// is whole when it leaves the registers, and has the same bits every time. delta = sum(dO O) is computed where dO is
// loaded.
//
// FLOPs: 10 Lq Lk Dh for each head, with one side rounded up to 16 and the other to 8. Bytes: Q, K, V, dO, O and three
// gradients once, and 8 for each query and head.
#include "cuda/short_attention.cuh"

namespace oner_fast::cuda {
namespace {

constexpr int kBlockQueries = 64;  // whose dS is in shared memory at a time
constexpr int kNumbers = 3;        // of each query: largest score, 1 / sum, delta

// Where the rows of a head are in shared memory.
struct Rows {
  unsigned char *queries, *values, *stored;     // stored: dS, (keys, kBlockQueries)
  uint32_t query, key, value, grad, to_scores;  // the same and more, as addresses of shared memory
  float* numbers;                               // (kNumbers, rows)
  int rows, query_row, key_row;                 // of a block; the first of the head
};

// Adds to dK and dV of a warp's keys what 32 queries give, and stores their dS. At an edge only the first `pieces` 8 of
// the queries are multiplied, of which those from `queries` on do not exist. Query q sees the keys up to
// q + last_key.
template <typename T, int kWidth, int kTiles, bool kEdge>
__device__ __forceinline__ void add_queries(float (&to_key)[2][kWidth / 8][4], float (&to_value)[2][kWidth / 8][4],
                                            const Rows& at, int key, int query, float scale, int queries, int keys,
                                            bool causal) {
  const int lane = threadIdx.x % kWarp, group = lane / 4, quad = lane % 4;
  const int pieces = kEdge ? min(ceiling(queries - query, 8), 4) : 4;
  const int key_row = at.key_row + key, query_row = at.query_row + query;
  uint32_t by_rows = rows_first<kWidth>(), by_columns = columns_first<kWidth>();
  asm volatile("" : "+r"(by_rows), "+r"(by_columns));
  float scores[kTiles][4][4] = {}, to_weights[kTiles][4][4] = {};
  const auto multiply_rows = [&](float (&sums)[kTiles][4][4], uint32_t keys_of, uint32_t queries_of) {
#pragma unroll
    for (int part = 0; part < kWidth / kHalfWords; part += 2) {
      uint32_t x[kTiles][4], y[2][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) load_matrices(x[i], keys_of + moved<kWidth>(by_rows, key_row + i * 16, part));
#pragma unroll
      for (int j = 0; j < 2; ++j)
        if (!kEdge || 2 * j < pieces)
          load_matrices(y[j], queries_of + moved<kWidth>(by_columns, query_row + j * 16, part));
#pragma unroll
      for (int j = 0; j < 4; ++j)
        if (!kEdge || j < pieces)
#pragma unroll
          for (int i = 0; i < kTiles; ++i) multiply<T>(sums[i][j], x[i], y[j / 2][j % 2 * 2], y[j / 2][j % 2 * 2 + 1]);
    }
  };
  multiply_rows(scores, at.key, at.query);
  multiply_rows(to_weights, at.value, at.grad);

  uint32_t weights[kTiles][2][4], to_scores[kTiles][2][4];
#pragma unroll
  for (int j = 0; j < 4; ++j) {
    if (kEdge && j / 2 * 2 >= pieces) break;  // pairs of pieces are stored, since matrices of dQ have 16 queries
    const float* numbers = at.numbers + query_row + j * 8 + quad * 2;
    const float2 max = *reinterpret_cast<const float2*>(numbers);
    const float2 inverse = *reinterpret_cast<const float2*>(numbers + at.rows);
    const float2 delta = *reinterpret_cast<const float2*>(numbers + 2 * at.rows);
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
#pragma unroll
      for (int r = 0; r < 2; ++r) {
        float weight[2], to_score[2];
#pragma unroll
        for (int c = 0; c < 2; ++c) {
          weight[c] = power_of_two(scores[i][j][r * 2 + c] * scale - (c == 0 ? max.x : max.y)) *
                      (c == 0 ? inverse.x : inverse.y);
          to_score[c] = weight[c] * (to_weights[i][j][r * 2 + c] - (c == 0 ? delta.x : delta.y));
          if (kEdge) {
            const int own_key = key + i * 16 + r * 8 + group, own_query = query + j * 8 + quad * 2 + c;
            if (own_key >= keys || own_query >= queries || (causal && own_key > own_query + keys - queries))
              weight[c] = to_score[c] = 0;
          }
        }
        weights[i][j / 2][j % 2 * 2 + r] = packed<T>(weight[0], weight[1]);
        to_scores[i][j / 2][j % 2 * 2 + r] = packed<T>(to_score[0], to_score[1]);
        *reinterpret_cast<uint32_t*>(
            at.stored + moved<kBlockQueries>(of_sums<kBlockQueries>(), key_row + i * 16 + r * 8,
                                             query % kBlockQueries / 8 + j)) = to_scores[i][j / 2][j % 2 * 2 + r];
      }
  }

  const auto add_rows = [&](float (&sums)[2][kWidth / 8][4], const uint32_t (&x)[kTiles][2][4], uint32_t queries_of) {
#pragma unroll
    for (int j = 0; j < 2; ++j) {
      if (kEdge && 2 * j >= pieces) break;
      const bool half = kEdge && 2 * j + 1 >= pieces;
#pragma unroll
      for (int d = 0; d < kWidth / 8; d += 2) {
        uint32_t y[4];
        load_transposed(y, queries_of + moved<kWidth>(by_rows, query_row + j * 16, d));
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          if (half) {
            multiply_half<T>(sums[i][d], x[i][j], y[0]);
            multiply_half<T>(sums[i][d + 1], x[i][j], y[2]);
          } else {
            multiply<T>(sums[i][d], x[i][j], y[0], y[1]);
            multiply<T>(sums[i][d + 1], x[i][j], y[2], y[3]);
          }
        }
      }
    }
  };
  add_rows(to_value, weights, at.grad);
  add_rows(to_key, to_scores, at.query);
}

// Sums dQ of 16 kTiles queries, in 16 of its columns, over the first `until` keys, and stores it. The queries' own rows
// in shared memory, which no warp reads any more, collect whole 16 bytes.
template <typename T, int kWidth, int kTiles>
__device__ __forceinline__ void store_queries(const ShortAttentionBackward& a, const Rows& at, int64_t begin, int head,
                                              int query, int queries, int until, int part) {
  const int lane = threadIdx.x % kWarp, row = at.query_row + query;
  uint32_t by_rows = rows_first<kWidth>(), by_columns = columns_first<kBlockQueries>();
  asm volatile("" : "+r"(by_rows), "+r"(by_columns));
  float sums[kTiles][2][4] = {};
  const auto load = [&](int key, uint32_t (&x)[kTiles][4], uint32_t (&y)[4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      load_transposed(
          x[i], at.to_scores + moved<kBlockQueries>(by_columns, at.key_row + key, query % kBlockQueries / 8 + i * 2));
    load_transposed(y, at.key + moved<kWidth>(by_rows, at.key_row + key, part));
  };
  int key = 0;
#pragma unroll 1
  for (; key + 8 < until; key += 16) {
    uint32_t x[kTiles][4], y[4];
    load(key, x, y);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      multiply<T>(sums[i][0], x[i], y[0], y[1]);
      multiply<T>(sums[i][1], x[i], y[2], y[3]);
    }
  }
  if (key < until) {
    uint32_t x[kTiles][4], y[4];
    load(key, x, y);
#pragma unroll
    for (int i = 0; i < kTiles; ++i) {
      multiply_half<T>(sums[i][0], x[i], y[0]);
      multiply_half<T>(sums[i][1], x[i], y[2]);
    }
  }
#pragma unroll
  for (int i = 0; i < kTiles; ++i)
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 0; d < 2; ++d)
        *reinterpret_cast<uint32_t*>(at.queries + moved<kWidth>(of_sums<kWidth>(), row + i * 16 + r * 8, part + d)) =
            packed<T>(sums[i][d][r * 2] * a.scale, sums[i][d][r * 2 + 1] * a.scale);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    // Of 8 lanes that are served at once, no two use the same banks.
    const int own = i * 16 + lane % 8 / 2 * 2 + lane / 8 % 2 + lane / 16 * 8, own_part = part + lane % 2;
    if (query + own < queries)
      *reinterpret_cast<uint4*>(static_cast<T*>(a.to_query) + ((begin + query + own) * a.heads + head) * kWidth +
                                own_part * kHalfWords) =
          *reinterpret_cast<const uint4*>(at.queries + place_in_rows<kWidth>(row + own, own_part));
  }
}

// Stores dK or dV of a warp's keys, by way of the rows of its values, which no other warp reads.
template <typename T, int kWidth>
__device__ __forceinline__ void store_keys(const float (&sums)[2][kWidth / 8][4], void* to, float factor,
                                           const Rows& at, int64_t begin, int head, int heads, int key, int keys) {
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (key + i * 16 >= keys) break;  // rows of another head
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 0; d < kWidth / 8; ++d)
        *reinterpret_cast<uint32_t*>(at.values +
                                     moved<kWidth>(of_sums<kWidth>(), at.key_row + key + i * 16 + r * 8, d)) =
            packed<T>(sums[i][d][r * 2] * factor, sums[i][d][r * 2 + 1] * factor);
  }
  __syncwarp();
  store_rows<kWidth, kTileRows>(at.values, at.key_row + key, static_cast<T*>(to), begin + key, head, heads, keys - key);
}

// Loads dO with O, and keeps the numbers of each query. The rows of padding are zeros and their weights 0.
template <typename T, int kWidth>
__device__ __forceinline__ void load_gradients(const ShortAttentionBackward& a, unsigned char* grads, float* numbers,
                                               int rows, int first_row, const Extent& q, int head) {
  constexpr int kParts = kWidth / kHalfWords;
  const int64_t begin = q.begin;
  const T* grad = static_cast<const T*>(a.grad) + begin * a.grad_row + head * a.grad_head;
  const T* out = static_cast<const T*>(a.out) + begin * a.out_row + head * a.out_head;
#pragma unroll 2
  for (int i = threadIdx.x; i < in_sixteens(q.length) * kParts; i += blockDim.x) {
    const int row = i / kParts, part = i % kParts;
    const bool inside = row < q.length;
    Bits<T, kHalfWords> mine = zeros<T, kHalfWords>(), other = mine;
    if (inside) {
      mine = read<T, kHalfWords>(grad + row * a.grad_row + part * kHalfWords);
      other = read<T, kHalfWords>(out + row * a.out_row + part * kHalfWords);
    }
    *reinterpret_cast<uint4*>(grads + place_in_rows<kWidth>(first_row + row, part)) = mine.word[0];
    float x[kHalfWords], y[kHalfWords], delta = 0;
    widen(mine, x);
    widen(other, y);
#pragma unroll
    for (int j = 0; j < kHalfWords; ++j) delta += x[j] * y[j];
#pragma unroll
    for (int lanes = 1; lanes < kParts; lanes *= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
    if (part == 0) {
      const int64_t at = (begin + row) * a.heads + head;
      numbers[first_row + row] = inside ? __ldg(a.statistics + at) : 0.0f;
      numbers[rows + first_row + row] =
          inside ? __ldg(a.statistics + at + static_cast<int64_t>(a.queries) * a.heads) : 0.0f;
      numbers[2 * rows + first_row + row] = delta;
    }
  }
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 1) short_attention_backward(const ShortAttentionBackward a) {
  extern __shared__ __align__(128) unsigned char memory[];
  const int rows = rows_of_block(a.longest), bytes = rows * kWidth * 2, warp = threadIdx.x / kWarp;
  Rows at;
  at.queries = memory;
  at.values = memory + 2 * bytes;
  at.stored = memory + 4 * bytes;
  at.query = static_cast<uint32_t>(__cvta_generic_to_shared(memory));
  at.key = at.query + bytes;
  at.value = at.key + bytes;
  at.grad = at.value + bytes;
  at.to_scores = at.grad + bytes;
  at.numbers = reinterpret_cast<float*>(at.stored + rows * kBlockQueries * 2);
  at.rows = rows;
  const float scale = a.scale * kLog2E;
  const bool causal = a.causal != 0;
  const int tasks = __ldg(a.table);
  for (int task = blockIdx.x; task < tasks; task += gridDim.x) {
    const int2 entry = __ldg(reinterpret_cast<const int2*>(a.table) + 1 + task);
    const Extent q(a.starts_q, entry.x, a.queries), k(a.starts_k, entry.x, a.keys);
    const int length = max(q.length, k.length), first_head = entry.y >> 16, end_head = first_head + (entry.y & 65535);
    if (length > a.longest) {
      for (int head = first_head; head < end_head; ++head) {
        if (a.to_query != nullptr) spoil_rows<kWidth>(static_cast<T*>(a.to_query), q.begin, q.length, head, a.heads);
        if (a.to_key == nullptr) continue;
        spoil_rows<kWidth>(static_cast<T*>(a.to_key), k.begin, k.length, head, a.heads);
        spoil_rows<kWidth>(static_cast<T*>(a.to_value), k.begin, k.length, head, a.heads);
      }
      continue;
    }
    const int padded_q = in_sixteens(q.length), padded_k = in_sixteens(k.length), stride = in_sixteens(length);
    const int warps = ceiling(length, kTileRows), each = heads_at_once(length, a.longest, a.heads);
    const int place = warp / warps, tile = warp % warps, key = tile * kTileRows, offset = k.length - q.length;
    at.query_row = at.key_row = place * stride;
    for (int head = first_head; head < end_head; head += each) {
      const int heads = min(each, end_head - head);
      __syncthreads();  // every warp has finished with the rows of the heads before
      for (int i = 0; i < heads; ++i) {
        const int64_t q0 = q.begin * a.query_row + (head + i) * a.query_head,
                      k0 = k.begin * a.key_row + (head + i) * a.key_head,
                      v0 = k.begin * a.value_row + (head + i) * a.value_head;
        load_rows<kWidth>(at.query, i * stride, static_cast<const T*>(a.query) + q0, a.query_row, q.length, padded_q);
        load_rows<kWidth>(at.key, i * stride, static_cast<const T*>(a.key) + k0, a.key_row, k.length, padded_k);
        load_rows<kWidth>(at.value, i * stride, static_cast<const T*>(a.value) + v0, a.value_row, k.length, padded_k);
      }
      commit_copies();
      for (int i = 0; i < heads; ++i)
        load_gradients<T, kWidth>(a, memory + 3 * bytes, at.numbers, rows, i * stride, q, head + i);
      wait_copies<0>();
      __syncthreads();

      const bool mine = place < heads, has_keys = mine && key < k.length;
      float to_key[2][kWidth / 8][4] = {}, to_value[2][kWidth / 8][4] = {};
      for (int block = 0; block < q.length; block += kBlockQueries) {
        if (has_keys)
#pragma unroll 1
          for (int query = block; query < min(block + kBlockQueries, q.length); query += kTileRows) {
            const int last = min(query + kTileRows, q.length) - 1;
            if (causal && key > last + offset) continue;  // they see none of these keys
            const bool edge = key + kTileRows > k.length || query + kTileRows > q.length ||
                              (causal && key + kTileRows - 1 > query + offset);
            if (k.length - key <= 16)
              add_queries<T, kWidth, 1, true>(to_key, to_value, at, key, query, scale, q.length, k.length, causal);
            else if (edge)
              add_queries<T, kWidth, 2, true>(to_key, to_value, at, key, query, scale, q.length, k.length, causal);
            else
              add_queries<T, kWidth, 2, false>(to_key, to_value, at, key, query, scale, q.length, k.length, causal);
          }
        __syncthreads();  // dS of the block is whole
        if (mine && a.to_query != nullptr)
#pragma unroll 1
          for (int unit = tile; unit < kBlockQueries / kTileRows * kWidth / 16; unit += warps) {
            const int query = block + unit / (kWidth / 16) * kTileRows, part = unit % (kWidth / 16) * 2;
            if (query >= q.length) break;
            const int last = min(query + kTileRows, q.length) - 1;
            const int until = causal ? min(last + offset + 1, k.length) : k.length;
            if (q.length - query > 16)
              store_queries<T, kWidth, 2>(a, at, q.begin, head + place, query, q.length, until, part);
            else
              store_queries<T, kWidth, 1>(a, at, q.begin, head + place, query, q.length, until, part);
          }
        __syncthreads();  // dS has been read
      }
      if (has_keys && a.to_key != nullptr) {
        store_keys<T, kWidth>(to_value, a.to_value, 1.0f, at, k.begin, head + place, a.heads, key, k.length);
        store_keys<T, kWidth>(to_key, a.to_key, a.scale, at, k.begin, head + place, a.heads, key, k.length);
      }
    }
  }
}

template <typename T, int kWidth>
cudaError_t launch_backward(const ShortAttentionBackward& a, cudaStream_t stream) {
  const int each = (4 * kWidth + kBlockQueries) * 2 + kNumbers * static_cast<int>(sizeof(float));
  return launch_tasks(short_attention_backward<T, kWidth>, a, rows_of_block(a.longest) * each, stream);
}

template <int kWidth>
cudaError_t launch_of_width(const ShortAttentionBackward& a, cudaStream_t stream) {
  if (a.number == kF16) return launch_backward<__half, kWidth>(a, stream);
  return a.number == kBF16 ? launch_backward<__nv_bfloat16, kWidth>(a, stream) : cudaErrorInvalidValue;
}

}  // namespace

extern "C" cudaError_t oner_fast_short_attention_backward(const ShortAttentionBackward* call, cudaStream_t stream) {
  if (call->longest < 1 || call->longest > kMostTokens) return cudaErrorInvalidValue;
  if (call->head_dim == 64) return launch_of_width<64>(*call, stream);
  return call->head_dim == 32 ? launch_of_width<32>(*call, stream) : cudaErrorInvalidValue;
}

}  // namespace oner_fast::cuda
