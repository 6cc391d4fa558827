// Writes a result, bypassing the cache when it is too large to stay there.
#pragma once

#include <cstdint>
#include <cstring>

#include "cpu/isa/streams.h"

namespace oner_fast {

class Output {
 public:
  static constexpr int64_t kStreamedFrom = 4 << 20;  // bytes: about the second-level caches of a few cores

  explicit Output(int64_t bytes, int64_t streamed_from = kStreamedFrom)
      : streamed_(bytes >= streamed_from), kernels_(stream_kernels()) {}

  bool streamed() const { return streamed_; }
  // to = from; where the result is streamed, also prefetches the `bytes` at `next` (may be null).
  void copy(char* to, const void* from, int64_t bytes, const void* next) const {
    if (streamed_)
      kernels_.copy(to, from, bytes, next);
    else
      std::memcpy(to, from, static_cast<size_t>(bytes));
  }
  void zero(char* to, int64_t bytes) const {
    if (streamed_)
      kernels_.zero(to, bytes);
    else
      std::memset(to, 0, static_cast<size_t>(bytes));
  }
  // Every thread that wrote must call this at its end.
  void finish() const {
    if (streamed_) kernels_.fence();
  }

 private:
  bool streamed_;
  const StreamKernels& kernels_;
};

}  // namespace oner_fast
