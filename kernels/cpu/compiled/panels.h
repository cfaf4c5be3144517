// The product of weights in panels (panel_layout.h) with rows of float32.
#pragma once

#include <type_traits>
#include <vector>

#include "nibbles.h"

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

#if ROUNDS_ROWS
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

  static Vec add(Vec weights, Vec x, Vec sum) { return (Vec)add_pairs((Ints)sum, (Bits)weights, (Bits)x); }
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

  static Vec value(const char* panel, int k, int vector) {
    const Ints pairs = (Ints)widen(panel, k / 2 * 2, 0, vector);
    return to_float(k % 2 ? pairs >> 16 : pairs << 16 >> 16);
  }
};

// Unsigned integers, whose zero points are taken off a group's sum (nibbles.h).
struct Int4 {
  using Item = uint32_t;
  static constexpr Type type = Type::int4;

  static Vec value(const char* panel, int k, int vector) {
    const Bits words = *(const BitsAt*)(panel + k / WORD * LINE + vector * LANES * 4);
    return to_float((Ints)(words >> shift_in_word(k) & 15u));
  }
};

struct Nf4 : OneByOne {
  static constexpr Type type = Type::nf4;
  static constexpr int step = WORD, items = WORD;

  static Vec widen(const char* panel, int at, int i, int vector) {
    const char* words = panel + at / WORD * LINE + vector * LANES * 4;
#if defined(__AVX512F__)  // of a place, a permutation takes four bits
    const __m512i places = _mm512_srli_epi32(_mm512_loadu_si512(words), shift_in_word(i));
    return (Vec)_mm512_permutexvar_ps(places, _mm512_load_ps(NF4));
#elif defined(__AVX2__)  // three bits
    const __m256i all = _mm256_loadu_si256((const __m256i*)words), places = _mm256_srli_epi32(all, shift_in_word(i));
    const __m256 low = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4), places);
    const __m256 high = _mm256_permutevar8x32_ps(_mm256_load_ps(NF4 + 8), places);
    return (Vec)_mm256_blendv_ps(low, high, _mm256_castsi256_ps(_mm256_slli_epi32(all, 28 - shift_in_word(i))));
#else
    const Bits places = *(const BitsAt*)words >> shift_in_word(i) & 15u;
    Vec wide;
    for (int lane = 0; lane < LANES; ++lane) wide[lane] = NF4[places[lane]];
    return wide;
#endif
  }

  static Vec value(const char* panel, int k, int vector) { return widen(panel, k / WORD * WORD, k % WORD, vector); }
};

#if LOOKS_UP_BYTES
struct Nf4InBytes {
  using Item = uint32_t;
  static constexpr Type type = Type::nf4;
};
#endif

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

  static Vec value(const char* panel, int k, int vector) { return widen(panel, k, 0, vector) * splat(factor); }
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
    const int rest = Weight::items == step ? k - i : (k - i + 1) / 2;  // steps of 1, 2 or as many items
    for (int item = 0; item < rest; ++item) add_one(panel, stride, i, item, x, x_stride);
  }

 private:
  inline __attribute__((always_inline)) void add_step(
      const char* panel, size_t stride, int at_k, const Item* x, size_t x_stride) {
#pragma GCC unroll 8
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
  constexpr bool integers = std::is_base_of_v<Integers, Weight>;
  const char* scales = panel + weight_bytes(Weight::type, k);
  for (int group = 0, first = 0; first < k; ++group, first += x.group) {
    Sums<Weight, ROWS, PANELS> sums;
    const size_t at = (size_t)first * PANEL * item_bits(Weight::type) / 8;
    const Ahead next{ahead.at ? ahead.at + at : nullptr, ahead.share};
    const auto* row_at = x.at + (integers ? first / 2 : first);
    sums.add(panel + at, stride, k - first < x.group ? k - first : x.group, row_at, x.stride, next);
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          float* to = out + row * out_stride + p * PANEL + v * LANES;
          Vec scale = load((const float*)(scales + p * stride) + group * PANEL + v * LANES), total;
          if constexpr (integers) {
            total = to_float((Ints)sums.at[p][row][v]);
            scale = scale * splat(x.scales[row * x.groups + first / GROUP]);
          } else {
            total = sums.at[p][row][v];
            if constexpr (Weight::type == Type::float8) scale *= splat(Weight::factor);
          }
          store(to, fma(total, scale, group ? load(to) : splat(0.0f)));
        }
  }
}

// Whether a product is that of nibbles.h.
template <class Weight>
constexpr bool in_bytes = takes_bytes(Weight::type) && !std::is_base_of_v<OneByOne, Weight>;

