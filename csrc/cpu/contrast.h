// The blocks of a contrast: the operands of both sides, how rows and columns are cut, which thread takes what, and the
// pass over all blocks that ends in the gradients of both sides.
//
// The logits are computed in blocks of a few hundred rows and columns, in forward and again in backward, and are never
// stored together. Columns are cut into stripes and rows into units. A thread takes a stripe and processes the units
// from first to last, so that a stripe is packed once and its sums stay in the second-level cache. The sums of a unit
// add the stripes in order. No order of a sum depends on the number of threads, and a thread waits only before it would
// overtake its predecessor.
#pragma once

#include <algorithm>
#include <atomic>
#include <cstring>
#include <numeric>
#include <optional>
#include <thread>
#include <tuple>
#include <vector>

#include "common/numbers.h"
#include "common/parallel.h"
#include "cpu/isa/mixup_info_nce.h"
#include "cpu/kinds.h"
#include "cpu/sizes.h"

namespace oner_fast::contrast {

constexpr int64_t kLargestStripe = 256, kLargestUnit = 128, kSmallest = 32;  // columns, rows, either
constexpr int64_t kLeastStripes = 4, kLeastUnits = 8;
constexpr int64_t kStripeNumbers = 1 << 16;  // numbers in a stripe; the second-level cache holds five times as many
constexpr int64_t kCountMultiple = 32;       // of columns and rows of every block but the last: whole panels and tiles
constexpr int64_t kColumnMultiple = 16;      // sums are padded to the widest vector
constexpr int64_t kRowGrain = 64;            // rows that are worth another thread where each is read once or twice

// The tensors behind a MixedRows, kept alive with it.
struct Side {
  Tensor x;
  OptionalTensor other, mix, inverse_norm;
  MixedRows rows;

  Side(const char* op, const char* name, const Tensor& x_in, const OptionalTensor& other_in,
       const OptionalTensor& mix_in, const OptionalTensor& inverse_in)
      : x(with_dense_rows(x_in)) {
    CHECK_VALUE(x_in.dim() == 2, op, ": ", name, " must have shape (N, D), got ", x_in.sizes());
    const ScalarType wide = statistics_type(type_of(x));
    rows = MixedRows{x.const_data_ptr(), x.stride(0), nullptr, 0, nullptr, 0, nullptr, kind_of(op, name, type_of(x)),
                     x.size(1)};
    if (other_in.has_value()) {
      CHECK_VALUE(other_in->sizes().equals(x.sizes()) && type_of(*other_in) == type_of(x), op, ": ", name,
                  "_other must be like ", name, ", got ", other_in->sizes(), " ", type_of(*other_in));
      CHECK_VALUE(mix_in.has_value() && (mix_in->dim() == 0 || mix_in->sizes().equals(x.sizes().slice(0, 1))), op,
                  ": mix must be a number or have shape (N,)");
      other = with_dense_rows(*other_in);
      mix = dense(of_type(*mix_in, wide));
      rows.other = other->const_data_ptr();
      rows.other_stride = other->stride(0);
      rows.mix = mix->const_data_ptr();
      rows.mix_step = mix->dim();
    }
    if (inverse_in.has_value()) {
      inverse_norm = vector(op, *inverse_in, x.size(0), wide, "the inverse norms");
      rows.inverse_norm = inverse_norm->const_data_ptr();
    }
  }

  static Tensor vector(const char* op, const Tensor& x, int64_t count, ScalarType type, const char* what) {
    CHECK_VALUE(x.dim() == 1 && x.size(0) == count && type_of(x) == type, op, ": ", what, " must be (", count, ",) ",
                type, ", got ", x.sizes(), " ", type_of(x));
    return dense(x);
  }
};

// Divides `count` rows or columns into parts of equal size, the last of which may be shorter.
struct Parts {
  int64_t count, size;
  int64_t number() const { return ceil_div(count, size); }
  int64_t begin(int64_t part) const { return part * size; }
  int64_t size_of(int64_t part) const { return std::min(size, count - begin(part)); }

