// Shared by the forward and backward of attention: one block of keys against one panel of queries.
//
// A panel holds up to kPanel queries, one in each lane, and its scores are S^T = K Q^T, with keys as rows. Maxima and
// sums over keys then go from row to row and never across lanes, and exp(S^T) has the layout of a panel of B of a
// product.
#pragma once

#include "cpu/isa/pack.h"
#include "cpu/isa/pieces.h"
#include "cpu/isa/varlen_attention.h"

namespace oner_fast {
namespace {

constexpr double kLog2E = 1.4426950408889634;

template <typename T>
inline constexpr T kInfinity = static_cast<T>(__builtin_inf());

// Keys that are multiplied at once, and queries that share a block of products in the backward. Multiples of kPanel.
template <typename P>
constexpr int64_t kKeys = P::kDepth == 2 ? 512 : 256;
template <typename P>
constexpr int64_t kQueries = P::kDepth == 2 ? 256 : 128;

// 2^x for x <= 127, exactly 0 below -126 and at -inf; NaN stays NaN. Relative error 1e-7, or 3e-6 where bfloat16
// follows.
template <bool kCoarse>
inline Vec<float> power_of_two(Vec<float> x) {
  using V = Vec<float>;
  using I = Vec<int32_t>;
  const V low = broadcast(-126.0f), round = broadcast(12582912.0f);  // 1.5 * 2^23: adding it rounds to an integer
  const V bounded = x < low ? low : x;
  const V shifted = bounded + round;
  const V r = bounded - (shifted - round);
  V p;
  if constexpr (kCoarse) {
    p = r * 9.5701018776e-3f + 5.5917861782e-2f;
    p = p * r + 2.4024744841e-1f;
    p = p * r + 6.9312181456e-1f;
    p = p * r + 9.9999926144e-1f;
  } else {
    p = r * 1.5345811966e-4f + 1.3399931385e-3f;
    p = p * r + 9.6184889587e-3f;
    p = p * r + 5.5503287766e-2f;
    p = p * r + 2.4022646891e-1f;
    p = p * r + 6.9314720574e-1f;
    p = p * r + 1.0f;
  }
  const V power = reinterpret_cast<V>((reinterpret_cast<I>(shifted) << 23) + 0x3F800000);
  return x < low ? V{} : p * power;
}

// float64 is for gradcheck, not for speed.
template <bool kCoarse>
inline Vec<double> power_of_two(Vec<double> x) {
  for (int i = 0; i < kLanes<double>; ++i) x[i] = __builtin_exp2(x[i]);
  return x;
}

// Prefetches rows that will be read or written soon, a few cache lines at a time between the products. Each row may lie
// in its own page, which no processor predicts, and fetched all at once they would wait for each other.
class Ahead {
 public:
  template <typename In, typename Operand>
  void add(const Operand& x, int64_t first, int64_t last, int64_t width) {
    if (last <= first) return;
    constexpr int64_t size = sizeof(In);
    regions_[count_++] = {static_cast<const char*>(x.data) + first * x.row * size, x.row * size, width * size,
                          last - first};
  }
  void advance(int64_t lines) {
    for (; lines > 0 && at_ < count_; --lines) {
      Region& region = regions_[at_];
      __builtin_prefetch(region.data + byte_, 0, 2);
      byte_ += 64;
      if (byte_ < region.bytes) continue;
      byte_ = 0;
      region.data += region.stride;
      if (--region.rows == 0) ++at_;
    }
  }

 private:
  struct Region {
    const char* data;
    int64_t stride, bytes, rows;
  };
  Region regions_[8];
  int count_ = 0, at_ = 0;
  int64_t byte_ = 0;
};

// multiply, a few rows at a time.
template <typename P, bool kAdd>
void multiply_ahead(Ahead& ahead, int64_t m, int64_t n, int64_t k, const typename P::Element* a, int64_t a_row,
                    int64_t a_step, const typename P::Element* b, typename P::Out* c, int64_t c_row) {
  constexpr int64_t kEach = P::kDepth == 2 ? 32 : kRows;
  for (int64_t i = 0; i < m; i += kEach) {
    const int64_t rows = m - i < kEach ? m - i : kEach;
    multiply<P, kAdd>(rows, n, k, a + i * a_row, a_row, a_step, b, c + i * c_row, c_row);
    ahead.advance(kPanel<P> / 4);
  }
}

// How many keys query q sees under a causal mask.
inline int64_t seen_by(const AttentionSizes& sizes, int64_t query) {
  return sizes.seen != nullptr ? sizes.seen[query] : query + sizes.keys - sizes.queries + 1;
}

// The last key that each lane of a panel sees; lanes beyond the last query see none.
template <typename T, int V>
struct Seen {
  using I = Vec<typename IntegerOf<T>::type>;
  I last[V];

