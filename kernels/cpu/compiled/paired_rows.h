// Rows as CPUs multiply them with narrow weights: integers of 16 bits, or pairs of bfloat16.
#pragma once

#include <vector>

#include "panel_layout.h"

// Whether rows are rounded to bfloat16 before they meet weights in bfloat16.
#if defined(__AVX512BF16__)
#define ROUNDS_ROWS 1
#else
#define ROUNDS_ROWS 0
#endif

// Whether weights of four bits are multiplied as bytes, and so nf4 too, whose numbers are looked up as two bytes each
// (nibbles.h).
#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define LOOKS_UP_BYTES 1
#else
#define LOOKS_UP_BYTES 0
#endif

// Of integers that fit two bytes with a sign each, 256 · high + low.
constexpr bool takes_bytes(Type type) { return type == Type::int4 || (LOOKS_UP_BYTES && type == Type::nf4); }

constexpr bool takes_integers(Type type) { return type == Type::int8 || takes_bytes(type); }

constexpr bool takes_pairs(Type type) { return takes_integers(type) || (ROUNDS_ROWS && type == Type::bfloat16); }

// What the largest number of 128 of a row becomes: of two bytes, 127 · 256 + 127.
constexpr float largest_integer(Type type) { return takes_bytes(type) ? 32639.0f : 32767.0f; }

#if ROUNDS_ROWS
inline void round_row(const float* x, int k, uint32_t* out) {
  int i = 0;
  for (; i + LANES <= k; i += LANES)
    _mm256_storeu_si256((__m256i*)(out + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  if (i == k) return;
  const __m256bh rest = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps((1u << (k - i)) - 1, x + i));
  _mm256_mask_storeu_epi32(out + i / 2, (1u << (k - i + 1) / 2) - 1, (__m256i)rest);
}
#endif

// Rounds up to 128 numbers to integers, zeros behind them, and returns what they are multiplied with: NaN if one of
// them is NaN or infinite.
inline float round_to_integers(const float* x, int count, float most_integer, int16_t* out) {
  alignas(64) float values[GROUP] = {};
  alignas(64) int32_t rounded[GROUP];
  memcpy(values, x, count * 4);
  Vec largest = splat(0.0f), wrong = splat(0.0f);
  for (int i = 0; i < GROUP; i += LANES) {
    const Vec value = load(values + i);
    largest = maximum(largest, maximum(value, -value));
    wrong += value - value;
  }
  float most = 0.0f;
  for (int lane = 0; lane < LANES; ++lane) most = largest[lane] > most ? largest[lane] : most;
  const float faulty = sum(wrong);  // NaN for NaN and for infinities
  const Vec inverse = splat(faulty == 0.0f && most > 1e-33f ? most_integer / most : 0.0f);
  const Vec shift = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer in the low bits
  for (int i = 0; i < GROUP; i += LANES) store((float*)rounded + i, fma(load(values + i), inverse, shift));
  for (int i = 0; i < GROUP; ++i) out[i] = (int16_t)rounded[i];
  return most / most_integer + faulty;
}

// Adds the products of two neighbours, integers of 16 bits.
inline Ints add_pairs(Ints sum, Bits weights, Bits x) {
#if defined(__AVX512VNNI__)
  return (Ints)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif defined(__AVX512BW__)
  return (Ints)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)weights, (__m512i)x));
#elif defined(__AVX2__)
  return (Ints)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)weights, (__m256i)x));
#else
  const Ints w = (Ints)weights, pair = (Ints)x;
  return sum + (w << 16 >> 16) * (pair << 16 >> 16) + (w >> 16) * (pair >> 16);
#endif
}

// Rows to multiply, as the weights' type takes them.
template <class Item>
struct Inputs {
  const Item* at;
  size_t stride;
  int group = GROUP;              // k with one scale of quantised weights
  const float* scales = nullptr;  // (rows, groups of 128), of integers
  int groups = 0;
  const int32_t* sums = nullptr;  // (rows, groups of the weights): what zero points are multiplied with
  int summed = 0;

  Inputs from(int row) const {
    return {at + row * stride, stride, group, scales ? scales + row * groups : nullptr, groups,
            sums ? sums + row * summed : nullptr, summed};
  }
};

// Rows of float32 as words of 32 bits: two neighbouring k; for weights of four bits the high bytes of four and then their
// low bytes, or without VNNI the first and third of four and then the others. `order` says at which k of a row each input lies, because weights may be laid out in another order;
// null: its own.
class PairedRows {
 public:
  void fill(Type type, int rows, int k, const float* x, size_t x_stride, int group, const int32_t* order) {
    stride = padded(type, k + (k & 1)) / 2;
    groups = groups_of(k);
    summed = takes_bytes(type) ? groups_of(k, group) : 0;
    of_weights = group;
    words.resize(rows * stride);
    if (takes_integers(type)) scales.resize((size_t)rows * groups);
    sums.resize((size_t)rows * summed);
    if (order) ordered.resize(k);
    for (int row = 0; row < rows; ++row, x += x_stride) {
      const float* values = x;
      if (order) {
        for (int i = 0; i < k; ++i) ordered[i] = x[order[i]];
        values = ordered.data();
      }
      if (takes_integers(type)) fill_integers(type, row, k, values);
#if ROUNDS_ROWS
      if (type == Type::bfloat16) round_row(values, k, words.data() + row * stride);
#endif
    }
  }

  Inputs<uint32_t> from(int row) const {
    return Inputs<uint32_t>{words.data(), stride, of_weights, scales.data(), groups, sums.data(), summed}.from(row);
  }

 private:
  std::vector<uint32_t> words;
  std::vector<float> scales, ordered;
  std::vector<int32_t> sums;
  size_t stride;
  int groups, summed, of_weights;

  void fill_integers(Type type, int row, int k, const float* x) {
    uint32_t* to = words.data() + row * stride;
    uint32_t* const end = to + stride;
    float* scale = scales.data() + row * groups;
    int32_t* sum = sums.data() + (size_t)row * summed;
    for (int first = 0; first < k; first += GROUP, x += GROUP) {
      const int count = k - first < GROUP ? k - first : GROUP;
      int16_t integers[GROUP];
      *scale++ = round_to_integers(x, count, largest_integer(type), integers);
      const size_t room = end - to < GROUP / 2 ? end - to : GROUP / 2;
      if (!takes_bytes(type)) {
        memcpy(to, integers, room * 4);
      } else {
        int8_t high[GROUP], low[GROUP];
        for (int i = 0; i < GROUP; ++i) {
          high[i] = (int8_t)((integers[i] + 128) >> 8);
          low[i] = (int8_t)integers[i];
        }
#if LOOKS_UP_BYTES
        for (size_t i = 0; i < room; i += 2) {
          memcpy(to + i, high + 2 * i, 4);
          memcpy(to + i + 1, low + 2 * i, 4);
        }
#else
        for (size_t i = 0; i < room; ++i) {
          const int16_t* four = integers + i / 2 * 4 + i % 2;
          to[i] = (uint16_t)four[0] | (uint32_t)(uint16_t)four[2] << 16;
        }
#endif
        for (int i = 0; i < count; i += of_weights) *sum++ = sum_of(type, integers + i, high + i);
      }
      to += room;
    }
  }

  // Of one group: of the integers, for int4; for nf4, what its bytes without a sign are too large by.
  int32_t sum_of(Type type, const int16_t* integers, const int8_t* high) const {
    int32_t total = 0, of_high = 0;
    for (int i = 0; i < of_weights; ++i) {
      total += integers[i];
      of_high += high[i];
    }
    return type == Type::int4 ? total : 128 * (total + of_high);
  }
};
