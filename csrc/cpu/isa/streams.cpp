// Copies past the cache, for callers outside this folder.
#include "cpu/isa/streams.h"

#include "cpu/isa/streaming.h"

namespace oner_fast {
namespace {

constexpr int64_t kZeros = 1024;

void copy(void* out, const void* in, int64_t bytes, const void* next) {
  if (next != nullptr) fetch(next, bytes);
  stream_copy(static_cast<char*>(out), static_cast<const char*>(in), bytes);
}

void zero(void* out, int64_t bytes) {
  alignas(kLine) static const char zeros[kZeros] = {};
  for (int64_t i = 0; i < bytes; i += kZeros)
    stream_copy(static_cast<char*>(out) + i, zeros, bytes - i < kZeros ? bytes - i : kZeros);
}

void fence() {
#if defined(__SSE2__)
  _mm_sfence();
#endif
}

StreamKernels make_table() { return {copy, zero, fence}; }

}  // namespace

ONER_FAST_DEFINE_KERNELS(StreamKernels, stream_kernels, make_table)

}  // namespace oner_fast
