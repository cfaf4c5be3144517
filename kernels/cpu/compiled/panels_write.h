// Filling panels, while a base or an adapter is loaded: weights as they are, codes of quantised ones, or floats that are
// quantised here. Columns are independent, so threads share them.
#pragma once

#include <thread>
#include <vector>

#include "panels.h"

constexpr int64_t ALONE = 1 << 20;  // weights that a thread writes in less time than it takes to start others

// Calls body(first, last) for parts of the columns, each whole panels, on so many threads at once.
template <class Body>
void share(int threads, int columns, int k, Body body) {
  const int panels = (columns + PANEL - 1) / PANEL;
  if ((int64_t)columns * k < ALONE) threads = 1;
  std::vector<std::thread> others;
  auto end_of = [=](int part) { return part == threads ? columns : (int)((int64_t)panels * part / threads) * PANEL; };
  for (int part = 1; part < threads; ++part) others.emplace_back(body, end_of(part), end_of(part + 1));
  body(0, end_of(1));
  for (std::thread& other : others) other.join();
}

template <class Item>
void write_columns(Type type, const Item* source, int64_t column_stride, int64_t k_stride, int from, int to, int k,
                   int first, void* panels) {
  const size_t bytes = panel_bytes(type, k);
  for (int c = from; c < to; ++c) {
    const Item* row = source + c * column_stride;
    Item* panel = (Item*)((char*)panels + (first + c) / PANEL * bytes);
    const int column = (first + c) % PANEL;
    if (paired(type))
      for (int i = 0; i < k; ++i) panel[i / 2 * 2 * PANEL + column * 2 + i % 2] = row[i * k_stride];
    else
      for (int i = 0; i < k; ++i) panel[(size_t)i * PANEL + column] = row[i * k_stride];
  }
}

// One column of quantised weights in its panel, which is written group by group.
struct QuantizedColumn {
  Type type;
  int group, column;
  uint8_t* panel;
  float* scales;
  int8_t* zeros;
  int k;

  QuantizedColumn(Type type, int k, int group, int column, void* panels)
      : type(type), group(group), column(column % PANEL), k(k) {
    panel = (uint8_t*)panels + column / PANEL * panel_bytes(type, k, group);
    scales = (float*)(panel + weight_bytes(type, k));
    zeros = (int8_t*)(scales + (size_t)groups_of(k, group) * PANEL);
  }

  // `codes` are a byte each, and zeros behind the last k.
  void put(int index, const uint8_t* codes, float scale, int8_t zero) const {
    const int first = index * group, count = padded(type, k - first < group ? k - first : group);
    if (four_bits(type)) {
      uint8_t* to = panel + (size_t)first / WORD * LINE + column * 4;
      for (int i = 0; i < count; i += WORD, to += LINE) {
        uint32_t low, high;
        memcpy(&low, codes + i, 4);
        memcpy(&high, codes + i + 4, 4);
        low |= high << 4;
        memcpy(to, &low, 4);
      }
    } else if (paired(type)) {
      uint8_t* to = panel + (size_t)first * PANEL + column * 2;
      for (int i = 0; i < count; i += 2, to += 2 * PANEL) memcpy(to, codes + i, 2);
    } else {
      uint8_t* to = panel + (size_t)first * PANEL + column;
      for (int i = 0; i < count; ++i, to += PANEL) *to = codes[i];
    }
    scales[index * PANEL + column] = scale;
    if (type == Type::int4) zeros[index * PANEL + column] = zero;
  }
};

inline void widen_row(Type held, const void* source, int k, float* out) {
  const uint16_t* halves = (const uint16_t*)source;
  int i = 0;
  if (held == Type::float32) {
    memcpy(out, source, (size_t)k * 4);
  } else if (held == Type::bfloat16) {
    for (; i < k; ++i) out[i] = widen_bfloat16(halves[i]);
  } else {
    for (; i + LANES <= k; i += LANES) store(out + i, Float16::widen((const char*)(halves + i), 0, 0, 0));
    for (; i < k; ++i) out[i] = widen_float16(halves[i]);
  }
}

// The least and the largest of a group, and what is NaN if one of it is not finite.
struct Range {
  float least = 0.0f, largest = 0.0f, wrong = 0.0f;

