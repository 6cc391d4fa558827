// The instruction set whose kernels are in use.
#pragma once

#include <string>

namespace oner_fast {

// "amx", "avx512_bf16", "avx512", "avx2" or "portable". ONER_FAST_CPU_CAPABILITY forces one. The choice is made once.
std::string cpu_capability();

}  // namespace oner_fast
