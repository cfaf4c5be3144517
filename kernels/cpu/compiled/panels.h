// Weights in panels, and their product with rows of float32.
//
// A matrix W (columns, k) lies in panels of 16 columns; a panel holds one vector of 16 weights for each k, so that a
// product reads it from end to end and needs no sum across lanes. bfloat16 and int8 hold two neighbouring k of a column
// side by side, because CPUs multiply and add pairs. Quantised weights have a float scale for each column and each group
// of k, behind the weights; int4 a zero point as well, behind the scales.
#pragma once

#include <type_traits>
#include <vector>

#include "vec.h"

constexpr int PANEL = 16;
constexpr int VECTORS = PANEL / LANES;  // of one k of a panel
constexpr int GROUP = 128;              // k of a row with one scale; of weights it has a whole number of groups

// nf4: places in a table of 16 numbers; float8: e4m3 without infinities.
enum class Type : int32_t { float32, bfloat16, float16, int8, int4, nf4, float8 };

constexpr size_t item_bits(Type type) {
  if (type == Type::int4 || type == Type::nf4) return 4;
  return type == Type::float32 ? 32 : type == Type::int8 || type == Type::float8 ? 8 : 16;
}

constexpr bool paired(Type type) { return type == Type::bfloat16 || type == Type::int8; }

constexpr bool quantized(Type type) {
  return type == Type::int8 || type == Type::int4 || type == Type::nf4 || type == Type::float8;
}

inline int groups_of(int k, int group = GROUP) { return (k + group - 1) / group; }

// The k that a panel has room for: whole pairs, or whole bytes of two pairs.
constexpr int padded(Type type, int k) {
  const int unit = item_bits(type) == 4 ? 4 : paired(type) ? 2 : 1;
  return (k + unit - 1) / unit * unit;
}

// The bytes of a panel's weights.
inline size_t weight_bytes(Type type, int k) { return (size_t)padded(type, k) * PANEL * item_bits(type) / 8; }

// The bytes of a panel, with `group` k to a scale.
inline size_t panel_bytes(Type type, int k, int group = GROUP) {
  const size_t scales = quantized(type) ? (size_t)groups_of(k, group) * PANEL : 0;
  return weight_bytes(type, k) + scales * 4 + (type == Type::int4 ? scales : 0);
}

// Where the weight of a column of the panel and a k lies, in items from the panel's start. int4 has the pairs of two
// steps in one byte each, the first in the low half; nf4 two neighbours of a column.
inline size_t item_in_panel(Type type, int column, int k) {
  if (type == Type::int4) return (size_t)(k / 4) * 4 * PANEL + (column * 2 + k % 2) * 2 + k / 2 % 2;
  if (type == Type::nf4) return (size_t)(k / 2) * 2 * PANEL + column * 2 + k % 2;
  return paired(type) ? (size_t)(k / 2) * 2 * PANEL + column * 2 + k % 2 : (size_t)k * PANEL + column;
}

// How each type reads a vector of the weights of one k, and what a product with it is. `step` k are read together, with
// `items` of a row; the k of `at` is a multiple of `step`.
struct OneByOne {
  using Item = float;
  static Vec spread(float x) { return splat(x); }
  static Vec add(Vec weights, Vec x, Vec sum) { return fma(weights, x, sum); }
};

struct Float32 : OneByOne {
  static constexpr Type type = Type::float32;
  static constexpr int step = 1, items = 1;
  static Vec widen(const char* panel, int at, int, int vector) {
    return load((const float*)panel + (size_t)at * PANEL + vector * LANES);
  }
};

struct BFloat16 : OneByOne {
  static constexpr Type type = Type::bfloat16;
  static constexpr int step = 2, items = 2;
  static Vec widen(const char* panel, int at, int odd, int vector) {
    const Bits pairs = *(const BitsAt*)((const uint16_t*)panel + (size_t)at * PANEL + vector * LANES * 2);
    return odd ? (Vec)(pairs & 0xffff0000u) : (Vec)(pairs << 16);
  }
};

#if defined(__AVX512BF16__)
#define ROUNDS_ROWS 1  // whether rows are rounded to bfloat16 before they meet weights in bfloat16

