// Attention over paged K/V, each row over its own context.
//
// The context is cut into partitions of 128 tokens from its start. A row's softmax over one partition gives a maximum,
// a sum and a weighted sum of values; partitions are merged in order. So a row's bits depend on its context alone: not
// on other rows, not on how its prompt was cut into steps, not on the number of threads.
#pragma once

#include <limits>
#include <vector>

#include "pool.h"
#include "step.h"

constexpr int PARTITION = 128;

// Some rows' softmax over a part of the context, row by row: the weighted sum of values, unless divided by the total.
struct Partial {
  float* at;
  int padded;  // head_dim, padded to panels

  static size_t size(int padded) { return padded + 2; }
  float* sums(int row) const { return at + row * size(padded); }
  float& maximum(int row) const { return sums(row)[padded]; }
  float& total(int row) const { return sums(row)[padded + 1]; }
};

struct Attention {
  Rows q, out;     // (rows, heads · head_dim); q is rotated
  const void* kv;  // (slots, 2, kv_heads, head_dim), keys first
  int32_t heads, kv_heads, head_dim, block_size;
  int32_t type;  // of the cache: float32 or bfloat16
  float scale;

  void run(Pool& pool, const Step& step) const {
    for (int task; (task = pool.claim()) >= 0;) {
      int i = 0;
      for (int tasks; i < step.queries && task >= (tasks = tasks_of(step.query[i])); ++i) task -= tasks;
      if (i == step.queries) return;
      const Queries& queries = step.query[i];
      if (queries.partials)
        attend_partition(queries, task % kv_heads, task / kv_heads);
      else
        attend(queries, task);
    }
  }

 private:
  struct Scratch {
    std::vector<float> rows, keys, values, scores, merged, partial;
  };

  int group() const { return heads / kv_heads; }
  int padded() const { return (head_dim + PANEL - 1) / PANEL * PANEL; }
  static int partitions(const Queries& queries) { return (queries.visible + PARTITION - 1) / PARTITION; }
  int tasks_of(const Queries& queries) const { return kv_heads * (queries.partials ? partitions(queries) : 1); }

  static Scratch& scratch() {
    static thread_local Scratch own;
    return own;
  }

  static float* room(std::vector<float>& memory, size_t size) {
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }

  // All partitions of some queries.
  void attend(const Queries& queries, int kv_head) const {
    const int rows = queries.count * group();
    const size_t size = rows * Partial::size(padded());
    Partial merged{room(scratch().merged, size), padded()}, next{room(scratch().partial, size), padded()};
    const float* scaled = scaled_queries(queries, kv_head);
    compute(queries, kv_head, 0, scaled, merged);
    for (int index = 1; index < partitions(queries); ++index) {
      compute(queries, kv_head, index, scaled, next);
      merge(merged, next, rows);
    }
    write(queries, kv_head, merged);
  }

  // One partition of some queries; whoever computes the last one merges them all.
  void attend_partition(const Queries& queries, int kv_head, int index) const {
    const int rows = queries.count * group(), count = partitions(queries);
    const size_t size = rows * Partial::size(padded());
    auto partial = [&](int i) { return Partial{queries.partials + (kv_head * count + i) * size, padded()}; };
    compute(queries, kv_head, index, scaled_queries(queries, kv_head), partial(index));
    if (__atomic_add_fetch(&queries.arrived[kv_head], 1, __ATOMIC_ACQ_REL) < count) return;
    queries.arrived[kv_head] = 0;  // for the next layer
    for (int i = 1; i < count; ++i) merge(partial(0), partial(i), rows);
    write(queries, kv_head, partial(0));
  }

  // The query heads of one K/V head, times `scale`: (queries · group, head_dim).
  const float* scaled_queries(const Queries& queries, int kv_head) const {
    float* to = room(scratch().rows, (size_t)queries.count * group() * head_dim);
    for (int query = 0; query < queries.count; ++query) {
      const float* from = q.at + (queries.row + query) * q.stride + kv_head * group() * head_dim;
      for (int i = 0; i < group() * head_dim; ++i) *to++ = from[i] * scale;
    }
    return scratch().rows.data();
  }

  void compute(const Queries& queries, int kv_head, int index, const float* scaled, Partial partial) const {
    const int rows = queries.count * group(), start = index * PARTITION;
    const int tokens = queries.visible - start < PARTITION ? queries.visible - start : PARTITION;
    float* scores = room(scratch().scores, (size_t)rows * PARTITION);
    const float* keys = gather_keys(queries, kv_head, start, tokens);
    multiply_rows(Type::float32, rows, (tokens + PANEL - 1) / PANEL, keys, head_dim, scaled, head_dim, scores,
                  PARTITION, false);
    for (int row = 0; row < rows; ++row) {
      const int seen = queries.position + row / group() + 1 - start;
      softmax(scores + row * PARTITION, seen < tokens ? seen : tokens, tokens, partial.maximum(row), partial.total(row));
    }
    const float* values = gather_values(queries, kv_head, start, tokens);
    multiply_rows(Type::float32, rows, padded() / PANEL, values, tokens, scores, PARTITION, partial.at,
                  Partial::size(padded()), false);
  }

  // weights[i] = exp(scores[i] - maximum) for the tokens that are seen, in place, and 0 for the others.
  static void softmax(float* scores, int seen, int tokens, float& maximum, float& total) {
    const float least = -std::numeric_limits<float>::infinity();
    const int end = (tokens + PANEL - 1) / PANEL * PANEL;
    for (int i = seen < 0 ? 0 : seen; i < end; ++i) scores[i] = least;
    maximum = least, total = 0.0f;
    if (seen <= 0) {
      for (int i = 0; i < end; ++i) scores[i] = 0.0f;
      return;
    }
    Vec highest = splat(least), sums = splat(0.0f);
    for (int i = 0; i < end; i += LANES) highest = ::maximum(load(scores + i), highest);
    for (int lane = 0; lane < LANES; ++lane) maximum = highest[lane] > maximum ? highest[lane] : maximum;
    for (int i = 0; i < end; i += LANES) {
      const Vec weights = exponential(load(scores + i) - splat(maximum));
      store(scores + i, weights);
      sums = sums + weights;
    }
    total = sum(sums);
  }

