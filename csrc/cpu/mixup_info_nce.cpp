// mixup_info_nce: computes the logits in blocks of a few hundred rows and columns, in forward and again in backward,
// and never stores them all.
//
// Columns are cut into stripes and rows into units. A thread takes a stripe and processes the units from first to last,
// so that a stripe is packed once and its sums stay in the second-level cache. The sums of a unit add the stripes in
// order. No order of a sum depends on the number of threads, and a thread waits only before it would overtake its
// predecessor.
#include "cpu/isa/mixup_info_nce.h"

#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <atomic>
#include <cstring>
#include <limits>
#include <optional>
#include <thread>
#include <tuple>
#include <utility>
#include <vector>

#include "common/ops.h"
#include "cpu/dense.h"
#include "cpu/kinds.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "mixup_info_nce";
constexpr int64_t kLargestStripe = 256, kLargestUnit = 128, kSmallest = 32;  // columns, rows, either
constexpr int64_t kLeastStripes = 4, kLeastUnits = 8;
constexpr int64_t kStripeNumbers = 1 << 16;  // numbers in a stripe; the second-level cache holds five times as many
constexpr int64_t kCountMultiple = 32;       // of columns and rows of every block but the last: whole panels and tiles
constexpr int64_t kColumnMultiple = 16;      // sums are padded to the widest vector
constexpr int64_t kRowGrain = 64;            // rows that are worth another thread where each is read once or twice

using OptionalTensor = std::optional<at::Tensor>;

// The tensors behind a MixedRows, kept alive with it.
struct Side {
  at::Tensor x, other, mix, inverse_norm;
  MixedRows rows;

  Side(const char* name, const at::Tensor& x_in, const OptionalTensor& other_in, const OptionalTensor& mix_in,
       const OptionalTensor& inverse_in)
      : x(with_dense_rows(x_in)) {
    TORCH_CHECK_VALUE(x_in.dim() == 2, kOp, ": ", name, " must have shape (N, D), got ", x_in.sizes());
    const at::ScalarType wide = statistics_type(x.scalar_type());
    rows =
        MixedRows{x.const_data_ptr(), x.stride(0), nullptr, 0, nullptr, 0, nullptr, kind_of(kOp, name, x.scalar_type()),
                  x.size(1)};
    if (other_in.has_value()) {
      TORCH_CHECK_VALUE(other_in->sizes() == x.sizes() && other_in->scalar_type() == x.scalar_type(), kOp, ": ", name,
                        "_other must be like ", name, ", got ", other_in->sizes(), " ", other_in->scalar_type());
      TORCH_CHECK_VALUE(mix_in.has_value() && (mix_in->dim() == 0 || mix_in->sizes() == x.sizes().slice(0, 1)), kOp,
                        ": mix must be a number or have shape (N,)");
      other = with_dense_rows(*other_in);
      mix = mix_in->to(wide).contiguous();
      rows.other = other.const_data_ptr();
      rows.other_stride = other.stride(0);
      rows.mix = mix.const_data_ptr();
      rows.mix_step = mix.dim();
    }
    if (inverse_in.has_value()) {
      inverse_norm = vector(*inverse_in, x.size(0), wide, "the inverse norms");
      rows.inverse_norm = inverse_norm.const_data_ptr();
    }
  }

  static at::Tensor vector(const at::Tensor& x, int64_t count, at::ScalarType type, const char* what) {
    TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == count && x.scalar_type() == type, kOp, ": ", what, " must be (",
                      count, ",) ", type, ", got ", x.sizes(), " ", x.scalar_type());
    return x.contiguous();
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
void for_each_stripe(int64_t stripes, int64_t scratch_bytes, const Stripe& stripe) {
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), stripes);
  const int64_t each = aligned(scratch_bytes);
  const at::Tensor scratch = at::empty({threads * each + kAlign}, at::kByte);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  base += (kAlign - static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) % kAlign)) % kAlign;
  std::atomic<int64_t> next{0};
  at::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
    for (int64_t thread = first_thread; thread < last_thread; ++thread)
      for (int64_t i = next.fetch_add(1); i < stripes; i = next.fetch_add(1)) stripe(i, base + thread * each);
  });
}

// The first block of a stripe; the caller moves its rows from unit to unit.
ContrastBlock block_of(const Side& rows, const Side& columns, double scale, int64_t own, const int64_t* partner,
                       const Parts& units, const Parts& stripes, int64_t stripe) {
  return {rows.rows,  columns.rows, 0,       0,    stripes.begin(stripe), stripes.size_of(stripe),
          units.size, own,          partner, scale};
}

void move_to(ContrastBlock& block, const Parts& units, int64_t unit) {
  block.row_first = units.begin(unit);
  block.row_count = units.size_of(unit);
}