// Two bfloat16 of a row at a time, by the instruction that multiplies pairs and sums in float32: twice as fast as one
// by one, for a row that is rounded to the weights' type first.
struct BFloat16Pairs {
  using Item = uint32_t;
  static constexpr Type type = Type::bfloat16;
  static constexpr int step = 2, items = 1;
  static Vec widen(const char* panel, int at, int, int vector) {
    return (Vec) * (const BitsAt*)((const uint16_t*)panel + (size_t)at * PANEL + vector * LANES * 2);
  }
  static Vec spread(uint32_t x) { return spread_bits(x); }
  static Vec add(Vec weights, Vec x, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)x);
  }
};

inline void round_row(const float* x, int k, uint32_t* out) {
  int i = 0;
  for (; i + LANES <= k; i += LANES)
    _mm256_storeu_si256((__m256i*)(out + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
  if (i == k) return;
  const __m256bh rest = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps((1u << (k - i)) - 1, x + i));
  _mm256_mask_storeu_epi32(out + i / 2, (1u << (k - i + 1) / 2) - 1, (__m256i)rest);
}
#else
#define ROUNDS_ROWS 0
#endif

struct Float16 : OneByOne {
  static constexpr Type type = Type::float16;
  static constexpr int step = 1, items = 1;
  static Vec widen(const char* panel, int at, int, int vector) {
    const uint16_t* halves = (const uint16_t*)panel + (size_t)at * PANEL + vector * LANES;
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
#elif defined(__AVX2__) && defined(__F16C__)
    return (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
#else
    Vec wide;
    for (int lane = 0; lane < LANES; ++lane) wide[lane] = widen_float16(halves[lane]);
    return wide;
#endif
  }
};

// Two integers of a row of 16 bits at a time. Sums of a group are exact: 128 · 127 · 32767 < 2^31.
struct Integers {
  using Item = uint32_t;
  static Vec spread(uint32_t x) { return spread_bits(x); }

  static Vec add(Vec weights, Vec x, Vec sum) {
#if defined(__AVX512VNNI__)
    return (Vec)_mm512_dpwssd_epi32((__m512i)sum, (__m512i)weights, (__m512i)x);
#elif defined(__AVX512BW__)
    return (Vec)_mm512_add_epi32((__m512i)sum, _mm512_madd_epi16((__m512i)weights, (__m512i)x));
#elif defined(__AVX2__)
    return (Vec)_mm256_add_epi32((__m256i)sum, _mm256_madd_epi16((__m256i)weights, (__m256i)x));
#else
    const Ints w = (Ints)weights, pair = (Ints)x;
    return (Vec)((Ints)sum + (w << 16 >> 16) * (pair << 16 >> 16) + (w >> 16) * (pair >> 16));
#endif
  }
};

struct Int8 : Integers {
  static constexpr Type type = Type::int8;
  static constexpr int step = 2, items = 1;

  static Vec widen(const char* panel, int at, int, int vector) {
    const int8_t* bytes = (const int8_t*)panel + (size_t)at * PANEL + vector * LANES * 2;
#if defined(__AVX512BW__)
    return (Vec)_mm512_cvtepi8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)bytes));
#else
    Ints wide;
    for (int lane = 0; lane < LANES; ++lane)
      wide[lane] = (uint16_t)bytes[2 * lane] | (uint32_t)(uint16_t)bytes[2 * lane + 1] << 16;
    return (Vec)wide;
#endif
  }
};

// Unsigned integers; their zero points are taken off a group's sum.
struct Int4 : Integers {
  static constexpr Type type = Type::int4;
  static constexpr int step = 4, items = 2;

  static Vec widen(const char* panel, int at, int odd, int vector) {
    const uint8_t* bytes = (const uint8_t*)panel + (size_t)at * PANEL / 2 + vector * LANES * 2;
#if defined(__AVX512BW__)
    const __m512i wide = _mm512_cvtepu8_epi16(_mm256_loadu_si256((const __m256i*)bytes));
    return (Vec)(odd ? _mm512_srli_epi16(wide, 4) : _mm512_and_si512(wide, _mm512_set1_epi16(15)));
#elif defined(__AVX2__)
    const __m256i wide = _mm256_cvtepu8_epi16(_mm_loadu_si128((const __m128i*)bytes));
    return (Vec)(odd ? _mm256_srli_epi16(wide, 4) : _mm256_and_si256(wide, _mm256_set1_epi16(15)));
#else
    Bits wide;
    for (int lane = 0; lane < LANES; ++lane) wide[lane] = bytes[2 * lane] | (uint32_t)bytes[2 * lane + 1] << 16;
    return (Vec)((odd ? wide >> 4 : wide) & 0x000f000fu);
#endif
  }
};

