// Weights in panels, and their product with rows of float32.
//
// A matrix W (columns, k) lies in panels of 16 columns; a panel holds one vector of 16 weights for each k, so that a
// product reads it from end to end and needs no sum across lanes. bfloat16 holds two neighbouring k of a column side by
// side: a shift and a mask widen them. int8 has a float scale for each column and each 128 k.
#pragma once

#include "vec.h"

constexpr int PANEL = 16;
constexpr int VECTORS = PANEL / LANES;  // of one k of a panel
constexpr int GROUP = 128;              // k with one scale, in int8

enum class Type : int32_t { float32, bfloat16, float16, int8 };

inline size_t item_bytes(Type type) { return type == Type::float32 ? 4 : type == Type::int8 ? 1 : 2; }

// The bytes of a panel; bfloat16 has a whole pair for the last k.
inline size_t panel_bytes(Type type, int k) {
  if (type == Type::int8) return (size_t)k * PANEL + (size_t)((k + GROUP - 1) / GROUP) * PANEL * 4;
  return (size_t)(type == Type::bfloat16 ? k + (k & 1) : k) * PANEL * item_bytes(type);
}

// Where the weight of a column of the panel and a k lies, in items from the panel's start.
inline size_t item_in_panel(Type type, int column, int k) {
  return type == Type::bfloat16 ? (size_t)(k / 2) * 2 * PANEL + column * 2 + k % 2 : (size_t)k * PANEL + column;
}

// How each type reads the weights of the k from `first` on: `step` of them at a time, one vector for each.
struct Float32 {
  static constexpr int step = 1;
  static void widen(const char* panel, int k, int vector, Vec out[step]) {
    out[0] = load((const float*)panel + (size_t)k * PANEL + vector * LANES);
  }
};

struct BFloat16 {
  static constexpr int step = 2;
  static void widen(const char* panel, int k, int vector, Vec out[step]) {
    Bits pairs = *(const BitsAt*)((const uint16_t*)panel + (size_t)k * PANEL + vector * LANES * 2);
    out[0] = (Vec)(pairs << 16);
    out[1] = (Vec)(pairs & 0xffff0000u);
  }
};

struct Float16 {
  static constexpr int step = 1;
  static void widen(const char* panel, int k, int vector, Vec out[step]) {
    const uint16_t* halves = (const uint16_t*)panel + (size_t)k * PANEL + vector * LANES;
#if defined(__AVX512F__)
    out[0] = (Vec)_mm512_cvtph_ps(_mm256_loadu_si256((const __m256i*)halves));
#elif defined(__AVX2__) && defined(__F16C__)
    out[0] = (Vec)_mm256_cvtph_ps(_mm_loadu_si128((const __m128i*)halves));
#else
    for (int lane = 0; lane < LANES; ++lane) out[0][lane] = widen_float16(halves[lane]);
#endif
  }
};

struct Int8 {
  static constexpr int step = 1;
  static void widen(const char* panel, int k, int vector, Vec out[step]) {
    const int8_t* bytes = (const int8_t*)panel + (size_t)k * PANEL + vector * LANES;
#if defined(__AVX512F__)
    out[0] = (Vec)_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128((const __m128i*)bytes)));
#elif defined(__AVX2__)
    out[0] = (Vec)_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(_mm_loadl_epi64((const __m128i*)bytes)));
#else
    for (int lane = 0; lane < LANES; ++lane) out[0][lane] = bytes[lane];
#endif
  }
};

// The sums of ROWS rows with PANELS panels over the k from `first` to `last`. Each sum has one order, by k, whatever
// the number of rows and panels: a row's bits depend on no other row.
template <class Weight, int ROWS, int PANELS>
struct Sums {
  Vec at[PANELS][ROWS][VECTORS] = {};

  inline __attribute__((always_inline)) void add(
      const char* panel, size_t stride, int first, int last, const float* x, size_t x_stride) {
    constexpr int step = Weight::step;
    int k = first;
    for (; k + step <= last; k += step) add_one<step>(panel, stride, k, x, x_stride);
    if (step > 1 && k < last) add_one<1>(panel, stride, k, x, x_stride);
  }

 private:
  template <int TAKE>
  inline __attribute__((always_inline)) void add_one(
      const char* panel, size_t stride, int k, const float* x, size_t x_stride) {
    for (int p = 0; p < PANELS; ++p)
      for (int v = 0; v < VECTORS; ++v) {
        Vec weights[Weight::step];
        Weight::widen(panel + p * stride, k, v, weights);
        for (int i = 0; i < TAKE; ++i)
          for (int row = 0; row < ROWS; ++row)
            at[p][row][v] = fma(weights[i], splat(x[row * x_stride + k + i]), at[p][row][v]);
      }
  }
};

