// What lies between the projections, a task a row: embedding, RMSNorm, rotation and the write to the K/V cache.
#pragma once

#include <vector>

#include "kv.h"
#include "pool.h"
#include "step.h"

// x[row] = scale · (W[token] + Σ A[token] Bᵀ)
struct Embed {
  Rows out;
  const void* panels;  // (vocabulary, hidden): a token is a column
  int32_t hidden, type, site;
  float scale;

  void run(Pool& pool, const Step& step) const {
    for (int row; (row = pool.claim()) < step.rows;) {
      float* x = out.at + row * out.stride;
      copy(step.token_ids[row], x);
      for (int r = 0; r < step.runs; ++r)
        if (step.run[r].first <= row && row < step.run[r].last) adapt(step.run[r].sites[site], step.token_ids[row], x);
      if (scale != 1.0f)
        for (int i = 0; i < hidden; ++i) x[i] *= scale;
    }
  }

 private:
  void copy(int token, float* x) const {
    const char* panel = (const char*)panels + token / PANEL * panel_bytes((Type)type, hidden);
    const float* scales = (const float*)(panel + weight_bytes((Type)type, hidden));  // of int8
    for (int i = 0; i < hidden; ++i) {
      x[i] = widen((Type)type, panel, item_in_panel((Type)type, token % PANEL, i));
      if ((Type)type == Type::int8) x[i] *= scales[i / GROUP * PANEL + token % PANEL];
    }
  }

  void adapt(const LoraSite& lora, int token, float* x) const {
    if (!lora.a) return;
    const Type held = (Type)lora.type;
    const LoraPart& part = lora.parts[0];
    static thread_local std::vector<float> shrunk;
    shrunk.resize(lora.ranks);
    float* t = shrunk.data();
    alignas(64) float y[PANEL];
    for (int rank = 0; rank < lora.ranks; ++rank)
      t[rank] = widen(held, lora.a, (size_t)token * lora.ranks + rank) * lora.scales[rank];
    for (int first = 0; first < hidden; first += PANEL) {
      const char* panel = (const char*)part.b + first / PANEL * panel_bytes(held, lora.ranks);
      multiply_rows(held, 1, 1, panel, 0, lora.ranks, t, 0, y, 0, false);
      for (int i = first; i < first + PANEL && i < hidden; ++i)
        x[i] += y[i - first] + (part.bias ? part.bias[i] : 0.0f);
    }
  }
};

// out = x / sqrt(mean(x²) + eps) · weight, or out += that
inline void normalize(const float* x, const float* weight, int size, float eps, float* out, bool add = false) {
  Vec squares = splat(0.0f);
  float rest = 0.0f;
  int i = 0;
  for (; i + LANES <= size; i += LANES) squares = fma(load(x + i), load(x + i), squares);
  for (int j = i; j < size; ++j) rest += x[j] * x[j];
  const float factor = 1.0f / std::sqrt((sum(squares) + rest) / (float)size + eps);
  for (i = 0; i + LANES <= size; i += LANES) {
    const Vec y = load(x + i) * splat(factor) * load(weight + i);
    store(out + i, add ? load(out + i) + y : y);
  }
  for (; i < size; ++i) out[i] = (add ? out[i] : 0.0f) + x[i] * factor * weight[i];
}

struct RmsNorm {
  Rows x, out;
  const float* weight;  // (size,)
  int32_t size;
  int32_t logits;  // out[i] = norm of x[logit_rows[i]]
  int32_t add;     // to out
  float eps;

  void run(Pool& pool, const Step& step) const {
    const int rows = logits ? step.logits : step.rows;
    for (int row; (row = pool.claim()) < rows;)
      normalize(x.at + (logits ? step.logit_rows[row] : row) * x.stride, weight, size, eps, out.at + row * out.stride,
                add);
  }
};

// Rotates queries in place; rotates keys and writes them and the values to the cache.
struct RotateWrite {
  Rows qkv;
  void* kv;                    // in tiles
  const float* query_norm;     // (head_dim,) or null: RMSNorm of each head before the rotation
  const float* key_norm;
  int32_t heads, kv_heads, head_dim;
  int32_t type;         // of the cache: float32 or bfloat16
  int32_t whole;        // the norms are of all heads together: (heads · head_dim,) and (kv_heads · head_dim,)
  int32_t rope;         // which of the step's cosines and sines
  int32_t turned;       // the first dimensions of a head, which turn
  int32_t interleaved;  // neighbouring dimensions are a pair, and not those turned / 2 apart
  float eps;

  void run(Pool& pool, const Step& step) const {
    for (int row; (row = pool.claim()) < step.rows;) {
      float* x = qkv.at + row * qkv.stride;
      const int64_t angles = ((int64_t)rope * step.rows + row) * head_dim;
      if (whole && query_norm) {
        normalize(x, query_norm, heads * head_dim, eps, x);
        normalize(x + heads * head_dim, key_norm, kv_heads * head_dim, eps, x + heads * head_dim);
      }
      for (int head = 0; head < heads + kv_heads; ++head) {
        float* at = x + head * head_dim;
        const float* weight = head < heads ? query_norm : key_norm;
        if (weight && !whole) normalize(at, weight, head_dim, eps, at);
        rotate(at, step.cosines + angles, step.sines + angles);
      }
      const float* k = x + heads * head_dim;
      Kv{(char*)kv, kv_heads, head_dim, (Type)type}.write(step.slots[row], k, k + kv_heads * head_dim);
    }
  }

 private:
  void rotate(float* x, const float* cosines, const float* sines) const {
    const int half = turned / 2;
    if (interleaved)
      for (int i = 0; i < half; ++i) turn(x, 2 * i, 2 * i + 1, cosines, sines);
    else
      for (int i = 0; i < half; ++i) turn(x, i, half + i, cosines, sines);
  }

  static void turn(float* x, int i, int j, const float* cosines, const float* sines) {
    const float a = x[i], b = x[j];
    x[i] = a * cosines[i] + b * sines[i];
    x[j] = b * cosines[j] + a * sines[j];
  }
};
