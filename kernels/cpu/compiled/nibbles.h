// Products with weights of four bits, as bytes that the CPU multiplies and adds by four.
//
// A row's integers of 16 bits are two bytes with a sign each, 256 · high + low, so two products of bytes are one of 16
// bits, and a weight is unpacked by a mask and at most one shift. All sums of a group are exact.
#pragma once

#include "paired_rows.h"

// Memory that a product asks for while it computes, a line at a time, because it is read next.
struct Ahead {
  const char* at;  // null: none
  int share;       // of 1 / share of the lines, because other products of the same panels ask for the others

  void ask(size_t first, size_t last) const {
    for (size_t line = first; at && line < last; line += 64 * share) __builtin_prefetch(at + line, 0, 2);
  }
};

constexpr int LINE = PANEL * WORD / 2;  // bytes of the words of one panel: a line of the cache

inline Bits first_halves(Bits words) { return words & 0x0f0f0f0fu; }
inline Bits second_halves(Bits words) { return words >> 4 & 0x0f0f0f0fu; }

inline Ints splat_int(int32_t value) { return Ints{} + value; }

#if LOOKS_UP_BYTES
inline Ints add_products(Ints sum, Bits weights, uint32_t x) {
  return (Ints)_mm512_dpbusd_epi32((__m512i)sum, (__m512i)weights, _mm512_set1_epi32((int)x));
}
#endif

// sums[row] = Σ weight · integer over `lines` words of each lane of a panel.
template <int ROWS>
inline __attribute__((always_inline)) void sum_int4(const char* panel, int lines, const uint32_t* x, size_t x_stride,
                                                    Ints* sums) {
#if LOOKS_UP_BYTES
  constexpr int CHAINS = ROWS <= 6 ? 2 : 1;  // so that few rows' sums wait less for one another
  Ints high[ROWS][CHAINS] = {}, low[ROWS][CHAINS] = {};
  for (int line = 0; line < lines; ++line, panel += LINE, x += 4) {
    const Bits words = *(const BitsAt*)panel, first = first_halves(words), second = second_halves(words);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const uint32_t* of_row = x + row * x_stride;
      high[row][0] = add_products(high[row][0], first, of_row[0]);
      low[row][0] = add_products(low[row][0], first, of_row[1]);
      high[row][CHAINS - 1] = add_products(high[row][CHAINS - 1], second, of_row[2]);
      low[row][CHAINS - 1] = add_products(low[row][CHAINS - 1], second, of_row[3]);
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) {
    if (CHAINS == 2) {
      high[row][0] += high[row][CHAINS - 1];
      low[row][0] += low[row][CHAINS - 1];
    }
    sums[row] = (high[row][0] << 8) + low[row][0];
  }
#elif defined(__AVX512BW__) || defined(__AVX2__)
#if defined(__AVX512BW__)
  typedef __m512i Register;
  auto products = [](Bits w, uint32_t x) { return _mm512_maddubs_epi16((Register)w, _mm512_set1_epi32((int)x)); };
  auto add = [](Register a, Register b) { return _mm512_add_epi16(a, b); };
  auto widened = [](Register a, int by) { return (Ints)_mm512_madd_epi16(a, _mm512_set1_epi16((short)by)); };
#else
  typedef __m256i Register;
  auto products = [](Bits w, uint32_t x) { return _mm256_maddubs_epi16((Register)w, _mm256_set1_epi32((int)x)); };
  auto add = [](Register a, Register b) { return _mm256_add_epi16(a, b); };
  auto widened = [](Register a, int by) { return (Ints)_mm256_madd_epi16(a, _mm256_set1_epi16((short)by)); };
#endif
  constexpr int IN_16_BITS = 4;  // lines, whose sums of pairs are at most 2 · 8 · 15 · 128 < 2^15
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) sums[row] = Ints{};
  for (int line = 0; line < lines;) {
    Register high[ROWS] = {}, low[ROWS] = {};
    const int end = line + IN_16_BITS < lines ? line + IN_16_BITS : lines;
    for (; line < end; ++line, panel += LINE, x += 4) {
      const Bits words = *(const BitsAt*)panel, first = first_halves(words), second = second_halves(words);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const uint32_t* of_row = x + row * x_stride;
        high[row] = add(add(high[row], products(first, of_row[0])), products(second, of_row[2]));
        low[row] = add(add(low[row], products(first, of_row[1])), products(second, of_row[3]));
      }
    }
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) sums[row] += widened(high[row], 256) + widened(low[row], 1);
  }
#else
  for (int row = 0; row < ROWS; ++row) sums[row] = Ints{};
  for (int line = 0; line < lines; ++line, panel += LINE, x += 4) {
    const Bits words = *(const BitsAt*)panel;
    for (int row = 0; row < ROWS; ++row)
      for (int i = 0; i < WORD; ++i) {
        const uint32_t* of_row = x + row * x_stride + i / 4 * 2;
        const int32_t integer = 256 * (int8_t)(of_row[0] >> i % 4 * 8) + (int8_t)(of_row[1] >> i % 4 * 8);
        sums[row] += (Ints)(words >> shift_in_word(i) & 15u) * integer;
      }
  }
