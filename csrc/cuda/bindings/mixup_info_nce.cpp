#include <cstdint>
#include <limits>
#include <tuple>

#include "common/numbers.h"
#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "mixup_info_nce";
constexpr int64_t kWord = 8;  // numbers in 16 bytes

Tensor vector(const Tensor& x, int64_t count, ScalarType type, const char* what) {
  CHECK_VALUE(x.dim() == 1 && x.size(0) == count && x.scalar_type() == type, kOp, ": ", what, " must be (", count,
              ",) ", type, ", got ", x.sizes(), " ", x.scalar_type());
  return dense(x);
}

const float* floats(const OptionalTensor& x) { return static_cast<const float*>(data(x)); }

// Rows that tensor cores can read, and the factors that make them unit vectors. A side that is unmixed and aligned is
// used in place; any other is copied once, O(N D) next to the O(N^2 D) of the product.
struct Side {
  Tensor rows;
  OptionalTensor factor;

  Side(const char* name, const Tensor& x, const OptionalTensor& other, const OptionalTensor& mix_in,
       const OptionalTensor& inverse_in, cudaStream_t stream)
      : rows(x) {
    CHECK_VALUE(x.dim() == 2, kOp, ": ", name, " must have shape (N, D), got ", x.sizes());
    CHECK_TYPE(x.scalar_type() == kHalf || x.scalar_type() == kBFloat16, kOp, ": ", name,
               " must be float16 or bfloat16 for tensor cores, got ", x.scalar_type());
    const int64_t count = x.size(0), width = x.size(1);
    if (inverse_in.has_value()) factor = vector(*inverse_in, count, kFloat, "the inverse norms");
    const bool aligned = reinterpret_cast<uintptr_t>(x.const_data_ptr()) % 16 == 0;
    if (!other.has_value() && x.stride(1) == 1 && x.stride(0) % kWord == 0 && width % kWord == 0 && aligned) return;
    OptionalTensor mix;
    if (other.has_value()) {
      CHECK_VALUE(other->sizes().equals(x.sizes()) && other->scalar_type() == x.scalar_type(), kOp, ": ", name,
                  "_other must be like ", name, ", got ", other->sizes(), " ", other->scalar_type());
      CHECK_VALUE(mix_in.has_value() && (mix_in->dim() == 0 || mix_in->sizes().equals(x.sizes().slice(0, 1))), kOp,
                  ": mix must be a number or have shape (N,)");
      mix = dense(torch::stable::to(*mix_in, kFloat, std::nullopt, x.device()));
    }
    const int64_t padded = (width + kWord - 1) / kWord * kWord;
    rows = empty({count, padded}, x.scalar_type(), x);
    const Tensor rest = empty({count}, kFloat, x);
    MixupPack call{};
    call.x = data(x);
    call.other = other.has_value() ? data(*other) : nullptr;
    call.mix = floats(mix);
    call.inverse_norm = floats(factor);
    call.out = result(rows);
    call.rest = static_cast<float*>(result(rest));
    call.rows = count;
    call.row_stride = x.stride(0);
    call.column_stride = x.stride(1);
    call.other_row_stride = other.has_value() ? other->stride(0) : 0;
    call.other_column_stride = other.has_value() ? other->stride(1) : 0;
    call.mix_step = mix.has_value() ? mix->dim() : 0;
    call.width = narrow_size(kOp, "the width", width);
    call.padded = narrow_size(kOp, "the width", padded);
    call.number = number_of(kOp, name, x.scalar_type());
    STD_CUDA_CHECK(oner_fast_mixup_pack(&call, stream));
    factor = rest;
  }
};

// logit_scale as a float on the rows' device; a host value is an argument of a launch, which waits for nothing.
Tensor scale_on(const Tensor& logit_scale, const Tensor& like) {
  CHECK_VALUE(logit_scale.numel() == 1, kOp, ": logit_scale must be 0-d, got ", logit_scale.sizes());
  if (!logit_scale.is_cpu()) return of_type(logit_scale, kFloat);
  return torch::stable::fill_(empty({}, kFloat, like), number_in(kOp, "logit_scale", logit_scale));
}

}  // namespace

