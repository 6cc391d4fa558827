#include "common/tensor.h"

#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>

#include <array>

namespace oner_fast {
namespace {

// PyTorch's own words for the call that failed last. From 2.13 on it keeps them; before, it writes them to stderr.
const char* reason() {
  using Words = const char* (*)();
  static const auto words = reinterpret_cast<Words>(dlsym(RTLD_DEFAULT, "torch_exception_get_what_without_backtrace"));
  return words == nullptr ? "PyTorch wrote the reason to stderr" : words();
}

// Raises RuntimeError, as PyTorch does where memory runs out.
template <typename... Parts>
void check(AOTITorchError code, const Parts&... parts) {
  if (__builtin_expect(code != AOTI_TORCH_SUCCESS, 0))
    fail<std::runtime_error>("oner_fast: ", parts..., ": ", reason());
}

struct Dtype {
  ScalarType type;
  int32_t code;  // PyTorch's number of it, which is the same while a process lives
};

const auto& known_dtypes() {
  static const std::array<Dtype, 7> known = {{{kFloat, aoti_torch_dtype_float32()},
                                              {kBFloat16, aoti_torch_dtype_bfloat16()},
                                              {kLong, aoti_torch_dtype_int64()},
                                              {kInt, aoti_torch_dtype_int32()},
                                              {kByte, aoti_torch_dtype_uint8()},
                                              {kHalf, aoti_torch_dtype_float16()},
                                              {kDouble, aoti_torch_dtype_float64()}}};
  return known;
}

int32_t code_of(ScalarType type) {
  for (const Dtype& each : known_dtypes())
    if (each.type == type) return each.code;
  fail<std::runtime_error>("oner_fast: no op makes tensors of ", type);
}

}  // namespace

ScalarType type_of(const Tensor& x) {
  int32_t code = 0;
  TORCH_ERROR_CODE_CHECK(aoti_torch_get_dtype(x.get(), &code));
  for (const Dtype& each : known_dtypes())
    if (each.code == code) return each.type;
  return x.scalar_type();
}

Tensor empty(Sizes sizes, ScalarType type, const Tensor& like) {
  int32_t code = code_of(type);
  AtenTensorHandle made = nullptr;
  check(aoti_torch_aten_new_empty(like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &code, nullptr, nullptr,
                                  0, nullptr, &made),
        "not enough memory for a tensor of shape ", sizes, " and dtype ", type);
  return Tensor(made);
}

Tensor zeros(Sizes sizes, ScalarType type, const Tensor& like) {
  Tensor made = empty(sizes, type, like);
  fill_with_zeros(made);
  return made;
}

void fill_with_zeros(const Tensor& x) { check(aoti_torch_zero_(x.get()), "a tensor could not be filled with zeros"); }

Tensor dense(const Tensor& x) {
  if (x.is_contiguous()) return x;
  using torch::stable::detail::from;
  std::array<StableIValue, 2> stack{from(x), from(torch::headeronly::MemoryFormat::Contiguous)};
  check(torch_call_dispatcher("aten::contiguous", "", stack.data(), TORCH_ABI_VERSION),
        "no dense copy of a tensor of shape ", x.sizes());
  return torch::stable::detail::to<Tensor>(stack[0]);
}

Tensor of_type(const Tensor& x, ScalarType type) {
  if (type_of(x) == type) return x;
  const Tensor made = empty(x.sizes(), type, x);
  check(aoti_torch_copy_(made.get(), x.get(), 0), "a tensor could not be converted to ", type);
  return made;
}

Tensor with_dense_rows(const Tensor& x) {
  const int64_t last = x.dim() - 1;
  return x.stride(last) == 1 || x.size(last) == 1 ? x : dense(x);
}

}  // namespace oner_fast
