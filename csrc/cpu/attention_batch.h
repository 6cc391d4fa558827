// The checked arguments of an attention op, packed or padded, and where each sequence lies.
#pragma once

#include <type_traits>
#include <vector>

#include "common/ops.h"
#include "cpu/isa/varlen_attention.h"
#include "cpu/kinds.h"

namespace oner_fast {

// The tensors of one sequence begin at `row_q` and `row_k`: 0 where sequences have a dimension of their own.
struct AttentionSequence {
  int64_t number, row_q, queries, row_k, keys;  // of `all_keys` the first `keys` are seen by some query
  int64_t blind;                                // the first queries, which see no key
  int64_t all_keys;
  const int32_t* seen;  // how many keys each query sees; nullptr where that follows from the sizes
};

// A tensor of rows of heads; (T, H, ...) where sequences are packed, (B, N, H, ...) where they are padded.
template <typename Operand>
struct AttentionRows {
  Operand operand;
  int64_t batch, size;  // elements from sequence to sequence; bytes of an element

  Operand of(const AttentionSequence& s, int64_t first, int64_t row, int64_t head) const {
    constexpr bool is_input = std::is_const_v<std::remove_pointer_t<decltype(operand.data)>>;
    using Bytes = std::conditional_t<is_input, const char*, char*>;
    Operand moved = operand;
    if (moved.data != nullptr)
      moved.data = static_cast<Bytes>(moved.data) +
                   (s.number * batch + (first + row) * operand.row + head * operand.head) * size;
    return moved;
  }
  Operand of_query(const AttentionSequence& s, int64_t row, int64_t head) const { return of(s, s.row_q, row, head); }
  Operand of_key(const AttentionSequence& s, int64_t row, int64_t head) const { return of(s, s.row_k, row, head); }
};

class AttentionBatch {
 public:
  static AttentionBatch packed(const Tensor& query, const Tensor& key, const Tensor& value, const Tensor& cu_seqlens_q,
                               const OptionalTensor& cu_seqlens_k, bool causal, double scale);
  static AttentionBatch padded(const Tensor& query, const Tensor& key, const Tensor& value, const OptionalTensor& seen,
                               double scale);
  void drop(int64_t dropped, const OptionalTensor& seed);
  void check_like(const char* name, const Tensor& x, const Tensor& like) const;

  // The queries that see a key; their places are counted from the first of them.
  AttentionSizes sizes(const AttentionSequence& s) const {
    return {s.queries - s.blind, s.keys, width, causal, scale, s.seen == nullptr ? nullptr : s.seen + s.blind};
  }
  AttentionDropout dropout(const AttentionSequence& s, int64_t head) const {
    AttentionDropout one = dropout_;
    one.sequence = s.number, one.head = head, one.place = s.blind;
    return one;
  }
  int64_t group() const { return heads / key_heads; }
  template <typename Operand>
  AttentionRows<Operand> rows(Operand operand, int64_t batch, const Tensor& x) const {
    return {operand, is_padded ? batch : 0, item_size(x)};
  }

  const char* op;
  bool is_padded, causal;
  double scale;
  Tensor query, key, value;
  Kind kind;
  int64_t heads, key_heads, width;
  std::vector<AttentionSequence> sequences;

 private:
  AttentionBatch(const char* op, bool is_padded, const Tensor& query, const Tensor& key, const Tensor& value,
                 bool causal, double scale);

  AttentionDropout dropout_{};
  std::vector<Tensor> kept_alive_;
};

std::tuple<Tensor, Tensor> attention(const AttentionBatch& batch);

std::tuple<Tensor, Tensor, Tensor> attention_backward(const AttentionBatch& batch, const Tensor& grad,
                                                      const Tensor& out, const Tensor& statistics, bool need_query,
                                                      bool need_key);

}  // namespace oner_fast
