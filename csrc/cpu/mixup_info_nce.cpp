// mixup_info_nce: the logits in blocks of a few hundred rows and columns, made twice (forward and backward) and never kept.
//
// Rows and columns are cut in stripes. In stage s row stripe t meets column stripe (t + s) mod n, so that the blocks of a
// stage share neither: each sum has one owner, and its order does not depend on the number of threads.
#include <ATen/Parallel.h>
#include <ATen/ops/empty.h>
#include <ATen/ops/full.h>
#include <ATen/ops/zeros.h>
#include <c10/util/Exception.h>

#include <algorithm>
#include <limits>
#include <optional>
#include <tuple>
#include <utility>
#include <vector>

#include "common/ops.h"
#include "cpu/dense.h"
#include "cpu/isa/mixup_info_nce.h"
#include "cpu/kinds.h"

namespace oner_fast {
namespace {

constexpr const char* kOp = "mixup_info_nce";
constexpr int64_t kLargestStripe = 256, kSmallestStripe = 32, kLeastStripes = 4;
constexpr int64_t kStripeNumbers = 1 << 16;  // of one side in one block: five such blocks fit the second-level cache
constexpr int64_t kColumnMultiple = 16;      // sums are padded to the widest vector
constexpr int64_t kRowGrain = 64;            // rows worth another thread where each is read once or twice

using OptionalTensor = std::optional<at::Tensor>;

at::ScalarType wide_of(const at::Tensor& x) { return x.scalar_type() == at::kDouble ? at::kDouble : at::kFloat; }

// The tensors behind a MixedRows, kept alive with it.
struct Side {
  at::Tensor x, other, mix, inverse_norm;
  MixedRows rows;