const ContrastKernels& kernels_for(const Side& rows, const Side& columns) {
  TORCH_CHECK_VALUE(rows.rows.width == columns.rows.width && rows.rows.kind == columns.rows.kind, kOp,
                    ": query and key must have one width and one dtype");
  const auto& table = mixup_info_nce_kernels();
  const auto kind = rows.rows.kind == kF64 ? kContrastF64 : rows.rows.kind == kBF16 ? kContrastBF16 : kContrastF32;
  const bool is_there = table.contrast[kind].forward != nullptr;
  return table.contrast[is_there ? kind : kContrastF32];
}

at::Tensor dense_partner(const OptionalTensor& partner, int64_t rows) {
  return partner.has_value() ? Side::vector(*partner, rows, at::kLong, "partner") : at::Tensor();
}

// Clamps the first pair: outside all rows and columns its distance has no meaning, and clamped no index overflows.
int64_t nearest_pair(int64_t first_pair, int64_t rows, int64_t columns) {
  return std::clamp(first_pair, -rows, columns);
}

const int64_t* indices(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<int64_t>() : nullptr; }

void* data(const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }

// The gradients of a side, empty where they are not needed.
struct Gradients {
  at::Tensor x, other, mix;

  Gradients(const Side& side, bool needed, bool zeros, const at::TensorOptions& wide)
      : x(!needed ? at::empty({0}, wide)
          : zeros ? at::zeros(side.x.sizes(), side.x.options())
                  : at::empty(side.x.sizes(), side.x.options())),
        other(at::empty(needed && side.other.defined() ? side.x.sizes() : at::IntArrayRef{0},
                        needed ? side.x.options() : wide)),
        mix(at::empty({needed && side.other.defined() ? side.x.size(0) : 0}, wide)) {}

  MixedRowsGradient places(void* dot) const {
    const bool mixed = mix.size(0) > 0;
    return {data(x), mixed ? data(other) : nullptr, mixed ? data(mix) : nullptr, dot, x.size(1), x.size(1)};
  }
};

}  // namespace