// The numbers of bitsandbytes' nf4, quantiles of the normal distribution.
alignas(64) constexpr float NF4[16] = {
    -1.0f,       -0.6961928009986877f, -0.5250730514526367f, -0.39491748809814453f, -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f, 0.24611230194568634f, 0.33791524171829224f, 0.44070982933044434f, 0.5626170039176941f, 0.7229568362236023f, 1.0f};

struct Nf4 : OneByOne {
  static constexpr Type type = Type::nf4;
  static constexpr int step = 2, items = 2;

  static Vec widen(const char* panel, int at, int odd, int vector) {
    const uint8_t* bytes = (const uint8_t*)panel + (size_t)at * PANEL / 2 + vector * LANES;
#if defined(__AVX512F__)
    const __m512i places = _mm512_cvtepu8_epi32(_mm_loadu_si128((const __m128i*)bytes));
    return (Vec)_mm512_permutexvar_ps(odd ? _mm512_srli_epi32(places, 4) : places, _mm512_load_ps(NF4));
#elif defined(__AVX2__)
    const __m256i both = _mm256_cvtepu8_epi32(_mm_loadl_epi64((const __m128i*)bytes));
    const __m256i places = odd ? _mm256_srli_epi32(both, 4) : both;  // of which a permutation takes three bits
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4), places);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4 + 8), places);
    return (Vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(places, 28)));
#else
    Vec wide;
    for (int lane = 0; lane < LANES; ++lane) wide[lane] = NF4[odd ? bytes[lane] >> 4 : bytes[lane] & 15];
    return wide;
#endif
  }
};

// Widened by way of float16, whose exponent has one bit more: its bits are 2^-8 of the number, which the scale makes up
// for.
struct Float8 : OneByOne {
  static constexpr Type type = Type::float8;
  static constexpr int step = 1, items = 1;
  static constexpr float factor = 256.0f;

  static Vec widen(const char* panel, int at, int, int vector) {
    const uint8_t* bytes = (const uint8_t*)panel + (size_t)at * PANEL + vector * LANES;
#if defined(__AVX512BW__)
    const __m256i wide = _mm256_slli_epi16(_mm256_cvtepi8_epi16(_mm_loadu_si128((const __m128i*)bytes)), 7);
    return (Vec)_mm512_cvtph_ps(_mm256_and_si256(wide, _mm256_set1_epi16((short)0xbf80)));
#elif defined(__AVX2__) && defined(__F16C__)
    const __m128i wide = _mm_slli_epi16(_mm_cvtepi8_epi16(_mm_loadl_epi64((const __m128i*)bytes)), 7);
    return (Vec)_mm256_cvtph_ps(_mm_and_si128(wide, _mm_set1_epi16((short)0xbf80)));
#else
    Vec wide;
    for (int lane = 0; lane < LANES; ++lane)
      wide[lane] = widen_float16((uint16_t)((bytes[lane] & 0x80) << 8 | (bytes[lane] & 0x7f) << 7));
    return wide;
#endif
  }
};

// Writes a row as pairs of 16-bit integers, and what each group of them is multiplied with. A row with NaN or infinity
// has a scale of NaN.
inline void quantize_row(const float* x, int k, uint32_t* out, float* scales) {
  for (int first = 0; first < k; first += GROUP, x += GROUP, out += GROUP / 2) {
    const int count = k - first < GROUP ? k - first : GROUP;
    float values[GROUP] = {};
    uint32_t rounded[GROUP];
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
    *scales++ = most / 32767.0f + faulty;
    const Vec inverse = splat(faulty == 0.0f && most > 1e-33f ? 32767.0f / most : 0.0f);
    const Vec shift = splat(12582912.0f);  // 1.5 · 2^23: adding it rounds to an integer in the low bits
    for (int i = 0; i < GROUP; i += LANES) store((float*)rounded + i, fma(load(values + i), inverse, shift));
    for (int i = 0; i < (count + 1) / 2; ++i) out[i] = (rounded[2 * i] & 0xffff) | rounded[2 * i + 1] << 16;
  }
}

// Rows to multiply, as the weights' type takes them.
template <class Item>
struct Inputs {
  const Item* at;
  size_t stride;
  int group = GROUP;              // k with one scale of quantised weights
  const float* scales = nullptr;  // (rows, groups of 128), of integers
  int groups = 0;
  const int32_t* sums = nullptr;  // (rows, groups of the weights), of integers that meet zero points
  int summed = 0;