#endif
}

// What nf4's 1 is in 16 bits: with this integer the numbers of the table are nearest to integers, and low bytes smallest.
// The root mean square of what a product is off by is then 1.65 of what rounding rows alone gives (with 32639, 2.03).
constexpr float NF4_ONE = 31753.0f;

// nf4's numbers in 16 bits, as bytes: number · NF4_ONE = 256 · high + low. Both are held without a sign, 128 too large.
struct Nf4Bytes {
  alignas(64) uint8_t high[64], low[64];

  constexpr Nf4Bytes() : high(), low() {
    for (int i = 0; i < 64; ++i) {
      const float exact = NF4[i % 16] * NF4_ONE;
      const int integer = (int)(exact + (exact < 0.0f ? -0.5f : 0.5f));
      const int above = (integer + 128 + 32768) / 256 - 128;
      high[i] = (uint8_t)(above + 128);
      low[i] = (uint8_t)(integer - 256 * above + 128);
    }
  }
};

#if LOOKS_UP_BYTES
constexpr Nf4Bytes NF4_BYTES;

// As `sum_int4`, of nf4's numbers and in units of 256: the products of low bytes with low bytes, which are below what
// rounding to 16 bits does, are left out. The bytes' 128 are taken off afterwards.
template <int ROWS>
inline __attribute__((always_inline)) void sum_nf4(const char* panel, int lines, const uint32_t* x, size_t x_stride,
                                                   Ints* sums) {
  const __m512i highs = _mm512_load_si512(NF4_BYTES.high), lows = _mm512_load_si512(NF4_BYTES.low);
  Ints high[ROWS] = {}, mixed[ROWS] = {}, other[ROWS] = {};
  constexpr bool apart = ROWS <= 6;
  for (int line = 0; line < lines; ++line, panel += LINE, x += 4) {
    const Bits words = *(const BitsAt*)panel;
#pragma GCC unroll 2
    for (int half = 0; half < 2; ++half) {
      const __m512i places = (__m512i)(half ? second_halves(words) : first_halves(words));
      const Bits above = (Bits)_mm512_shuffle_epi8(highs, places), below = (Bits)_mm512_shuffle_epi8(lows, places);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const uint32_t* of_row = x + row * x_stride + half * 2;
        high[row] = add_products(high[row], above, of_row[0]);
        mixed[row] = add_products(mixed[row], above, of_row[1]);
        (apart ? other : mixed)[row] = add_products((apart ? other : mixed)[row], below, of_row[0]);
      }
    }
  }
#pragma GCC unroll 16
  for (int row = 0; row < ROWS; ++row) sums[row] = (high[row] << 8) + mixed[row] + (apart ? other[row] : Ints{});
}
#endif

// out[row][column] = Σ x[row][k] · W[column][k] for ROWS rows and one panel, in int4 or nf4.
template <Type type, int ROWS>
void multiply_nibbles(const char* panel, int k, Inputs<uint32_t> x, float* out, size_t out_stride, Ahead ahead) {
  static_assert(takes_bytes(type));
  const int groups = groups_of(k, x.group), lines = padded(type, k) / WORD, of_group = x.group / WORD;
  const size_t weights = weight_bytes(type, k), zeros = weights + (size_t)groups * PANEL * 4;
  for (int group = 0, line = 0; group < groups; ++group, line += of_group) {
    const int count = lines - line < of_group ? lines - line : of_group;
    ahead.ask((size_t)line * LINE, (size_t)(line + count) * LINE);
    ahead.ask(weights + (size_t)group * PANEL * 4, weights + (size_t)(group + 1) * PANEL * 4);
    for (int v = 0; v < VECTORS; ++v) {
      const char* words = panel + (size_t)line * LINE + v * LANES * 4;
      Ints sums[ROWS];
#if LOOKS_UP_BYTES
      if constexpr (type == Type::nf4)
        sum_nf4<ROWS>(words, count, x.at + line * 4, x.stride, sums);
      else
#endif
        sum_int4<ROWS>(words, count, x.at + line * 4, x.stride, sums);
      const int place = group * PANEL + v * LANES;
      const Vec scale = load((const float*)(panel + weights) + place) * splat(type == Type::nf4 ? 256.0f / NF4_ONE : 1.0f);
      const Ints zero = type == Type::int4 ? load_bytes((const int8_t*)panel + zeros + place) : splat_int(1);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        float* to = out + row * out_stride + v * LANES;
        const Vec total = to_float(sums[row] - zero * x.sums[row * x.summed + group]);
        store(to, fma(total, scale * splat(x.scales[row * x.groups + line * WORD / GROUP]), group ? load(to) : splat(0.0f)));
      }
    }
  }
}
