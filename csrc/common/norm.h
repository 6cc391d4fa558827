// The norm that a row is divided by, with the rule for rows that have no direction.
#pragma once

#include <limits>

namespace oner_fast {
namespace {

constexpr double kLeastNorm = 1e-12;  // a shorter row counts as a row of zeros

// A row divided by this is a unit vector. The quotient is 0 for a row that counts as zeros, and NaN for a row whose
// squares overflow: a loss of diverged rows must not look finite.
template <typename T>
inline T divisor_of(T norm) {
  if (norm < static_cast<T>(kLeastNorm)) return std::numeric_limits<T>::infinity();
  return norm > std::numeric_limits<T>::max() ? std::numeric_limits<T>::quiet_NaN() : norm;
}

}  // namespace
}  // namespace oner_fast
