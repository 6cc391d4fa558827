// Conversions and sums over rows. Built without contraction into FMA: every instruction set gives the same bits.
#include "cpu/isa/rows.h"

#include "cpu/isa/convert.h"

namespace oner_fast {
namespace {

constexpr int64_t kChunk = 64;  // elements converted at a time; they stay in the first-level cache

template <typename T, typename Wide>
void add(void* out, const void* a, const void* b, int64_t count) {
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = count - i < kChunk ? count - i : kChunk;
    Wide x[kChunk], y[kChunk];
    widen_row(x, static_cast<const T*>(a) + i, n);
    widen_row(y, static_cast<const T*>(b) + i, n);
    for (int64_t j = 0; j < n; ++j) x[j] += y[j];
    narrow_row(static_cast<T*>(out) + i, x, n);
  }
}

template <typename T>
void add_plain(void* out, const void* a, const void* b, int64_t count) {
  T* __restrict o = static_cast<T*>(out);
  const T* x = static_cast<const T*>(a);
  const T* y = static_cast<const T*>(b);
  for (int64_t i = 0; i < count; ++i) o[i] = x[i] + y[i];
}

template <typename T, typename Wide>
void accumulate(void* sum, const void* row, int64_t count) {
  Wide* total = static_cast<Wide*>(sum);
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = count - i < kChunk ? count - i : kChunk;
    Wide x[kChunk];
    widen_row(x, static_cast<const T*>(row) + i, n);
    for (int64_t j = 0; j < n; ++j) total[i + j] += x[j];
  }
}

template <typename T, typename Wide>
void store(void* row, const void* sum, int64_t count) {
  narrow_row(static_cast<T*>(row), static_cast<const Wide*>(sum), count);
}

template <typename In, typename Out, typename Wide>
void normalise(void* out, const void* pixels, int64_t stride, int64_t side, double shift, double divisor) {
  const Wide s = static_cast<Wide>(shift), d = static_cast<Wide>(divisor);
  for (int64_t y = 0; y < side; ++y) {
    const In* line = static_cast<const In*>(pixels) + y * stride;
    Out* row = static_cast<Out*>(out) + y * side;
    for (int64_t i = 0; i < side; i += kChunk) {
      const int64_t n = side - i < kChunk ? side - i : kChunk;
      Wide x[kChunk];
      widen_row(x, line + i, n);
      for (int64_t j = 0; j < n; ++j) x[j] = (x[j] - s) / d;
      narrow_row(row + i, x, n);
    }
  }
}

template <typename In, typename Wide>
void fill_normalise(void (*(&table)[kKinds])(void*, const void*, int64_t, int64_t, double, double)) {
  table[kF32] = normalise<In, float, Wide>;
  table[kF64] = normalise<In, double, double>;
  table[kF16] = normalise<In, Half, Wide>;
  table[kBF16] = normalise<In, BFloat, Wide>;
}

RowKernels make_table() {
  RowKernels table{};
  table.add[kF32] = add_plain<float>;
  table.add[kF64] = add_plain<double>;
  table.add[kF16] = add<Half, float>;
  table.add[kBF16] = add<BFloat, float>;
  table.accumulate[kF32][0] = accumulate<float, float>;
  table.accumulate[kF32][1] = accumulate<float, double>;
  table.accumulate[kF64][0] = accumulate<double, float>;
  table.accumulate[kF64][1] = accumulate<double, double>;
  table.accumulate[kF16][0] = accumulate<Half, float>;
  table.accumulate[kF16][1] = accumulate<Half, double>;
  table.accumulate[kBF16][0] = accumulate<BFloat, float>;
  table.accumulate[kBF16][1] = accumulate<BFloat, double>;
  table.store[kF32][0] = store<float, float>;
  table.store[kF32][1] = store<float, double>;
  table.store[kF64][0] = store<double, float>;
  table.store[kF64][1] = store<double, double>;
  table.store[kF16][0] = store<Half, float>;
  table.store[kF16][1] = store<Half, double>;
  table.store[kBF16][0] = store<BFloat, float>;
  table.store[kBF16][1] = store<BFloat, double>;
  fill_normalise<float, float>(table.normalise[kF32]);
  fill_normalise<double, double>(table.normalise[kF64]);
  fill_normalise<Half, float>(table.normalise[kF16]);
  fill_normalise<BFloat, float>(table.normalise[kBF16]);
  fill_normalise<uint8_t, float>(table.normalise[kU8]);
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(RowKernels, row_kernels, make_table)

}  // namespace oner_fast
