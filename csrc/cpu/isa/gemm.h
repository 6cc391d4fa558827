// Matrix products over operands that fit the caches: C (m x n) = or += A (m x k) B (k x n).
//
// B is packed in panels of kPanel columns, row after row, and C stored row after row; their columns are padded to whole
// vectors. A of Plain is read one element at a time and may have any strides: a transposed A costs nothing. A of Pairs
// has consecutive elements; its k is padded with zeros to a multiple of kSteps, as that of B, and its rows may be read
// up to the next multiple of kRowsRead.
#pragma once

#include "cpu/isa/vec.h"

#if defined(__AVX512BF16__)
#include <immintrin.h>
#endif

namespace oner_fast {
namespace {

// The types of a product: Out is that of C, Element one step of A (and of a column of B), which holds kDepth numbers
// along k.
template <typename T>
struct Plain {
  using Out = T;
  using Element = T;
  static constexpr int kDepth = 1, kSteps = 1, kRowsRead = 1;
  static Vec<T> multiply_add(T a, Vec<T> b, Vec<T> c) { return broadcast(a) * b + c; }
};

#if defined(__AVX512BF16__)
// Pairs of bfloat16 along k in one 32-bit element, the lower k in the lower half; float32 sums.
struct Pairs {
  using Out = float;
  using Element = uint32_t;
  static constexpr int kDepth = 2, kSteps = 16, kRowsRead = 16;
  static Vec<float> multiply_add(uint32_t a, Vec<uint32_t> b, Vec<float> c) {
    return reinterpret_cast<Vec<float>>(_mm512_dpbf16_ps(
        reinterpret_cast<__m512>(c), reinterpret_cast<__m512bh>(_mm512_set1_epi32(static_cast<int>(a))),
        reinterpret_cast<__m512bh>(b)));
  }
};
#endif

// Rows and vectors of C kept in registers: all sums, one row of B and one element of A fit the register file.
#if defined(__AVX512F__) || defined(__aarch64__)
constexpr int kRows = 6, kVectors = 4;
#else
constexpr int kRows = 6, kVectors = 2;
#endif
#if defined(__AMX_BF16__)
template <typename P>
constexpr int kPanel = P::kDepth == 2 ? 32 : kVectors * kLanes<typename P::Out>;
#else
template <typename P>
constexpr int kPanel = kVectors * kLanes<typename P::Out>;
#endif

template <typename T>
constexpr int64_t padded(int64_t columns) {
  return (columns + kLanes<T> - 1) / kLanes<T> * kLanes<T>;
}
constexpr int64_t round_up(int64_t x, int64_t multiple) { return (x + multiple - 1) / multiple * multiple; }

template <typename P, int R, int V, bool kAdd>
inline void tile(int64_t k, const typename P::Element* a, int64_t a_row, int64_t a_step, const typename P::Element* b,
                 typename P::Out* c, int64_t c_row) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  Vec<T> sum[R][V];
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) sum[r][v] = Vec<T>{};
  for (int64_t i = 0; i < k; ++i) {
    Vec<typename P::Element> row[V];
#pragma GCC unroll 16
    for (int v = 0; v < V; ++v) row[v] = load(b + v * W);
#pragma GCC unroll 16
    for (int r = 0; r < R; ++r) {
      const typename P::Element x = a[r * a_row];
#pragma GCC unroll 16
      for (int v = 0; v < V; ++v) sum[r][v] = P::multiply_add(x, row[v], sum[r][v]);
    }
    a += a_step;
    b += V * W;
  }
  for (int r = 0; r < R; ++r)
    for (int v = 0; v < V; ++v) {
      // Added at the end: each step's rounding is relative to this product, not to all that C holds.
      if constexpr (kAdd) sum[r][v] += load(c + r * c_row + v * W);
      store(c + r * c_row + v * W, sum[r][v]);
    }
}

