// Fresh memory for a large result costs one fault for each page, so large pages save most faults.
#pragma once

#ifdef __linux__
#include <sys/mman.h>
#endif

#include <cstdint>

#include "common/tensor.h"

namespace oner_fast {

// Returns `x`, and asks for pages of 2 MB where its memory is fresh and spans many of them.
inline Tensor with_large_pages(Tensor x) {
#ifdef __linux__
  constexpr uintptr_t kPage = 2 << 20, kFew = 4;
  const auto begin = reinterpret_cast<uintptr_t>(x.mutable_data_ptr());
  const uintptr_t first = (begin + kPage - 1) / kPage * kPage,
                  last = (begin + static_cast<uintptr_t>(x.numel() * item_size(x))) / kPage * kPage;
  // This is advice only: if it is refused, pages stay small.
  if (last > first && last - first >= kFew * kPage)
    static_cast<void>(madvise(reinterpret_cast<void*>(first), last - first, MADV_HUGEPAGE));
#endif
  return x;
}

}  // namespace oner_fast
