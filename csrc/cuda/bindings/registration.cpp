// Registers the CUDA C++ kernels with PyTorch's dispatcher. Raw ops that are not here have Triton kernels.
#include "common/raw_op.h"
#include "cuda/bindings/ops.h"

STABLE_TORCH_LIBRARY_IMPL(oner_fast, CUDA, m) {
  ONER_FAST_IMPL(m, "masked_gather", oner_fast::cuda::masked_gather);
  ONER_FAST_IMPL(m, "masked_gather_backward", oner_fast::cuda::masked_gather_backward);
  ONER_FAST_IMPL(m, "gather_patches", oner_fast::cuda::gather_patches, 1);
  ONER_FAST_IMPL(m, "gather_patches_backward", oner_fast::cuda::gather_patches_backward);
  ONER_FAST_IMPL(m, "token_alignment", oner_fast::cuda::token_alignment);
  ONER_FAST_IMPL(m, "token_alignment_backward", oner_fast::cuda::token_alignment_backward);
  ONER_FAST_IMPL(m, "mixup_info_nce_statistics", oner_fast::cuda::mixup_info_nce_statistics);
  ONER_FAST_IMPL(m, "short_attention_table", oner_fast::cuda::short_attention_table);
  ONER_FAST_IMPL(m, "short_attention", oner_fast::cuda::short_attention);
  ONER_FAST_IMPL(m, "short_attention_backward", oner_fast::cuda::short_attention_backward);
}