  Inputs from(int row) const {
    return {at + row * stride, stride, group, scales ? scales + row * groups : nullptr, groups,
            sums ? sums + row * summed : nullptr, summed};
  }
};

constexpr bool takes_pairs(Type type) {
  return type == Type::int8 || type == Type::int4 || (ROUNDS_ROWS && type == Type::bfloat16);
}

// Rows of float32 as pairs of neighbouring k, for the types that take them. `order` says at which k of a row each input
// lies, because weights may be laid out in another order; null: its own.
class PairedRows {
 public:
  void fill(Type type, int rows, int k, const float* x, size_t x_stride, int group, const int32_t* order) {
    stride = padded(type, k + (k & 1)) / 2;
    groups = groups_of(k);
    summed = type == Type::int4 ? groups_of(k, group) : 0;
    of_weights = group;
    pairs.resize(rows * stride);
    if (quantized(type)) scales.resize((size_t)rows * groups);
    sums.resize((size_t)rows * summed);
    if (order) ordered.resize(k);
    for (int row = 0; row < rows; ++row, x += x_stride) {
      const float* values = x;
      if (order) {
        for (int i = 0; i < k; ++i) ordered[i] = x[order[i]];
        values = ordered.data();
      }
      uint32_t* to = pairs.data() + row * stride;
      if (quantized(type)) {
        quantize_row(values, k, to, scales.data() + row * groups);
        for (size_t i = (k + 1) / 2; i < stride; ++i) to[i] = 0;
      }
#if ROUNDS_ROWS
      if (type == Type::bfloat16) round_row(values, k, to);
#endif
      for (int i = 0; i < summed; ++i) sums[(size_t)row * summed + i] = sum_of(to, i * group, i * group + group, k);
    }
  }

  Inputs<uint32_t> from(int row) const {
    return Inputs<uint32_t>{pairs.data(), stride, of_weights, scales.data(), groups, sums.data(), summed}.from(row);
  }

 private:
  std::vector<uint32_t> pairs;
  std::vector<float> scales, ordered;
  std::vector<int32_t> sums;
  size_t stride;
  int groups, summed, of_weights;

  static int32_t sum_of(const uint32_t* row, int first, int last, int k) {
    int32_t total = 0;
    for (int i = first / 2; i < ((last < k ? last : k) + 1) / 2; ++i) total += (int16_t)row[i] + (int16_t)(row[i] >> 16);
    return total;
  }
};

// Memory that a product asks for while it computes, a line at a time, because it is read next.
struct Ahead {
  const char* at;  // null: none
  int share;       // of 1 / share of the lines, because other products of the same panels ask for the others
};

// The sums of ROWS rows with PANELS panels. Each has one order, by k, whatever the number of rows and panels: a row's
// bits depend on no other row. All is unrolled, or the sums would not be kept in registers.
template <class Weight, int ROWS, int PANELS>
struct Sums {
  using Item = typename Weight::Item;
  Vec at[PANELS][ROWS][VECTORS] = {};

  inline __attribute__((always_inline)) void add(
      const char* panel, size_t stride, int k, const Item* x, size_t x_stride, Ahead ahead) {
    constexpr int step = Weight::step;
    int i = 0;
    if (ahead.at) {
      const size_t bytes = item_bits(Weight::type) * PANEL * step / 8;
      const int wait = 64 / bytes > 1 ? 64 / bytes * ahead.share : ahead.share;  // steps to the next line
      for (int next = 0; i + step <= k; i += step, --next) {
        if (next <= 0) {
          __builtin_prefetch(ahead.at + i / step * bytes, 0, 2);
          next = wait;
        }
        add_step(panel, stride, i, x, x_stride);
      }
    }
    for (; i + step <= k; i += step) add_step(panel, stride, i, x, x_stride);
    if (step > 1 && i < k) add_one(panel, stride, i, 0, x, x_stride);
  }

 private:
  inline __attribute__((always_inline)) void add_step(
      const char* panel, size_t stride, int at_k, const Item* x, size_t x_stride) {
#pragma GCC unroll 2
    for (int i = 0; i < Weight::items; ++i) add_one(panel, stride, at_k, i, x, x_stride);
  }

  inline __attribute__((always_inline)) void add_one(
      const char* panel, size_t stride, int at_k, int i, const Item* x, size_t x_stride) {
    Vec weights[PANELS][VECTORS];
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) weights[p][v] = Weight::widen(panel + p * stride, at_k, i, v);
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row) {
      const Vec value = Weight::spread(x[row * x_stride + at_k / Weight::step * Weight::items + i]);
#pragma GCC unroll 4
      for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) at[p][row][v] = Weight::add(weights[p][v], value, at[p][row][v]);
    }
  }
};

