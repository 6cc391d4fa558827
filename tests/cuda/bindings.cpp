// The bindings of csrc/cuda as ops for tensors on the CPU, so that they run without a GPU: this file registers them,
// and stands in for the functions of PyTorch that need one. Launches end in runtime.cpp.
#include <cuda_runtime_api.h>

#include <cstdlib>
#include <cstring>
#include <string>

#include "common/raw_op.h"
#include "cuda/bindings/ops.h"

STABLE_TORCH_LIBRARY_IMPL(oner_fast_emulated, CPU, m) {
  ONER_FAST_IMPL(m, "masked_gather", oner_fast::cuda::masked_gather);
  ONER_FAST_IMPL(m, "masked_gather_backward", oner_fast::cuda::masked_gather_backward);
  ONER_FAST_IMPL(m, "gather_patches", oner_fast::cuda::gather_patches);
  ONER_FAST_IMPL(m, "gather_patches_backward", oner_fast::cuda::gather_patches_backward);
  ONER_FAST_IMPL(m, "token_alignment", oner_fast::cuda::token_alignment);
  ONER_FAST_IMPL(m, "token_alignment_backward", oner_fast::cuda::token_alignment_backward);
  ONER_FAST_IMPL(m, "mixup_info_nce_statistics", oner_fast::cuda::mixup_info_nce_statistics);
  ONER_FAST_IMPL(m, "short_attention_table", oner_fast::cuda::short_attention_table);
  ONER_FAST_IMPL(m, "short_attention", oner_fast::cuda::short_attention);
  ONER_FAST_IMPL(m, "short_attention_backward", oner_fast::cuda::short_attention_backward);
}

extern "C" {

AOTITorchError aoti_torch_create_device_guard(int32_t, DeviceGuardHandle* guard) {
  *guard = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError aoti_torch_delete_device_guard(DeviceGuardHandle) { return AOTI_TORCH_SUCCESS; }
AOTITorchError aoti_torch_get_current_cuda_stream(int32_t, void** stream) {
  *stream = nullptr;
  return AOTI_TORCH_SUCCESS;
}
AOTITorchError torch_c10_cuda_check_msg(int32_t error, const char*, const char*, uint32_t, bool, char** message) {
  if (error != cudaSuccess) *message = strdup(("CUDA error " + std::to_string(error)).c_str());
  return AOTI_TORCH_SUCCESS;
}
void torch_c10_cuda_free_error_msg(char* message) { std::free(message); }

}  // extern "C"
