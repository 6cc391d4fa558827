// One block of the logits: the terms of sigmoid_loss (forward), and its part of both sides' gradients (backward).
//
// A logit takes one exponential, and one logarithm in forward or one division in backward. Nothing overflows: with
// e = exp(-|l|), which is at most 1, log(1 + exp(l)) = max(l, 0) + log(1 + e), and sigmoid(|l|) = 1 / (1 + e).
#include "cpu/isa/sigmoid_loss.h"

#include "cpu/isa/contrast_tile.h"

namespace oner_fast {
namespace {

// The targets of a row other than 0 that do not come from codes: its own pair and its partner.
template <typename T>
struct RowTargets {
  int64_t own, partner;  // columns of the block, or -1
  T own_target, partner_target;

  static RowTargets of(const ContrastBlock& block, const SigmoidTerms& terms, int64_t row) {
    RowTargets found{block.column_of(block.own + row), -1, T(1), T(0)};
    if (block.partner == nullptr) return found;
    const T weight = static_cast<const T*>(terms.partner_weight)[row];
    found.partner = block.column_of(block.partner[row]);
    found.own_target = 1 - weight;
    found.partner_target = weight;
    return found;
  }
  // Whether the vector of columns from j on has one of them.
  bool any(int64_t j) const { return in(own, j) || in(partner, j); }
  Vec<T> at(int64_t j) const {
    T targets[kLanes<T>] = {};
    if (in(own, j)) targets[own - j] += own_target;
    if (in(partner, j)) targets[partner - j] += partner_target;
    return load(targets);
  }

 private:
  static bool in(int64_t column, int64_t j) {
    return static_cast<uint64_t>(column - j) < static_cast<uint64_t>(kLanes<T>);
  }
};

template <typename T>
Vec<T> negative_size(Vec<T> x) {
  return x < 0 ? x : -x;
}

// log(1 + exp(l)) - target * l; exact in the difference of the first and last term where the target is 0 or 1.
template <typename T>
Vec<T> term_of(Vec<T> l, Vec<T> hinge) {
  return hinge + log1p_of(exp_of(negative_size<T>(l)));
}

// sigmoid(l) and sigmoid(-l).
template <typename T>
struct Sigmoids {
  Vec<T> positive, negative;

  explicit Sigmoids(Vec<T> l) {
    const Vec<T> e = exp_of(negative_size<T>(l)), large = T(1) / (e + T(1)), small = e * large;
    positive = l < 0 ? small : large;
    negative = l < 0 ? large : small;
  }
};

// The logit of a product; any compiler may fuse its multiplication and addition.
template <typename P>
Vec<typename P::Out> biased(Vec<typename P::Out> product, Vec<typename P::Out> factor,
                            const typename P::Out* column_rest, Vec<typename P::Out> bias) {
  return product * (P::kDepth == 1 ? factor : factor * load(column_rest)) + bias;
}

// Finds the sums of the lanes of R rows of terms.
template <typename P, Same kSame, int R>
void add_terms(const ContrastBlock& block, const SigmoidTerms& terms, const Scratch<P>& s, int64_t first) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  const int64_t n = block.column_count, whole = n / W * W, row = block.row_first + first;
  const T* rows = s.logits + first * s.logits_row;
  const Vec<T> bias = broadcast(static_cast<T>(terms.bias));
  Vec<T> factor[R], total[R];
  RowTargets<T> targets[R];
  for (int r = 0; r < R; ++r) {
    factor[r] = row_factor<P>(block, s, first + r);
    total[r] = Vec<T>{};
    targets[r] = RowTargets<T>::of(block, terms, row + r);
  }
  const auto take = [&]<bool kWhole>(int64_t j) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Vec<T> l = biased<P>(load(rows + r * s.logits_row + j), factor[r], s.column_rest + j, bias);
      Vec<T> hinge = larger<T>(l, Vec<T>{});
      if constexpr (kSame == kPositive)
        hinge = EqualCodes<P>(block, row + r).targets(s, j) ? larger<T>(-l, Vec<T>{}) : hinge;
      else if (targets[r].any(j))
        hinge -= targets[r].at(j) * l;
      Vec<T> term = term_of<T>(l, hinge);
      if constexpr (kSame == kIgnored) term = EqualCodes<P>(block, row + r).further(s, j) ? Vec<T>{} : term;
      if constexpr (!kWhole) {
        T part[W];
        store(part, term);
        term = load_part(part, n - j, T(0));
      }
      total[r] += term;
    }
  };
  for (int64_t j = 0; j < whole; j += W) take.template operator()<true>(j);
  if (whole < n) take.template operator()<false>(whole);
  for (int r = 0; r < R; ++r) store(s.row_lanes + (first + r) * W, total[r]);
}

