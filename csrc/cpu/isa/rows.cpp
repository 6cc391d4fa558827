// Conversions and sums over rows. Built without contraction into FMA: every instruction set gives the same bits.
#include "cpu/isa/rows.h"

#include "cpu/isa/convert.h"

namespace oner_fast {
namespace {

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

template <typename T>
void accumulate_plain(void* sum, const void* row, int64_t count) {
  T* __restrict total = static_cast<T*>(sum);
  const T* x = static_cast<const T*>(row);
  for (int64_t i = 0; i < count; ++i) total[i] += x[i];
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

// Lines of the usual lengths are copied with one or two instructions, because a call would cost more than the line.
inline void place(void* to, const void* from, int64_t bytes) {
  switch (bytes) {
    case 8:
      std::memcpy(to, from, 8);
      break;
    case 16:
      std::memcpy(to, from, 16);
      break;
    case 32:
      std::memcpy(to, from, 32);
      break;
    case 64:
      std::memcpy(to, from, 64);
      break;
    default:
      std::memcpy(to, from, static_cast<size_t>(bytes));
  }
}

// out = (pixels - shift) * scale: a product, since a division of vectors takes as long as all the rest
template <typename In, typename Out, typename Wide>
inline void normalise_block(Out* out, const In* pixels, int64_t count, Wide shift, Wide scale) {
  Wide x[kChunk];
  widen_row(x, pixels, count);
  for (int64_t j = 0; j < count; ++j) x[j] = (x[j] - shift) * scale;
  narrow_row(out, x, count);
}

template <typename In, typename Out, typename Wide>
void normalise(void* out, const void* pixels, int64_t stride, int64_t side, double shift, double divisor) {
  constexpr int64_t kRoom = 1024, kShort = 16;  // for a constant count the compiler emits a few instructions
  const Wide s = static_cast<Wide>(shift), d = static_cast<Wide>(1 / divisor);
  if (side % kShort == 0) {
    for (int64_t y = 0; y < side; ++y)
      for (int64_t x = 0; x < side; x += kShort)
        normalise_block<In, Out, Wide>(static_cast<Out*>(out) + y * side + x,
                                       static_cast<const In*>(pixels) + y * stride + x, kShort, s, d);
    return;
  }
  const int64_t width = side < kRoom ? side : kRoom, lines = kRoom / width;
  In room[kRoom];  // gathers lines, so that whole blocks are converted
  for (int64_t y = 0; y < side; y += lines) {
    const int64_t height = side - y < lines ? side - y : lines;
    for (int64_t x = 0; x < side; x += width) {
      const int64_t columns = side - x < width ? side - x : width;
      for (int64_t k = 0; k < height; ++k)
        place(room + k * columns, static_cast<const In*>(pixels) + (y + k) * stride + x,
              columns * static_cast<int64_t>(sizeof(In)));
      Out* to = static_cast<Out*>(out) + y * side + x;
      const int64_t count = height * columns;
      const int64_t whole = count / kChunk * kChunk, rest = count % kChunk;
      for (int64_t i = 0; i < whole; i += kChunk) normalise_block<In, Out, Wide>(to + i, room + i, kChunk, s, d);
      if (rest > 0) normalise_block<In, Out, Wide>(to + whole, room + whole, rest, s, d);
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
  table.accumulate[kF32][0] = accumulate_plain<float>;
  table.accumulate[kF32][1] = accumulate<float, double>;
  table.accumulate[kF64][0] = accumulate<double, float>;
  table.accumulate[kF64][1] = accumulate_plain<double>;
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
