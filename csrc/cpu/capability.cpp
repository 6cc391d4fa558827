// Which instruction set's kernels are used: decided once, here.
#include "cpu/capability.h"

#include <c10/util/Exception.h>

#include <cstdlib>
#include <string>

#include "cpu/rows.h"

namespace oner_fast {
namespace {

std::string best() {
#ifdef ONER_FAST_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return "avx512";
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return "avx2";
#endif
  return "portable";
}

std::string decide() {
  const char* asked = std::getenv("ONER_FAST_CPU_CAPABILITY");
  const std::string able = best();
  if (asked == nullptr || *asked == '\0') return able;
  const std::string name = asked;
  TORCH_CHECK_VALUE(name == "portable" || name == "avx2" || name == "avx512", "ONER_FAST_CPU_CAPABILITY is '", name,
                    "'; known ones: portable, avx2, avx512");
  TORCH_CHECK_VALUE(name == "portable" || name == able || able == "avx512", "ONER_FAST_CPU_CAPABILITY asks for ", name,
                    ", but this processor runs ", able, " at most");
  return name;
}

}  // namespace

std::string cpu_capability() {
  static const std::string name = decide();
  return name;
}

const RowKernels& row_kernels() {
#ifdef ONER_FAST_X86
  static const RowKernels& table = cpu_capability() == "avx512" ? row_kernels_avx512()
                                   : cpu_capability() == "avx2" ? row_kernels_avx2()
                                                                : row_kernels_portable();
  return table;
#else
  return row_kernels_portable();
#endif
}

}  // namespace oner_fast
