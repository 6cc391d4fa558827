#include "common/kept.h"

#include <algorithm>

#include "common/parallel.h"

namespace oner_fast {

Kept::Kept(const char* op, const Tensor& kept, const OptionalTensor& cu_seqlens, int64_t samples, int64_t cells)
    : holder_(dense(kept)), samples_(samples), total_(kept.numel()) {
  CHECK_VALUE(samples >= 0 && cells >= 0, op, ": ", samples, " samples of ", cells, " tokens");
  CHECK_TYPE(type_of(kept) == kLong, op, ": kept must be int64, got ", type_of(kept));
  values_ = static_cast<const int64_t*>(holder_.const_data_ptr());
  if (cu_seqlens.has_value()) {
    CHECK_TYPE(type_of(*cu_seqlens) == kInt, op, ": cu_seqlens must be int32, got ", type_of(*cu_seqlens));
    CHECK_VALUE(kept.dim() == 1, op, ": kept must have shape (T,) beside cu_seqlens, got ", kept.sizes());
    CHECK_VALUE(cu_seqlens->dim() == 1 && cu_seqlens->size(0) == samples + 1, op,
                ": cu_seqlens must have shape (B + 1,) = (", samples + 1, ",), got ", cu_seqlens->sizes());
    starts_holder_ = dense(*cu_seqlens);
    starts_ = static_cast<const int32_t*>(starts_holder_->const_data_ptr());
    CHECK_VALUE(starts_[0] == 0 && starts_[samples] == total_, op, ": cu_seqlens must begin with 0 and end with ",
                total_, ", got ", starts_[0], " and ", starts_[samples]);
    CHECK_VALUE(std::is_sorted(starts_, starts_ + samples + 1), op, ": cu_seqlens must never decrease");
  } else {
    CHECK_VALUE(kept.dim() == 2 && kept.size(0) == samples, op, ": kept must have shape (B, K) with B = ", samples,
                ", got ", kept.sizes());
    per_sample_ = kept.size(1);
  }
  bool inside = true;
  for (int64_t i = 0; i < total_; ++i) inside &= static_cast<uint64_t>(values_[i]) < static_cast<uint64_t>(cells);
  if (!inside) {
    const int64_t* bad = std::find_if(values_, values_ + total_, [cells](int64_t v) { return v < 0 || v >= cells; });
    CHECK_INDEX(false, op, ": kept must hold values in [0, ", cells, "), found ", *bad);
  }
}

int64_t Kept::sample_of_row(int64_t row, int64_t prefix) const {
  int64_t low = 0, high = samples_;  // the last sample whose first row is not after `row`
  while (high - low > 1) {
    const int64_t middle = (low + high) / 2;
    (begin(middle) + middle * prefix <= row ? low : high) = middle;
  }
  return low;
}

Inverse::Inverse(const Kept& kept, int64_t cells)
    : cells_(cells),
      offsets_(static_cast<size_t>(kept.samples() * cells + 1)),
      entries_(static_cast<size_t>(kept.total())) {
  parallel_for(0, kept.samples(), 16, [&](int64_t first, int64_t last) {
    std::vector<int64_t> cursor(static_cast<size_t>(cells));
    for (int64_t b = first; b < last; ++b) {
      std::fill(cursor.begin(), cursor.end(), 0);
      for (int64_t i = kept.begin(b); i < kept.begin(b + 1); ++i) ++cursor[static_cast<size_t>(kept[i])];
      int64_t offset = kept.begin(b);
      for (int64_t n = 0; n < cells; ++n) {
        const int64_t count = cursor[static_cast<size_t>(n)];
        cursor[static_cast<size_t>(n)] = offset;
        offsets_[index(b, n)] = offset;
        offset += count;
      }
      for (int64_t i = kept.begin(b); i < kept.begin(b + 1); ++i)
        entries_[static_cast<size_t>(cursor[static_cast<size_t>(kept[i])]++)] = i;
    }
  });
  offsets_.back() = kept.total();
}

}  // namespace oner_fast
