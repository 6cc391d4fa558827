// Attention's kernels: which product computes each kind of numbers.
#include "cpu/isa/attention_backward.h"
#include "cpu/isa/attention_forward.h"

namespace oner_fast {
namespace {

template <typename In, typename P>
void fill(AttentionKernels& table, Kind kind) {
  table.queries_each[kind] = kQueries<P>;
  table.keys_each[kind] = kKeys<P>;
  table.forward_scratch[kind] = [](const AttentionForward& task) { return Forward<In, P>(task, nullptr).bytes(); };
  table.forward[kind] = [](const AttentionForward& task, const AttentionForward* next, char* scratch) {
    Forward<In, P>(task, scratch).run(next);
  };
  table.backward_scratch[kind] = [](const AttentionBackward& task) { return Backward<In, P>(task, nullptr).bytes(); };
  table.backward[kind] = [](const AttentionBackward& task, const AttentionBackward* next, char* scratch) {
    Backward<In, P>(task, scratch).run(next);
  };
}

AttentionKernels make_table() {
#if defined(__AVX512BF16__)
  AttentionKernels table = attention_kernels_avx512();
  fill<BFloat, Pairs>(table, kBF16);
#else
  AttentionKernels table{};
  fill<float, Plain<float>>(table, kF32);
  fill<double, Plain<double>>(table, kF64);
  fill<Half, Plain<float>>(table, kF16);
  fill<BFloat, Plain<float>>(table, kBF16);
#endif
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(AttentionKernels, attention_kernels, make_table)

}  // namespace oner_fast