template <typename P, int V, bool kAdd, int R>
inline void last_rows(int64_t rows, int64_t k, const typename P::Element* a, int64_t a_row, int64_t a_step,
                      const typename P::Element* b, typename P::Out* c, int64_t c_row) {
  if constexpr (R > 0) {
    if (rows == R)
      tile<P, R, V, kAdd>(k, a, a_row, a_step, b, c, c_row);
    else
      last_rows<P, V, kAdd, R - 1>(rows, k, a, a_row, a_step, b, c, c_row);
  }
}

template <typename P, int V, bool kAdd>
void panel_part(int64_t m, int64_t k, const typename P::Element* a, int64_t a_row, int64_t a_step,
                const typename P::Element* b, typename P::Out* c, int64_t c_row) {
  int64_t i = 0;
  for (; i + kRows <= m; i += kRows) tile<P, kRows, V, kAdd>(k, a + i * a_row, a_row, a_step, b, c + i * c_row, c_row);
  last_rows<P, V, kAdd, kRows - 1>(m - i, k, a + i * a_row, a_row, a_step, b, c + i * c_row, c_row);
}

// The rows of a panel that leave room for A in the first-level cache.
constexpr int64_t kPanelPart = 128;

template <typename P, int V, bool kAdd>
void panel(int64_t m, int64_t k, const typename P::Element* a, int64_t a_row, int64_t a_step,
           const typename P::Element* b, typename P::Out* c, int64_t c_row) {
  constexpr int64_t width = V * kLanes<typename P::Out>;
  panel_part<P, V, kAdd>(m, k < kPanelPart ? k : kPanelPart, a, a_row, a_step, b, c, c_row);
  for (int64_t i = kPanelPart; i < k; i += kPanelPart)
    panel_part<P, V, true>(m, k - i < kPanelPart ? k - i : kPanelPart, a + i * a_step, a_row, a_step, b + i * width, c,
                           c_row);
}

#if defined(__AMX_BF16__)
// Four 16 x 16 sums: tiles 0 to 3; two tiles of A: 4 and 5; two of B: 6 and 7.
struct alignas(64) TileShapes {
  uint8_t palette = 1, start_row = 0, reserved[14] = {};
  uint16_t column_bytes[16] = {64, 64, 64, 64, 64, 64, 64, 64};
  uint8_t rows[16] = {16, 16, 16, 16, 16, 16, 16, 16};
};

// A task that multiplies Pairs must hold one of these.
class Tiles {
 public:
  Tiles() {
    const TileShapes shapes;
    _tile_loadconfig(&shapes);
  }
  ~Tiles() { _tile_release(); }
  Tiles(const Tiles&) = delete;
  Tiles& operator=(const Tiles&) = delete;
};

template <bool kAdd, bool kTwoRows, bool kTwoColumns>
inline void tiles(int64_t k, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, float* c,
                  int64_t c_row) {
  const int64_t a_bytes = a_row * 4, b_bytes = b_row * 4, c_bytes = c_row * 4;
  if constexpr (kAdd) {
    _tile_loadd(0, c, c_bytes);
    if constexpr (kTwoColumns) _tile_loadd(1, c + 16, c_bytes);
    if constexpr (kTwoRows) _tile_loadd(2, c + 16 * c_row, c_bytes);
    if constexpr (kTwoRows && kTwoColumns) _tile_loadd(3, c + 16 * c_row + 16, c_bytes);
  } else {
    _tile_zero(0);
    if constexpr (kTwoColumns) _tile_zero(1);
    if constexpr (kTwoRows) _tile_zero(2);
    if constexpr (kTwoRows && kTwoColumns) _tile_zero(3);
  }
  for (int64_t i = 0; i < k; i += 16) {
    _tile_loadd(4, a + i, a_bytes);
    _tile_loadd(6, b + i * b_row, b_bytes);
    _tile_dpbf16ps(0, 4, 6);
    if constexpr (kTwoColumns) {
      _tile_loadd(7, b + i * b_row + 16, b_bytes);
      _tile_dpbf16ps(1, 4, 7);
    }
    if constexpr (kTwoRows) {
      _tile_loadd(5, a + 16 * a_row + i, a_bytes);
      _tile_dpbf16ps(2, 5, 6);
      if constexpr (kTwoColumns) _tile_dpbf16ps(3, 5, 7);
    }
  }
  _tile_stored(0, c, c_bytes);
  if constexpr (kTwoColumns) _tile_stored(1, c + 16, c_bytes);
  if constexpr (kTwoRows) _tile_stored(2, c + 16 * c_row, c_bytes);
  if constexpr (kTwoRows && kTwoColumns) _tile_stored(3, c + 16 * c_row + 16, c_bytes);
}

