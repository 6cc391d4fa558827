// Registers the CUDA C++ kernels with PyTorch's dispatcher. Raw ops that are not here have Triton kernels.
#include <torch/csrc/stable/library.h>

#include "cuda/bindings/ops.h"

STABLE_TORCH_LIBRARY_IMPL(oner_fast, CUDA, m) {
  m.impl("masked_gather", TORCH_BOX(&oner_fast::cuda::masked_gather));
  m.impl("masked_gather_backward", TORCH_BOX(&oner_fast::cuda::masked_gather_backward));
  m.impl("gather_patches", TORCH_BOX(&oner_fast::cuda::gather_patches));
  m.impl("gather_patches_backward", TORCH_BOX(&oner_fast::cuda::gather_patches_backward));
  m.impl("token_alignment", TORCH_BOX(&oner_fast::cuda::token_alignment));
  m.impl("token_alignment_backward", TORCH_BOX(&oner_fast::cuda::token_alignment_backward));
  m.impl("mixup_info_nce_statistics", TORCH_BOX(&oner_fast::cuda::mixup_info_nce_statistics));
}
