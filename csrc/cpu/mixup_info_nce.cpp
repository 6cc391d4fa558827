// mixup_info_nce: the statistics of the logits (forward), and the gradients that follow from them (backward).
#include "cpu/isa/mixup_info_nce.h"

#include <limits>
#include <optional>
#include <tuple>

#include "common/numbers.h"
#include "common/ops.h"
#include "common/parallel.h"
#include "cpu/contrast.h"

namespace oner_fast {

namespace {
constexpr const char* kOp = "mixup_info_nce";
}  // namespace

using namespace contrast;  // NOLINT: the parts of this op that sigmoid_loss shares

Tensor mixup_inverse_norms(const Tensor& x, const OptionalTensor& other, const OptionalTensor& mix) {
  const Side side(kOp, "x", x, other, mix, std::nullopt);
  const ScalarType wide = statistics_type(type_of(x));
  const Tensor out = empty({x.size(0)}, wide, x);
  const auto kernel = mixup_info_nce_kernels().inverse_norms[wide == kDouble];
  void* to = data(out);
  parallel_for(0, x.size(0), kRowGrain, [&](int64_t first, int64_t last) { kernel(side.rows, first, last, to); });
  return out;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixup_info_nce_statistics(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, bool columns_too, const OptionalTensor& query_code,
    const OptionalTensor& key_code, const OptionalTensor& row_share, const OptionalTensor& column_share) {
  const Side rows(kOp, "query", query, query_other, query_mix, query_inverse_norm);
  const Side columns(kOp, "key", key, key_other, key_mix, key_inverse_norm);
  const ContrastKernels& kernels = mixup_info_nce_kernels().contrast[kind_of_products(kOp, rows, columns)];
  const int64_t m = query.size(0), n = key.size(0);
  const OptionalTensor partner = optional_vector(kOp, partner_in, m, kLong, "partner");
  const Codes same(kOp, query_code, key_code, row_share, column_share, m, n, statistics_type(type_of(query)));
  CHECK_VALUE(!same.any() || !partner.has_value(), kOp, ": codes and partners exclude each other");
  const Call call{
      kOp, rows, columns, number_in(kOp, "logit_scale", logit_scale), nearest_pair(first_pair, m, n), indices(partner),
      same};
  const int64_t column_count = columns_too ? n : 0;
  const auto vector = [&](int64_t count, double value) {
    const Tensor made = empty({count}, statistics_type(type_of(query)), query);
    fill(made, value);
    return made;
  };
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  const Tensor row_max = vector(m, -kInfinity), row_sum = vector(m, 0);
  const Tensor column_max = vector(column_count, -kInfinity), column_sum = vector(column_count, 0);
  const Tensor own = vector(m, 0), shared = vector(partner.has_value() ? m : 0, 0);
  const ContrastStatistics out{
      data(row_max), data(row_sum), columns_too ? data(column_max) : nullptr, columns_too ? data(column_sum) : nullptr,
      data(own),     data(shared)};
  const Parts units = Parts::units(m), stripes = Parts::stripes(n, query.size(1));
  Turns turns(stripes.number());
  const int64_t bytes = kernels.scratch_bytes(units.size, stripes.size, query.size(1), false, same.any());
  call.for_each_stripe(units, stripes, bytes, [&](int64_t stripe, ContrastBlock& block, void* scratch) {
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

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixup_info_nce_backward(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, const Tensor& row_max_in, const Tensor& row_weight_in,
    const OptionalTensor& column_max_in, const OptionalTensor& column_weight_in, const Tensor& own_weight_in,
    const OptionalTensor& partner_weight_in, bool need_key, bool key_sums_wanted, const OptionalTensor& query_code,
    const OptionalTensor& key_code, const OptionalTensor& column_share) {
  const Side rows(kOp, "query", query, query_other, query_mix, query_inverse_norm);
  const Side columns(kOp, "key", key, key_other, key_mix, key_inverse_norm);
  const ContrastKernels& kernels = mixup_info_nce_kernels().contrast[kind_of_products(kOp, rows, columns)];
  const int64_t m = query.size(0), n = key.size(0);
  const ScalarType wide = statistics_type(type_of(query));
  const OptionalTensor partner = optional_vector(kOp, partner_in, m, kLong, "partner");
  const Tensor row_max = Side::vector(kOp, row_max_in, m, wide, "row_max");
  const Tensor row_weight = Side::vector(kOp, row_weight_in, m, wide, "row_weight");
  const Tensor own_weight = Side::vector(kOp, own_weight_in, m, wide, "own_weight");
  const OptionalTensor column_max = optional_vector(kOp, column_max_in, n, wide, "column_max");
  const OptionalTensor column_weight = optional_vector(kOp, column_weight_in, n, wide, "column_weight");
  const OptionalTensor partner_weight = optional_vector(kOp, partner_weight_in, m, wide, "partner_weight");
  CHECK_VALUE(column_max.has_value() == column_weight.has_value() && partner.has_value() == partner_weight.has_value(),
              kOp, ": statistics and weights of columns, and partners and their weights, come together");
  const Codes same(kOp, query_code, key_code, column_share.has_value() ? OptionalTensor(own_weight) : std::nullopt,
                   column_share, m, n, wide);
  CHECK_VALUE(!same.any() || !partner.has_value(), kOp, ": codes and partners exclude each other");
  const Call call{
      kOp, rows, columns, number_in(kOp, "logit_scale", logit_scale), nearest_pair(first_pair, m, n), indices(partner),
      same};
  const ContrastGradient weights{data(row_max),       data(row_weight), data(column_max),
                                 data(column_weight), data(own_weight), data(partner_weight)};
  return backward(
      call, 1.0, need_key, key_sums_wanted,
      [&](const ContrastBlock& block, bool to_columns, void* scratch) {
        kernels.gradient(block, weights, to_columns, scratch);
      },
      [](const ContrastBlock&, void*) {});
}

}  // namespace oner_fast