// At most 32 rows.
template <bool kAdd, bool kTwoColumns>
void tile_rows(int64_t rows, int64_t k, const uint32_t* a, int64_t a_row, const uint32_t* b, int64_t b_row, float* c,
               int64_t c_row) {
  if (rows == 32) return tiles<kAdd, true, kTwoColumns>(k, a, a_row, b, b_row, c, c_row);
  if (rows >= 16) {
    tiles<kAdd, false, kTwoColumns>(k, a, a_row, b, b_row, c, c_row);
    rows -= 16;
    a += 16 * a_row;
    c += 16 * c_row;
  }
  if (rows == 0) return;
  alignas(64) float part[16 * 32];  // the last rows go through a buffer: a tile is written whole
  constexpr size_t bytes = kTwoColumns ? 128 : 64;
  if constexpr (kAdd)
    for (int64_t r = 0; r < rows; ++r) std::memcpy(part + r * 32, c + r * c_row, bytes);
  tiles<kAdd, false, kTwoColumns>(k, a, a_row, b, b_row, part, 32);
  for (int64_t r = 0; r < rows; ++r) std::memcpy(c + r * c_row, part + r * 32, bytes);
}

// 32 rows of A stay in the first-level cache while B passes.
template <bool kAdd>
void multiply_tiles(int64_t m, int64_t n, int64_t k, const uint32_t* a, int64_t a_row, const uint32_t* b, float* c,
                    int64_t c_row) {
  for (int64_t i = 0; i < m; i += 32) {
    const int64_t rows = m - i < 32 ? m - i : 32;
    for (int64_t j = 0; j < n; j += 32) {
      if (n - j > 16)
        tile_rows<kAdd, true>(rows, k, a + i * a_row, a_row, b + j * k, 32, c + i * c_row + j, c_row);
      else
        tile_rows<kAdd, false>(rows, k, a + i * a_row, a_row, b + j * k, 16, c + i * c_row + j, c_row);
    }
  }
}
#else
struct Tiles {
  Tiles() {}  // nothing to prepare, and not an unused variable
};
#endif

// k counts elements (pairs for bfloat16) and n counts columns; the rows of C have room for padded(n). Panel p of B
// starts at p * kPanel * k; the last panel holds the remaining vectors.
template <typename P, bool kAdd>
void multiply(int64_t m, int64_t n, int64_t k, const typename P::Element* a, int64_t a_row, int64_t a_step,
              const typename P::Element* b, typename P::Out* c, int64_t c_row) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
#if defined(__AMX_BF16__)
  if constexpr (P::kDepth == 2) return multiply_tiles<kAdd>(m, n, k, a, a_row, b, c, c_row);
#endif
  for (int64_t j = 0; j < n; j += kPanel<P>) {
    const int64_t left = (n - j + W - 1) / W;
    const typename P::Element* from = b + j * k;
    if (left >= kVectors)
      panel<P, kVectors, kAdd>(m, k, a, a_row, a_step, from, c + j, c_row);
    else if (left == 1)
      panel<P, 1, kAdd>(m, k, a, a_row, a_step, from, c + j, c_row);
    else if (kVectors > 2 && left == 2)
      panel<P, 2, kAdd>(m, k, a, a_row, a_step, from, c + j, c_row);
    else if constexpr (kVectors > 3)
      panel<P, 3, kAdd>(m, k, a, a_row, a_step, from, c + j, c_row);
  }
}

}  // namespace
}  // namespace oner_fast
