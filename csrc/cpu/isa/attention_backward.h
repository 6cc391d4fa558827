// Backward: a range of query blocks against a range of key blocks. The weights are recomputed with the products and
// exponentials of forward, so that they equal those of forward however large the scores are (a rounded log-sum-exp
// would not give that).
//
// For any ranges, a gradient is the sum of the same products of blocks in the same order: its bits do not depend on how
// a sequence was divided into tasks.
#pragma once

#include "cpu/isa/attention_dropout.h"
#include "cpu/isa/attention_tile.h"

namespace oner_fast {
namespace {

template <typename In, typename P>
class Backward {
  using T = typename P::Out;
  using E = typename P::Element;
  static constexpr int W = kLanes<T>;

 public:
  Backward(const AttentionBackward& task, char* scratch) : t_(task), scratch_(scratch) {
    const int64_t width = t_.sizes.width, all = t_.last_query - t_.first_query;
    keys_ = t_.last_key - t_.first_key < kKeys<P> ? t_.last_key - t_.first_key : kKeys<P>;
    queries_ = all < kQueries<P> ? all : kQueries<P>;
    const int64_t columns = round_up(queries_, kPanel<P>);
    width_row_ = round_up(steps<P>(width), W);
    sum_row_ = padded<T>(width);
    key_depth_row_ = steps<P>(keys_);
    pair_row_ = round_up(steps<P>(columns), W);
    key_ = scratch_.template take<E>(round_up(keys_, P::kRowsRead) * width_row_);
    value_ = scratch_.template take<E>(round_up(keys_, P::kRowsRead) * width_row_);
    key_transposed_ =
        P::kDepth == 1 ? nullptr : scratch_.template take<E>(round_up(width, P::kRowsRead) * key_depth_row_);
    query_transposed_ = scratch_.template take<E>(width_row_ * columns);
    grad_transposed_ = scratch_.template take<E>(width_row_ * columns);
    query_ = scratch_.template take<E>(steps<P>(columns) * sum_row_);
    grad_ = scratch_.template take<E>(steps<P>(columns) * sum_row_);
    scores_ = scratch_.template take<T>(keys_ * kPanel<P>);
    products_ = scratch_.template take<T>(keys_ * kPanel<P>);
    weights_ = scratch_.template take<E>(round_up(keys_, P::kRowsRead) * pair_row_);
    slopes_ = scratch_.template take<E>(round_up(keys_, P::kRowsRead) * pair_row_);
    panel_ = P::kDepth == 1 ? nullptr : scratch_.template take<E>(steps<P>(keys_) * kPanel<P>);
    to_key_ = scratch_.template take<T>(keys_ * sum_row_);
    to_value_ = scratch_.template take<T>(keys_ * sum_row_);
    to_query_head_ = round_up(all, kPanel<P>) * width;
    to_query_ = scratch_.template take<T>(one_block() ? kPanel<P> * width : t_.heads * to_query_head_);
    maximum_ = scratch_.template take<T>(columns);
    inverse_ = scratch_.template take<T>(columns);
    delta_ = scratch_.template take<T>(columns);
    factor_ = scratch_.template take<T>(kPanel<P>);
    const int64_t words = drops() ? Draws<T>::words(keys_, kPanel<P>) : 0;
    draws_ = Draws<T>(&t_.dropout, scratch_.template take<typename Draws<T>::Word>(words));
  }
  int64_t bytes() const { return scratch_.bytes(); }

  void run(const AttentionBackward* next) {
    foresee(next);
    const Tiles tiles;
    for (int64_t i = 0; i < kPanel<P>; ++i) factor_[i] = static_cast<T>(t_.sizes.scale);
    for (int64_t key = t_.first_key; key < t_.last_key; key += keys_) {
      const int64_t count = t_.last_key - key < keys_ ? t_.last_key - key : keys_;
      load_keys(key, count);
      bool first = true;
      for (int64_t h = 0; h < t_.heads; ++h)
        for (int64_t q = t_.first_query; q < t_.last_query; q += queries_)
          block(h, q, t_.last_query - q < queries_ ? t_.last_query - q : queries_, key, count, first);
      if (t_.need_key) store_keys(key, count);
    }
  }