at::Tensor mixup_inverse_norms(const at::Tensor& x, const OptionalTensor& other, const OptionalTensor& mix) {
  const Side side("x", x, other, mix, std::nullopt);
  const at::Tensor out = at::empty({x.size(0)}, x.options().dtype(statistics_type(x.scalar_type())));
  const auto kernel = mixup_info_nce_kernels().inverse_norms[statistics_type(x.scalar_type()) == at::kDouble];
  void* to = data(out);
  at::parallel_for(0, x.size(0), kRowGrain, [&](int64_t first, int64_t last) { kernel(side.rows, first, last, to); });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_statistics(
    const at::Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const at::Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const at::Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, bool columns_too) {
  const Side rows("query", query, query_other, query_mix, query_inverse_norm);
  const Side columns("key", key, key_other, key_mix, key_inverse_norm);
  const ContrastKernels& kernels = kernels_for(rows, columns);
  const int64_t m = query.size(0), n = key.size(0), own_column = nearest_pair(first_pair, m, n);
  const at::Tensor partner = dense_partner(partner_in, m);
  const auto options = query.options().dtype(statistics_type(query.scalar_type()));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const at::Tensor row_max = at::full({m}, -kInfinity, options), row_sum = at::zeros({m}, options);
  const int64_t column_count = columns_too ? n : 0;
  const at::Tensor column_max = at::full({column_count}, -kInfinity, options);
  const at::Tensor column_sum = at::zeros({column_count}, options);
  const at::Tensor own = at::zeros({m}, options), shared = at::zeros({partner.defined() ? m : 0}, options);
  const ContrastStatistics out{
      data(row_max), data(row_sum), columns_too ? data(column_max) : nullptr, columns_too ? data(column_sum) : nullptr,
      data(own),     data(shared)};
  const double scale = logit_scale.item<double>();
  const Parts units = Parts::units(m), stripes = Parts::stripes(n, query.size(1));
  Turns turns(stripes.number());
  const int64_t bytes = kernels.scratch_bytes(units.size, stripes.size, query.size(1), false);
  for_each_stripe(stripes.number(), bytes, [&](int64_t stripe, void* scratch) {
    ContrastBlock block = block_of(rows, columns, scale, own_column, indices(partner), units, stripes, stripe);
    kernels.take_columns(block, false, scratch);
    for (int64_t unit = 0; unit < units.number(); ++unit) {
      move_to(block, units, unit);
      kernels.forward(block, out, scratch);
      turns.wait(stripe, unit);
      kernels.forward_rows(block, out, scratch);
      turns.pass_on(stripe, unit);
    }
  });
  return {row_max, row_sum, column_max, column_sum, own, shared};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_backward(
    const at::Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const at::Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const at::Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, const at::Tensor& row_max_in, const at::Tensor& row_weight_in,
    const OptionalTensor& column_max_in, const OptionalTensor& column_weight_in, const at::Tensor& own_weight_in,
    const OptionalTensor& partner_weight_in, bool need_key, bool key_sums_wanted) {
  const Side rows("query", query, query_other, query_mix, query_inverse_norm);
  const Side columns("key", key, key_other, key_mix, key_inverse_norm);
  const ContrastKernels& kernels = kernels_for(rows, columns);
  const int64_t m = query.size(0), n = key.size(0), width = query.size(1), own_column = nearest_pair(first_pair, m, n);
  const at::Tensor partner = dense_partner(partner_in, m);
  const at::ScalarType wide = statistics_type(query.scalar_type());
  const auto options = query.options().dtype(wide);
  const auto vector = [&](const OptionalTensor& x, int64_t count, const char* what) {
    return x.has_value() ? Side::vector(*x, count, wide, what) : at::Tensor();
  };
  const at::Tensor row_max = vector(row_max_in, m, "row_max"), column_max = vector(column_max_in, n, "column_max");
  const at::Tensor row_weight = vector(row_weight_in, m, "row_weight");
  const at::Tensor column_weight = vector(column_weight_in, n, "column_weight");
  const at::Tensor own_weight = vector(own_weight_in, m, "own_weight");
  const at::Tensor partner_weight = vector(partner_weight_in, m, "partner_weight");
  TORCH_CHECK_VALUE(column_max.defined() == column_weight.defined() && partner.defined() == partner_weight.defined(),
                    kOp, ": statistics and weights of columns, and partners and their weights, come together");

  const int64_t padded = ceil_div(width, kColumnMultiple) * kColumnMultiple;
  const int64_t row_bytes = padded * static_cast<int64_t>(options.dtype().itemsize());
  const bool in_place = query.scalar_type() == wide && padded == width;  // sums become the gradients
  const bool finish_keys = need_key && !key_sums_wanted;                 // else the sums are the result
  const Gradients to_query(rows, true, in_place, options), to_key(columns, finish_keys, in_place, options);
  const at::Tensor row_sums = in_place ? to_query.x : at::zeros({m, padded}, options);
  at::Tensor key_sums;
  if (need_key && !finish_keys)
    key_sums = at::zeros({n, padded}, options);
  else if (in_place)
    key_sums = to_key.x;
  const bool buffered = finish_keys && !in_place;  // a stripe's sums last as long as the stripe
  const at::Tensor dot = at::empty({m}, options);

  const double scale = logit_scale.item<double>();
  const Parts units = Parts::units(m), stripes = Parts::stripes(n, width);
  const auto finish = mixup_info_nce_kernels().finish[wide == at::kDouble];
  Turns turns(stripes.number());
  const int64_t bytes = aligned(kernels.scratch_bytes(units.size, stripes.size, width, true));
  const int64_t sum_bytes = buffered ? stripes.size * row_bytes : 0;
  for_each_stripe(stripes.number(), bytes + sum_bytes, [&](int64_t stripe, char* scratch) {
    ContrastBlock block = block_of(rows, columns, scale, own_column, indices(partner), units, stripes, stripe);
    const int64_t first = block.column_first;
    char* sums = buffered   ? static_cast<char*>(std::memset(scratch + bytes, 0, static_cast<size_t>(sum_bytes)))
                 : need_key ? static_cast<char*>(data(key_sums)) + first * row_bytes
                            : nullptr;
    const ContrastGradient gradient{data(row_max),    data(row_weight),
                                    data(column_max), data(column_weight),
                                    data(own_weight), data(partner_weight),
                                    data(row_sums),   sums,
                                    padded,           padded};
    kernels.take_columns(block, true, scratch);
    for (int64_t unit = 0; unit < units.number(); ++unit) {
      move_to(block, units, unit);
      kernels.gradient(block, gradient, scratch);
      turns.wait(stripe, unit);
      kernels.to_rows(block, gradient, scratch);
      turns.pass_on(stripe, unit);
      if (need_key) kernels.to_columns(block, gradient, scratch);
    }
    if (finish_keys)
      finish(columns.rows, first, first + block.column_count, sums, padded, scale, to_key.places(nullptr));
  });
  at::parallel_for(0, m, kRowGrain, [&](int64_t first, int64_t last) {
    const char* sums = static_cast<const char*>(row_sums.const_data_ptr()) + first * row_bytes;
    finish(rows.rows, first, last, sums, padded, scale, to_query.places(data(dot)));
  });
  at::Tensor key_result = to_key.x;
  if (need_key && !finish_keys)
    key_result = padded == width ? key_sums.mul_(scale) : key_sums.narrow(1, 0, width).mul(scale);
  // Summed in float64, so that the float32 result does not depend on the order of the sum.
  return {
      to_query.x, to_query.other, to_query.mix, key_result, to_key.other, to_key.mix, dot.sum(at::kDouble).to(wide)};
}

}  // namespace oner_fast
