// The terms of sigmoid_loss: what becomes of one block of the logits. The block's operands and its products are those
// of mixup_info_nce, whose kernels prepare the scratch and multiply.
#pragma once

#include "cpu/isa/mixup_info_nce.h"

namespace oner_fast {

// What the terms need beside the block. The target of an own pair is 1, or 1 - partner_weight where rows have partners;
// that of a partner is its weight. Pairs with equal codes have the target 1, or no term unless they are an own pair.
struct SigmoidTerms {
  double bias;
  const void* partner_weight;  // with block.partner
  bool positive;               // what pairs with equal codes are
};

// Call take_columns of mixup_info_nce's kernels once for a stripe, then for each block either forward, or gradient, and
// then add_rows, which adds what was found of each row to `sums`; to_rows and to_columns of mixup_info_nce's kernels
// follow a gradient. Other stripes add to the same sums, so the caller orders these calls.
struct SigmoidKernels {
  // Finds the sum of the terms of each row.
  void (*forward)(const ContrastBlock& block, const SigmoidTerms& terms, void* scratch);
  // Turns the products into G[i, j] = sigmoid(l) - target, and finds the sum of each row of G.
  void (*gradient)(const ContrastBlock& block, const SigmoidTerms& terms, bool to_columns, void* scratch);
  void (*add_rows)(const ContrastBlock& block, void* sums, void* scratch);
};

struct SigmoidLossKernels {
  // [kContrastBF16] is empty where the instruction set has no bfloat16 products; use float32 there.
  SigmoidKernels kinds[kContrastKinds];
};

ONER_FAST_DECLARE_KERNELS(SigmoidLossKernels, sigmoid_loss_kernels)

}  // namespace oner_fast