  static void merge(Partial into, Partial next, int rows) {
    for (int row = 0; row < rows; ++row) {
      if (next.total(row) == 0.0f) continue;  // the row sees nothing of it
      const float highest = into.maximum(row) > next.maximum(row) ? into.maximum(row) : next.maximum(row);
      const Vec a = exponential(splat(into.maximum(row) - highest)), b = exponential(splat(next.maximum(row) - highest));
      for (int i = 0; i < into.padded; i += LANES)
        store(into.sums(row) + i, fma(load(next.sums(row) + i), b, load(into.sums(row) + i) * a));
      into.total(row) = into.total(row) * a[0] + next.total(row) * b[0];
      into.maximum(row) = highest;
    }
  }

  void write(const Queries& queries, int kv_head, Partial merged) const {
    for (int row = 0; row < queries.count * group(); ++row) {
      const int head = kv_head * group() + row % group();
      float* to = out.at + (queries.row + row / group()) * out.stride + head * head_dim;
      for (int i = 0; i < head_dim; ++i) to[i] = merged.sums(row)[i] / merged.total(row);
    }
  }

  // A token's keys (0) or values (1), in the cache's type.
  const char* cached(const Queries& queries, int token, int kv_head, int which) const {
    const size_t slot = (size_t)queries.blocks[token / block_size] * block_size + token % block_size;
    return (const char*)kv + ((slot * 2 + which) * kv_heads + kv_head) * head_dim * item_bytes((Type)type);
  }

  // Keys as panels of tokens, (tokens, head_dim).
  const float* gather_keys(const Queries& queries, int kv_head, int start, int tokens) const {
    float* panels = room(scratch().keys, (size_t)PARTITION * head_dim);
    for (int first = 0; first < tokens; first += PANEL, panels += PANEL * head_dim) {
      int token = 0;
#if defined(__AVX2__)
      for (; token < PANEL && first + token + 8 <= tokens; token += 8) {
        const char* rows[8];
        for (int i = 0; i < 8; ++i) rows[i] = cached(queries, start + first + token + i, kv_head, 0);
        for (int i = 0; i + 8 <= head_dim; i += 8) transpose(rows, i, panels + i * PANEL + token);
        for (int i = head_dim / 8 * 8; i < head_dim; ++i)
          for (int j = 0; j < 8; ++j) panels[i * PANEL + token + j] = widen((Type)type, rows[j], i);
      }
#endif
      for (; token < PANEL; ++token) {
        const bool there = first + token < tokens;
        const char* row = there ? cached(queries, start + first + token, kv_head, 0) : nullptr;
        for (int i = 0; i < head_dim; ++i) panels[i * PANEL + token] = there ? widen((Type)type, row, i) : 0.0f;
      }
    }
    return scratch().keys.data();
  }

  // Values as panels of dimensions, (head_dim, tokens).
  const float* gather_values(const Queries& queries, int kv_head, int start, int tokens) const {
    float* panels = room(scratch().values, (size_t)PARTITION * padded());
    for (int token = 0; token < tokens; ++token) {
      const char* row = cached(queries, start + token, kv_head, 1);
      int i = 0;
      for (; i + LANES <= head_dim; i += LANES)
        store(panels + (i / PANEL * tokens + token) * PANEL + i % PANEL, widened(row, i));
      for (; i < padded(); ++i)
        panels[(i / PANEL * tokens + token) * PANEL + i % PANEL] = i < head_dim ? widen((Type)type, row, i) : 0.0f;
    }
    return scratch().values.data();
  }

  Vec widened(const char* row, int index) const {
    if ((Type)type == Type::float32) return load((const float*)row + index);
    Vec wide;
    Bits bits;
    for (int lane = 0; lane < LANES; ++lane) bits[lane] = ((const uint16_t*)row)[index + lane];
    bits <<= 16;
    memcpy(&wide, &bits, sizeof wide);
    return wide;
  }

#if defined(__AVX2__)
  __m256 eight(const char* row, int index) const {
    if ((Type)type == Type::float32) return _mm256_loadu_ps((const float*)row + index);
    const __m128i bits = _mm_loadu_si128((const __m128i*)((const uint16_t*)row + index));
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
  }

  // Eight dimensions of eight tokens, to eight tokens of eight dimensions.
  void transpose(const char* const rows[8], int first, float* out) const {
    __m256 in[8], pairs[8];
    for (int i = 0; i < 8; ++i) in[i] = eight(rows[i], first);
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
    }
    for (int i = 0; i < 4; ++i) {
      const int low = i / 2;
      const __m256 a = i % 2 ? _mm256_shuffle_ps(pairs[low], pairs[low + 2], 0xee)
                             : _mm256_shuffle_ps(pairs[low], pairs[low + 2], 0x44);
      const __m256 b = i % 2 ? _mm256_shuffle_ps(pairs[low + 4], pairs[low + 6], 0xee)
                             : _mm256_shuffle_ps(pairs[low + 4], pairs[low + 6], 0x44);
      _mm256_storeu_ps(out + i * PANEL, _mm256_permute2f128_ps(a, b, 0x20));
      _mm256_storeu_ps(out + (i + 4) * PANEL, _mm256_permute2f128_ps(a, b, 0x31));
    }
  }
#endif
};