// `multiply` for quantised weights: each group is summed by itself, and scaled by the column and, of integers, by the
// row.
template <class Weight, int ROWS, int PANELS>
void multiply_groups(const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x, float* out,
                     size_t out_stride, Ahead ahead) {
  constexpr bool integers = std::is_base_of_v<Integers, Weight>, has_zeros = Weight::type == Type::int4;
  const char* scales = panel + weight_bytes(Weight::type, k);
  const char* zeros = scales + (size_t)groups_of(k, x.group) * PANEL * 4;
  const int whole = has_zeros ? padded(Weight::type, k) : k;
  for (int group = 0, first = 0; first < k; ++group, first += x.group) {
    Sums<Weight, ROWS, PANELS> sums;
    const size_t at = (size_t)first * PANEL * item_bits(Weight::type) / 8;
    const Ahead next{ahead.at ? ahead.at + at : nullptr, ahead.share};
    const auto* row_at = x.at + (integers ? first / 2 : first);
    sums.add(panel + at, stride, whole - first < x.group ? whole - first : x.group, row_at, x.stride, next);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          float* to = out + row * out_stride + p * PANEL + v * LANES;
          Vec scale = load((const float*)(scales + p * stride) + group * PANEL + v * LANES), total;
          if constexpr (integers) {
            Ints whole_sum = (Ints)sums.at[p][row][v];
            if constexpr (has_zeros)
              whole_sum -= load_bytes((const int8_t*)zeros + p * stride + group * PANEL + v * LANES) *
                           x.sums[row * x.summed + group];
            total = to_float(whole_sum);
            scale = scale * splat(x.scales[row * x.groups + first / GROUP]);
          } else {
            total = sums.at[p][row][v];
            if constexpr (Weight::type == Type::float8) scale *= splat(Weight::factor);
          }
          store(to, fma(total, scale, group ? load(to) : splat(0.0f)));
        }
  }
}

// out[row][column] (+)= Σ x[row][k] · W[column][k] for ROWS rows and PANELS panels that lie `stride` bytes apart;
// `add` says whether the sum continues what is in `out`, which that of quantised weights never does.
template <class Weight, int ROWS, int PANELS>
void multiply(const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x, float* out, size_t out_stride,
              bool add, Ahead ahead) {
  if constexpr (quantized(Weight::type))
    return multiply_groups<Weight, ROWS, PANELS>(panel, stride, k, x, out, out_stride, ahead);
  Sums<Weight, ROWS, PANELS> sums;
  if (add)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums.at[p][row][v] = load(out + row * out_stride + p * PANEL + v * LANES);
  sums.add(panel, stride, k, x.at, x.stride, ahead);
#pragma GCC unroll 4
  for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
    for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
      for (int v = 0; v < VECTORS; ++v) store(out + row * out_stride + p * PANEL + v * LANES, sums.at[p][row][v]);
}

// The most rows that keep all sums of one panel in registers: there are 16 with AVX2, 32 elsewhere.
constexpr int MOST_ROWS = LANES == 16 ? 12 : 6;
// The most rows whose sums of two panels stay in registers. Two panels at a time share the rows' values, and their sums
// wait less for one another; but memory is read faster a panel at a time, with the next one asked for, where the CPU has
// AVX-512 (a step of one request takes 10 to 20 % longer in pairs, of four 40 %).
constexpr int PAIRED_ROWS = LANES == 16 ? 12 : 2;
constexpr bool PAIRED_FROM_MEMORY = LANES != 16;

template <class Weight, int ROWS>
void multiply_panels(int panels, const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x, float* out,
                     size_t out_stride, bool add, Ahead ahead) {
  int p = 0;
  auto next = [&](int i) { return Ahead{ahead.at ? ahead.at + i * stride : nullptr, ahead.share}; };
  if constexpr (ROWS <= PAIRED_ROWS)
    for (; p + 2 <= panels && (PAIRED_FROM_MEMORY || !ahead.at); p += 2)
      multiply<Weight, ROWS, 2>(panel + p * stride, stride, k, x, out + p * PANEL, out_stride, add, {nullptr, 1});
  for (; p < panels; ++p)
    multiply<Weight, ROWS, 1>(panel + p * stride, stride, k, x, out + p * PANEL, out_stride, add, next(p));
}