 private:
  bool one_block() const { return t_.last_key - t_.first_key <= kKeys<P>; }
  bool drops() const { return t_.dropout.dropped > 0; }
  static const In* row(const AttentionInput& x, int64_t head, int64_t i) {
    return static_cast<const In*>(x.data) + i * x.row + head * x.head;
  }
  static In* row(const AttentionOutput& x, int64_t head, int64_t i) {
    return static_cast<In*>(x.data) + i * x.row + head * x.head;
  }

  void foresee(const AttentionBackward* next) {
    const int64_t width = t_.sizes.width;
    const auto end = [](int64_t first, int64_t last, int64_t most) {
      return last - first < most ? last : first + most;
    };
    if (t_.need_query)
      ahead_.template add<In>(t_.to_query, t_.first_query, end(t_.first_query, t_.last_query, queries_), width);
    if (t_.need_key) {
      ahead_.template add<In>(t_.to_key, t_.first_key, t_.first_key + keys_, width);
      ahead_.template add<In>(t_.to_value, t_.first_key, t_.first_key + keys_, width);
    }
    if (next == nullptr) return;
    const int64_t last_key = end(next->first_key, next->last_key, kKeys<P>);
    const int64_t last_query = end(next->first_query, next->last_query, kQueries<P>);
    ahead_.template add<In>(next->key, next->first_key, last_key, width);
    ahead_.template add<In>(next->value, next->first_key, last_key, width);
    ahead_.template add<In>(next->query, next->first_query, last_query, width);
    ahead_.template add<In>(next->grad, next->first_query, last_query, width);
    ahead_.template add<In>(next->out, next->first_query, last_query, width);
  }

  void load_keys(int64_t key, int64_t count) {
    const int64_t width = t_.sizes.width;
    pack_a<P>(key_, width_row_, row(t_.key, 0, key), t_.key.row, count, width);
    pack_a<P>(value_, width_row_, row(t_.value, 0, key), t_.value.row, count, width);
    if constexpr (P::kDepth > 1)
      if (t_.need_query)
        pack_a_transposed<P>(key_transposed_, key_depth_row_, row(t_.key, 0, key), t_.key.row, count, width);
  }

  void store_keys(int64_t key, int64_t count) {
    const int64_t width = t_.sizes.width;
    write_rows(row(t_.to_key, 0, key), t_.to_key.row, to_key_, sum_row_, count, width, factor_[0]);
    const T made_up = drops() ? static_cast<T>(t_.dropout.factor) : T{1};
    write_rows(row(t_.to_value, 0, key), t_.to_value.row, to_value_, sum_row_, count, width, made_up);
  }

  void load_queries(int64_t head, int64_t query, int64_t count) {
    const int64_t width = t_.sizes.width;
    const In *from = row(t_.query, head, query), *grad = row(t_.grad, head, query), *out = row(t_.out, head, query);
    pack_b_transposed<P>(query_transposed_, from, t_.query.row, count, width);
    pack_b_transposed<P>(grad_transposed_, grad, t_.grad.row, count, width);
    if (t_.need_key) {
      pack_b<P>(query_, from, t_.query.row, count, width);
      pack_b<P>(grad_, grad, t_.grad.row, count, width);
    }
    const T* maximum = static_cast<const T*>(t_.maximum.data) + query * t_.maximum.row + head * t_.maximum.head;
    const T* inverse = static_cast<const T*>(t_.inverse.data) + query * t_.inverse.row + head * t_.inverse.head;
    const int64_t columns = padded<T>(count);
    for (int64_t i = 0; i < columns; ++i) {
      maximum_[i] = i < count ? maximum[i * t_.maximum.row] : T{0};
      inverse_[i] = i < count ? inverse[i * t_.inverse.row] : T{0};
    }
    for (int64_t n = 0; n < columns; n += W) {  // delta = sum over the row of grad * out
      Vec<T> sums[W];
      for (int i = 0; i < W; ++i) {
        sums[i] = Vec<T>{};
        if (n + i < count)
          for (int64_t d = 0; d < width; d += W)
            sums[i] +=
                read(grad + (n + i) * t_.grad.row + d, width - d) * read(out + (n + i) * t_.out.row + d, width - d);
      }
      transpose(sums);
      for (int i = 1; i < W; ++i) sums[0] += sums[i];
      store(delta_ + n, sums[0]);
    }
  }