// out[row][column] (+)= Σ x[row][k] · W[column][k] for ROWS rows and PANELS panels that lie `stride` bytes apart;
// `add` says whether the sum continues what is in `out`.
template <class Weight, int ROWS, int PANELS>
void multiply(const char* panel, size_t stride, int k, const float* x, size_t x_stride, float* out, size_t out_stride,
              bool add) {
  Sums<Weight, ROWS, PANELS> sums;
  if (add)
    for (int p = 0; p < PANELS; ++p)
      for (int row = 0; row < ROWS; ++row)
        for (int v = 0; v < VECTORS; ++v) sums.at[p][row][v] = load(out + row * out_stride + p * PANEL + v * LANES);
  if constexpr (std::is_same_v<Weight, Int8>) {
    const size_t scales = (size_t)k * PANEL;
    for (int first = 0; first < k; first += GROUP) {
      Sums<Weight, ROWS, PANELS> group;
      group.add(panel, stride, first, first + GROUP < k ? first + GROUP : k, x, x_stride);
      for (int p = 0; p < PANELS; ++p)
        for (int v = 0; v < VECTORS; ++v) {
          const float* scale = (const float*)(panel + p * stride + scales) + first / GROUP * PANEL + v * LANES;
          for (int row = 0; row < ROWS; ++row)
            sums.at[p][row][v] = fma(group.at[p][row][v], load(scale), sums.at[p][row][v]);
        }
    }
  } else {
    sums.add(panel, stride, 0, k, x, x_stride);
  }
  for (int p = 0; p < PANELS; ++p)
    for (int row = 0; row < ROWS; ++row)
      for (int v = 0; v < VECTORS; ++v) store(out + row * out_stride + p * PANEL + v * LANES, sums.at[p][row][v]);
}

// The most rows that keep all sums of one panel in registers: 16 of them with AVX2, 32 elsewhere.
constexpr int MOST_ROWS = LANES == 8 ? 6 : LANES == 16 ? 12 : 6;

template <class Weight, int ROWS>
void multiply_panels(int panels, const char* panel, size_t stride, int k, const float* x, size_t x_stride, float* out,
                     size_t out_stride, bool add) {
  int p = 0;
  // Few rows: two panels at a time, because the sums of one would wait for one another.
  if constexpr (ROWS * 2 <= MOST_ROWS)
    for (; p + 2 <= panels; p += 2)
      multiply<Weight, ROWS, 2>(panel + p * stride, stride, k, x, x_stride, out + p * PANEL, out_stride, add);
  for (; p < panels; ++p)
    multiply<Weight, ROWS, 1>(panel + p * stride, stride, k, x, x_stride, out + p * PANEL, out_stride, add);
}

template <class Weight, int ROWS = MOST_ROWS>
void multiply_block(int rows, int panels, const char* panel, size_t stride, int k, const float* x, size_t x_stride,
                    float* out, size_t out_stride, bool add) {
  if (rows == ROWS)
    multiply_panels<Weight, ROWS>(panels, panel, stride, k, x, x_stride, out, out_stride, add);
  else if constexpr (ROWS > 1)
    multiply_block<Weight, ROWS - 1>(rows, panels, panel, stride, k, x, x_stride, out, out_stride, add);
}

// `multiply` for any number of rows and panels. `out` has 16 columns for every panel, the last one included.
template <class Weight>
void multiply_rows(int rows, int panels, const char* panel, size_t stride, int k, const float* x, size_t x_stride,
                   float* out, size_t out_stride, bool add) {
  int blocks = (rows + MOST_ROWS - 1) / MOST_ROWS;
  for (int block = 0, row = 0; block < blocks; ++block) {
    int take = (rows - row + blocks - block - 1) / (blocks - block);
    multiply_block<Weight>(take, panels, panel, stride, k, x + row * x_stride, x_stride, out + row * out_stride,
                           out_stride, add);
    row += take;
  }
}

inline void multiply_rows(Type type, int rows, int panels, const void* panel, int k, const float* x, size_t x_stride,
                          float* out, size_t out_stride, bool add) {
  size_t stride = panel_bytes(type, k);
  const char* first = (const char*)panel;
  switch (type) {
    case Type::float32:
      return multiply_rows<Float32>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add);
    case Type::bfloat16:
      return multiply_rows<BFloat16>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add);
    case Type::float16:
      return multiply_rows<Float16>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add);
    case Type::int8:
      return multiply_rows<Int8>(rows, panels, first, stride, k, x, x_stride, out, out_stride, add);
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
  }
  return 0;
}
