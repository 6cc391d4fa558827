// Registers the compiled ops with PyTorch's dispatcher.
#include <torch/csrc/autograd/autograd_not_implemented_fallback.h>
#include <torch/library.h>

#include "common/ops.h"
#include "cpu/capability.h"

TORCH_LIBRARY_IMPL(oner_fast, CPU, m) {
  m.impl("masked_gather", TORCH_FN(oner_fast::masked_gather));
  m.impl("masked_gather_backward", TORCH_FN(oner_fast::masked_gather_backward));
  m.impl("gather_patches", TORCH_FN(oner_fast::gather_patches));
  m.impl("gather_patches_backward", TORCH_FN(oner_fast::gather_patches_backward));
  m.impl("mixup_inverse_norms", TORCH_FN(oner_fast::mixup_inverse_norms));
  m.impl("mixup_info_nce_statistics", TORCH_FN(oner_fast::mixup_info_nce_statistics));
  m.impl("mixup_info_nce_backward", TORCH_FN(oner_fast::mixup_info_nce_backward));
  m.impl("token_alignment", TORCH_FN(oner_fast::token_alignment));
  m.impl("token_alignment_backward", TORCH_FN(oner_fast::token_alignment_backward));
  m.impl("varlen_attention", TORCH_FN(oner_fast::varlen_attention));
  m.impl("varlen_attention_backward", TORCH_FN(oner_fast::varlen_attention_backward));
}

TORCH_LIBRARY_IMPL(oner_fast, CompositeExplicitAutograd, m) {
  m.impl("cpu_capability", TORCH_FN(oner_fast::cpu_capability));
}

// Gradients belong to the public functions in oner_fast.ops; a raw op refuses to give a wrong one.
TORCH_LIBRARY_IMPL(oner_fast, Autograd, m) {
  m.impl("masked_gather", torch::autograd::autogradNotImplementedFallback());
  m.impl("masked_gather_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("gather_patches", torch::autograd::autogradNotImplementedFallback());
  m.impl("gather_patches_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("mixup_inverse_norms", torch::autograd::autogradNotImplementedFallback());
  m.impl("mixup_info_nce_statistics", torch::autograd::autogradNotImplementedFallback());
  m.impl("mixup_info_nce_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("token_alignment", torch::autograd::autogradNotImplementedFallback());
  m.impl("token_alignment_backward", torch::autograd::autogradNotImplementedFallback());
  m.impl("varlen_attention", torch::autograd::autogradNotImplementedFallback());
  m.impl("varlen_attention_backward", torch::autograd::autogradNotImplementedFallback());
}
