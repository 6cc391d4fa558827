// Fresh memory for a large result costs a fault a page; large pages make the faults few.
#pragma once

#include <ATen/core/Tensor.h>

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

namespace oner_fast {

// `x` itself; asks that memory which spans many pages of 2 MB come in such pages where it is fresh.
inline at::Tensor with_large_pages(at::Tensor x) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20, kFew = 4;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage, last = (begin + x.nbytes()) / kPage * kPage;
  // Advice alone: where it is refused, pages are small.
  if (last > first && last - first >= kFew * kPage)
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
  return x;
}

}  // namespace oner_fast
