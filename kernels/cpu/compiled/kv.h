// The K/V cache of one layer, in tiles of 16 tokens, so that both products of attention read panels as they lie.
//
// A tile has for each K/V head 16 · head_dim items of keys and then as many of values. The keys are one panel: its
// columns are the tokens. The values are panels whose columns are dimensions, and k the tokens; where head_dim is no
// multiple of 16, the last dimensions lie token by token. A block of K/V is some whole tiles.
#pragma once

#include "panels.h"

constexpr int TILE = PANEL;  // tokens

struct Kv {
  char* at;
  int heads, head_dim;
  Type type;  // float32 or bfloat16

  static size_t values_stride(Type type) { return panel_bytes(type, TILE); }
  size_t head_bytes() const { return (size_t)2 * TILE * head_dim * item_bits(type) / 8; }
  char* keys(size_t tile, int head) const { return at + (tile * heads + head) * head_bytes(); }
  // Where the values begin that belong to some keys.
  const char* values(const char* keys) const { return keys + head_bytes() / 2; }

  // Writes one token's K and V, (heads, head_dim) each.
  void write(size_t slot, const float* k, const float* v) const {
    const int token = slot % TILE;
    for (int head = 0; head < heads; ++head, k += head_dim, v += head_dim) {
      char* tile = keys(slot / TILE, head);
      for (int i = 0; i < head_dim; ++i) put(tile, item_in_panel(type, token, i), k[i]);
      for (int i = 0; i < head_dim; ++i) put(tile, (size_t)TILE * head_dim + value_item(token, i), v[i]);
    }
  }

  int panels() const { return head_dim / PANEL; }      // of values
  int last_columns() const { return head_dim % PANEL; }  // of values that fill no panel

  // One panel, float32 (tokens, 16), of the last columns of a tile's values; 0 where there are none.
  void widen_last_columns(const char* values, int tokens, float* out) const {
    for (int token = 0; token < tokens; ++token)
      for (int i = 0; i < PANEL; ++i)
        *out++ = i < last_columns() ? widen(type, values, value_item(token, panels() * PANEL + i)) : 0.0f;
  }

 private:
  size_t value_item(int token, int dimension) const {
    const int first = dimension / PANEL * PANEL;
    if (dimension < panels() * PANEL) return (size_t)first * TILE + item_in_panel(type, dimension - first, token);
    return (size_t)first * TILE + token * last_columns() + dimension - first;
  }

  void put(char* to, size_t item, float value) const {
    if (type == Type::float32)
      ((float*)to)[item] = value;
    else
      ((uint16_t*)to)[item] = round_bfloat16(value);
  }
};