  static Parts of(int64_t count, int64_t least, int64_t smallest, int64_t largest) {
    const int64_t wanted = std::clamp(ceil_div(count, least), smallest, largest);
    const int64_t even = ceil_div(count, std::max<int64_t>(ceil_div(count, wanted), 1));
    return {count, std::max(ceil_div(even, kCountMultiple) * kCountMultiple, kCountMultiple)};
  }
  static Parts stripes(int64_t count, int64_t width) {
    const int64_t largest = std::clamp(kStripeNumbers / std::max<int64_t>(width, 1), kSmallest, kLargestStripe);
    return of(count, kLeastStripes, kSmallest, largest);
  }
  static Parts units(int64_t count) { return of(count, kLeastUnits, kSmallest, kLargestUnit); }
};

// Counts the units that each stripe has finished.
class Turns {
 public:
  explicit Turns(int64_t stripes) : done_(static_cast<size_t>(stripes)) {}

  // Returns once the previous stripe has finished the unit. The first running stripe never waits.
  void wait(int64_t stripe, int64_t unit) {
    constexpr int kPatience = 1000;
    if (stripe == 0) return;
    const std::atomic<int64_t>& before = done_[static_cast<size_t>(stripe - 1)].units;
    for (int tries = 0; before.load(std::memory_order_acquire) <= unit; ++tries)
      if (tries > kPatience) std::this_thread::yield();
  }
  void pass_on(int64_t stripe, int64_t unit) {
    done_[static_cast<size_t>(stripe)].units.store(unit + 1, std::memory_order_release);
  }

 private:
  struct alignas(64) Done {
    std::atomic<int64_t> units{0};
  };
  std::vector<Done> done_;
};

constexpr int64_t kAlign = 64;
constexpr int64_t aligned(int64_t bytes) { return (bytes + kAlign - 1) / kAlign * kAlign; }

// Calls stripe(number, scratch) for every stripe, with any number of threads; stripes start in order.
template <typename Stripe>
void for_each_stripe(const Tensor& like, int64_t stripes, int64_t scratch_bytes, const Stripe& stripe) {
  const int64_t workers = std::min<int64_t>(threads(), stripes);
  const int64_t each = aligned(scratch_bytes);
  const Tensor scratch = empty({workers * each + kAlign}, kByte, like);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  base += (kAlign - static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) % kAlign)) % kAlign;
  std::atomic<int64_t> next{0};
  parallel_for(0, workers, 1, [&](int64_t first_worker, int64_t last_worker) {
    for (int64_t worker = first_worker; worker < last_worker; ++worker)
      for (int64_t i = next.fetch_add(1); i < stripes; i = next.fetch_add(1)) stripe(i, base + worker * each);
  });
}

// The first block of a stripe; the caller moves its rows from unit to unit.
inline ContrastBlock block_of(const Side& rows, const Side& columns, double scale, int64_t own, const int64_t* partner,
                              const SamePairs& same, const Parts& units, const Parts& stripes, int64_t stripe) {
  return {rows.rows, columns.rows, 0,    0,    stripes.begin(stripe), stripes.size_of(stripe), units.size,
          own,       partner,      same, scale};
}

inline void move_to(ContrastBlock& block, const Parts& units, int64_t unit) {
  block.row_first = units.begin(unit);
  block.row_count = units.size_of(unit);
}

// The kind of the products of both sides.
inline ContrastKind kind_of_products(const char* op, const Side& rows, const Side& columns) {
  CHECK_VALUE(rows.rows.width == columns.rows.width && rows.rows.kind == columns.rows.kind, op,
              ": query and key must have one width and one dtype");
  const auto kind = rows.rows.kind == kF64 ? kContrastF64 : rows.rows.kind == kBF16 ? kContrastBF16 : kContrastF32;
  const bool is_there = mixup_info_nce_kernels().contrast[kind].forward != nullptr;
  return is_there ? kind : kContrastF32;
}

inline OptionalTensor optional_vector(const char* op, const OptionalTensor& x, int64_t count, ScalarType type,
                                      const char* what) {
  return x.has_value() ? OptionalTensor(Side::vector(op, *x, count, type, what)) : std::nullopt;
}

