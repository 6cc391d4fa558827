// The weights that dropout keeps: Philox4x32-10 with a query in each lane, counted as
// oner_fast/ops/attention_dropout.py says.
#pragma once

#include "cpu/isa/varlen_attention.h"
#include "cpu/isa/vec.h"

#if defined(__AVX2__)
#include <immintrin.h>
#endif

namespace oner_fast {
namespace {

// Words of 32 bits in lanes of 64, whose upper halves may hold anything.
using WideWords = Vec<uint64_t>;

inline WideWords product(WideWords words, uint32_t by) {
#if defined(__AVX512F__)
  return reinterpret_cast<WideWords>(
      _mm512_mul_epu32(reinterpret_cast<__m512i>(words), _mm512_set1_epi64(static_cast<int64_t>(by))));
#elif defined(__AVX2__)
  return reinterpret_cast<WideWords>(
      _mm256_mul_epu32(reinterpret_cast<__m256i>(words), _mm256_set1_epi64x(static_cast<int64_t>(by))));
#else
  return (words & uint64_t{0xFFFFFFFF}) * uint64_t{by};
#endif
}

inline void philox(WideWords (&w)[4], uint32_t low, uint32_t high) {
  for (int round = 0; round < 10; ++round) {
    const WideWords first = product(w[0], 0xD2511F53), second = product(w[2], 0xCD9E8D57);
    w[0] = (second >> 32) ^ w[1] ^ uint64_t { low };
    w[1] = second;
    w[2] = (first >> 32) ^ w[3] ^ uint64_t { high };
    w[3] = first;
    low += 0x9E3779B9, high += 0xBB67AE85;
  }
}

// The draws of a block of keys and a panel of queries: a word of each query for every two keys.
template <typename T>
class Draws {
  using I = Vec<typename IntegerOf<T>::type>;
  static constexpr int W = kLanes<T>, kStep = sizeof(uint64_t) / sizeof(T);  // queries of a wide lane

 public:
  using Word = typename IntegerOf<T>::type;
  static constexpr int64_t words(int64_t keys, int64_t columns) { return (keys + 7) / 8 * 4 * columns; }

  Draws(const AttentionDropout* dropout, Word* memory) : dropout_(dropout), words_(memory) {}

  // `place` is the first query's in its sequence; keys [key, key + keys), where 8 divides `key`.
  void draw(int64_t head, int64_t place, int64_t key, int64_t keys, int64_t columns) {
    columns_ = columns;
    WideWords lanes;
    for (int i = 0; i < kLanes<uint64_t>; ++i) lanes[i] = static_cast<uint64_t>(i * kStep);
    for (int64_t block = 0; block * 8 < keys; ++block)
      for (int64_t n = 0; n < columns; n += W) {
        I found[4];
        for (int part = 0; part < kStep; ++part) {
          WideWords w[4] = {broadcast(static_cast<uint64_t>(key / 8 + block)),
                            lanes + static_cast<uint64_t>(place + n + part), broadcast(static_cast<uint64_t>(head)),
                            broadcast(static_cast<uint64_t>(dropout_->sequence) | uint64_t{0x80000000})};
          philox(w, dropout_->low, dropout_->high);
          for (int i = 0; i < 4; ++i) {
            const WideWords word = w[i] & uint64_t{0xFFFFFFFF};
            if (part == 0)
              found[i] = reinterpret_cast<I>(word);
            else
              found[i] |= reinterpret_cast<I>(word << 32);
          }
        }
        for (int i = 0; i < 4; ++i) store(words_ + (block * 4 + i) * columns + n, found[i]);
      }
  }

  // Whether the weights of key `key + j` are kept: all bits of a lane, or none.
  I kept(int64_t j, int v) const {
    const I word = load(words_ + j / 2 * columns_ + v * W);
    const I bits = (j % 2 == 0 ? word : word >> 16) & Word{0xFFFF};
    return bits >= static_cast<Word>(dropout_->dropped);
  }
  Vec<T> factor() const { return broadcast(static_cast<T>(dropout_->factor)); }

 private:
  const AttentionDropout* dropout_;
  Word* words_;
  int64_t columns_ = 0;
};

}  // namespace
}  // namespace oner_fast
