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

// Where the rows of a head are in shared memory: Q, K, V, dO of all heads, dS (keys, kBlockQueries), and the numbers of
// each query. Only two registers hold it; addresses are computed where they are needed.
template <int kWidth>
struct Rows {
  int longest, first;  // the bound of lengths; the first row of the head

  __device__ __forceinline__ int every() const { return rows_of_block(anew(longest)); }
  __device__ __forceinline__ uint32_t tensor(int place) const {
    extern __shared__ __align__(128) unsigned char memory[];
    return static_cast<uint32_t>(__cvta_generic_to_shared(memory)) + place * every() * kWidth * 2;
  }
  __device__ __forceinline__ uint32_t query() const { return tensor(0); }
  __device__ __forceinline__ uint32_t key() const { return tensor(1); }
  __device__ __forceinline__ uint32_t value() const { return tensor(2); }
  __device__ __forceinline__ uint32_t grad() const { return tensor(3); }
  __device__ __forceinline__ uint32_t to_scores() const { return tensor(4); }
  __device__ __forceinline__ uint32_t number(int which, int row) const {
    return tensor(0) + every() * (4 * kWidth + kBlockQueries) * 2 + (which * every() + row) * 4;
  }
};

// Adds to dK and dV of a warp's 16 kTiles keys what 16 kSteps queries give, and stores their dS. At an edge, where
// kSteps is 1, keys from `keys` on and queries from `queries` on do not exist, and under a causal mask query q sees the
// keys up to q + keys - queries.
template <typename T, int kWidth, int kTiles, int kSteps>
__device__ __forceinline__ void add_queries(float (&to_key)[2][kWidth / 8][4], float (&to_value)[2][kWidth / 8][4],
                                            const Rows<kWidth>& at, int key, int query, float scale, int queries,
                                            int keys, bool causal) {
  constexpr bool kEdge = kSteps == 1;
  const int lane = static_cast<int>(anew(threadIdx.x) % kWarp);
  const int first = anew(at.first), key_row = first + key, query_row = first + query;
  const bool half = kEdge && queries - query <= 8;
  const uint32_t by_rows = rows_first<kWidth>(lane), by_columns = columns_first<kWidth>(lane);
  float scores[kTiles][kSteps * 2][4] = {}, to_weights[kTiles][kSteps * 2][4] = {};
  const auto multiply_rows = [&](float (&sums)[kTiles][kSteps* 2][4], uint32_t keys_of, uint32_t queries_of) {
#pragma unroll
    for (int part = 0; part < kWidth / kHalfWords; part += 2) {
      uint32_t x[kTiles][4];
#pragma unroll
      for (int i = 0; i < kTiles; ++i) load_matrices(x[i], keys_of + moved<kWidth>(by_rows, key_row + i * 16, part));
#pragma unroll
      for (int j = 0; j < kSteps; ++j) {
        uint32_t y[4];
        load_matrices(y, queries_of + moved<kWidth>(by_columns, query_row + j * 16, part));
#pragma unroll
        for (int i = 0; i < kTiles; ++i) {
          multiply<T>(sums[i][j * 2], x[i], y[0], y[1]);
          if (!half) multiply<T>(sums[i][j * 2 + 1], x[i], y[2], y[3]);
        }
      }
    }
  };
  multiply_rows(scores, at.key(), at.query());
  multiply_rows(to_weights, at.value(), at.grad());

  const uint32_t stored = at.to_scores(), by_sums = of_sums<kBlockQueries>(lane), each = at.every() * 4,
                 numbers = at.number(0, query_row + lane % 4 * 2);
  uint32_t weights[kTiles][kSteps][4], to_scores[kTiles][kSteps][4];
#pragma unroll
  for (int j = 0; j < kSteps * 2; ++j) {
    const uint32_t of_piece = numbers + j * 8 * 4;
    const float2 max = load_pair(of_piece), inverse = load_pair(of_piece + each),
                 delta = load_pair(of_piece + 2 * each);
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
            const int own_key = key + i * 16 + r * 8 + lane / 4, own_query = query + j * 8 + lane % 4 * 2 + c;
            if (own_key >= keys || own_query >= queries || (causal && own_key > own_query + keys - queries))
              weight[c] = to_score[c] = 0;
          }
        }
        const uint32_t both = packed<T>(to_score[0], to_score[1]);
        weights[i][j / 2][j % 2 * 2 + r] = packed<T>(weight[0], weight[1]);
        to_scores[i][j / 2][j % 2 * 2 + r] = both;
        store_word(stored + moved<kBlockQueries>(by_sums, key_row + i * 16 + r * 8, query % kBlockQueries / 8 + j),
                   both);
      }
  }

  const auto add_rows = [&](float (&sums)[2][kWidth / 8][4], const uint32_t (&x)[kTiles][kSteps][4],
                            uint32_t queries_of) {
#pragma unroll
    for (int j = 0; j < kSteps; ++j)
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
  };
  add_rows(to_value, weights, at.grad());
  add_rows(to_key, to_scores, at.query());
}

