// The launches of the CUDA C++ kernels, whose arguments the bindings fill in. This file does not use torch, so that the
// kernels and these functions compile, and are tested, without it. Strides and widths count elements, never bytes.
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace oner_fast::cuda {

enum Number : int32_t { kF32 = 0, kF64, kF16, kBF16, kU8 };

constexpr int64_t bytes_of(int32_t number) { return number == kF64 ? 8 : number == kF32 ? 4 : number == kU8 ? 1 : 2; }

// The rows of each sample to keep: entry i of sample b is values[begin(b) + i]. A value outside [0, cells) keeps
// nothing.
struct Kept {
  const int64_t* values;
  const int32_t* starts;  // (samples + 1,), or null: per_sample entries each
  int64_t samples, cells, per_sample, total;
};

// For one (sample, cell): its first entry within the sample, and how many entries chose it.
struct Choice {
  int32_t first, count;
};

struct MaskedGather {
  const void *tokens, *positions, *prefix;  // positions and prefix may be null
  void* out;                                // (kept.total + samples * prefix_rows, width), dense
  Kept kept;
  int64_t sample_stride, token_stride, position_stride, prefix_stride, prefix_rows;
  int32_t width, number;
};

// Sums over samples are computed in splits of kSamplesPerSplit, stored in the partials as float (double for double),
// and then added in order.
constexpr int64_t kSamplesPerSplit = 32;

struct MaskedGatherBackward {
  const void* grad;                            // dense, rows as those of MaskedGather::out
  void *to_tokens, *to_positions, *to_prefix;  // null where not needed
  void *position_partials, *prefix_partials;   // (splits, cells, width), (splits, prefix_rows, width); null likewise
  Choice* choices;                             // (samples, cells) scratch, if tokens or positions are needed
  Kept kept;
  int64_t prefix_rows;
  int32_t width, number;
};

struct GatherPatches {
  const void* images;
  void* out;                 // (kept.total, channels * patch * patch), dense
  const double *mean, *std;  // (channels,), or null
  Kept kept;
  int64_t sample_stride, channel_stride, line_stride;  // pixels of a line lie side by side
  int32_t channels, patch, across, image_number, out_number;
};

struct GatherPatchesBackward {
  const void* grad;  // dense, as GatherPatches::out
  void* to_images;   // (samples, channels, down * patch, across * patch), dense
  const double* std;
  Choice* choices;  // (samples, cells) scratch
  Kept kept;
  int32_t channels, patch, across, down, grad_number, image_number;
};

struct TokenAlignment {
  const void *student, *teacher;
  const int64_t* kept;   // (samples * per_sample,), or null: teacher token i for student token i
  void *loss, *factors;  // 0-d and (rows, 2): float, or double for a double student
  double* partials;      // token_alignment_partials(rows)
  const void* grad;      // backward: 0-d like the loss; factors are read
  void* to_student;      // backward: dense
  int64_t samples, per_sample, cells;
  int64_t student_sample_stride, student_token_stride, teacher_sample_stride, teacher_token_stride;
  int32_t width, student_number, teacher_number;
};

// One side of the contrast that tensor cores cannot read: it is mixed, or its width or strides do not fit.
struct MixupPack {
  const void *x, *other;            // other may be null
  const float *mix, *inverse_norm;  // with other; or null
  void* out;                        // (rows, padded) of x's type, zeros behind the width
  float* rest;                      // (rows,), the factors that make packed rows unit vectors
  int64_t rows, row_stride, column_stride, other_row_stride, other_column_stride, mix_step;
  int32_t width, padded, number;
};

struct MixupStatistics {
  const void *query, *key;                 // 16-byte aligned, strides and width multiples of 8
  const float *query_factor, *key_factor;  // the factors that make unit vectors; null: rows are unit vectors
  const float* scale;                      // 0-d
  const int64_t* partner;                  // (rows,), or null
  const int32_t *query_code, *key_code;    // (rows,), (columns,), or null: pairs with equal codes are further pairs
  const float *row_share, *column_share;   // the same; null: such pairs are ignored
  float *row_max, *row_sum, *column_max, *column_sum, *own, *shared;  // column_* null: rows alone
  float *row_parts, *column_parts;  // (2, column_chunks, rows), (2, row_chunks, columns)
  float* own_parts;                 // (column_chunks, rows) with shares
  int64_t query_stride, key_stride, first_pair;
  int32_t rows, columns, width, number;
  int32_t row_chunks, column_chunks, row_tiles_each, column_tiles_each;  // mixup_plan
};

// The tasks of attention within short sequences, longest first: table[0] is their number, and task i is the sequence
// table[2 + 2 i] with table[3 + 2 i] = 65536 first head + heads. No length may be more than `longest`, at most 256.
struct ShortAttentionTable {
  const int32_t *starts_q, *starts_k;  // (sequences + 1,)
  int32_t* table;                      // (2 + 2 sequences heads,)
  int32_t sequences, queries, keys, heads, longest;
};

struct ShortAttention {
  const void *query, *key, *value;  // 16-byte aligned, strides multiples of 8
  void* out;                        // (queries, heads, head_dim), dense
  float* statistics;                // (2, queries, heads): largest score in base 2, 1 / sum
  const int32_t *starts_q, *starts_k, *table;
  int64_t query_row, query_head, key_row, key_head, value_row, value_head;
  float scale;  // positive
  int32_t sequences, queries, keys, heads, head_dim, longest, causal, number;
};

struct ShortAttentionBackward {
  const void *grad, *query, *key, *value, *out;
  const float* statistics;
  void *to_query, *to_key, *to_value;  // dense; null where not needed
  const int32_t *starts_q, *starts_k, *table;
  int64_t grad_row, grad_head, query_row, query_head, key_row, key_head, value_row, value_head, out_row, out_head;
  float scale;
  int32_t sequences, queries, keys, heads, head_dim, longest, causal, number;
};

extern "C" {
cudaError_t oner_fast_masked_gather(const MaskedGather* call, cudaStream_t stream);
cudaError_t oner_fast_masked_gather_backward(const MaskedGatherBackward* call, cudaStream_t stream);
cudaError_t oner_fast_gather_patches(const GatherPatches* call, cudaStream_t stream);
cudaError_t oner_fast_gather_patches_backward(const GatherPatchesBackward* call, cudaStream_t stream);
int64_t oner_fast_token_alignment_partials(int64_t rows);
cudaError_t oner_fast_token_alignment(const TokenAlignment* call, cudaStream_t stream);
cudaError_t oner_fast_token_alignment_backward(const TokenAlignment* call, cudaStream_t stream);
cudaError_t oner_fast_mixup_pack(const MixupPack* call, cudaStream_t stream);
// Fills in the chunks of a call that has rows and columns.
void oner_fast_mixup_plan(MixupStatistics* call);
cudaError_t oner_fast_mixup_statistics(const MixupStatistics* call, cudaStream_t stream);
cudaError_t oner_fast_short_attention_table(const ShortAttentionTable* call, cudaStream_t stream);
cudaError_t oner_fast_short_attention(const ShortAttention* call, cudaStream_t stream);
cudaError_t oner_fast_short_attention_backward(const ShortAttentionBackward* call, cudaStream_t stream);
}

}  // namespace oner_fast::cuda