std::tuple<Tensor, Tensor, Tensor, Tensor, Tensor, Tensor> mixup_info_nce_statistics(
    const Tensor& query, const OptionalTensor& query_other, const OptionalTensor& query_mix,
    const OptionalTensor& query_inverse_norm, const Tensor& key, const OptionalTensor& key_other,
    const OptionalTensor& key_mix, const OptionalTensor& key_inverse_norm, const Tensor& logit_scale,
    const OptionalTensor& partner_in, int64_t first_pair, bool columns_too, const OptionalTensor& query_code_in,
    const OptionalTensor& key_code_in, const OptionalTensor& row_share_in, const OptionalTensor& column_share_in) {
  same_device(kOp, query,
              {query_other, query_inverse_norm, key, key_other, key_inverse_norm, partner_in, query_code_in,
               key_code_in, row_share_in, column_share_in});
  const Launch launch(query);
  const cudaStream_t stream = launch.stream();
  const Side rows("query", query, query_other, query_mix, query_inverse_norm, stream);
  const Side columns("key", key, key_other, key_mix, key_inverse_norm, stream);
  CHECK_VALUE(query.size(1) == key.size(1) && query.scalar_type() == key.scalar_type(), kOp,
              ": query and key must have one width and one dtype");
  const int64_t m = query.size(0), n = key.size(0), column_count = columns_too ? n : 0;
  OptionalTensor partner;
  if (partner_in.has_value()) partner = vector(*partner_in, m, kLong, "partner");
  const bool same = query_code_in.has_value(), positive = row_share_in.has_value();
  CHECK_VALUE(same == key_code_in.has_value() && positive == column_share_in.has_value() && (same || !positive), kOp,
              ": codes of both sides come together, and shares of both sides with them");
  CHECK_VALUE(!same || !partner.has_value(), kOp, ": codes and partners exclude each other");
  OptionalTensor query_code, key_code, row_share, column_share;
  if (same) {
    query_code = vector(*query_code_in, m, kInt, "query_code");
    key_code = vector(*key_code_in, n, kInt, "key_code");
  }
  if (positive) {
    row_share = vector(*row_share_in, m, kFloat, "row_share");
    column_share = vector(*column_share_in, n, kFloat, "column_share");
  }
  constexpr double kInfinity = std::numeric_limits<double>::infinity();
  // Without any logit no kernel runs.
  const auto each = [&](int64_t count, double otherwise) {
    const Tensor made = empty({count}, kFloat, query);
    return m > 0 && n > 0 ? made : torch::stable::fill_(made, otherwise);
  };
  const Tensor row_max = each(m, -kInfinity), row_sum = each(m, 0), column_max = each(column_count, -kInfinity),
               column_sum = each(column_count, 0), own = each(m, 0), shared = each(partner.has_value() ? m : 0, 0);
  if (m > 0 && n > 0) {
    MixupStatistics call{};
    call.rows = narrow_size(kOp, "the number of queries", m);
    call.columns = narrow_size(kOp, "the number of keys", n);
    oner_fast_mixup_plan(&call);
    const Tensor scale = scale_on(logit_scale, query);
    const Tensor row_parts = empty({2, call.column_chunks, m}, kFloat, query);
    OptionalTensor column_parts, own_parts;
    if (positive) own_parts = empty({call.column_chunks, m}, kFloat, query);
    if (columns_too) column_parts = empty({2, call.row_chunks, n}, kFloat, query);
    const auto to = [](const OptionalTensor& x) { return static_cast<float*>(result(x)); };
    call.query = data(rows.rows);
    call.key = data(columns.rows);
    call.query_factor = floats(rows.factor);
    call.key_factor = floats(columns.factor);
    call.scale = floats(scale);
    call.partner = static_cast<const int64_t*>(data(partner));
    call.query_code = static_cast<const int32_t*>(data(query_code));
    call.key_code = static_cast<const int32_t*>(data(key_code));
    call.row_share = floats(row_share);
    call.column_share = floats(column_share);
    call.own_parts = to(own_parts);
    call.row_max = to(row_max);
    call.row_sum = to(row_sum);
    call.column_max = to(column_max);
    call.column_sum = to(column_sum);
    call.own = to(own);
    call.shared = to(shared);
    call.row_parts = to(row_parts);
    call.column_parts = to(column_parts);
    call.query_stride = rows.rows.stride(0);
    call.key_stride = columns.rows.stride(0);
    call.first_pair = first_pair;
    call.width = narrow_size(kOp, "the width", rows.rows.size(1));
    call.number = number_of(kOp, "query", query.scalar_type());
    STD_CUDA_CHECK(oner_fast_mixup_statistics(&call, stream));
  }
  return {row_max, row_sum, column_max, column_sum, own, shared};
}

}  // namespace oner_fast::cuda
