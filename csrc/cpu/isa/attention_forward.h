// Forward: flash attention of a range of queries. Keys come in blocks; a sequence of one block needs no rescaling.
#pragma once

#include "cpu/isa/attention_dropout.h"
#include "cpu/isa/attention_tile.h"

namespace oner_fast {
namespace {

template <typename In, typename P>
class Forward {
  using T = typename P::Out;
  using E = typename P::Element;
  static constexpr int W = kLanes<T>;

 public:
  Forward(const AttentionForward& task, char* scratch) : t_(task), scratch_(scratch) {
    const int64_t queries = round_up(t_.last - t_.first, kPanel<P>), width = t_.sizes.width;
    keys_ = t_.sizes.keys < kKeys<P> ? t_.sizes.keys : kKeys<P>;
    key_row_ = round_up(steps<P>(width), W);
    value_row_ = P::kDepth == 1 ? round_up(width, W) : steps<P>(keys_);
    key_ = scratch_.template take<E>(round_up(keys_, P::kRowsRead) * key_row_);
    value_ = scratch_.template take<E>(round_up(P::kDepth == 1 ? keys_ : width, P::kRowsRead) * value_row_);
    query_ = scratch_.template take<E>(key_row_ * kPanel<P>);
    scores_ = scratch_.template take<T>(keys_ * kPanel<P>);
    weights_ = P::kDepth == 1 ? nullptr : scratch_.template take<E>(steps<P>(keys_) * kPanel<P>);
    sums_ = scratch_.template take<T>((one_block() ? kPanel<P> : queries) * width);
    maximum_ = scratch_.template take<T>(queries);
    total_ = scratch_.template take<T>(queries);
    factor_ = scratch_.template take<T>(kPanel<P>);
    const int64_t words = drops() ? Draws<T>::words(keys_, kPanel<P>) : 0;
    draws_ = Draws<T>(&t_.dropout, scratch_.template take<typename Draws<T>::Word>(words));
  }
  int64_t bytes() const { return scratch_.bytes(); }

  void run(const AttentionForward* next) {
    ahead_.template add<In>(t_.out, t_.first, t_.last, t_.sizes.width);
    if (next != nullptr) {
      const AttentionSizes& sizes = next->sizes;
      const int64_t keys = sizes.keys < kKeys<P> ? sizes.keys : kKeys<P>;
      ahead_.template add<In>(next->key, 0, keys, sizes.width);
      ahead_.template add<In>(next->value, 0, keys, sizes.width);
      ahead_.template add<In>(next->query, next->first, next->last, sizes.width);
    }
    const int64_t keys = t_.sizes.keys;
    const Tiles tiles;
    for (int64_t key = 0; key < keys; key += keys_) {
      const int64_t count = keys - key < keys_ ? keys - key : keys_;
      load_block(key, count);
      for (int64_t q = t_.first; q < t_.last; q += kPanel<P>) panel(q, key, count);
    }
  }

 private:
  bool one_block() const { return t_.sizes.keys <= kKeys<P>; }
  bool drops() const { return t_.dropout.dropped > 0; }
  const In* row(const AttentionInput& x, int64_t i) const { return static_cast<const In*>(x.data) + i * x.row; }

  void load_block(int64_t key, int64_t count) {
    const int64_t width = t_.sizes.width;
    pack_a<P>(key_, key_row_, row(t_.key, key), t_.key.row, count, width);
    if constexpr (P::kDepth == 1)
      pack_a<P>(value_, value_row_, row(t_.value, key), t_.value.row, count, width);
    else
      pack_a_transposed<P>(value_, value_row_, row(t_.value, key), t_.value.row, count, width);
  }

  void panel(int64_t query, int64_t key, int64_t count) {
    const int64_t width = t_.sizes.width, queries = t_.last - query < kPanel<P> ? t_.last - query : kPanel<P>;
    const int64_t columns = padded<T>(queries), place = query - t_.first;
    T* sums = sums_ + (one_block() ? 0 : place * width);
    const int64_t seen = keys_seen(t_.sizes, query + queries - 1, key, count);
    if (seen > 0) {
      pack_b_transposed<P>(query_, row(t_.query, query), t_.query.row, queries, width);
      multiply_ahead<P, false>(ahead_, seen, queries, steps<P>(width), key_, key_row_, 1, query_, scores_, columns);
      const bool masked = some_unseen(t_.sizes, query, key, seen);
      if (drops()) draws_.draw(t_.dropout.head, t_.dropout.place + query, key, seen, columns);
      with_vectors<P>(columns / W, [&](auto v) {
        constexpr int V = decltype(v)::value;
        if (drops())
          softmax<V, true, true>(query, queries, key, seen, sums);
        else if (masked)
          softmax<V, true, false>(query, queries, key, seen, sums);
        else
          softmax<V, false, false>(query, queries, key, seen, sums);
      });
      if constexpr (P::kDepth == 1)
        multiply_panel<P>(ahead_, key > 0, width, queries, seen, value_, 1, value_row_, scores_, sums, columns);
      else
        multiply_panel<P>(ahead_, key > 0, width, queries, steps<P>(seen), value_, value_row_, 1, weights_, sums,
                          columns);
    }
    if (key + count == t_.sizes.keys) finish(query, queries, columns, sums);
  }

