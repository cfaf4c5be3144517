// What lies between the projections, a task a row: embedding, RMSNorm, rotation and the write to the K/V cache.
#pragma once

#include <vector>

#include "kv.h"
#include "pool.h"
#include "step.h"

// x[row] = scale · (W[token] + Σ A[token] Bᵀ) · gain, where an adapter may have rows of W of its own
struct Embed {
  Rows out;
  const void* panels;  // (vocabulary, hidden): a token is a column
  int32_t hidden, type, site;
  float scale;

  void run(Pool& pool, const Step& step) const {
    for (int row; (row = pool.claim()) < step.rows;) {
      float* x = out.at + row * out.stride;
      const LoraSite* adapter = nullptr;
      for (int r = 0; r < step.runs; ++r)
        if (step.run[r].first <= row && row < step.run[r].last) adapter = step.run[r].sites + site;
      if (!adapter || !replace(adapter->parts[0], step.token_ids[row], x)) copy(step.token_ids[row], x);
      if (adapter) adapt(*adapter, step.token_ids[row], x);
      if (scale != 1.0f)
        for (int i = 0; i < hidden; ++i) x[i] *= scale;
    }
  }

 private:
  void copy(int token, float* x) const { read_column((Type)type, panels, hidden, token, x); }

  // Whether the adapter has the token's row itself.
  bool replace(const LoraPart& own, int token, float* x) const {
    const int i = own.count ? own.first_token(token) : 0;
    if (i < own.count && own.tokens[i] == token) {
      memcpy(x, own.rows + (size_t)i * hidden, hidden * 4);
      return true;
    }
    if (!own.weight) return false;
    for (int j = 0; j < hidden; ++j) x[j] = widen((Type)own.type, own.weight, (size_t)token * hidden + j);
    return true;
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
        x[i] = (x[i] + y[i - first]) * (part.gain ? part.gain[i] : 1.0f) + (part.bias ? part.bias[i] : 0.0f);
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
  int32_t site;    // of the adapters' own weights; negative: they have none
  float eps;

  void run(Pool& pool, const Step& step) const {
    const int rows = logits ? step.logits : step.rows;
    for (int row; (row = pool.claim()) < rows;)
      normalize(x.at + (logits ? step.logit_rows[row] : row) * x.stride, weight_of(row, step), size, eps,
                out.at + row * out.stride, add);
  }

 private:
  const float* weight_of(int row, const Step& step) const {
    const Run* runs = logits ? step.logit_run : step.run;
    for (int r = 0; site >= 0 && r < (logits ? step.logit_runs : step.runs); ++r)
      if (runs[r].first <= row && row < runs[r].last && runs[r].sites[site].parts[0].weight)
        return (const float*)runs[r].sites[site].parts[0].weight;
    return weight;
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