template <class Weight, int ROWS = MOST_ROWS>
void multiply_block(int rows, int panels, const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x,
                    float* out, size_t out_stride, bool add, Ahead ahead) {
  if (rows == ROWS)
    multiply_panels<Weight, ROWS>(panels, panel, stride, k, x, out, out_stride, add, ahead);
  else if constexpr (ROWS > 1)
    multiply_block<Weight, ROWS - 1>(rows, panels, panel, stride, k, x, out, out_stride, add, ahead);
}

// `multiply` for any number of rows and panels. `out` has 16 columns for every panel, the last one included.
template <class Weight>
void multiply_rows(int rows, int panels, const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x,
                   float* out, size_t out_stride, bool add, const char* ahead) {
  const int blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int block = 0, row = 0; block < blocks; ++block) {
    const int take = (rows - row + blocks - block - 1) / (blocks - block);
    // Each block of rows asks for other lines
    const Ahead own{ahead ? ahead + block * 64 : nullptr, blocks};
    multiply_block<Weight>(take, panels, panel, stride, k, x.from(row), out + row * out_stride, out_stride, add, own);
    row += take;
  }
}

// `ahead` is the panels that are multiplied next, for which the memory is asked meanwhile; null for none. `stride` is the
// bytes from one panel to the next, `group` the k with one scale. Weights of integers take pairs.
inline void multiply_rows(Type type, int rows, int panels, const void* panel, size_t stride, int k, const float* x,
                          size_t x_stride, float* out, size_t out_stride, bool add, const void* ahead = nullptr,
                          int group = GROUP) {
  const char *first = (const char*)panel, *next = (const char*)ahead;
  const Inputs<float> in{x, x_stride, group};
  switch (type) {
    case Type::float32:
      return multiply_rows<Float32>(rows, panels, first, stride, k, in, out, out_stride, add, next);
    case Type::bfloat16:
      return multiply_rows<BFloat16>(rows, panels, first, stride, k, in, out, out_stride, add, next);
    case Type::float16:
      return multiply_rows<Float16>(rows, panels, first, stride, k, in, out, out_stride, add, next);
    case Type::nf4:
      return multiply_rows<Nf4>(rows, panels, first, stride, k, in, out, out_stride, add, next);
    case Type::float8:
      return multiply_rows<Float8>(rows, panels, first, stride, k, in, out, out_stride, add, next);
    case Type::int8:
    case Type::int4:
      __builtin_unreachable();
  }
}

// `multiply_rows` for the types that take pairs.
inline void multiply_pairs(Type type, int rows, int panels, const void* panel, size_t stride, int k,
                           Inputs<uint32_t> x, float* out, size_t out_stride, const void* ahead) {
  const char *first = (const char*)panel, *next = (const char*)ahead;
  if (type == Type::int8) return multiply_rows<Int8>(rows, panels, first, stride, k, x, out, out_stride, false, next);
  if (type == Type::int4) return multiply_rows<Int4>(rows, panels, first, stride, k, x, out, out_stride, false, next);
#if ROUNDS_ROWS
  multiply_rows<BFloat16Pairs>(rows, panels, first, stride, k, x, out, out_stride, false, next);
#endif
}

// Writes panels in float32, for products with many rows: each weight is then widened once, to the same value.
template <class Weight>
void widen_panels(int panels, const char* panel, int k, float* out) {
  for (; panels > 0; --panels, panel += panel_bytes(Weight::type, k))
    for (int i = 0; i < k; ++i)
      for (int v = 0; v < VECTORS; ++v, out += LANES)
        store(out, Weight::widen(panel, i / Weight::step * Weight::step, i % Weight::step, v));
}

inline void widen_panels(Type type, int panels, const void* panel, int k, float* out) {
  switch (type) {
    case Type::float32:
      return widen_panels<Float32>(panels, (const char*)panel, k, out);
    case Type::bfloat16:
      return widen_panels<BFloat16>(panels, (const char*)panel, k, out);
    case Type::float16:
      return widen_panels<Float16>(panels, (const char*)panel, k, out);
    default:
      __builtin_unreachable();
  }
}

inline float widen(Type type, const void* items, size_t index) {
  switch (type) {
    case Type::float32:
      return ((const float*)items)[index];
    case Type::bfloat16:
      return widen_bfloat16(((const uint16_t*)items)[index]);
    case Type::float16:
      return widen_float16(((const uint16_t*)items)[index]);
    case Type::int8:
      return ((const int8_t*)items)[index];
    default:
      __builtin_unreachable();
  }
}
