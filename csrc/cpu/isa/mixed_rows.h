// Rows mixed from two and normalised: read in any kind, in parts that stay in the first-level cache.
#pragma once

#include "common/norm.h"
#include "cpu/isa/mixup_info_nce.h"
#include "cpu/isa/pack.h"

namespace oner_fast {
namespace {

constexpr int64_t kPart = 256;

template <typename T>
T dot_of(const T* a, const T* b, int64_t count) {
  Vec<T> sums{};
  int64_t j = 0;
  for (; j + kLanes<T> <= count; j += kLanes<T>) sums += load(a + j) * load(b + j);
  T total = sum_of<T>(sums);
  for (; j < count; ++j) total += a[j] * b[j];
  return total;
}

template <typename T>
void read_part(const void* row, Kind kind, int64_t column, int64_t count, T* out) {
  switch (kind) {
    case kF32:
      return widen_row(out, static_cast<const float*>(row) + column, count);
    case kF64:
      return widen_row(out, static_cast<const double*>(row) + column, count);
    case kF16:
      return widen_row(out, static_cast<const Half*>(row) + column, count);
    default:
      return widen_row(out, static_cast<const BFloat*>(row) + column, count);
  }
}

template <typename T>
void write_part(void* row, Kind kind, int64_t column, int64_t count, const T* values) {
  switch (kind) {
    case kF32:
      return narrow_row(static_cast<float*>(row) + column, values, count);
    case kF64:
      return narrow_row(static_cast<double*>(row) + column, values, count);
    case kF16:
      return narrow_row(static_cast<Half*>(row) + column, values, count);
    default:
      return narrow_row(static_cast<BFloat*>(row) + column, values, count);
  }
}

constexpr int64_t bytes_of(Kind kind) { return kind == kF64 ? 8 : kind == kF32 ? 4 : 2; }

inline const void* row_of(const void* x, int64_t stride, Kind kind, int64_t i) {
  return static_cast<const char*>(x) + i * stride * bytes_of(kind);
}
inline void* row_of(void* x, int64_t stride, Kind kind, int64_t i) {
  return static_cast<char*>(x) + i * stride * bytes_of(kind);
}

template <typename T>
T mix_of(const MixedRows& rows, int64_t i) {
  return rows.other == nullptr ? T(0) : static_cast<const T*>(rows.mix)[i * rows.mix_step];
}

template <typename T>
void read_mixed(const MixedRows& rows, int64_t i, int64_t column, int64_t count, T* out) {
  read_part(row_of(rows.x, rows.stride, rows.kind, i), rows.kind, column, count, out);
  if (rows.other == nullptr) return;
  T second[kPart];
  read_part(row_of(rows.other, rows.other_stride, rows.kind, i), rows.kind, column, count, second);
  const T share = mix_of<T>(rows, i), rest = 1 - share;
  for (int64_t j = 0; j < count; ++j) out[j] = rest * out[j] + share * second[j];
}

// Whether a row of this inverse norm times a unit vector cannot overflow. That of a row of zeros is 0.
template <typename T>
bool is_moderate(T inverse) {
  return inverse == 0 || (inverse > T(1.0f / (1 << 30)) && inverse < T(1 << 30));
}

// The factor that a packed row was multiplied by, and the one that makes it a unit vector. bfloat16 rows are scaled by
// a power of two, which is exact, and by 1 where no product could overflow: rows that are not mixed enter the product
// as they are.
template <typename P>
struct RowFactors {
  typename P::Out packed, rest;
};

template <typename P>
RowFactors<P> factors_of(const MixedRows& rows, int64_t i) {
  using T = typename P::Out;
  if (rows.inverse_norm == nullptr) return {1, 1};
  const T inverse = static_cast<const T*>(rows.inverse_norm)[i];
  if constexpr (P::kDepth == 1) {
    return {inverse, 1};
  } else {
    if (is_moderate(inverse)) return {1, inverse};
    const float power = float_of(bits_of(inverse) & 0x7F800000u);
    return {power, inverse / power};
  }
}

// The elements of a packed row, padding that products and transpositions read included.
template <typename P>
constexpr int64_t packed_length(int64_t width) {
  return round_up((width + P::kDepth - 1) / P::kDepth, kLanes<typename P::Element>);
}

// Unpacks a row to the numbers that it holds.
template <typename P>
auto numbers_of(const typename P::Element* elements) {
  if constexpr (P::kDepth == 1)
    return elements;
  else
    return reinterpret_cast<const BFloat*>(elements);
}

// Rows first..first + count, one after the other, zeros behind each; `rest` as in RowFactors.
template <typename P>
void pack_mixed(const MixedRows& rows, int64_t first, int64_t count, typename P::Element* out, typename P::Out* rest) {
  using T = typename P::Out;
  const int64_t length = packed_length<P>(rows.width);
  for (int64_t i = 0; i < count; ++i) {
    typename P::Element* to = out + i * length;
    const RowFactors<P> factors = factors_of<P>(rows, first + i);
    rest[i] = factors.rest;
    const int64_t all = length * static_cast<int64_t>(sizeof *out);
    const int64_t used = rows.width * static_cast<int64_t>(sizeof *out) / P::kDepth;
    std::memset(reinterpret_cast<char*>(to) + used, 0, static_cast<size_t>(all - used));
    if (P::kDepth == 2 && rows.other == nullptr && rows.kind == kBF16 && factors.packed == 1) {
      std::memcpy(to, row_of(rows.x, rows.stride, rows.kind, first + i), static_cast<size_t>(used));
      continue;
    }
    for (int64_t column = 0; column < rows.width; column += kPart) {
      const int64_t n = rows.width - column < kPart ? rows.width - column : kPart;
      T part[kPart];
      read_mixed(rows, first + i, column, n, part);
      for (int64_t j = 0; j < n; ++j) part[j] *= factors.packed;
      if constexpr (P::kDepth == 1)
        narrow_row(to + column, part, n);
      else
        narrow_row(reinterpret_cast<BFloat*>(to) + column, part, n);
    }
  }
}

template <typename T>
void inverse_norms(const MixedRows& rows, int64_t first, int64_t last, void* out) {
  for (int64_t i = first; i < last; ++i) {
    T sum = 0;
    for (int64_t column = 0; column < rows.width; column += kPart) {
      const int64_t n = rows.width - column < kPart ? rows.width - column : kPart;
      T part[kPart];
      read_mixed(rows, i, column, n, part);
      sum += dot_of(part, part, n);
    }
    static_cast<T*>(out)[i] = 1 / divisor_of(static_cast<T>(__builtin_sqrt(sum)));
  }
}

// Computes the gradients of x, other and mix from sums u, which begin with row `first`; scale * u is the gradient with
// respect to the row of the logits.
template <typename T>
void finish(const MixedRows& rows, int64_t first, int64_t last, const void* sums, int64_t stride, double scale,
            const MixedRowsGradient& out) {
  const T factor = static_cast<T>(scale);
  for (int64_t i = first; i < last; ++i) {
    const T* u = static_cast<const T*>(sums) + (i - first) * stride;
    const bool has_norm = rows.inverse_norm != nullptr;
    const T inverse = has_norm ? static_cast<const T*>(rows.inverse_norm)[i] : T(1);
    const T share = mix_of<T>(rows, i);
    T dot = 0, to_mix = 0, part[kPart];
    for (int64_t column = 0; column < rows.width && (has_norm || out.dot != nullptr); column += kPart) {
      const int64_t n = rows.width - column < kPart ? rows.width - column : kPart;
      read_mixed(rows, i, column, n, part);
      dot += dot_of(part, u + column, n);
    }
    dot *= inverse;
    if (out.dot != nullptr) static_cast<T*>(out.dot)[i] = dot;
    const T along = dot * inverse;
    for (int64_t column = 0; column < rows.width; column += kPart) {
      const int64_t n = rows.width - column < kPart ? rows.width - column : kPart;
      T gradient[kPart], second[kPart];
      if (has_norm) {
        read_mixed(rows, i, column, n, part);
        for (int64_t j = 0; j < n; ++j) gradient[j] = factor * inverse * (u[column + j] - along * part[j]);
      } else {
        for (int64_t j = 0; j < n; ++j) gradient[j] = factor * u[column + j];
      }
      if (out.to_mix != nullptr && rows.other != nullptr) {
        read_part(row_of(rows.x, rows.stride, rows.kind, i), rows.kind, column, n, part);
        read_part(row_of(rows.other, rows.other_stride, rows.kind, i), rows.kind, column, n, second);
        to_mix += dot_of(gradient, second, n) - dot_of(gradient, part, n);
      }
      if (out.to_other != nullptr) {
        for (int64_t j = 0; j < n; ++j) second[j] = share * gradient[j];
        write_part(row_of(out.to_other, out.to_other_stride, rows.kind, i), rows.kind, column, n, second);
      }
      for (int64_t j = 0; j < n; ++j) gradient[j] *= 1 - share;
      write_part(row_of(out.to_x, out.to_x_stride, rows.kind, i), rows.kind, column, n, gradient);
    }
    if (out.to_mix != nullptr) static_cast<T*>(out.to_mix)[i] = to_mix;
  }
}

}  // namespace
}  // namespace oner_fast
