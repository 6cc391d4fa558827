#include "common/tensor.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/ops.h>

namespace oner_fast {
namespace {

// PyTorch's own words for the call that failed last. From 2.13 on it keeps them; before, it wrote them to stderr.
const char* reason() {
  using Words = const char* (*)();
  static const auto words = reinterpret_cast<Words>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return words == nullptr ? "PyTorch wrote the reason to stderr" : words();
}

int32_t code_of(ScalarType type) { return torch::stable::detail::to<int32_t>(torch::stable::detail::from(type)); }

}  // namespace

Tensor empty(Sizes sizes, ScalarType type, const Tensor& like) {
  int32_t code = code_of(type);
  AtenTensorHandle made = nullptr;
  if (aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &code, nullptr, nullptr,
                                0, nullptr, &made) != AOTI_TORCH_SUCCESS)
    fail<std::runtime_error>("oner_fast could not allocate a tensor of shape ", sizes, " and dtype ", type, ": ",
                             reason());
  return Tensor(made);
}

Tensor zeros(Sizes sizes, ScalarType type, const Tensor& like) {
  Tensor made = empty(sizes, type, like);
  fill_with_zeros(made);
  return made;
}

void fill_with_zeros(const Tensor& x) {
  if (aoti_torch_zero_(x.get()) != AOTI_TORCH_SUCCESS) fail<std::runtime_error>("zero_ failed: ", reason());
}

Tensor dense(const Tensor& x) { return x.is_contiguous() ? x : torch::stable::contiguous(x); }

Tensor of_type(const Tensor& x, ScalarType type) { return x.scalar_type() == type ? x : torch::stable::to(x, type); }

Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : dense(x);
}

}  // namespace oner_fast
