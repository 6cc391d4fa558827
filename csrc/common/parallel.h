// Work shared by PyTorch's own threads.
#pragma once

#include <torch/csrc/stable/c/shim.h>
#include <torch/headeronly/util/shim_utils.h>

#include <cstdint>
#include <exception>
#include <mutex>

namespace oner_fast {

inline int64_t threads() {
  uint32_t count = 1;
  TORCH_ERROR_CODE_CHECK(torch_get_num_threads(&count));
  return count;
}

// Calls work(first, last) for ranges that cover [begin, end), each of at least `grain` numbers but the last. In a
// region that is parallel already, and for less than a grain, the calling thread does all. An exception of `work`
// reaches the caller as it was thrown, which the C interface alone would turn into a code.
template <typename Work>
void parallel_for(int64_t begin, int64_t end, int64_t grain, const Work& work) {
  if (begin >= end) return;
  if (end - begin <= grain) return work(begin, end);
  struct Call {
    const Work& work;
    std::mutex mutex;
    std::exception_ptr error;
  } call{work, {}, nullptr};
  const auto part = [](int64_t first, int64_t last, void* context) {
    Call& whole = *static_cast<Call*>(context);
    try {
      whole.work(first, last);
    } catch (...) {
      const std::lock_guard<std::mutex> lock(whole.mutex);
      whole.error = std::current_exception();
    }
  };
  TORCH_ERROR_CODE_CHECK(torch_parallel_for(begin, end, grain, part, &call));
  if (call.error) std::rethrow_exception(call.error);
}

}  // namespace oner_fast