// The sums of weights in floats, which continue what is in `out` if `add`.
template <class Weight, int ROWS, int PANELS>
void multiply_floats(const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x, float* out,
                     size_t out_stride, bool add, Ahead ahead) {
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

// out[row][column] (+)= Σ x[row][k] · W[column][k] for ROWS rows and PANELS panels that lie `stride` bytes apart;
// `add` says whether the sum continues what is in `out`, which that of quantised weights never does.
template <class Weight, int ROWS, int PANELS>
void multiply(const char* panel, size_t stride, int k, Inputs<typename Weight::Item> x, float* out, size_t out_stride,
              bool add, Ahead ahead) {
  if constexpr (in_bytes<Weight>)
    for (int p = 0; p < PANELS; ++p)
      multiply_nibbles<Weight::type, ROWS>(panel + p * stride, k, x, out + p * PANEL, out_stride, ahead);
  else if constexpr (quantized(Weight::type))
    multiply_groups<Weight, ROWS, PANELS>(panel, stride, k, x, out, out_stride, ahead);
  else
    multiply_floats<Weight, ROWS, PANELS>(panel, stride, k, x, out, out_stride, add, ahead);
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
  if constexpr (ROWS <= PAIRED_ROWS && !in_bytes<Weight>)
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
    case Type::float8:
      return multiply_rows<Float8>(rows, panels, first, stride, k, in, out, out_stride, add, next);
    case Type::nf4:
#if !LOOKS_UP_BYTES
      return multiply_rows<Nf4>(rows, panels, first, stride, k, in, out, out_stride, add, next);
#endif
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
#if LOOKS_UP_BYTES
  if (type == Type::nf4) return multiply_rows<Nf4InBytes>(rows, panels, first, stride, k, x, out, out_stride, false, next);
#endif
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

// As `widen_panels` of one panel of quantised weights.
template <class Weight>
void dequantize_panel(const char* panel, int k, int group, float* out) {
  const char* scales = panel + weight_bytes(Weight::type, k);
  const int8_t* zeros = (const int8_t*)scales + (size_t)groups_of(k, group) * PANEL * 4;
  for (int first = 0; first < k; first += group, scales += PANEL * 4, zeros += PANEL)
    for (int i = first; i < first + group && i < k; ++i)
      for (int v = 0; v < VECTORS; ++v, out += LANES) {
        Vec value = Weight::value(panel, i, v);
        if (Weight::type == Type::int4) value -= to_float(load_bytes(zeros + v * LANES));
        store(out, value * load((const float*)scales + v * LANES));
      }
}

inline void dequantize_panel(Type type, const void* panel, int k, int group, float* out) {
  switch (type) {
    case Type::int8:
      return dequantize_panel<Int8>((const char*)panel, k, group, out);
    case Type::int4:
      return dequantize_panel<Int4>((const char*)panel, k, group, out);
    case Type::nf4:
      return dequantize_panel<Nf4>((const char*)panel, k, group, out);
    case Type::float8:
      return dequantize_panel<Float8>((const char*)panel, k, group, out);
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
    case Type::int4:
      return ((const uint8_t*)items)[index / 2] >> index % 2 * 4 & 15;
    case Type::nf4:
      return NF4[((const uint8_t*)items)[index / 2] >> index % 2 * 4 & 15];
    case Type::float8: {
      const uint8_t bits = ((const uint8_t*)items)[index];
      return widen_float16((uint16_t)((bits & 0x80) << 8 | (bits & 0x7f) << 7)) * Float8::factor;
    }
  }
  __builtin_unreachable();
}

// One column of a matrix in panels, as float32.
inline void read_column(Type type, const void* panels, int k, int column, float* out, int group = GROUP) {
  const char* panel = (const char*)panels + column / PANEL * panel_bytes(type, k, group);
  const float* scales = (const float*)(panel + weight_bytes(type, k));  // of quantised weights
  const int8_t* zeros = (const int8_t*)(scales + (size_t)groups_of(k, group) * PANEL);  // of int4
  for (int i = 0; i < k; ++i) {
    const int at = i / group * PANEL + column % PANEL;
    out[i] = widen(type, panel, item_in_panel(type, column % PANEL, i));
    if (type == Type::int4) out[i] -= zeros[at];
    if (quantized(type)) out[i] *= scales[at];
  }
}

// Σ x[i] · y[i], in one order.
inline float dot(const float* x, const float* y, int k) {
  Vec sums = splat(0.0f);
  float rest = 0.0f;
  int i = 0;
  for (; i + LANES <= k; i += LANES) sums = fma(load(x + i), load(y + i), sums);
  for (; i < k; ++i) rest += x[i] * y[i];
  return sum(sums) + rest;
}
