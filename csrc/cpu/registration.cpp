// Registers the compiled ops with PyTorch's dispatcher.
#include "common/ops.h"
#include "common/raw_op.h"
#include "cpu/capability.h"

STABLE_TORCH_LIBRARY_IMPL(oner_fast, CPU, m) {
  ONER_FAST_IMPL(m, "masked_gather", oner_fast::masked_gather);
  ONER_FAST_IMPL(m, "masked_gather_backward", oner_fast::masked_gather_backward);
  ONER_FAST_IMPL(m, "gather_patches", oner_fast::gather_patches, 1);
  ONER_FAST_IMPL(m, "gather_patches_backward", oner_fast::gather_patches_backward);
  ONER_FAST_IMPL(m, "mixup_inverse_norms", oner_fast::mixup_inverse_norms);
  ONER_FAST_IMPL(m, "mixup_info_nce_statistics", oner_fast::mixup_info_nce_statistics);
  ONER_FAST_IMPL(m, "mixup_info_nce_backward", oner_fast::mixup_info_nce_backward);
  ONER_FAST_IMPL(m, "sigmoid_loss_sums", oner_fast::sigmoid_loss_sums);
  ONER_FAST_IMPL(m, "sigmoid_loss_backward", oner_fast::sigmoid_loss_backward);
  ONER_FAST_IMPL(m, "token_alignment", oner_fast::token_alignment);
  ONER_FAST_IMPL(m, "token_alignment_backward", oner_fast::token_alignment_backward);
  ONER_FAST_IMPL(m, "padded_attention", oner_fast::padded_attention);
  ONER_FAST_IMPL(m, "padded_attention_backward", oner_fast::padded_attention_backward);
  ONER_FAST_IMPL(m, "varlen_attention", oner_fast::varlen_attention);
  ONER_FAST_IMPL(m, "varlen_attention_backward", oner_fast::varlen_attention_backward);
}

STABLE_TORCH_LIBRARY_IMPL(oner_fast, CompositeExplicitAutograd, m) {
  ONER_FAST_IMPL(m, "cpu_capability", oner_fast::cpu_capability);
}
