#include <tuple>

#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "masked_gather";

OptionalTensor rows_like(const char* name, const OptionalTensor& rows, const Tensor& tokens) {
  if (!rows.has_value()) return {};
  CHECK_TYPE(rows->scalar_type() == tokens.scalar_type(), kOp, ": ", name, " must have dtype ", tokens.scalar_type(),
             " like tokens, got ", rows->scalar_type());
  CHECK_VALUE(rows->dim() == 2 && rows->size(1) == tokens.size(2), kOp, ": ", name, " must have ", tokens.size(2),
              " columns, got ", rows->sizes());
  return with_dense_rows(*rows);
}

}  // namespace

Tensor masked_gather(const Tensor& tokens_in, const Tensor& kept_in, const OptionalTensor& positions_in,
                     const OptionalTensor& prefix_in, const OptionalTensor& cu_seqlens) {
  CHECK_VALUE(tokens_in.dim() == 3, kOp, ": tokens must have shape (B, N, D), got ", tokens_in.sizes());
  same_device(kOp, tokens_in, {kept_in, positions_in, prefix_in, cu_seqlens});
  const Launch launch(tokens_in);
  const Tensor tokens = with_dense_rows(tokens_in);
  const OptionalTensor positions = rows_like("positions", positions_in, tokens),
                       prefix = rows_like("prefix", prefix_in, tokens);
  const int64_t samples = tokens.size(0), cells = tokens.size(1), width = tokens.size(2);
  CHECK_VALUE(!positions.has_value() || positions->size(0) == cells, kOp, ": positions must have ", cells,
              " rows, got ", positions_in->sizes());
  const int64_t length = prefix.has_value() ? prefix->size(0) : 0;
  const KeptTensor kept(kOp, kept_in, cu_seqlens, samples, cells);
  const Tensor out = cu_seqlens.has_value()
                         ? empty({kept.kept.total + samples * length, width}, tokens.scalar_type(), tokens)
                         : empty({samples, kept_in.size(1) + length, width}, tokens.scalar_type(), tokens);
  MaskedGather call{};
  call.tokens = data(tokens);
  call.positions = data(positions);
  call.prefix = data(prefix);
  call.out = result(out);
  call.kept = kept.kept;
  call.sample_stride = tokens.stride(0);
  call.token_stride = tokens.stride(1);
  call.position_stride = positions.has_value() ? positions->stride(0) : 0;
  call.prefix_stride = length > 0 ? prefix->stride(0) : 0;
  call.prefix_rows = length;
  call.width = narrow_size(kOp, "the width of tokens", width);
  call.number = number_of(kOp, "tokens", tokens.scalar_type());
  STD_CUDA_CHECK(oner_fast_masked_gather(&call, launch.stream()));
  return out;
}

std::tuple<Tensor, Tensor, Tensor> masked_gather_backward(const Tensor& grad_in, const Tensor& kept_in,
                                                          const OptionalTensor& cu_seqlens, int64_t samples,
                                                          int64_t cells, int64_t length, bool need_tokens,
                                                          bool need_positions, bool need_prefix) {
  CHECK_VALUE(length >= 0, kOp, ": the prefix has ", length, " rows");
  CHECK_VALUE(grad_in.dim() == (cu_seqlens.has_value() ? 2 : 3), kOp, ": the gradient has shape ", grad_in.sizes());
  same_device(kOp, grad_in, {kept_in, cu_seqlens});
  const Launch launch(grad_in);
  const KeptTensor kept(kOp, kept_in, cu_seqlens, samples, cells);
  const Tensor grad = dense(grad_in);  // the gradient of a sum is an expanded tensor
  const int64_t width = grad.size(grad.dim() - 1), splits = (samples + kSamplesPerSplit - 1) / kSamplesPerSplit;
  CHECK_VALUE(grad.numel() == (kept.kept.total + samples * length) * width, kOp, ": the gradient has shape ",
              grad.sizes(), ", needed ", kept.kept.total + samples * length, " rows");
  const ScalarType type = grad.scalar_type(), wide = statistics_type(type);
  // Without samples no kernel runs.
  const auto some = [&](bool needed, Sizes sizes) {
    return !needed ? empty({0}, type, grad) : samples == 0 ? zeros(sizes, type, grad) : empty(sizes, type, grad);
  };
  const Tensor to_tokens = some(need_tokens, {samples, cells, width}),
               to_positions = some(need_positions, {cells, width}), to_prefix = some(need_prefix, {length, width});
  OptionalTensor choices, position_partials, prefix_partials;
  if (need_tokens || need_positions) choices = empty({samples, cells, 2}, kInt, grad);
  if (need_positions) position_partials = empty({splits, cells, width}, wide, grad);
  if (need_prefix) prefix_partials = empty({splits, length, width}, wide, grad);
  MaskedGatherBackward call{};
  call.grad = data(grad);
  call.to_tokens = result(to_tokens);
  call.to_positions = result(to_positions);
  call.to_prefix = result(to_prefix);
  call.position_partials = result(position_partials);
  call.prefix_partials = result(prefix_partials);
  call.choices = static_cast<Choice*>(result(choices));
  call.kept = kept.kept;
  call.prefix_rows = length;
  call.width = narrow_size(kOp, "the width of the gradient", width);
  call.number = number_of(kOp, "the gradient", grad.scalar_type());
  STD_CUDA_CHECK(oner_fast_masked_gather_backward(&call, launch.stream()));
  return {to_tokens, to_positions, to_prefix};
}

}  // namespace oner_fast::cuda