// Clamps the first pair: outside all rows and columns its distance has no meaning, and clamped no index overflows.
inline int64_t nearest_pair(int64_t first_pair, int64_t rows, int64_t columns) {
  return std::clamp(first_pair, -rows, columns);
}

inline const int64_t* indices(const OptionalTensor& x) {
  return x.has_value() ? static_cast<const int64_t*>(x->const_data_ptr()) : nullptr;
}

inline void* data(const Tensor& x) { return x.mutable_data_ptr(); }
inline const void* data(const OptionalTensor& x) { return x.has_value() ? x->const_data_ptr() : nullptr; }

// The tensors behind SamePairs, kept alive with it.
struct Codes {
  OptionalTensor rows, columns, row_share, column_share;
  SamePairs pairs;

  Codes(const char* op, const OptionalTensor& query_code, const OptionalTensor& key_code,
        const OptionalTensor& row_share_in, const OptionalTensor& column_share_in, int64_t m, int64_t n,
        ScalarType wide)
      : rows(optional_vector(op, query_code, m, kInt, "query_code")),
        columns(optional_vector(op, key_code, n, kInt, "key_code")),
        row_share(optional_vector(op, row_share_in, m, wide, "row_share")),
        column_share(optional_vector(op, column_share_in, n, wide, "column_share")),
        pairs{static_cast<const int32_t*>(data(rows)), static_cast<const int32_t*>(data(columns)), data(row_share),
              data(column_share)} {
    CHECK_VALUE(rows.has_value() == columns.has_value() && row_share.has_value() == column_share.has_value() &&
                    (rows.has_value() || !row_share.has_value()),
                op, ": codes of both sides come together, and shares of both sides with them");
  }
  bool any() const { return rows.has_value(); }
};

// The gradients of a side, empty where they are not needed.
struct Gradients {
  Tensor x, other, mix;

  Gradients(const Side& side, bool needed, bool from_zeros, ScalarType wide)
      : x(!needed      ? empty({0}, wide, side.x)
          : from_zeros ? zeros(side.x.sizes(), type_of(side.x), side.x)
                       : empty(side.x.sizes(), type_of(side.x), side.x)),
        other(needed && side.other.has_value() ? empty(side.x.sizes(), type_of(side.x), side.x)
                                               : empty({0}, needed ? type_of(side.x) : wide, side.x)),
        mix(empty({needed && side.other.has_value() ? side.x.size(0) : 0}, wide, side.x)) {}

  MixedRowsGradient places(void* dot) const {
    const bool mixed = mix.size(0) > 0;
    return {data(x), mixed ? data(other) : nullptr, mixed ? data(mix) : nullptr, dot, x.size(1), x.size(1)};
  }
};

// The sum of a vector, in float64, so that a float32 result does not depend on the order.
template <typename T>
double sum(const Tensor& x) {
  const T* values = static_cast<const T*>(x.const_data_ptr());
  return std::accumulate(values, values + x.numel(), 0.0);
}

// The first `width` columns of `x`, times `scale`: `x` itself where these are all.
template <typename T>
Tensor scaled(const Tensor& x, int64_t width, double scale) {
  const int64_t rows = x.size(0), stride = x.size(1);
  const Tensor out = width == stride ? x : empty({rows, width}, type_of(x), x);
  const T* from = static_cast<const T*>(x.const_data_ptr());
  T* to = static_cast<T*>(out.mutable_data_ptr());
  const T factor = static_cast<T>(scale);
  parallel_for(0, rows, kRowGrain, [=](int64_t first, int64_t last) {
    for (int64_t i = first; i < last; ++i)
      for (int64_t j = 0; j < width; ++j) to[i * width + j] = from[i * stride + j] * factor;
  });
  return out;
}

// What every block of a call shares.
struct Call {
  const char* op;
  const Side& rows;
  const Side& columns;
  double scale;
  int64_t own_column;
  const int64_t* partner;
  const Codes& same;

  // Calls stripe(block, scratch) for every stripe, whose block has no rows yet.
  template <typename Stripe>
  void for_each_stripe(const Parts& units, const Parts& stripes, int64_t bytes, const Stripe& stripe) const {
    contrast::for_each_stripe(rows.x, stripes.number(), bytes, [&](int64_t number, char* scratch) {
      ContrastBlock block = block_of(rows, columns, scale, own_column, partner, same.pairs, units, stripes, number);
      stripe(number, block, scratch);
    });
  }
};

