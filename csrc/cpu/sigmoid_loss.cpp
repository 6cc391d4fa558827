// sigmoid_loss: the sums of the terms of each row (forward), and the gradients of both sides, the scale and the bias.
#include "cpu/isa/sigmoid_loss.h"

#include <optional>
#include <tuple>

#include "common/numbers.h"
#include "common/ops.h"
#include "cpu/contrast.h"

namespace oner_fast {
namespace {

using namespace contrast;  // NOLINT: the parts of mixup_info_nce that this op shares

constexpr const char* kOp = "sigmoid_loss";

// The checked arguments of a call, kept alive with it.
struct Arguments {
  Side rows, columns;
  OptionalTensor partner, partner_weight;
  Codes same;
  SigmoidTerms terms;
  Call call;

  Arguments(const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
            const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
            const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
            const OptionalTensor& logit_bias, const OptionalTensor& partner_in, const OptionalTensor& weight_in,
            int64_t first_pair, const OptionalTensor& query_code, const OptionalTensor& key_code, bool positive)
      : rows(kOp, "query", query, query_other, query_mix, query_inverse_norm),
        columns(kOp, "key", key, key_other, key_mix, key_inverse_norm),
        partner(optional_vector(kOp, partner_in, query.size(0), kLong, "partner")),
        partner_weight(optional_vector(kOp, weight_in, query.size(0), wide(), "partner_weight")),
        same(kOp, query_code, key_code, std::nullopt, std::nullopt, query.size(0), key.size(0), wide()),
        terms{logit_bias.has_value() ? number_in(kOp, "logit_bias", *logit_bias) : 0.0, data(partner_weight), positive},
        call{kOp,
             rows,
             columns,
             number_in(kOp, "logit_scale", logit_scale),
             nearest_pair(first_pair, query.size(0), key.size(0)),
             indices(partner),
             same} {
    CHECK_VALUE(partner.has_value() == partner_weight.has_value(), kOp, ": partners and their weights come together");
    CHECK_VALUE(!same.any() || !partner.has_value(), kOp, ": codes and partners exclude each other");
  }
  Arguments(const Arguments&) = delete;
  Arguments& operator=(const Arguments&) = delete;

  ScalarType wide() const { return statistics_type(type_of(rows.x)); }
  ContrastKind kind() const { return kind_of_products(kOp, rows, columns); }
  Tensor row_sums() const { return zeros({rows.x.size(0)}, wide(), rows.x); }
};

}  // namespace

Tensor sigmoid_loss_sums(const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
                         const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
                         const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm,
                         const Tensor& logit_scale, const OptionalTensor& logit_bias, const OptionalTensor& partner,
                         const OptionalTensor& partner_weight, int64_t first_pair, const OptionalTensor& query_code,
                         const OptionalTensor& key_code, bool positive) {
  const Arguments given(query, query_other, query_mix, query_inverse_norm, key, key_other, key_mix, key_inverse_norm,
                        logit_scale, logit_bias, partner, partner_weight, first_pair, query_code, key_code, positive);
  const ContrastKernels& operands = mixup_info_nce_kernels().contrast[given.kind()];
  const SigmoidKernels& kernels = sigmoid_loss_kernels().kinds[given.kind()];
  const Tensor sums = given.row_sums();
  const int64_t width = query.size(1);
  const Parts units = Parts::units(query.size(0)), stripes = Parts::stripes(key.size(0), width);
  Turns turns(stripes.number());
  const int64_t bytes = operands.scratch_bytes(units.size, stripes.size, width, false, given.same.any());
  given.call.for_each_stripe(units, stripes, bytes, [&](int64_t stripe, ContrastBlock& block, void* scratch) {
    operands.take_columns(block, false, scratch);
    for (int64_t unit = 0; unit < units.number(); ++unit) {
      move_to(block, units, unit);
      kernels.forward(block, given.terms, scratch);
      turns.wait(stripe, unit);
      kernels.add_rows(block, data(sums), scratch);
      turns.pass_on(stripe, unit);
    }
  });
  return sums;
}

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> sigmoid_loss_backward(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& logit_bias, const OptionalTensor& partner, const OptionalTensor& partner_weight,
    int64_t first_pair, const Tensor& each_in, bool need_key, bool key_sums, const OptionalTensor& query_code,
    const OptionalTensor& key_code, bool positive) {
  const Arguments given(query, query_other, query_mix, query_inverse_norm, key, key_other, key_mix, key_inverse_norm,
                        logit_scale, logit_bias, partner, partner_weight, first_pair, query_code, key_code, positive);
  const SigmoidKernels& kernels = sigmoid_loss_kernels().kinds[given.kind()];
  const double each = number_in(kOp, "each", each_in);
  const Tensor sums = given.row_sums(), to_bias = empty({}, given.wide(), query);
  const SideGradients found = backward(
      given.call, each, need_key, key_sums,
      [&](const ContrastBlock& block, bool to_columns, void* scratch) {
        kernels.gradient(block, given.terms, to_columns, scratch);
      },
      [&](const ContrastBlock& block, void* scratch) { kernels.add_rows(block, data(sums), scratch); });
  fill(to_bias, each * (given.wide() == kDouble ? sum<double>(sums) : sum<float>(sums)));
  return std::tuple_cat(found, std::make_tuple(to_bias));
}

}  // namespace oner_fast
