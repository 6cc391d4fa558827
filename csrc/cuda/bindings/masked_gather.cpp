#include <ATen/ops/empty.h>
#include <ATen/ops/zeros.h>

#include <tuple>

#include "cuda/bindings/arguments.h"
#include "cuda/bindings/ops.h"

namespace oner_fast::cuda {
namespace {

constexpr const char* kOp = "masked_gather";

at::Tensor rows_like(const char* name, const OptionalTensor& rows, const at::Tensor& tokens) {
  if (!rows.has_value()) return {};
  TORCH_CHECK_TYPE(rows->scalar_type() == tokens.scalar_type(), kOp, ": ", name, " must have dtype ",
                   tokens.scalar_type(), " like tokens, got ", rows->scalar_type());
  TORCH_CHECK_VALUE(rows->dim() == 2 && rows->size(1) == tokens.size(2), kOp, ": ", name, " must have ", tokens.size(2),
                    " columns, got ", rows->sizes());
  return with_dense_rows(*rows);
}

}  // namespace

at::Tensor masked_gather(const at::Tensor& tokens_in, const at::Tensor& kept_in, const OptionalTensor& positions_in,
                         const OptionalTensor& prefix_in, const OptionalTensor& cu_seqlens) {
  TORCH_CHECK_VALUE(tokens_in.dim() == 3, kOp, ": tokens must have shape (B, N, D), got ", tokens_in.sizes());
  same_device(kOp, tokens_in, {kept_in, positions_in, prefix_in, cu_seqlens});
  const c10::cuda::CUDAGuard guard(tokens_in.device());
  const at::Tensor tokens = with_dense_rows(tokens_in), positions = rows_like("positions", positions_in, tokens),
                   prefix = rows_like("prefix", prefix_in, tokens);
  const int64_t samples = tokens.size(0), cells = tokens.size(1), width = tokens.size(2);
  TORCH_CHECK_VALUE(!positions.defined() || positions.size(0) == cells, kOp, ": positions must have ", cells,
                    " rows, got ", positions_in->sizes());
  const int64_t length = prefix.defined() ? prefix.size(0) : 0;
  const KeptTensor kept(kOp, kept_in, cu_seqlens, samples, cells);
  const at::Tensor out = cu_seqlens.has_value()
                             ? at::empty({kept.kept.total + samples * length, width}, tokens.options())
                             : at::empty({samples, kept_in.size(1) + length, width}, tokens.options());
  MaskedGather call{};
  call.tokens = data(tokens);
  call.positions = data(positions);
  call.prefix = data(prefix);
  call.out = result(out);
  call.kept = kept.kept;
  call.sample_stride = tokens.stride(0);
  call.token_stride = tokens.stride(1);
  call.position_stride = positions.defined() ? positions.stride(0) : 0;
  call.prefix_stride = length > 0 ? prefix.stride(0) : 0;
  call.prefix_rows = length;
  call.width = narrow_size(kOp, "the width of tokens", width);
  call.number = number_of(kOp, "tokens", tokens.scalar_type());
  C10_CUDA_CHECK(oner_fast_masked_gather(&call, c10::cuda::getCurrentCUDAStream()));
  return out;
}

std::tuple<at::Tensor, at::Tensor, at::Tensor> masked_gather_backward(const at::Tensor& grad_in,
                                                                      const at::Tensor& kept_in,
                                                                      const OptionalTensor& cu_seqlens, int64_t samples,
                                                                      int64_t cells, int64_t length, bool need_tokens,
                                                                      bool need_positions, bool need_prefix) {
  TORCH_CHECK_VALUE(length >= 0, kOp, ": the prefix has ", length, " rows");
  TORCH_CHECK_VALUE(grad_in.dim() == (cu_seqlens.has_value() ? 2 : 3), kOp, ": the gradient has shape ",
                    grad_in.sizes());
  same_device(kOp, grad_in, {kept_in, cu_seqlens});
  const c10::cuda::CUDAGuard guard(grad_in.device());
  const KeptTensor kept(kOp, kept_in, cu_seqlens, samples, cells);
  const at::Tensor grad = grad_in.contiguous();  // the gradient of a sum is an expanded tensor
  const int64_t width = grad.size(-1), splits = (samples + kSamplesPerSplit - 1) / kSamplesPerSplit;
  TORCH_CHECK_VALUE(grad.numel() == (kept.kept.total + samples * length) * width, kOp, ": the gradient has shape ",
                    grad.sizes(), ", needed ", kept.kept.total + samples * length, " rows");
  const auto options = grad.options(), wide = options.dtype(statistics_type(grad.scalar_type()));
  // Without samples no kernel runs.
  const auto some = [&](bool needed, at::IntArrayRef sizes) {
    return !needed ? at::empty({0}, options) : samples == 0 ? at::zeros(sizes, options) : at::empty(sizes, options);
  };
  const at::Tensor to_tokens = some(need_tokens, {samples, cells, width}),
                   to_positions = some(need_positions, {cells, width}), to_prefix = some(need_prefix, {length, width});
  at::Tensor choices, position_partials, prefix_partials;
  if (need_tokens || need_positions) choices = at::empty({samples, cells, 2}, options.dtype(at::kInt));
  if (need_positions) position_partials = at::empty({splits, cells, width}, wide);
  if (need_prefix) prefix_partials = at::empty({splits, length, width}, wide);
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
  C10_CUDA_CHECK(oner_fast_masked_gather_backward(&call, c10::cuda::getCurrentCUDAStream()));
  return {to_tokens, to_positions, to_prefix};
}

}  // namespace oner_fast::cuda
