// A CUDA runtime without a GPU. The host code of csrc/cuda launches kernels; each launch is handed to Python, which
// runs the compiled PTX on the CPU. Only the functions that nvcc's host code calls are here.
#include <cuda_runtime_api.h>

#include <cstdint>
#include <map>
#include <string>
#include <vector>

namespace {

using Launcher = int (*)(const char* kernel, const unsigned* grid, const unsigned* block, void** arguments,
                         uint64_t shared);

struct Configuration {
  dim3 grid, block;
  size_t shared;
  cudaStream_t stream;
};

Launcher launcher = nullptr;
int multiprocessors = 108;
cudaError_t last_error = cudaSuccess;
std::map<const void*, std::string>& names() {
  static std::map<const void*, std::string> known;
  return known;
}
std::map<const void*, int>& largest_shared() {
  static std::map<const void*, int> known;
  return known;
}
std::vector<Configuration>& configurations() {
  static std::vector<Configuration> pushed;
  return pushed;
}

cudaError_t failed(cudaError_t error) { return last_error = error; }

}  // namespace

extern "C" {

void oner_fast_test_launcher(Launcher function) { launcher = function; }

void oner_fast_test_multiprocessors(int count) { multiprocessors = count; }

// Registration, which runs when the library is loaded.
void** __cudaRegisterFatBinary(void*) {
  static void* handle = nullptr;
  return &handle;
}
void __cudaRegisterFatBinaryEnd(void**) {}
void __cudaUnregisterFatBinary(void**) {}
char __cudaInitModule(void**) { return 1; }
void __cudaRegisterFunction(void**, const char* function, char*, const char* name, int, uint3*, uint3*, dim3*, dim3*,
                            int*) {
  names()[function] = name;
}

unsigned __cudaPushCallConfiguration(dim3 grid, dim3 block, size_t shared, cudaStream_t stream) {
  configurations().push_back({grid, block, shared, stream});
  return 0;
}
cudaError_t __cudaPopCallConfiguration(dim3* grid, dim3* block, size_t* shared, void* stream) {
  const Configuration last = configurations().back();
  configurations().pop_back();
  *grid = last.grid, *block = last.block, *shared = last.shared;
  *static_cast<cudaStream_t*>(stream) = last.stream;
  return cudaSuccess;
}

cudaError_t cudaLaunchKernel(const void* function, dim3 grid, dim3 block, void** arguments, size_t shared,
                             cudaStream_t) {
  constexpr size_t kWithoutAsking = 48 << 10;
  const unsigned most = 65535, x[3] = {grid.x, grid.y, grid.z}, y[3] = {block.x, block.y, block.z};
  const auto asked = largest_shared().find(function);
  const bool too_much =
      shared > kWithoutAsking && (asked == largest_shared().end() || shared > static_cast<size_t>(asked->second));
  if (names().count(function) == 0) return failed(cudaErrorInvalidDeviceFunction);
  if (x[0] == 0 || x[1] == 0 || x[2] == 0 || x[0] > INT32_MAX || x[1] > most || x[2] > most || too_much)
    return failed(cudaErrorInvalidConfiguration);
  if (launcher == nullptr || launcher(names()[function].c_str(), x, y, arguments, shared) != 0)
    return failed(cudaErrorLaunchFailure);
  return cudaSuccess;
}
// From CUDA 13 on a kernel has a handle; here it is the function.
cudaError_t __cudaGetKernel(cudaKernel_t* kernel, const void* function) {
  *kernel = reinterpret_cast<cudaKernel_t>(const_cast<void*>(function));
  return cudaSuccess;
}
cudaError_t __cudaLaunchKernel(cudaKernel_t kernel, dim3 grid, dim3 block, void** arguments, size_t shared,
                               cudaStream_t stream) {
  return cudaLaunchKernel(reinterpret_cast<const void*>(kernel), grid, block, arguments, shared, stream);
}

cudaError_t cudaFuncSetAttribute(const void* function, cudaFuncAttribute attribute, int value) {
  if (attribute == cudaFuncAttributeMaxDynamicSharedMemorySize) largest_shared()[function] = value;
  return cudaSuccess;
}
// An A100 that holds one block of each kernel on a multiprocessor.
cudaError_t cudaGetDevice(int* device) {
  *device = 0;
  return cudaSuccess;
}
cudaError_t cudaDeviceGetAttribute(int* value, cudaDeviceAttr attribute, int) {
  if (attribute != cudaDevAttrMultiProcessorCount) return failed(cudaErrorInvalidValue);
  *value = multiprocessors;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessor(int* blocks, const void*, int, size_t) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaOccupancyMaxActiveBlocksPerMultiprocessorWithFlags(int* blocks, const void*, int, size_t, unsigned) {
  *blocks = 1;
  return cudaSuccess;
}
cudaError_t cudaGetLastError() {
  const cudaError_t error = last_error;
  last_error = cudaSuccess;
  return error;
}

}  // extern "C"