  void block(int64_t head, int64_t query, int64_t queries, int64_t key, int64_t count, bool& first) {
    const int64_t width = t_.sizes.width, last_key = key + count;
    T* sums = to_query_ + (one_block() ? 0 : head * to_query_head_ + (query - t_.first_query) * width);
    load_queries(head, query, queries);
    bool any = false;
    for (int64_t p = 0; p < queries; p += kPanel<P>) {
      const int64_t n = queries - p < kPanel<P> ? queries - p : kPanel<P>, columns = padded<T>(n);
      const int64_t seen = keys_seen(t_.sizes, query + p + n - 1, key, count);
      E *weights = weights_ + p / P::kDepth, *slopes = slopes_ + p / P::kDepth;
      T* to_query = sums + (one_block() ? 0 : p * width);
      any |= seen > 0;
      if (seen > 0) {
        const int64_t depth = steps<P>(width);
        multiply_ahead<P, false>(ahead_, seen, n, depth, key_, width_row_, 1, query_transposed_ + p * depth, scores_,
                                 columns);
        multiply_ahead<P, false>(ahead_, seen, n, depth, value_, width_row_, 1, grad_transposed_ + p * depth, products_,
                                 columns);
        const bool masked = n < columns || some_unseen(t_.sizes, query + p, key, seen);
        if (drops()) draws_.draw(t_.dropout.head + head, t_.dropout.place + query + p, key, seen, columns);
        with_vectors<P>(columns / W, [&](auto v) {
          constexpr int V = decltype(v)::value;
          if (drops())
            gradient<V, true, true>(query + p, n, key, seen, p, weights, slopes);
          else if (masked)
            gradient<V, true, false>(query + p, n, key, seen, p, weights, slopes);
          else
            gradient<V, false, false>(query + p, n, key, seen, p, weights, slopes);
        });
        if (t_.need_query) multiply_query(key > 0, n, seen, to_query, columns);
      }
      if (t_.need_key)
        for (int64_t j = seen; j < count; ++j) {
          const size_t bytes = static_cast<size_t>(steps<P>(columns)) * sizeof(E);
          std::memset(weights + j * pair_row_, 0, bytes);
          std::memset(slopes + j * pair_row_, 0, bytes);
        }
      if (t_.need_query && last_key == t_.sizes.keys)
        write_transposed(row(t_.to_query, head, query + p), t_.to_query.row, to_query, columns, n, width, factor_);
    }
    if (t_.need_key && any) {
      multiply_key(!first, count, queries, weights_, grad_, to_value_);
      multiply_key(!first, count, queries, slopes_, query_, to_key_);
      first = false;
    }
  }

  void multiply_query(bool add, int64_t n, int64_t keys, T* c, int64_t columns) {
    if constexpr (P::kDepth == 1)
      multiply_panel<P>(ahead_, add, t_.sizes.width, n, keys, key_, 1, width_row_, products_, c, columns);
    else
      multiply_panel<P>(ahead_, add, t_.sizes.width, n, steps<P>(keys), key_transposed_, key_depth_row_, 1, panel_, c,
                        columns);
  }

