// Attention of one sequence and head (or of the heads that share a key head), forward and backward.
//
// A sequence has at least one query and one key, and every query sees a key.
#pragma once

#include "cpu/isa/rows.h"

namespace oner_fast {

// Row i of head h begins at data + i * row + h * head, in elements; the elements of a row are consecutive.
struct AttentionInput {
  const void* data;
  int64_t row, head;
};
struct AttentionOutput {
  void* data;
  int64_t row, head;
};

struct AttentionSizes {
  int64_t queries, keys, width;  // of the whole sequence
  bool causal;                   // query q sees the first seen[q] keys or, without `seen`, q + keys - queries + 1
  double scale;
  const int32_t* seen;  // never decreases, and ends with `keys`; nullptr without
};

// Weights whose 16 bits are below `dropped` are dropped, and the others multiplied by `factor`; 0 drops none.
struct AttentionDropout {
  uint32_t low, high;  // the seed
  int32_t dropped;
  double factor;
  int64_t sequence, head, place;  // of the task's first head; of the sequence's first query that sees a key
};

struct AttentionForward {
  AttentionSizes sizes;
  int64_t first, last;  // the queries to compute
  AttentionInput query, key, value;
  AttentionOutput out, maximum, inverse;  // of a query's scores in base 2, and of their sum: float, double for kF64
  AttentionDropout dropout;
};

// A range of query blocks against a range of key blocks; all pointers are to the sequence's first row.
struct AttentionBackward {
  AttentionSizes sizes;
  int64_t heads;  // of the query that share the key head
  int64_t first_query, last_query, first_key, last_key;
  bool need_query, need_key;  // of the ranges: needs all keys, needs all queries
  AttentionInput query, key, value, out, maximum, inverse, grad;
  AttentionOutput to_query, to_key, to_value;
  AttentionDropout dropout;
};

struct AttentionKernels {
  // A range may start at multiples of these lengths.
  int64_t queries_each[kKinds], keys_each[kKinds];
  int64_t (*forward_scratch[kKinds])(const AttentionForward&);
  // `next` (or nullptr) is the task that this thread runs after this one; its inputs are prefetched meanwhile.
  void (*forward[kKinds])(const AttentionForward&, const AttentionForward* next, char* scratch);
  int64_t (*backward_scratch[kKinds])(const AttentionBackward&);
  void (*backward[kKinds])(const AttentionBackward&, const AttentionBackward* next, char* scratch);
};

ONER_FAST_DECLARE_KERNELS(AttentionKernels, attention_kernels)

}  // namespace oner_fast