template <typename P>
void forward(const ContrastBlock& block, const SigmoidTerms& terms, void* memory) {
  const auto s = Scratch<P>::of(block, memory, false);
  const Tiles tiles;
  const RowOperand<P> rows = take_rows<P>(block, s);
  for (int64_t first = 0; first < block.row_count; first += kRowsAtOnce<P>) {
    const int64_t count = smaller(block.row_count - first, kRowsAtOnce<P>);
    multiply_rows<P>(block, s, rows, first, count, s.logits + first * s.logits_row);
    for_same(block.same, terms.positive, [&]<Same kSame> {
      in_groups(first, first + count, [&]<int R>(int64_t i) { add_terms<P, kSame, R>(block, terms, s, i); });
    });
  }
  over_lanes<true>(s.row_lanes, block.row_count, s.row_total);
}

// Turns products of R rows at `rows` into G, 0 beyond the last column, and finds the sums of their lanes.
template <typename P, Same kSame, int R>
void gradient_of_rows(const ContrastBlock& block, const SigmoidTerms& terms, const Scratch<P>& s, int64_t first,
                      typename P::Out* rows) {
  using T = typename P::Out;
  constexpr int W = kLanes<T>;
  const int64_t n = block.column_count, whole = n / W * W, row = block.row_first + first;
  const Vec<T> bias = broadcast(static_cast<T>(terms.bias));
  Vec<T> factor[R], total[R];
  RowTargets<T> targets[R];
  for (int r = 0; r < R; ++r) {
    factor[r] = row_factor<P>(block, s, first + r);
    total[r] = Vec<T>{};
    targets[r] = RowTargets<T>::of(block, terms, row + r);
  }
  const auto take = [&]<bool kWhole>(int64_t j) {
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      T* at = rows + r * s.logits_row + j;
      const Sigmoids<T> of(biased<P>(load(at), factor[r], s.column_rest + j, bias));
      Vec<T> g = of.positive;
      if constexpr (kSame == kPositive) {
        g = EqualCodes<P>(block, row + r).targets(s, j) ? -of.negative : g;
      } else if (targets[r].any(j)) {
        const Vec<T> target = targets[r].at(j);  // no difference of two numbers near 1
        g = (T(1) - target) * of.positive - target * of.negative;
      }
      if constexpr (kSame == kIgnored) g = EqualCodes<P>(block, row + r).further(s, j) ? Vec<T>{} : g;
      store(at, g);
      if constexpr (!kWhole) {
        g = load_part(at, n - j, T(0));
        store(at, g);
      }
      total[r] += g;
    }
  };
  for (int64_t j = 0; j < whole; j += W) take.template operator()<true>(j);
  if (whole < n) take.template operator()<false>(whole);
  for (int r = 0; r < R; ++r) store(s.row_lanes + (first + r) * W, total[r]);
}

template <typename P>
void gradient_of(const ContrastBlock& block, const SigmoidTerms& terms, bool to_columns, void* memory) {
  const auto s = Scratch<P>::of(block, memory, true);
  const Tiles tiles;
  gradients_of_rows<P>(block, s, to_columns, [&](int64_t first, int64_t count) {
    for_same(block.same, terms.positive, [&]<Same kSame> {
      in_groups(first, first + count, [&]<int R>(int64_t i) {
        gradient_of_rows<P, kSame, R>(block, terms, s, i, s.logits + (i - first) * s.logits_row);
      });
    });
  });
  over_lanes<true>(s.row_lanes, block.row_count, s.row_total);
}

template <typename P>
void add_rows(const ContrastBlock& block, void* sums, void* memory) {
  using T = typename P::Out;
  const auto s = Scratch<P>::of(block, memory, false);  // forward and backward keep the totals of rows in one place
  T* out = static_cast<T*>(sums) + block.row_first;
  for (int64_t i = 0; i < block.row_count; ++i) out[i] += s.row_total[i];
}

template <typename P>
constexpr SigmoidKernels kernels_of() {
  return {forward<P>, gradient_of<P>, add_rows<P>};
}

SigmoidLossKernels make_table() {
#if defined(__AVX512BF16__)
  SigmoidLossKernels table = sigmoid_loss_kernels_avx512();
  table.kinds[kContrastBF16] = kernels_of<Pairs>();
#else
  SigmoidLossKernels table{};
  table.kinds[kContrastF32] = kernels_of<Plain<float>>();
  table.kinds[kContrastF64] = kernels_of<Plain<double>>();
#endif
  return table;
}

}  // namespace

ONER_FAST_DEFINE_KERNELS(SigmoidLossKernels, sigmoid_loss_kernels, make_table)

}  // namespace oner_fast
