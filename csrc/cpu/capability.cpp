// Chooses, once, the instruction set whose kernels are used.
#include "cpu/capability.h"

#include <algorithm>
#include <array>
#include <cstdlib>
#include <string>

#ifdef ONER_FAST_X86
#include <cpuid.h>
#ifdef __linux__
#include <sys/syscall.h>
#include <unistd.h>
#endif
#endif

#include "common/check.h"
#include "cpu/isa/mixup_info_nce.h"
#include "cpu/isa/rows.h"
#include "cpu/isa/sigmoid_loss.h"
#include "cpu/isa/streams.h"
#include "cpu/isa/token_alignment.h"
#include "cpu/isa/varlen_attention.h"

namespace oner_fast {
namespace {

constexpr std::array<const char*, 5> kNames = {"portable", "avx2", "avx512", "avx512_bf16", "amx"};

#ifdef ONER_FAST_X86
// AMX tiles need support by the processor, and permission from the operating system to have their state saved.
bool has_amx() {
#ifdef __linux__
  unsigned a = 0, b = 0, c = 0, d = 0;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return false;
  constexpr unsigned kBf16 = 1u << 22, kTile = 1u << 24;
  constexpr long kRequestPermission = 0x1023, kTileData = 18;  // asm/prctl.h, ARCH_REQ_XCOMP_PERM
  return (d & kBf16) != 0 && (d & kTile) != 0 && syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
#else
  return false;
#endif
}
#endif

int best() {
#ifdef ONER_FAST_X86
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl"))
    return !__builtin_cpu_supports("avx512bf16") ? 2 : has_amx() ? 4 : 3;
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c")) return 1;
#endif
  return 0;
}

// Intel's cores have one unit for vdpbf16ps and two for float32, so without tiles it is faster to widen to float32.
int preferred(int able) {
#ifdef ONER_FAST_X86
  if (able == 3 && __builtin_cpu_is("intel")) return 2;
#endif
  return able;
}

int decide() {
  const char* asked = std::getenv("ONER_FAST_CPU_CAPABILITY");
  const int able = best();
  if (asked == nullptr || *asked == '\0') return preferred(able);
  const auto found = std::find(kNames.begin(), kNames.end(), std::string(asked));
  CHECK_VALUE(found != kNames.end(), "ONER_FAST_CPU_CAPABILITY is '", asked,
              "'; known ones: portable, avx2, avx512, avx512_bf16, amx");
  const int level = static_cast<int>(found - kNames.begin());
  CHECK_VALUE(level <= able, "ONER_FAST_CPU_CAPABILITY asks for ", asked, ", but this processor runs ",
              kNames[static_cast<size_t>(able)], " at most");
  return level;
}

int level() {
  static const int decided = decide();
  return decided;
}

}  // namespace

std::string cpu_capability() { return kNames[static_cast<size_t>(level())]; }

#ifdef ONER_FAST_X86
#define ONER_FAST_CHOOSE(Table, name, of_amx, of_bf16)              \
  const Table& name() {                                             \
    static const Table& table = level() == 4   ? of_amx()           \
                                : level() == 3 ? of_bf16()          \
                                : level() == 2 ? name##_avx512()    \
                                : level() == 1 ? name##_avx2()      \
                                               : name##_portable(); \
    return table;                                                   \
  }
#else
#define ONER_FAST_CHOOSE(Table, name, of_amx, of_bf16) \
  const Table& name() { return name##_portable(); }
#endif
#define ONER_FAST_CHOOSE_PRODUCTS(Table, name) ONER_FAST_CHOOSE(Table, name, name##_amx, name##_avx512_bf16)
#define ONER_FAST_CHOOSE_OTHERS(Table, name) ONER_FAST_CHOOSE(Table, name, name##_avx512, name##_avx512)

ONER_FAST_CHOOSE_PRODUCTS(MixupInfoNceKernels, mixup_info_nce_kernels)
ONER_FAST_CHOOSE_PRODUCTS(SigmoidLossKernels, sigmoid_loss_kernels)
ONER_FAST_CHOOSE_PRODUCTS(AttentionKernels, attention_kernels)
ONER_FAST_CHOOSE_OTHERS(RowKernels, row_kernels)
ONER_FAST_CHOOSE_OTHERS(StreamKernels, stream_kernels)
ONER_FAST_CHOOSE_OTHERS(TokenAlignmentKernels, token_alignment_kernels)

}  // namespace oner_fast