  // Turns scores into weights exp(scale * score - maximum), and rescales earlier sums to the new maximum. Base 2. The
  // sum is that of all weights, also of those that are dropped.
  template <int V, bool kMasked, bool kDropped>
  void softmax(int64_t query, int64_t queries, int64_t key, int64_t keys, T* sums) {
    constexpr int64_t columns = V * W;
    T *maximum = maximum_ + (query - t_.first), *total = total_ + (query - t_.first);
    const Seen<T, V> seen(t_.sizes, query, queries);
    const Vec<T> scale = broadcast(static_cast<T>(t_.sizes.scale * kLog2E)), lowest = broadcast(-kInfinity<T>);
    Vec<T> before[V], best[V], shift[V], sum[V];
    for (int v = 0; v < V; ++v) best[v] = before[v] = key == 0 ? lowest : load(maximum + v * W);
    for (int64_t j = 0; j < keys; ++j)
      for (int v = 0; v < V; ++v) {
        Vec<T> score = load(scores_ + j * columns + v * W) * scale;
        if constexpr (kMasked) score = seen(v, key + j) ? score : lowest;
        best[v] = larger<T>(score, best[v]);
      }
    for (int v = 0; v < V; ++v) {
      shift[v] = best[v] == lowest ? Vec<T>{} : best[v];  // where all are -inf the sum is 0 and the result NaN
      sum[v] = Vec<T>{};
    }
    for (int64_t j = 0; j < keys; j += P::kDepth) {
      Vec<T> weight[P::kDepth][V];
      for (int r = 0; r < P::kDepth; ++r)
        for (int v = 0; v < V; ++v) {
          if (P::kDepth > 1 && j + r == keys) {
            weight[r][v] = Vec<T>{};
            continue;
          }
          const Vec<T> score = rounded<T>(load(scores_ + (j + r) * columns + v * W) * scale);  // the largest is best[v]
          Vec<T> w = power_of_two<P::kDepth == 2>(score - shift[v]);
          if constexpr (kMasked) w = seen(v, key + j + r) ? w : Vec<T>{};
          sum[v] += w;
          if constexpr (kDropped) w = draws_.kept(j + r, v) ? w : Vec<T>{};
          weight[r][v] = w;
        }
      if constexpr (P::kDepth == 1)
        store_b<P>(scores_ + j * columns, weight);
      else
        store_b<P>(weights_ + j / P::kDepth * columns, weight), ahead_.advance(2);
    }
    if constexpr (P::kDepth > 1)
      for (int64_t s = (keys + 1) / 2 * columns; s < steps<P>(keys) * columns; ++s) weights_[s] = 0;
    for (int v = 0; v < V; ++v) {
      store(maximum + v * W, best[v]);
      if (key == 0) {
        store(total + v * W, sum[v]);
        continue;
      }
      const Vec<T> less = power_of_two<false>(before[v] - shift[v]);
      store(total + v * W, load(total + v * W) * less + sum[v]);
      for (int64_t d = 0; d < t_.sizes.width; ++d)
        store(sums + d * columns + v * W, load(sums + d * columns + v * W) * less);
    }
  }

  void finish(int64_t query, int64_t queries, int64_t columns, const T* sums) {
    const int64_t place = query - t_.first;
    T* maximum = static_cast<T*>(t_.maximum.data) + query * t_.maximum.row;
    T* inverse = static_cast<T*>(t_.inverse.data) + query * t_.inverse.row;
    for (int64_t i = 0; i < columns; ++i) {
      factor_[i] = T{1} / total_[place + i];
      if (i < queries) maximum[i * t_.maximum.row] = maximum_[place + i], inverse[i * t_.inverse.row] = factor_[i];
    }
    if (drops())
      for (int64_t i = 0; i < columns; ++i) factor_[i] *= static_cast<T>(t_.dropout.factor);
    In* out = static_cast<In*>(t_.out.data) + query * t_.out.row;
    write_transposed<In>(out, t_.out.row, sums, columns, queries, t_.sizes.width, factor_);
  }

  const AttentionForward& t_;
  Ahead ahead_;
  Pieces scratch_;
  int64_t keys_, key_row_, value_row_;
  E *key_, *value_, *query_, *weights_;
  T *scores_, *sums_, *maximum_, *total_, *factor_;
  Draws<T> draws_{nullptr, nullptr};
};

}  // namespace
}  // namespace oner_fast
