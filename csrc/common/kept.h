// The `kept` argument of the gathers: the rows of each sample to keep, (B, K) or ragged (T,) with cu_seqlens (B + 1,).
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "common/tensor.h"

namespace oner_fast {

// Checked, contiguous view of kept. Sample b owns the entries [begin(b), begin(b + 1)).
class Kept {
 public:
  // Raises IndexError for a value outside [0, cells) and ValueError for cu_seqlens that do not describe kept.
  Kept(const char* op, const Tensor& kept, const OptionalTensor& cu_seqlens, int64_t samples, int64_t cells);

  int64_t samples() const { return samples_; }
  int64_t total() const { return total_; }
  bool ragged() const { return starts_ != nullptr; }
  int64_t begin(int64_t sample) const { return starts_ ? starts_[sample] : sample * per_sample_; }
  int64_t operator[](int64_t entry) const { return values_[entry]; }
  // The sample of output row `row`, where every sample has `prefix` more rows.
  int64_t sample_of_row(int64_t row, int64_t prefix) const;

 private:
  Tensor holder_;
  OptionalTensor starts_holder_;  // keep the contiguous copies alive
  const int64_t* values_;
  const int32_t* starts_ = nullptr;
  int64_t samples_, total_, per_sample_ = 0;
};

// For every (sample, cell), the entries of kept that chose it, in ascending order, so that one thread writes each row
// of the gradient.
class Inverse {
 public:
  Inverse(const Kept& kept, int64_t cells);

  const int64_t* begin(int64_t sample, int64_t cell) const { return entries_.data() + offsets_[index(sample, cell)]; }
  const int64_t* end(int64_t sample, int64_t cell) const { return entries_.data() + offsets_[index(sample, cell) + 1]; }
  // Every entry once, ordered by sample and cell; entries of a sample are in the range that kept gives the sample.
  int64_t in_order(int64_t place) const { return entries_[static_cast<size_t>(place)]; }

 private:
  size_t index(int64_t sample, int64_t cell) const { return static_cast<size_t>(sample * cells_ + cell); }

  int64_t cells_;
  std::vector<int64_t> offsets_, entries_;
};

}  // namespace oner_fast
