// Kernels of token_alignment: a student row beside the teacher row it is aligned with.
#pragma once

#include <cstdint>

#include "cpu/isa/rows.h"

namespace oner_fast {

// Statistics and arithmetic are float32, or float64 where the student is: any teacher is converted to that first.
struct TokenAlignmentKernels {
  // sums = {s . s, t . t, s . t}; in both, the rows at `next_student` and `next_teacher` are fetched into the cache
  // meanwhile.
  void (*sums[kKinds][kKinds])(double sums[3], const void* student, const void* teacher, int64_t count,
                               const void* next_student, const void* next_teacher);
  // out = to_teacher * t + to_student * s, in the student's dtype, bypassing the cache if streamed.
  void (*combine[kKinds][kKinds])(void* out, const void* student, const void* teacher, int64_t count, double to_student,
                                  double to_teacher, const void* next_student, const void* next_teacher, bool streamed);
  // The same in float64, for factors that underflow float32.
  decltype(sums) wide_sums;
  decltype(combine) wide_combine;
};

ONER_FAST_DECLARE_KERNELS(TokenAlignmentKernels, token_alignment_kernels)

}  // namespace oner_fast