  Range(const float* values, int count) {
    Vec low = splat(0.0f), high = splat(0.0f), faults = splat(0.0f);
    for (int i = 0; i < count; i += LANES) {
      const Vec value = load(values + i);
      low = -maximum(-low, -value);
      high = maximum(high, value);
      faults += value - value;
    }
    for (int lane = 0; lane < LANES; ++lane) {
      least = low[lane] < least ? low[lane] : least;
      largest = high[lane] > largest ? high[lane] : largest;
    }
    wrong = sum(faults);
  }

  float magnitude() const { return largest > -least ? largest : -least; }
};

constexpr float LEAST_SCALE = 1e-36f;  // below, a group is zeros

inline Vec to_integers(Vec value) {  // to nearest even, of numbers below 2^22
  const Vec shift = splat(12582912.0f);  // 1.5 · 2^23
  return (value + shift) - shift;
}

// Writes the codes of `count` numbers, a byte each; zeros lie behind them up to a whole vector.
inline void store_codes(Vec codes, uint8_t* to) {
  typedef uint8_t Bytes __attribute__((vector_size(LANES), aligned(1), may_alias));
  *(Bytes*)to = __builtin_convertvector(__builtin_convertvector(codes, Ints), Bytes);
}

// The largest weight of a group becomes 127.
inline void quantize_int8(const float* values, int count, int index, const QuantizedColumn& column) {
  uint8_t codes[GROUP];
  const Range range(values, count);
  const float most = range.magnitude();
  const Vec inverse = splat(range.wrong == 0.0f && most > LEAST_SCALE ? 127.0f / most : 0.0f);
  for (int i = 0; i < count; i += LANES) store_codes(to_integers(load(values + i) * inverse), codes + i);
  column.put(index, codes, most / 127.0f + range.wrong, 0);
}

// Integers from the least weight of a group to its largest, 0 always among them.
inline void quantize_int4(const float* values, int count, int index, const QuantizedColumn& column) {
  uint8_t codes[GROUP];
  const Range range(values, count);
  const float scale = (range.largest - range.least) / 15.0f, safe = scale > LEAST_SCALE ? scale : LEAST_SCALE;
  const Vec zero = maximum(splat(0.0f), -maximum(splat(-15.0f), -to_integers(splat(-range.least / safe))));
  for (int i = 0; i < count; i += LANES) {
    const Vec code = to_integers(load(values + i) / splat(safe)) + zero;
    store_codes(maximum(splat(0.0f), -maximum(splat(-15.0f), -code)), codes + i);
  }
  column.put(index, codes, scale + range.wrong, (int8_t)zero[0]);
}

// The nearest of NF4's numbers, scaled by the group's largest weight; of two as near, the smaller.
inline void quantize_nf4(const float* values, int count, int index, const QuantizedColumn& column) {
  uint8_t codes[GROUP];
  const Range range(values, count);
  const float most = range.magnitude();
  const Vec scale = splat(most > LEAST_SCALE ? most : LEAST_SCALE);
  for (int i = 0; i < count; i += LANES) {
    const Vec value = load(values + i) / scale;
    Ints code = {};
    for (int place = 0; place < 15; ++place) code -= (Ints)(value > splat((NF4[place] + NF4[place + 1]) / 2.0f));
    store_codes(to_float(code), codes + i);
  }
  column.put(index, codes, most + range.wrong, 0);
}

inline void quantize_columns(Type type, Type held, const void* source, int64_t column_stride, int from, int to, int k,
                             int group, void* panels) {
  std::vector<float> row((size_t)groups_of(k, group) * group);  // zeros behind the last k
  for (int c = from; c < to; ++c) {
    widen_row(held, (const char*)source + c * column_stride * (item_bits(held) / 8), k, row.data());
    const QuantizedColumn column(type, k, group, c, panels);
    for (int index = 0; index < groups_of(k, group); ++index) {
      const float* values = row.data() + (size_t)index * group;
      if (type == Type::int8)
        quantize_int8(values, group, index, column);
      else if (type == Type::int4)
        quantize_int4(values, group, index, column);
      else
        quantize_nf4(values, group, index, column);
    }
  }
}
