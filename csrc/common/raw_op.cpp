#include "common/raw_op.h"

#include <array>

namespace oner_fast {

// The stable ABI does not tell whether a tensor requires a gradient. A view of one that does has a history, and is then
// no leaf.
bool needs_gradient(const Tensor& x) {
  const ScalarType type = type_of(x);
  if (type == kByte || type == kInt || type == kLong) return false;
  using torch::stable::detail::from;
  using torch::stable::detail::to;
  std::array<StableIValue, 1> stack{from(x)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::alias", "", stack.data(), TORCH_ABI_VERSION));
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::is_leaf", "", stack.data(), TORCH_ABI_VERSION));
  return !to<bool>(stack[0]);
}

std::string& signatures() {
  static std::string all;
  return all;
}

}  // namespace oner_fast

extern "C" __attribute__((visibility("default"))) const char* oner_fast_signatures() {
  return oner_fast::signatures().c_str();
}
