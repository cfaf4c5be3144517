// Weights in panels, and their product with rows of float32.
//
// A matrix W (columns, k) lies in panels of 16 columns; a panel holds one vector of 16 weights for each k, so that a
// product reads it from end to end and needs no sum across lanes. bfloat16 holds two neighbouring k of a column side by
// side: a shift and a mask widen them. int8 has a float scale for each column and each
// 128 k, behind the weights.
#pragma once

#include "vec.h"

constexpr int PANEL = 16;
constexpr int VECTORS = PANEL / LANES;  // of one k of a panel
constexpr int GROUP = 128;              // k with one scale, in int8

// The last is what `widen_panels` makes of int8: float32 of the same values, with the same scales.
enum class Type : int32_t { float32, bfloat16, float16, int8, wide_int8 };

constexpr size_t item_bytes(Type type) {
  return type == Type::float32 || type == Type::wide_int8 ? 4 : type == Type::int8 ? 1 : 2;
}

constexpr bool scaled(Type type) { return type == Type::int8 || type == Type::wide_int8; }

// The bytes of a panel; bfloat16 has a whole pair for the last k.
inline size_t panel_bytes(Type type, int k) {
  const size_t scales = scaled(type) ? (size_t)((k + GROUP - 1) / GROUP) * PANEL * 4 : 0;
  return (size_t)(type == Type::bfloat16 ? k + (k & 1) : k) * PANEL * item_bytes(type) + scales;
}

// Where the weight of a column of the panel and a k lies, in items from the panel's start.
inline size_t item_in_panel(Type type, int column, int k) {
  return type == Type::bfloat16 ? (size_t)(k / 2) * 2 * PANEL + column * 2 + k % 2 : (size_t)k * PANEL + column;
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

struct WideInt8 : Float32 {
  static constexpr Type type = Type::wide_int8;
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
  static Vec spread(uint32_t x) { return (Vec)_mm512_set1_epi32((int)x); }
  static Vec add(Vec weights, Vec x, Vec sum) {
    return (Vec)_mm512_dpbf16_ps((__m512)sum, (__m512bh)weights, (__m512bh)x);
  }
};

// Writes rows of k floats as pairs of bfloat16, to nearest even; the last of an odd k has a zero beside it.
inline void round_rows(int rows, int k, const float* x, size_t x_stride, uint32_t* out) {
  for (int row = 0; row < rows; ++row, x += x_stride, out += (k + 1) / 2) {
    int i = 0;
    for (; i + LANES <= k; i += LANES)
      _mm256_storeu_si256((__m256i*)(out + i / 2), (__m256i)_mm512_cvtneps_pbh(_mm512_loadu_ps(x + i)));
    if (i == k) continue;
    const __m256bh rest = _mm512_cvtneps_pbh(_mm512_maskz_loadu_ps((1u << (k - i)) - 1, x + i));
    _mm256_mask_storeu_epi32(out + i / 2, (1u << (k - i + 1) / 2) - 1, (__m256i)rest);
  }
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

struct Int8 : OneByOne {
  static constexpr Type type = Type::int8;
  static constexpr int step = 1, items = 1;
  static Vec widen(const char* panel, int at, int, int vector) {
    const int8_t* bytes = (const int8_t*)panel + (size_t)at * PANEL + vector * LANES;
#if defined(__AVX512F__)
    return (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
#elif defined(__AVX2__)
    return (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
#else
    Vec wide;
    for (int lane = 0; lane < LANES; ++lane) wide[lane] = bytes[lane];
    return wide;
#endif
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
      const size_t bytes = item_bytes(Weight::type) * PANEL * step;
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

// `multiply` for weights with scales: the weights of one scale are summed as they are, and the scale multiplies the sum.
template <class Weight, int ROWS, int PANELS>
void multiply_scaled(const char* panel, size_t stride, int k, const float* x, size_t x_stride, float* out,
                     size_t out_stride, bool add, Ahead ahead) {
  const size_t bytes = item_bytes(Weight::type) * PANEL;  // of one k
  for (int first = 0; first < k; first += GROUP) {
    Sums<Weight, ROWS, PANELS> sums;
    const Ahead next{ahead.at ? ahead.at + first * bytes : nullptr, ahead.share};
    sums.add(panel + first * bytes, stride, k - first < GROUP ? k - first : GROUP, x + first, x_stride, next);
    const char* scales = panel + k * bytes + first / GROUP * PANEL * 4;
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) {
          float* to = out + row * out_stride + p * PANEL + v * LANES;
          const Vec scale = load((const float*)(scales + p * stride) + v * LANES);
          store(to, fma(sums.at[p][row][v], scale, add || first ? load(to) : splat(0.0f)));
        }
  }
}

// out[row][column] (+)= Σ x[row][k] · W[column][k] for ROWS rows and PANELS panels that lie `stride` bytes apart;
// `add` says whether the sum continues what is in `out`.
template <class Weight, int ROWS, int PANELS>
void multiply(const char* panel, size_t stride, int k, const typename Weight::Item* x, size_t x_stride, float* out,
              size_t out_stride, bool add, Ahead ahead) {
  if constexpr (scaled(Weight::type))
    return multiply_scaled<Weight, ROWS, PANELS>(panel, stride, k, x, x_stride, out, out_stride, add, ahead);
  Sums<Weight, ROWS, PANELS> sums;
  if (add)
#pragma GCC unroll 4
    for (int p = 0; p < PANELS; ++p)
#pragma GCC unroll 16
      for (int row = 0; row < ROWS; ++row)
#pragma GCC unroll 4
        for (int v = 0; v < VECTORS; ++v) sums.at[p][row][v] = load(out + row * out_stride + p * PANEL + v * LANES);
  sums.add(panel, stride, k, x, x_stride, ahead);
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
void multiply_panels(int panels, const char* panel, size_t stride, int k, const typename Weight::Item* x,
                     size_t x_stride, float* out, size_t out_stride, bool add, Ahead ahead) {
  int p = 0;
  auto next = [&](int i) { return Ahead{ahead.at ? ahead.at + i * stride : nullptr, ahead.share}; };
  if constexpr (ROWS <= PAIRED_ROWS)
    for (; p + 2 <= panels && (PAIRED_FROM_MEMORY || !ahead.at); p += 2)
      multiply<Weight, ROWS, 2>(panel + p * stride, stride, k, x, x_stride, out + p * PANEL, out_stride, add,
                                {nullptr, 1});
  for (; p < panels; ++p)
    multiply<Weight, ROWS, 1>(panel + p * stride, stride, k, x, x_stride, out + p * PANEL, out_stride, add, next(p));
}

template <class Weight, int ROWS = MOST_ROWS>
void multiply_block(int rows, int panels, const char* panel, size_t stride, int k, const typename Weight::Item* x,
                    size_t x_stride, float* out, size_t out_stride, bool add, Ahead ahead) {
  if (rows == ROWS)
    multiply_panels<Weight, ROWS>(panels, panel, stride, k, x, x_stride, out, out_stride, add, ahead);
  else if constexpr (ROWS > 1)
    multiply_block<Weight, ROWS - 1>(rows, panels, panel, stride, k, x, x_stride, out, out_stride, add, ahead);
}

// `multiply` for any number of rows and panels. `out` has 16 columns for every panel, the last one included.
template <class Weight>
void multiply_rows(int rows, int panels, const char* panel, size_t stride, int k, const typename Weight::Item* x,
                   size_t x_stride, float* out, size_t out_stride, bool add, const char* ahead) {
  const int blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int block = 0, row = 0; block < blocks; ++block) {
    const int take = (rows - row + blocks - block - 1) / (blocks - block);
    // Each block of rows asks for other lines
    const Ahead own{ahead ? ahead + block * 64 : nullptr, blocks};
    multiply_block<Weight>(take, panels, panel, stride, k, x + row * x_stride, x_stride, out + row * out_stride,
                           out_stride, add, own);
    row += take;
  }
}

// `ahead` is the panels that are multiplied next, for which the memory is asked meanwhile; null for none. `stride` is the
// bytes from one panel to the next.
inline void multiply_rows(Type type, int rows, int panels, const void* panel, size_t stride, int k, const float* x,
                          size_t x_stride, float* out, size_t out_stride, bool add, const void* ahead = nullptr) {
  const char *first = (const char*)panel, *next = (const char*)ahead;
  switch (type) {
    case Type::float32:
      return multiply_rows<Float32>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add, next);
    case Type::bfloat16:
      return multiply_rows<BFloat16>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add, next);
    case Type::float16:
      return multiply_rows<Float16>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add, next);
    case Type::int8:
      return multiply_rows<Int8>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add, next);
    case Type::wide_int8:
      return multiply_rows<WideInt8>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add, next);
  }
}

