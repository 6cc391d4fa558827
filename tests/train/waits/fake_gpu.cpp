// A CUDA device that PyTorch's autograd takes for there, so that tensors without memory can have gradients on it.
//
// PyTorch's CPU build knows no CUDA device, and its engine asks for one where a gradient lies on it. Preloaded, this
// library answers: there is one device, whose streams and events do nothing. It runs no kernel. Tensors of
// FakeTensorMode need none, as they have shapes alone.
#include <ATen/DeviceAccelerator.h>
#include <ATen/detail/CUDAHooksInterface.h>
#include <c10/core/impl/FakeGuardImpl.h>

namespace {

struct OneDevice : at::CUDAHooksInterface {
  bool hasCUDA() const override { return true; }
  bool hasPrimaryContext(at::DeviceIndex) const override { return true; }
  at::DeviceIndex deviceCount() const override { return 1; }
  at::DeviceIndex getCurrentDevice() const override { return 0; }
};

c10::impl::DeviceGuardImplRegistrar registrar(c10::DeviceType::CUDA,
                                              new c10::impl::FakeGuardImpl<c10::DeviceType::CUDA>());

}  // namespace

namespace at::detail {
const CUDAHooksInterface& getCUDAHooks() {
  static OneDevice device;
  return device;
}
}  // namespace at::detail

namespace at::accelerator {
std::optional<c10::DeviceType> getAccelerator(bool) { return c10::DeviceType::CUDA; }
}  // namespace at::accelerator