  Seen(const AttentionSizes& sizes, int64_t first_query, int64_t queries) {
    for (int v = 0; v < V; ++v)
      for (int i = 0; i < kLanes<T>; ++i) {
        const int64_t lane = v * kLanes<T> + i;
        int64_t key = -1;
        if (lane < queries) key = sizes.causal ? seen_by(sizes, first_query + lane) - 1 : sizes.keys;
        last[v][i] = static_cast<typename IntegerOf<T>::type>(key);
      }
  }
  I operator()(int v, int64_t key) const { return last[v] >= static_cast<typename IntegerOf<T>::type>(key); }
};

// How many keys of the block [key, key + keys) any query of a panel sees, and whether every query sees all of these.
inline int64_t keys_seen(const AttentionSizes& sizes, int64_t last_query, int64_t key, int64_t keys) {
  if (!sizes.causal) return keys;
  const int64_t seen = seen_by(sizes, last_query) - key;
  return seen < 0 ? 0 : seen < keys ? seen : keys;
}
inline bool some_unseen(const AttentionSizes& sizes, int64_t first_query, int64_t key, int64_t keys) {
  return sizes.causal && seen_by(sizes, first_query) < key + keys;
}

// Calls f(Count<V>) for a panel of V vectors.
template <int V>
struct Count {
  static constexpr int value = V;
};
template <typename P, int V = 1, typename F>
inline void with_vectors(int64_t vectors, const F& f) {
  if (vectors == V)
    f(Count<V>{});
  else if constexpr ((V + 1) * kLanes<typename P::Out> <= kPanel<P>)
    with_vectors<P, V + 1>(vectors, f);
}

// The largest depth of a product whose panel of B fits the first-level cache.
template <typename P>
constexpr int64_t kDeep = P::kDepth == 2 ? 256 : 128;

// multiply with one panel of B and any depth; adds to C where told to.
template <typename P>
void multiply_panel(Ahead& ahead, bool add, int64_t m, int64_t n, int64_t k, const typename P::Element* a,
                    int64_t a_row, int64_t a_step, const typename P::Element* b, typename P::Out* c, int64_t c_row) {
  const int64_t columns = padded<typename P::Out>(n);
  for (int64_t i = 0; i < k; i += kDeep<P>) {
    const int64_t depth = k - i < kDeep<P> ? k - i : kDeep<P>;
    if (add || i > 0)
      multiply_ahead<P, true>(ahead, m, n, depth, a + i * a_step, a_row, a_step, b + i * columns, c, c_row);
    else
      multiply_ahead<P, false>(ahead, m, n, depth, a + i * a_step, a_row, a_step, b + i * columns, c, c_row);
  }
}

#if defined(__AVX512BF16__)
inline __m512i bfloats(Vec<float> low, Vec<float> high) {
  return reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(reinterpret_cast<__m512>(high), reinterpret_cast<__m512>(low)));
}

// The pairs (low[i], high[i]).
inline Vec<uint32_t> pairs(Vec<float> low, Vec<float> high) {
  constexpr int W = kLanes<float>;
  alignas(64) static constexpr uint16_t kOrder[2 * W] = {0, 16, 1, 17, 2,  18, 3,  19, 4,  20, 5,  21, 6,  22, 7,  23,
                                                         8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31};
  return reinterpret_cast<Vec<uint32_t>>(_mm512_permutexvar_epi16(_mm512_load_si512(kOrder), bfloats(low, high)));
}
#endif

// Rows j to j + kDepth - 1 of a panel, as one row of a product's B.
template <typename P, int V>
inline void store_b(typename P::Element* to, const Vec<typename P::Out> (&rows)[P::kDepth][V]) {
  for (int v = 0; v < V; ++v) {
    if constexpr (P::kDepth == 1)
      store(to + v * kLanes<typename P::Out>, rows[0][v]);
    else
      store(to + v * kLanes<typename P::Out>, pairs(rows[0][v], rows[1][v]));
  }
}

// The same rows as part of the rows of a product's A. A row of Pairs is padded to its kSteps.
template <typename P, int V>
inline void store_a(typename P::Element* to, int64_t to_row, const Vec<typename P::Out> (&rows)[P::kDepth][V]) {
  constexpr int W = kLanes<typename P::Out>;
  for (int r = 0; r < P::kDepth; ++r, to += to_row) {
    if constexpr (P::kDepth == 1)
      for (int v = 0; v < V; ++v) store(to + v * W, rows[r][v]);
    else
      for (int v = 0; v < V; v += 2) {
        Vec<float> last{};
        if (v + 1 < V) last = rows[r][v + 1];
        const auto both = bfloats(rows[r][v], last);
        std::memcpy(to + v * W / 2, &both, sizeof both);
      }
  }
}

}  // namespace
}  // namespace oner_fast