// Sums dQ of 16 kTiles queries, in 16 of its columns, over the first `until` keys, and stores it. The queries' own rows
// in shared memory, which no warp reads any more, collect whole 16 bytes.
template <typename T, int kWidth, int kTiles>
__device__ __forceinline__ void store_queries(const ShortAttentionBackward& a, const Rows<kWidth>& at, int64_t begin,
                                              int head, int query, int queries, int until, int part) {
  const int lane = static_cast<int>(anew(threadIdx.x) % kWarp), row = at.first + query, heads = anew(a.heads);
  const uint32_t by_rows = rows_first<kWidth>(lane), by_columns = columns_first<kBlockQueries>(lane);
  const uint32_t to_scores = at.to_scores(), keys = at.key(), own_rows = at.query(), by_sums = of_sums<kWidth>(lane);
  float sums[kTiles][2][4] = {};
  const auto load = [&](int key, uint32_t (&x)[kTiles][4], uint32_t (&y)[4]) {
#pragma unroll
    for (int i = 0; i < kTiles; ++i)
      load_transposed(x[i],
                      to_scores + moved<kBlockQueries>(by_columns, at.first + key, query % kBlockQueries / 8 + i * 2));
    load_transposed(y, keys + moved<kWidth>(by_rows, at.first + key, part));
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
        store_word(own_rows + moved<kWidth>(by_sums, row + i * 16 + r * 8, part + d),
                   packed<T>(sums[i][d][r * 2] * a.scale, sums[i][d][r * 2 + 1] * a.scale));
  __syncwarp();
#pragma unroll
  for (int i = 0; i < kTiles; ++i) {
    // Of 8 lanes that are served at once, no two use the same banks.
    const int own = i * 16 + lane % 8 / 2 * 2 + lane / 8 % 2 + lane / 16 * 8, own_part = part + lane % 2;
    if (query + own < queries)
      *reinterpret_cast<uint4*>(static_cast<T*>(a.to_query) + ((begin + query + own) * heads + head) * kWidth +
                                own_part * kHalfWords) =
          load_words(own_rows + place_in_rows<kWidth>(row + own, own_part));
  }
}

// Stores dK or dV of a warp's keys, by way of the rows of its values, which no other warp reads.
template <typename T, int kWidth>
__device__ __forceinline__ void store_keys(const float (&sums)[2][kWidth / 8][4], void* to, float factor,
                                           const Rows<kWidth>& at, int64_t begin, int head, int heads, int key,
                                           int keys) {
  const int lane = static_cast<int>(anew(threadIdx.x) % kWarp);
  const uint32_t values = at.value(), by_sums = of_sums<kWidth>(lane);
  __syncwarp();
#pragma unroll
  for (int i = 0; i < 2; ++i) {
    if (key + i * 16 >= keys) break;  // rows of another head
#pragma unroll
    for (int r = 0; r < 2; ++r)
#pragma unroll
      for (int d = 0; d < kWidth / 8; ++d)
        store_word(values + moved<kWidth>(by_sums, at.first + key + i * 16 + r * 8, d),
                   packed<T>(sums[i][d][r * 2] * factor, sums[i][d][r * 2 + 1] * factor));
  }
  __syncwarp();
  store_rows<kWidth, kTileRows>(values, at.first + key, static_cast<T*>(to), begin + key, head, heads, keys - key);
}

// Loads dO with O, and keeps the numbers of each query. The rows of padding are zeros and their weights 0.
template <typename T, int kWidth>
__device__ __forceinline__ void load_gradients(const ShortAttentionBackward& a, const Rows<kWidth>& at, const Extent& q,
                                               int head) {
  constexpr int kParts = kWidth / kHalfWords;
  const Head<T> grad(a.grad, a.grad_row, a.grad_head, q.begin, head), out(a.out, a.out_row, a.out_head, q.begin, head);
  const float* statistics = a.statistics + static_cast<int64_t>(q.begin) * a.heads + head;
#pragma unroll 4
  for (int i = static_cast<int>(anew(threadIdx.x)); i < in_sixteens(q.length) * kParts; i += blockDim.x) {
    const int row = i / kParts, part = i % kParts;
    const bool inside = row < q.length;
    Bits<T, kHalfWords> mine = zeros<T, kHalfWords>(), other = mine;
    if (inside) {
      mine = read<T, kHalfWords>(grad.rows + row * grad.stride + part * kHalfWords);
      other = read<T, kHalfWords>(out.rows + row * out.stride + part * kHalfWords);
    }
    store_words(at.grad() + place_in_rows<kWidth>(at.first + row, part), mine.word[0]);
    float x[kHalfWords], y[kHalfWords], delta = 0;
    widen(mine, x);
    widen(other, y);
#pragma unroll
    for (int j = 0; j < kHalfWords; ++j) delta += x[j] * y[j];
#pragma unroll
    for (int lanes = 1; lanes < kParts; lanes *= 2) delta += __shfl_xor_sync(~0u, delta, lanes);
    if (part == 0) {
      const int heads = anew(a.heads);
      const uint32_t numbers = at.number(0, at.first + row), each = at.every() * 4;
      const int64_t plane = static_cast<int64_t>(a.queries) * heads;
      store_word(numbers, __float_as_uint(inside ? __ldg(statistics + row * heads) : 0.0f));
      store_word(numbers + each, __float_as_uint(inside ? __ldg(statistics + plane + row * heads) : 0.0f));
      store_word(numbers + 2 * each, __float_as_uint(delta));
    }
  }
}

// The lengths of a warp's head, in one register; a warp without a head has no keys.
struct Lengths {
  int both;
  __device__ __forceinline__ Lengths(int queries, int keys) : both(queries | keys << 16) {}
  __device__ __forceinline__ int queries() const { return anew(both) & 65535; }
  __device__ __forceinline__ int keys() const { return anew(both) >> 16; }
};

// Computes what a warp owns of a head whose rows are in shared memory: dK and dV of its keys, and units of dQ.
// `packed_key` is 65536 times the first row of the head plus the warp's first key. What only a few stores need is read
// from the task again. Either leaves registers to the sums.
template <typename T, int kWidth>
__device__ __forceinline__ void compute(const ShortAttentionBackward& a, int task, const Lengths& lengths,
                                        int packed_key) {
  const auto key_of = [&] { return anew(packed_key) & 65535; };
  constexpr int kParts = kWidth / 16, kUnits = kBlockQueries / kTileRows * kParts;
  // Whether 32 queries exist and see all of the warp's keys, which exist.
  const auto whole = [&](int query) {
    const int queries = lengths.queries(), keys = lengths.keys(), key = key_of();
    return key + kTileRows <= keys && query + kTileRows <= queries &&
           (a.causal == 0 || key + kTileRows - 1 <= query + keys - queries);
  };
  const auto rows = [&] { return Rows<kWidth>{a.longest, anew(packed_key) >> 16}; };
  float to_key[2][kWidth / 8][4] = {}, to_value[2][kWidth / 8][4] = {};
#pragma unroll 1
  for (int block = 0; block < lengths.queries(); block += kBlockQueries) {
#pragma unroll 1
    for (int query = block; query < block + kBlockQueries; query += kTileRows)
      if (whole(query))
        add_queries<T, kWidth, 2, 2>(to_key, to_value, rows(), key_of(), query, a.scale * kLog2E, 0, 0, false);
#pragma unroll 1
    for (int step = block; step < block + kBlockQueries; step += 16) {
      const int queries = lengths.queries(), keys = lengths.keys(), query = step & ~(kTileRows - 1), key = key_of();
      if (key >= keys || step >= queries || whole(query)) continue;
      if (a.causal != 0 && key > query + kTileRows - 1 + keys - queries) continue;  // they see none of the keys
      if (keys - key > 16)
        add_queries<T, kWidth, 2, 1>(to_key, to_value, rows(), key, step, a.scale * kLog2E, queries, keys,
                                     a.causal != 0);
      else
        add_queries<T, kWidth, 1, 1>(to_key, to_value, rows(), key, step, a.scale * kLog2E, queries, keys,
                                     a.causal != 0);
    }
    __syncthreads();  // dS of the block is whole
    const Task now(a, anew(task));
    const int place = static_cast<int>(anew(threadIdx.x) / kWarp) / now.warps();
    if (place < now.heads && a.to_query != nullptr)
#pragma unroll 1
      for (int unit = key_of() / kTileRows; unit < kUnits; unit += now.warps()) {
        const int queries = now.q.length, keys = now.k.length, query = block + unit / kParts * kTileRows;
        if (query >= queries) break;
        const int last = min(query + kTileRows, queries) - 1;
        const int until = a.causal != 0 ? min(last + keys - queries + 1, keys) : keys;
        if (queries - query > 16)
          store_queries<T, kWidth, 2>(a, rows(), now.q.begin, now.head + place, query, queries, until,
                                      unit % kParts * 2);
        else
          store_queries<T, kWidth, 1>(a, rows(), now.q.begin, now.head + place, query, queries, until,
                                      unit % kParts * 2);
      }
    __syncthreads();  // dS has been read
  }
  const int key = key_of();
  if (key >= lengths.keys() || a.to_key == nullptr) return;
  const Task now(a, anew(task));
  const int head = now.head + static_cast<int>(anew(threadIdx.x) / kWarp) / now.warps();
  store_keys<T, kWidth>(to_value, a.to_value, 1.0f, rows(), now.k.begin, head, a.heads, key, now.k.length);
  store_keys<T, kWidth>(to_key, a.to_key, a.scale, rows(), now.k.begin, head, a.heads, key, now.k.length);
}

template <typename T, int kWidth>
__global__ void __launch_bounds__(kMostThreads, 1) short_attention_backward(const ShortAttentionBackward a) {
  for (int task = blockIdx.x; task < __ldg(a.table); task += gridDim.x) {
    const Task now(a, task);
    if (!now.fits) {
      for (int head = now.head; head < now.head + now.heads; ++head) {
        if (a.to_query != nullptr) spoil_rows<kWidth>(static_cast<T*>(a.to_query), now.q, head, a.heads);
        if (a.to_key == nullptr) continue;
        spoil_rows<kWidth>(static_cast<T*>(a.to_key), now.k, head, a.heads);
        spoil_rows<kWidth>(static_cast<T*>(a.to_value), now.k, head, a.heads);
      }
      continue;
    }
    __syncthreads();  // every warp has finished with the rows of the task before
    for (int i = 0; i < now.heads; ++i) {
      const Rows<kWidth> to{a.longest, i * now.stride()};
      const Head<T> query(a.query, a.query_row, a.query_head, now.q.begin, now.head + i),
          key(a.key, a.key_row, a.key_head, now.k.begin, now.head + i),
          value(a.value, a.value_row, a.value_head, now.k.begin, now.head + i);
      load_rows<kWidth>(to.query(), to.first, query, now.q.length);
      load_rows<kWidth>(to.key(), to.first, key, now.k.length);
      load_rows<kWidth>(to.value(), to.first, value, now.k.length);
    }
    commit_copies();
    for (int i = 0; i < now.heads; ++i)
      load_gradients<T, kWidth>(a, {a.longest, i * now.stride()}, now.q, now.head + i);
    wait_copies<0>();
    __syncthreads();
    const int warp = static_cast<int>(anew(threadIdx.x) / kWarp), place = warp / now.warps();
    compute<T, kWidth>(a, task, {now.q.length, place < now.heads ? now.k.length : 0},
                       warp % now.warps() * kTileRows | place * now.stride() << 16);
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
