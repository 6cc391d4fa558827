// Copies that bypass the cache: memory larger than the cache need not be fetched into it before it is overwritten.
#pragma once

#include <cstdint>

#include "cpu/isa/isa.h"

namespace oner_fast {

struct StreamKernels {
  // out = in with non-temporal stores where the instruction set has them; meanwhile the `bytes` at `next` (may be null)
  // are fetched into the cache.
  void (*copy)(void* out, const void* in, int64_t bytes, const void* next);
  void (*zero)(void* out, int64_t bytes);
  // Orders a thread's streamed stores before its later writes; required before another thread may read them.
  void (*fence)();
};

ONER_FAST_DECLARE_KERNELS(StreamKernels, stream_kernels)

}  // namespace oner_fast