  void multiply_key(bool add, int64_t keys, int64_t queries, const E* a, const E* b, T* c) {
    if (add)
      multiply_ahead<P, true>(ahead_, keys, t_.sizes.width, steps<P>(queries), a, pair_row_, 1, b, c, sum_row_);
    else
      multiply_ahead<P, false>(ahead_, keys, t_.sizes.width, steps<P>(queries), a, pair_row_, 1, b, c, sum_row_);
  }

  // weights = exp(scale * scores - maximum) / sum and slopes = weights * (products - delta), as rows of A; slopes as a
  // panel of B. The panel begins at query `place` of its block. Dropout makes zeros of weights and of products, but the
  // slopes are those of all weights.
  template <int V, bool kMasked, bool kDropped>
  void gradient(int64_t query, int64_t queries, int64_t key, int64_t keys, int64_t place, E* weights, E* slopes) {
    constexpr int64_t columns = V * W;
    const Seen<T, V> seen(t_.sizes, query, queries);
    const Vec<T> scale = broadcast(static_cast<T>(t_.sizes.scale * kLog2E));
    Vec<T> shift[V], share[V], less[V];
    for (int v = 0; v < V; ++v) {
      const Vec<T> best = load(maximum_ + place + v * W);
      shift[v] = best == broadcast(-kInfinity<T>) ? Vec<T>{} : best;  // as forward does
      share[v] = load(inverse_ + place + v * W), less[v] = load(delta_ + place + v * W);
    }
    E* panel = panel_;
    for (int64_t j = 0; j < keys; j += P::kDepth) {
      Vec<T> weight[P::kDepth][V], slope[P::kDepth][V];
      for (int r = 0; r < P::kDepth; ++r)
        for (int v = 0; v < V; ++v) {
          if (P::kDepth > 1 && j + r == keys) {
            weight[r][v] = slope[r][v] = Vec<T>{};
            continue;
          }
          const int64_t at = (j + r) * columns + v * W;
          Vec<T> w = power_of_two<P::kDepth == 2>(rounded<T>(load(scores_ + at) * scale) - shift[v]) * share[v];
          Vec<T> product = load(products_ + at);
          if constexpr (kDropped) product = draws_.kept(j + r, v) ? product * draws_.factor() : Vec<T>{};
          Vec<T> s = w * (product - less[v]);
          if constexpr (kDropped) w = draws_.kept(j + r, v) ? w : Vec<T>{};
          if constexpr (kMasked) {
            w = seen(v, key + j + r) ? w : Vec<T>{};
            s = seen(v, key + j + r) ? s : Vec<T>{};
          }
          weight[r][v] = w;
          slope[r][v] = s;
        }
      if (t_.need_key) {
        store_a<P>(weights + j * pair_row_, pair_row_, weight);
        store_a<P>(slopes + j * pair_row_, pair_row_, slope);
      }
      if constexpr (P::kDepth == 1)
        store_b<P>(products_ + j * columns, slope);
      else
        store_b<P>(panel + j / 2 * columns, slope), ahead_.advance(2);
    }
    if constexpr (P::kDepth > 1)
      for (int64_t s = (keys + 1) / 2 * columns; s < steps<P>(keys) * columns; ++s) panel[s] = 0;
  }

  const AttentionBackward& t_;
  Ahead ahead_;
  Pieces scratch_;
  int64_t keys_, queries_, width_row_, sum_row_, key_depth_row_, pair_row_, to_query_head_;
  E *key_, *value_, *key_transposed_, *query_transposed_, *grad_transposed_, *query_, *grad_, *weights_, *slopes_,
      *panel_;
  T *scores_, *products_, *to_key_, *to_value_, *to_query_, *maximum_, *inverse_, *delta_, *factor_;
  Draws<T> draws_{nullptr, nullptr};
};

}  // namespace
}  // namespace oner_fast