  Side(const char* name, const at::Tensor& x_in, const OptionalTensor& other_in, const OptionalTensor& mix_in,
       const OptionalTensor& inverse_in)
      : x(with_dense_rows(x_in)) {
    TORCH_CHECK_VALUE(x_in.dim() == 2, kOp, ": ", name, " must have shape (N, D), got ", x_in.sizes());
    const at::ScalarType wide = wide_of(x);
    rows = MixedRows{x.const_data_ptr(), x.stride(0), nullptr, 0, nullptr, 0, nullptr, kind_of(kOp, name, x.scalar_type()),
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
    TORCH_CHECK_VALUE(x.dim() == 1 && x.size(0) == count && x.scalar_type() == type, kOp, ": ", what, " must be (", count,
                      ",) ", type, ", got ", x.sizes(), " ", x.scalar_type());
    return x.contiguous();
  }
};

struct Stripes {
  int64_t count, parts;
  int64_t begin(int64_t part) const { return count * part / parts; }
  int64_t size(int64_t part) const { return begin(part + 1) - begin(part); }
  int64_t largest() const { return ceil_div(count, parts); }
  static Stripes of(int64_t count, int64_t width) {
    const int64_t most = std::clamp(kStripeNumbers / std::max<int64_t>(width, 1), kSmallestStripe, kLargestStripe);
    const int64_t size = std::clamp(ceil_div(count, kLeastStripes), kSmallestStripe, most);
    return {count, std::max<int64_t>(ceil_div(count, size), 1)};
  }
};

// Calls block(row stripe, column stripe, scratch) for every pair, those of a stage in parallel.
template <typename Block>
void for_each_block(const Stripes& rows, const Stripes& columns, int64_t scratch_bytes, const Block& block) {
  const int64_t together = std::min(rows.parts, columns.parts), stages = std::max(rows.parts, columns.parts);
  const int64_t threads = std::min<int64_t>(at::get_num_threads(), together);
  constexpr int64_t kAlign = 64;
  const int64_t each = ceil_div(scratch_bytes, kAlign) * kAlign;
  const at::Tensor scratch = at::empty({threads * each + kAlign}, at::kByte);
  char* base = static_cast<char*>(scratch.mutable_data_ptr());
  base += (kAlign - static_cast<int64_t>(reinterpret_cast<uintptr_t>(base) % kAlign)) % kAlign;
  for (int64_t stage = 0; stage < stages; ++stage) {
    at::parallel_for(0, threads, 1, [&](int64_t first_thread, int64_t last_thread) {
      for (int64_t thread = first_thread; thread < last_thread; ++thread) {
        for (int64_t i = together * thread / threads; i < together * (thread + 1) / threads; ++i) {
          const int64_t other = (i + stage) % stages;
          const bool rows_are_fewer = rows.parts <= columns.parts;
          block(rows_are_fewer ? i : other, rows_are_fewer ? other : i, base + thread * each);
        }
      }
    });
  }
}

ContrastBlock block_of(const Side& rows, const Side& columns, double scale, int64_t own, const int64_t* partner,
                       const Stripes& row_stripes, const Stripes& column_stripes, int64_t r, int64_t c) {
  return {rows.rows, columns.rows, row_stripes.begin(r), row_stripes.size(r), column_stripes.begin(c), column_stripes.size(c),
          own, partner, scale};
}

const ContrastKernels& kernels_for(const Side& rows, const Side& columns) {
  TORCH_CHECK_VALUE(rows.rows.width == columns.rows.width && rows.rows.kind == columns.rows.kind, kOp,
                    ": query and key must have one width and one dtype");
  const auto& table = mixup_info_nce_kernels();
  const auto kind = rows.rows.kind == kF64 ? kContrastF64 : rows.rows.kind == kBF16 ? kContrastBF16 : kContrastF32;
  const bool is_there = table.contrast[kind].forward != nullptr;
  return table.contrast[is_there ? kind : kContrastF32];
}

void check_pairs(int64_t queries, int64_t keys, int64_t first_pair) {
  TORCH_CHECK_VALUE(first_pair >= 0 && queries <= keys && first_pair <= keys - queries, kOp, ": ", queries,
                    " queries from pair ", first_pair, " on need as many keys, got ", keys);
}

at::Tensor checked_partner(const OptionalTensor& partner, int64_t rows, int64_t columns) {
  if (!partner.has_value()) return {};
  const at::Tensor dense = Side::vector(*partner, rows, at::kLong, "partner");
  const int64_t* at = dense.const_data_ptr<int64_t>();
  for (int64_t i = 0; i < rows; ++i)
    TORCH_CHECK_INDEX(at[i] >= 0 && at[i] < columns, kOp, ": partner must hold values in [0, ", columns, "), found ", at[i]);
  return dense;
}

const int64_t* indices(const at::Tensor& x) { return x.defined() ? x.const_data_ptr<int64_t>() : nullptr; }

void* data(const at::Tensor& x) { return x.defined() ? x.mutable_data_ptr() : nullptr; }

}  // namespace

at::Tensor mixup_inverse_norms(const at::Tensor& x, const OptionalTensor& other, const OptionalTensor& mix) {
  const Side side("x", x, other, mix, std::nullopt);
  const at::Tensor out = at::empty({x.size(0)}, x.options().dtype(wide_of(x)));
  const auto kernel = mixup_info_nce_kernels().inverse_norms[wide_of(x) == at::kDouble];
  void* to = data(out);
  at::parallel_for(0, x.size(0), kRowGrain, [&](int64_t first, int64_t last) { kernel(side.rows, first, last, to); });
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_statistics(
    const at::Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const at::Tensor& query_inverse_norm, const at::Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const at::Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, bool columns_too) {
  const Side rows("query", query, query_other, query_mix, query_inverse_norm);
  const Side columns("key", key, key_other, key_mix, key_inverse_norm);
  const ContrastKernels& kernels = kernels_for(rows, columns);
  const int64_t m = query.size(0), n = key.size(0);
  check_pairs(m, n, first_pair);
  const at::Tensor partner = checked_partner(partner_in, m, n);
  const auto options = query.options().dtype(wide_of(query));
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const at::Tensor row_max = at::full({m}, -kInfinity, options), row_sum = at::zeros({m}, options);
  const int64_t column_count = columns_too ? n : 0;
  const at::Tensor column_max = at::full({column_count}, -kInfinity, options);
  const at::Tensor column_sum = at::zeros({column_count}, options);
  const at::Tensor own = at::empty({m}, options), shared = at::empty({partner.defined() ? m : 0}, options);
  const ContrastStatistics out{data(row_max),
                               data(row_sum),
                               columns_too ? data(column_max) : nullptr,
                               columns_too ? data(column_sum) : nullptr,
                               data(own),
                               data(shared)};
  const double scale = logit_scale.item<double>();
  const Stripes r = Stripes::of(m, query.size(1)), c = Stripes::of(n, query.size(1));
  if (m > 0) {
    const int64_t bytes = kernels.scratch_bytes(r.largest(), c.largest(), query.size(1), false);
    for_each_block(r, c, bytes, [&](int64_t i, int64_t j, void* scratch) {
      kernels.forward(block_of(rows, columns, scale, first_pair, indices(partner), r, c, i, j), out, scratch);
    });
  }
  return {row_max, row_sum, column_max, column_sum, own, shared};
}

std::tuple<at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor, at::Tensor> mixup_info_nce_backward(
    const at::Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const at::Tensor& query_inverse_norm, const at::Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const at::Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, const at::Tensor& row_max_in, const at::Tensor& row_weight_in,
    const OptionalTensor& column_max_in, const OptionalTensor& column_weight_in, const at::Tensor& own_weight_in,
    const OptionalTensor& partner_weight_in, bool need_key) {
  const Side rows("query", query, query_other, query_mix, query_inverse_norm);
  const Side columns("key", key, key_other, key_mix, key_inverse_norm);
  const ContrastKernels& kernels = kernels_for(rows, columns);
  const int64_t m = query.size(0), n = key.size(0), width = query.size(1);
  check_pairs(m, n, first_pair);
  const at::Tensor partner = checked_partner(partner_in, m, n);
  const at::ScalarType wide = wide_of(query);
  const auto options = query.options().dtype(wide);
  const auto vector = [&](const OptionalTensor& x, int64_t count, const char* what) {
    return x.has_value() ? Side::vector(*x, count, wide, what) : at::Tensor();
  };
  const at::Tensor row_max = vector(row_max_in, m, "row_max"), column_max = vector(column_max_in, n, "column_max");
  const at::Tensor row_weight = vector(row_weight_in, m, "row_weight");
  const at::Tensor column_weight = vector(column_weight_in, n, "column_weight");
  const at::Tensor own_weight = vector(own_weight_in, m, "own_weight");
  const at::Tensor partner_weight = vector(partner_weight_in, m, "partner_weight");
  TORCH_CHECK_VALUE(column_max.defined() == column_weight.defined() && partner.defined() == partner_weight.defined(), kOp,
                    ": statistics and weights of columns, and partners and their weights, come together");

  // The sums become the gradients where they have their dtype and width.
  const int64_t padded = ceil_div(width, kColumnMultiple) * kColumnMultiple;
  const at::Tensor row_sums = at::zeros({m, padded}, options);
  const at::Tensor column_sums = need_key ? at::zeros({n, padded}, options) : at::Tensor();
  const ContrastGradient gradient{data(row_max),    data(row_weight),     data(column_max), data(column_weight),
                                  data(own_weight), data(partner_weight), data(row_sums),   data(column_sums),
                                  padded,           padded};
  const double scale = logit_scale.item<double>();
  const Stripes r = Stripes::of(m, width), c = Stripes::of(n, width);
  if (m > 0) {
    const int64_t bytes = kernels.scratch_bytes(r.largest(), c.largest(), width, true);
    for_each_block(r, c, bytes, [&](int64_t i, int64_t j, void* scratch) {
      kernels.backward(block_of(rows, columns, scale, first_pair, indices(partner), r, c, i, j), gradient, scratch);
    });
  }

  const auto finish = mixup_info_nce_kernels().finish[wide == at::kDouble];
  const auto finished = [&](const Side& side, const at::Tensor& sums, at::Tensor& dot) {
    const bool in_place = side.x.scalar_type() == wide && padded == width;
    const at::Tensor to_x = in_place ? sums : at::empty(side.x.sizes(), side.x.options());
    const at::Tensor to_other = at::empty(side.other.defined() ? side.x.sizes() : at::IntArrayRef{0}, side.x.options());
    const at::Tensor to_mix = at::empty({side.other.defined() ? side.x.size(0) : 0}, options);
    dot = at::empty({side.x.size(0)}, options);
    const MixedRowsGradient out{data(to_x), side.other.defined() ? data(to_other) : nullptr,
                                side.other.defined() ? data(to_mix) : nullptr, data(dot), width, width};
    at::parallel_for(0, side.x.size(0), kRowGrain, [&](int64_t first, int64_t last) {
      finish(side.rows, first, last, sums.const_data_ptr(), padded, scale, out);
    });
    return std::make_tuple(to_x, to_other, to_mix);
  };
  at::Tensor dot, key_dot;
  const auto [to_query, to_query_other, to_query_mix] = finished(rows, row_sums, dot);
  at::Tensor to_key = at::empty({0}, options), to_key_other = at::empty({0}, options), to_key_mix = at::empty({0}, options);
  if (need_key && key_inverse_norm.has_value())
    std::tie(to_key, to_key_other, to_key_mix) = finished(columns, column_sums, key_dot);
  else if (need_key)
    to_key = padded == width ? column_sums.mul_(scale) : column_sums.narrow(1, 0, width).mul(scale);
  // In float64 no order of the sum shows in float32.
  return {to_query, to_query_other, to_query_mix, to_key, to_key_other, to_key_mix, dot.sum(at::kDouble).to(wide)};
}

}  // namespace oner_fast
