// The tiles of mixup_info_nce. q is `rows`, k is `columns`; logits (M x N) exist one block at a time.
#pragma once

#include <cstdint>

#include "cpu/isa/isa.h"
#include "cpu/isa/rows.h"

namespace oner_fast {

// Rows of the logits: row i is inverse_norm[i] * ((1 - mix_i) x_i + mix_i other_i); statistics are float, or double for
// float64.
struct MixedRows {
  const void* x;
  int64_t stride;
  const void* other;  // or null
  int64_t other_stride;
  const void* mix;           // with `other`
  int64_t mix_step;          // 0: one for all rows
  const void* inverse_norm;  // or null: the mixed rows are used as they are
  Kind kind;
  int64_t width;
};

// Further pairs: row i and column j whose codes are equal. Without shares these leave the sums, unless they are an own
// pair. With shares they are targets of the weight row_share[i] + column_share[j], and so is the own pair.
struct SamePairs {
  const int32_t *row_code, *column_code;  // null: there are none
  const void *row_share, *column_share;   // null: such pairs are ignored
};

// One block of rows against one block of columns.
struct ContrastBlock {
  MixedRows rows, columns;
  int64_t row_first, row_count, column_first, column_count;
  int64_t largest_row_count;  // of the blocks that share the scratch
  int64_t own;                // the column of row 0's own pair, or where it would be
  const int64_t* partner;     // the other target of each row, or null; any value
  SamePairs same;
  double scale;

  // Where a column is in the block, or -1.
  int64_t column_of(int64_t column) const {
    return column >= column_first && column < column_first + column_count ? column - column_first : -1;
  }
};

// Sums are of exp(logit - max); `column_*` are null where only rows count. With shares, own_logit is the sum of the
// logits of all targets times their weights.
struct ContrastStatistics {
  void *row_max, *row_sum, *column_max, *column_sum, *own_logit, *partner_logit;
};

// G[i, j] = row_weight[i] exp(l - row_max[i]) + column_weight[j] exp(l - column_max[j]) - targets. Maxima are kept
// apart from sums, so that the largest logit has an exponential of exactly 1, and 1 minus its target is exact. With
// column shares, own_weight is the share of the row.
struct ContrastGradient {
  const void *row_max, *row_weight, *column_max, *column_weight, *own_weight, *partner_weight;
};

// Sums of G times the rows of the other side, from row 0 and from the stripe's first column on.
struct ContrastSums {
  void *to_rows, *to_columns;  // the columns' are null where not needed
  int64_t to_rows_stride, to_columns_stride;
};

// The gradients of x, of other and of mix (null without other) for a row, and <row of the logits, sum> (or null).
struct MixedRowsGradient {
  void *to_x, *to_other, *to_mix, *dot;
  int64_t to_x_stride, to_other_stride;
};

// A stripe of columns keeps its scratch while it processes units of rows, one after the other. Call take_columns once,
// then for each block (a unit and the stripe) either forward and forward_rows, or gradient, to_rows and to_columns.
// Other stripes add to the results of forward_rows and to_rows too, so the caller orders them. scratch_bytes takes the
// largest unit.
struct ContrastKernels {
  int64_t (*scratch_bytes)(int64_t rows, int64_t columns, int64_t width, bool backward, bool same);
  void (*take_columns)(const ContrastBlock& block, bool backward, void* scratch);
  void (*forward)(const ContrastBlock& block, const ContrastStatistics& statistics, void* scratch);
  void (*forward_rows)(const ContrastBlock& block, const ContrastStatistics& statistics, void* scratch);
  void (*gradient)(const ContrastBlock& block, const ContrastGradient& gradient, bool to_columns, void* scratch);
  void (*to_rows)(const ContrastBlock& block, const ContrastSums& sums, void* scratch);
  void (*to_columns)(const ContrastBlock& block, const ContrastSums& sums, void* scratch);
};

enum ContrastKind { kContrastF32 = 0, kContrastF64, kContrastBF16, kContrastKinds };

struct MixupInfoNceKernels {
  // [kContrastBF16] is empty where the instruction set has no bfloat16 products; use float32 there.
  ContrastKernels contrast[kContrastKinds];
  // inverse_norm = 1 / norm of rows first..last, as in common/norm.h, and its backward; [0] float, [1] double
  // statistics.
  void (*inverse_norms[2])(const MixedRows& rows, int64_t first, int64_t last, void* out);
  void (*finish[2])(const MixedRows& rows, int64_t first, int64_t last, const void* sums, int64_t stride, double scale,
                    const MixedRowsGradient& out);
};

ONER_FAST_DECLARE_KERNELS(MixupInfoNceKernels, mixup_info_nce_kernels)

}  // namespace oner_fast