// Writes panels in float32, for products with many rows: each weight is then widened once, to the same value.
template <class Weight>
void widen_panels(int panels, const char* panel, int k, float* out) {
  const size_t bytes = panel_bytes(Weight::type, k), scales = (size_t)k * PANEL * item_bytes(Weight::type);
  for (; panels > 0; --panels, panel += bytes) {
    for (int i = 0; i < k; ++i)
      for (int v = 0; v < VECTORS; ++v, out += LANES)
        store(out, Weight::widen(panel, i / Weight::step * Weight::step, i % Weight::step, v));
    if (!scaled(Weight::type)) continue;
    memcpy(out, panel + scales, bytes - scales);
    out += (bytes - scales) / 4;
  }
}

inline Type widened(Type type) { return scaled(type) ? Type::wide_int8 : Type::float32; }

inline void widen_panels(Type type, int panels, const void* panel, int k, float* out) {
  switch (type) {
    case Type::float32:
      return widen_panels<Float32>(panels, (const char*)panel, k, out);
    case Type::bfloat16:
      return widen_panels<BFloat16>(panels, (const char*)panel, k, out);
    case Type::float16:
      return widen_panels<Float16>(panels, (const char*)panel, k, out);
    case Type::int8:
      return widen_panels<Int8>(panels, (const char*)panel, k, out);
    case Type::wide_int8:
      return widen_panels<WideInt8>(panels, (const char*)panel, k, out);
  }
}

inline float widen(Type type, const void* items, size_t index) {
  switch (type) {
    case Type::float32:
    case Type::wide_int8:
      return ((const float*)items)[index];
    case Type::bfloat16:
      return widen_bfloat16(((const uint16_t*)items)[index]);
    case Type::float16:
      return widen_float16(((const uint16_t*)items)[index]);
    case Type::int8:
      return ((const int8_t*)items)[index];
  }
  return 0;
}
