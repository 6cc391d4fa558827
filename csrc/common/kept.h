// The `kept` argument of the gathers: which rows of each sample survive, fixed (B, K) or ragged (T,) with cu_seqlens (B + 1,).
#pragma once

#include <ATen/core/Tensor.h>

#include <cstdint>
#include <optional>
#include <vector>

namespace oner_fast {

// A checked, contiguous view of kept. Sample b owns the entries [begin(b), begin(b + 1)).
class Kept {
 public:
  // Raises IndexError for a value outside [0, cells) and ValueError for cu_seqlens that do not describe kept.
  Kept(const char* op, const at::Tensor& kept, const std::optional<at::Tensor>& cu_seqlens, int64_t samples, int64_t cells);

  int64_t samples() const { return samples_; }
  int64_t total() const { return total_; }
  bool ragged() const { return starts_ != nullptr; }
  int64_t begin(int64_t sample) const { return starts_ ? starts_[sample] : sample * per_sample_; }
  int64_t operator[](int64_t entry) const { return values_[entry]; }
  // The sample that owns output row `row` when every sample has `prefix` rows more.
  int64_t sample_of_row(int64_t row, int64_t prefix) const;

 private:
  at::Tensor holder_, starts_holder_;  // keep the contiguous copies alive
  const int64_t* values_;
  const int32_t* starts_ = nullptr;
  int64_t samples_, total_, per_sample_ = 0;
};

// For every (sample, cell): the entries of kept that chose it, in ascending order. This gives each gradient row to one thread.
class Inverse {
 public:
  Inverse(const Kept& kept, int64_t cells);

  const int64_t* begin(int64_t sample, int64_t cell) const { return entries_.data() + offsets_[index(sample, cell)]; }
  const int64_t* end(int64_t sample, int64_t cell) const { return entries_.data() + offsets_[index(sample, cell) + 1]; }
  // Every entry once, in the order of samples and cells; those of a sample have the places that kept gives them.
  int64_t in_order(int64_t place) const { return entries_[static_cast<size_t>(place)]; }

 private:
  size_t index(int64_t sample, int64_t cell) const { return static_cast<size_t>(sample * cells_ + cell); }

  int64_t cells_;
  std::vector<int64_t> offsets_, entries_;
};

}  // namespace oner_fast
