// token_alignment: three sums of two rows in one pass, and a weighted sum of them.
#include "cpu/isa/token_alignment.h"

#include "cpu/isa/convert.h"
#include "cpu/isa/streaming.h"
#include "cpu/isa/vec.h"

namespace oner_fast {
namespace {

// kChunk numbers of a row from `row` on, zeros beyond its end; read in place if they need no conversion.
template <typename Wide, typename T>
const Wide* chunk(Wide* room, const T* row, int64_t count) {
  if constexpr (sizeof(Wide) == sizeof(T)) {
    if (count == kChunk) return row;
  }
  if (count < kChunk) std::memset(room, 0, kChunk * sizeof(Wide));
  widen_row(room, row, count);
  return room;
}

template <typename S, typename T, typename Wide>
void sums(double out[3], const void* student, const void* teacher, int64_t count, const void* next_student,
          const void* next_teacher) {
  constexpr int64_t kLane = kLanes<Wide>;
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  Vec<Wide> ss[2] = {}, tt[2] = {}, st[2] = {};
  Wide room_s[kChunk], room_t[kChunk];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = count - i < kChunk ? count - i : kChunk;
    fetch(static_cast<const S*>(next_student) + i, n * static_cast<int64_t>(sizeof(S)));
    fetch(static_cast<const T*>(next_teacher) + i, n * static_cast<int64_t>(sizeof(T)));
    const Wide *x = chunk(room_s, s + i, n), *y = chunk(room_t, t + i, n);
#pragma GCC unroll 2
    for (int64_t j = 0; j < kChunk; j += 2 * kLane) {
#pragma GCC unroll 2
      for (int64_t k = 0; k < 2; ++k) {
        const Vec<Wide> a = load(x + j + k * kLane), b = load(y + j + k * kLane);
        ss[k] += a * a;
        tt[k] += b * b;
        st[k] += a * b;
      }
    }
  }
  out[0] = out[1] = out[2] = 0;
  for (int64_t k = 0; k < 2; ++k) {
    for (int64_t lane = 0; lane < kLane; ++lane) {
      out[0] += static_cast<double>(ss[k][lane]);
      out[1] += static_cast<double>(tt[k][lane]);
      out[2] += static_cast<double>(st[k][lane]);
    }
  }
}

template <typename S, typename T, typename Wide>
void combine(void* out, const void* student, const void* teacher, int64_t count, double to_student, double to_teacher,
             const void* next_student, const void* next_teacher, bool streamed) {
  const S* s = static_cast<const S*>(student);
  const T* t = static_cast<const T*>(teacher);
  const Wide a = static_cast<Wide>(to_student), b = static_cast<Wide>(to_teacher);
  Wide room_s[kChunk], room_t[kChunk], sum[kChunk];
  S row[kChunk];
  for (int64_t i = 0; i < count; i += kChunk) {
    const int64_t n = count - i < kChunk ? count - i : kChunk;
    fetch(static_cast<const S*>(next_student) + i, n * static_cast<int64_t>(sizeof(S)));
    fetch(static_cast<const T*>(next_teacher) + i, n * static_cast<int64_t>(sizeof(T)));
    const Wide *x = chunk(room_s, s + i, n), *y = chunk(room_t, t + i, n);
    for (int64_t j = 0; j < kChunk; ++j) sum[j] = b * y[j] + a * x[j];
    narrow_row(row, sum, kChunk);
    char* to = reinterpret_cast<char*>(static_cast<S*>(out) + i);
    const int64_t bytes = n * static_cast<int64_t>(sizeof(S));
    if (streamed)
      stream_copy(to, reinterpret_cast<const char*>(row), bytes);
    else
      std::memcpy(to, row, static_cast<size_t>(bytes));
  }
}

template <typename S, typename T, typename Wide>
void fill_pair(TokenAlignmentKernels& table, Kind student, Kind teacher) {
  table.sums[student][teacher] = sums<S, T, Wide>;
  table.combine[student][teacher] = combine<S, T, Wide>;
  table.wide_sums[student][teacher] = sums<S, T, double>;
  table.wide_combine[student][teacher] = combine<S, T, double>;
}

template <typename S, typename Wide>
void fill(TokenAlignmentKernels& table, Kind kind) {
  fill_pair<S, float, Wide>(table, kind, kF32);
  fill_pair<S, double, Wide>(table, kind, kF64);
  fill_pair<S, Half, Wide>(table, kind, kF16);
  fill_pair<S, BFloat, Wide>(table, kind, kBF16);
}

TokenAlignmentKernels make_table() {
  TokenAlignmentKernels table{};
  fill<float, float>(table, kF32);
  fill<double, double>(table, kF64);
  fill<Half, float>(table, kF16);
  fill<BFloat, float>(table, kBF16);
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(TokenAlignmentKernels, token_alignment_kernels, make_table)

}  // namespace oner_fast
