// Products with weights of four bits, which are unpacked by a mask and at most one shift. All sums of a group are exact.
//
// With VNNI weights are bytes, which the CPU multiplies and adds by four: a row's integers of 16 bits are two bytes with
// a sign each, 256 · high + low, so two products of bytes are one of 16 bits. Without it they are pairs of 16 bits.
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
                                                    Ints (&sums)[VECTORS][ROWS]) {
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
    sums[0][row] = (high[row][0] << 8) + low[row][0];
  }
#else
  // Two weights of a word at a time, which lie two bytes apart: a mask makes them integers of 16 bits
  for (int v = 0; v < VECTORS; ++v)
    for (int row = 0; row < ROWS; ++row) sums[v][row] = Ints{};
  for (int line = 0; line < lines; ++line, panel += LINE, x += 4) {
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      Bits pairs[VECTORS];
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v)
        pairs[v] = *(const BitsAt*)(panel + v * LANES * 4) >> (i % 2 * 8 + i / 2 * 4) & 0x000f000fu;
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        const Bits integers = (Bits)spread_bits(x[row * x_stride + i]);
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums[v][row] = add_pairs(sums[v][row], pairs[v], integers);
      }
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
                                                   Ints (&sums)[VECTORS][ROWS]) {
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
  for (int row = 0; row < ROWS; ++row) sums[0][row] = (high[row] << 8) + mixed[row] + (apart ? other[row] : Ints{});
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
    const char* words = panel + (size_t)line * LINE;
    Ints sums[VECTORS][ROWS];
#if LOOKS_UP_BYTES
    if constexpr (type == Type::nf4)
      sum_nf4<ROWS>(words, count, x.at + line * 4, x.stride, sums);
    else
#endif
      sum_int4<ROWS>(words, count, x.at + line * 4, x.stride, sums);
    for (int v = 0; v < VECTORS; ++v) {
      const int place = group * PANEL + v * LANES;
      const Vec scale = load((const float*)(panel + weights) + place) * splat(type == Type::nf4 ? 256.0f / NF4_ONE : 1.0f);
      const Ints zero = type == Type::int4 ? load_bytes((const int8_t*)panel + zeros + place) : splat_int(1);
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row) {
        float* to = out + row * out_stride + v * LANES;
        const Vec total = to_float(sums[v][row] - zero * x.sums[row * x.summed + group]);
        store(to, fma(total, scale * splat(x.scales[row * x.groups + line * WORD / GROUP]), group ? load(to) : splat(0.0f)));
      }
    }
  }
}