using SideGradients = std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor>;

// Computes the gradients of both sides (x, other and mix of each) and that of the scale, all times `each`.
// gradient(block, to_columns, scratch) turns the products of a block into G. add(block, scratch), called in the order
// of the stripes, adds up what that found of the block's rows.
template <typename Gradient, typename Add>
SideGradients backward(const Call& call, double each, bool need_key, bool key_sums_wanted, const Gradient& gradient,
                       const Add& add) {
  const Side &rows = call.rows, &columns = call.columns;
  const ContrastKernels& kernels = mixup_info_nce_kernels().contrast[kind_of_products(call.op, rows, columns)];
  const int64_t m = rows.x.size(0), n = columns.x.size(0), width = rows.x.size(1);
  const ScalarType wide = statistics_type(type_of(rows.x));
  const int64_t padded = ceil_div(width, kColumnMultiple) * kColumnMultiple;
  const int64_t row_bytes = padded * (wide == kDouble ? 8 : 4);
  const bool in_place = type_of(rows.x) == wide && padded == width;  // sums become the gradients
  const bool finish_keys = need_key && !key_sums_wanted;             // else the sums are the result
  const Gradients to_query(rows, true, in_place, wide), to_key(columns, finish_keys, in_place, wide);
  const Tensor row_sums = in_place ? to_query.x : zeros({m, padded}, wide, rows.x);
  const Tensor key_sums = need_key && !finish_keys ? zeros({n, padded}, wide, rows.x) : to_key.x;
  const bool buffered = finish_keys && !in_place;  // a stripe's sums last as long as the stripe
  const Tensor dot = empty({m}, wide, rows.x);

  const double factor = call.scale * each;
  const Parts units = Parts::units(m), stripes = Parts::stripes(n, width);
  const auto finish = mixup_info_nce_kernels().finish[wide == kDouble];
  Turns turns(stripes.number());
  const int64_t bytes = aligned(kernels.scratch_bytes(units.size, stripes.size, width, true, call.same.any()));
  const int64_t sum_bytes = buffered ? stripes.size * row_bytes : 0;
  call.for_each_stripe(units, stripes, bytes + sum_bytes, [&](int64_t stripe, ContrastBlock& block, char* scratch) {
    const int64_t first = block.column_first;
    char* of_columns = buffered   ? static_cast<char*>(std::memset(scratch + bytes, 0, static_cast<size_t>(sum_bytes)))
                       : need_key ? static_cast<char*>(data(key_sums)) + first * row_bytes
                                  : nullptr;
    const ContrastSums sums{data(row_sums), of_columns, padded, padded};
    kernels.take_columns(block, true, scratch);
    for (int64_t unit = 0; unit < units.number(); ++unit) {
      move_to(block, units, unit);
      gradient(block, need_key, scratch);
      turns.wait(stripe, unit);
      add(block, scratch);
      kernels.to_rows(block, sums, scratch);
      turns.pass_on(stripe, unit);
      if (need_key) kernels.to_columns(block, sums, scratch);
    }
    if (finish_keys)
      finish(columns.rows, first, first + block.column_count, of_columns, padded, factor, to_key.places(nullptr));
  });
  parallel_for(0, m, kRowGrain, [&](int64_t first, int64_t last) {
    const char* sums = static_cast<const char*>(row_sums.const_data_ptr()) + first * row_bytes;
    finish(rows.rows, first, last, sums, padded, factor, to_query.places(data(dot)));
  });
  const Tensor to_scale = empty({}, wide, rows.x);
  fill(to_scale, each * (wide == kDouble ? sum<double>(dot) : sum<float>(dot)));
  const Tensor key_result = !need_key || finish_keys ? to_key.x
                            : wide == kDouble        ? scaled<double>(key_sums, width, factor)
                                                     : scaled<float>(key_sums, width, factor);
  return {to_query.x, to_query.other, to_query.mix, key_result, to_key.other, to_key.mix, to_scale};
}

}  // namespace oner_fast::contrast
