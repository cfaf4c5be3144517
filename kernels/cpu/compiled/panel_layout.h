// How weights lie in panels.
//
// A matrix W (columns, k) lies in panels of 16 columns; a panel holds one vector of 16 weights for each k, so that a
// product reads it from end to end and needs no sum across lanes. bfloat16 and int8 hold two neighbouring k of a column
// side by side, because CPUs multiply and add pairs; four bits hold eight k of a column in a word of 32 bits, as bytes
// that CPUs multiply and add by four. Quantised weights have a float scale for each column and each group of k, behind
// the weights; int4 a zero point as well, behind the scales.
#pragma once

#include "vec.h"

constexpr int PANEL = 16;
constexpr int VECTORS = PANEL / LANES;  // of one k of a panel
constexpr int GROUP = 128;              // k of a row with one scale; of weights it has a whole number of groups

// nf4: places in a table of 16 numbers; float8: e4m3 without infinities.
enum class Type : int32_t { float32, bfloat16, float16, int8, int4, nf4, float8 };

constexpr bool four_bits(Type type) { return type == Type::int4 || type == Type::nf4; }

constexpr size_t item_bits(Type type) {
  if (four_bits(type)) return 4;
  return type == Type::float32 ? 32 : type == Type::int8 || type == Type::float8 ? 8 : 16;
}

constexpr bool paired(Type type) { return type == Type::bfloat16 || type == Type::int8; }

constexpr bool quantized(Type type) {
  return type == Type::int8 || type == Type::int4 || type == Type::nf4 || type == Type::float8;
}

inline int groups_of(int k, int group = GROUP) { return (k + group - 1) / group; }

constexpr int WORD = 8;  // weights of four bits in a word

// The k that a panel has room for: whole pairs, or whole words.
constexpr int padded(Type type, int k) {
  const int unit = four_bits(type) ? WORD : paired(type) ? 2 : 1;
  return (k + unit - 1) / unit * unit;
}

// The bytes of a panel's weights.
inline size_t weight_bytes(Type type, int k) { return (size_t)padded(type, k) * PANEL * item_bits(type) / 8; }

// The bytes of a panel, with `group` k to a scale.
inline size_t panel_bytes(Type type, int k, int group = GROUP) {
  const size_t scales = quantized(type) ? (size_t)groups_of(k, group) * PANEL : 0;
  return weight_bytes(type, k) + scales * 4 + (type == Type::int4 ? scales : 0);
}

// Where the weight of a column of the panel and a k lies, in items from the panel's start. The bytes of a word have four
// neighbouring k in their low halves and the next four in their high ones.
inline size_t item_in_panel(Type type, int column, int k) {
  if (four_bits(type)) return (size_t)(k / WORD) * WORD * PANEL + (column * 4 + k % 4) * 2 + k / 4 % 2;
  return paired(type) ? (size_t)(k / 2) * 2 * PANEL + column * 2 + k % 2 : (size_t)k * PANEL + column;
}

// How far to the right a weight of four bits lies in its word, by its k.
constexpr int shift_in_word(int k) { return k % 4 * 8 + k / 4 % 2 * 4; }

// The numbers of bitsandbytes' nf4, quantiles of the normal distribution.
alignas(64) constexpr float NF4[16] = {
    -1.0f,                -0.6961928009986877f,  -0.5250730514526367f, -0.39491748809814453f,
    -0.28444138169288635f, -0.18477343022823334f, -0.09105003625154495f, 0.0f,
    0.07958029955625534f, 0.16093020141124725f,  0.24611230194568634f, 0.33791524171829224f,
    0.44070982933044434f, 0.5626170039176941f,   0.7229568362236023f,  1.0f};
