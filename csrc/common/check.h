// Checks that throw what PyTorch's bindings make an error of Python: ValueError (RuntimeError from torch 2.15 on, which
// keeps the type of IndexError alone) and IndexError. Public functions check in Python what they can, before. The
// message is made of the arguments, and only where the condition does not hold.
#pragma once

#include <torch/headeronly/core/ScalarType.h>
#include <torch/headeronly/util/HeaderOnlyArrayRef.h>

#include <cstdint>
#include <sstream>
#include <stdexcept>
#include <vector>

namespace oner_fast {

inline void write(std::ostream& to, torch::headeronly::IntHeaderOnlyArrayRef sizes) {
  to << '[';
  for (size_t i = 0; i < sizes.size(); ++i) to << (i == 0 ? "" : ", ") << sizes[i];
  to << ']';
}
inline void write(std::ostream& to, const std::vector<int64_t>& sizes) {
  write(to, torch::headeronly::IntHeaderOnlyArrayRef(sizes));
}
template <typename Part>
void write(std::ostream& to, const Part& part) {
  to << part;
}

template <typename Error, typename... Parts>
[[noreturn, gnu::noinline, gnu::cold]] void fail(const Parts&... parts) {
  std::ostringstream message;
  (write(message, parts), ...);
  throw Error(message.str());
}

}  // namespace oner_fast

#define ONER_FAST_CHECK(Error, condition, ...)                                    \
  do {                                                                            \
    if (__builtin_expect(!(condition), 0)) ::oner_fast::fail<Error>(__VA_ARGS__); \
  } while (false)
#define CHECK_VALUE(condition, ...) ONER_FAST_CHECK(std::invalid_argument, condition, __VA_ARGS__)
#define CHECK_INDEX(condition, ...) ONER_FAST_CHECK(std::out_of_range, condition, __VA_ARGS__)
// No exception of C++ becomes a TypeError: that is for Python, which checks every dtype first.
#define CHECK_TYPE(condition, ...) CHECK_VALUE(condition, __VA_ARGS__)
