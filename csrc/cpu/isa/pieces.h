// Divides the scratch memory that the caller of a kernel provides.
#pragma once

#include "cpu/isa/gemm.h"

namespace oner_fast {
namespace {

// Hands out consecutive pieces of the scratch memory; with nullptr it only measures their total size.
class Pieces {
 public:
  explicit Pieces(char* begin) : begin_(begin) {}
  template <typename T>
  T* take(int64_t count) {
    const int64_t at = bytes_;
    bytes_ += round_up(count * static_cast<int64_t>(sizeof(T)), 64);
    return begin_ == nullptr ? nullptr : reinterpret_cast<T*>(begin_ + at);
  }
  int64_t bytes() const { return bytes_; }

 private:
  char* begin_;
  int64_t bytes_ = 0;
};

}  // namespace
}  // namespace oner_fast
