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
    // The K and V of a token lie together: where there are tasks enough, one task takes all heads of a row.
    const int each = step.queries < 2 * pool.threads() ? 1 : kv_heads;
    // The next task is claimed before this one is computed, so that its K and V can be asked for meanwhile.
    Task next = task_of(step, pool.claim(), each);
    while (next.queries) {
      const Task task = next;
      next = task_of(step, pool.claim(), each);
      for (int head = task.kv_head; head < task.kv_head + task.heads; ++head)
        if (task.queries->partials)
          attend_partition(*task.queries, head, task.partition);
        else
          attend(*task.queries, head, head == task.kv_head + task.heads - 1 ? next : Task{});
    }
  }

 private:
  struct Task {
    const Queries* queries = nullptr;
    int kv_head = 0, heads = 0, partition = 0;
  };

  struct Scratch {
    std::vector<float> rows, keys, values, scores, merged, partial;
  };

  int group() const { return heads / kv_heads; }
  int padded() const { return (head_dim + PANEL - 1) / PANEL * PANEL; }
  static int partitions(const Queries& queries) { return (queries.visible + PARTITION - 1) / PARTITION; }

  // The task of a number; none if there are not so many.
  Task task_of(const Step& step, int number, int each) const {
    for (int i = 0; i < step.queries; ++i) {
      const Queries& queries = step.query[i];
      const int heads = queries.count == 1 ? each : 1, parts = kv_heads / heads;
      const int tasks = parts * (queries.partials ? partitions(queries) : 1);
      if (number < tasks) return {&queries, number % parts * heads, heads, number / parts};
      number -= tasks;
    }
    return {};
  }

  static Scratch& scratch() {
    static thread_local Scratch own;
    return own;
  }

  static float* room(std::vector<float>& memory, size_t size) {
    if (memory.size() < size) memory.resize(size);
    return memory.data();
  }

  // All partitions of some queries. Asks for the memory of each partition before the one before it is computed.
  void attend(const Queries& queries, int kv_head, const Task& after) const {
    const int rows = queries.count * group();
    const size_t size = rows * Partial::size(padded());
    Partial merged{room(scratch().merged, size), padded()}, next{room(scratch().partial, size), padded()};
    const float* scaled = scaled_queries(queries, kv_head);
    for (int index = 0; index < partitions(queries); ++index) {
      if (index + 1 < partitions(queries))
        ask_for({&queries, kv_head, 1, index + 1});
      else
        ask_for(after);
      compute(queries, kv_head, index, scaled, index ? next : merged);
      if (index) merge(merged, next, rows);
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
    if ((Type)type == Type::float32)
      compute_of<float>(queries, kv_head, index, scaled, partial);
    else
      compute_of<uint16_t>(queries, kv_head, index, scaled, partial);
  }

  template <class Item>
  void compute_of(const Queries& queries, int kv_head, int index, const float* scaled, Partial partial) const {
    const int rows = queries.count * group(), start = index * PARTITION;
    const int tokens = queries.visible - start < PARTITION ? queries.visible - start : PARTITION;
    float* scores = room(scratch().scores, (size_t)rows * PARTITION);
    const Item* at[PARTITION];
    locate(queries, kv_head, start, tokens, at);
    const float* keys = gather_keys(at, tokens);
    multiply_rows(Type::float32, rows, (tokens + PANEL - 1) / PANEL, keys, head_dim, scaled, head_dim, scores,
                  PARTITION, false);
    for (int row = 0; row < rows; ++row) {
      const int seen = queries.position + row / group() + 1 - start;
      softmax(scores + row * PARTITION, seen < tokens ? seen : tokens, tokens, partial.maximum(row), partial.total(row));
    }
    const float* values = gather_values(at, tokens);
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

  // Asks for the K and V of a task's partition.
  void ask_for(const Task& task) const {
    if (!task.queries) return;
    const Queries& queries = *task.queries;
    const int start = task.partition * PARTITION, end = start + PARTITION < queries.visible ? start + PARTITION : queries.visible;
    const size_t item = item_bytes((Type)type), head = head_dim * item, values = kv_heads * head;
    int block = start / block_size, offset = start % block_size;
    for (int token = start; token < end; ++token) {
      const size_t slot = (size_t)queries.blocks[block] * block_size + offset;
      const char* keys = (const char*)kv + slot * 2 * values + task.kv_head * head;
      for (size_t byte = 0; byte < task.heads * head; byte += 64) {
        __builtin_prefetch(keys + byte, 0, 2);
        __builtin_prefetch(keys + values + byte, 0, 2);
      }
      if (++offset == block_size) offset = 0, ++block;
    }
  }

  // Each token's keys of a head; its values lie `kv_heads` heads further.
  template <class Item>
  void locate(const Queries& queries, int kv_head, int start, int tokens, const Item** rows) const {
    const size_t of_token = (size_t)2 * kv_heads * head_dim;
    int block = start / block_size, offset = start % block_size;
    for (int token = 0; token < tokens; ++token) {
      const size_t slot = (size_t)queries.blocks[block] * block_size + offset;
      rows[token] = (const Item*)kv + slot * of_token + kv_head * head_dim;
      if (++offset == block_size) offset = 0, ++block;
    }
  }

  // Keys as panels of tokens, (tokens, head_dim).
  template <class Item>
  const float* gather_keys(const Item* const* rows, int tokens) const {
    float* panels = room(scratch().keys, (size_t)PARTITION * head_dim);
    for (int first = 0; first < tokens; first += PANEL, panels += PANEL * head_dim) {
      int token = 0;
#if defined(__AVX2__)
      for (; token < PANEL && first + token + 8 <= tokens; token += 8) {
        for (int i = 0; i + 8 <= head_dim; i += 8) transpose(rows + first + token, i, panels + i * PANEL + token);
        for (int i = head_dim / 8 * 8; i < head_dim; ++i)
          for (int j = 0; j < 8; ++j) panels[i * PANEL + token + j] = widened_item(rows[first + token + j][i]);
      }
#endif
      for (; token < PANEL; ++token)
        for (int i = 0; i < head_dim; ++i)
          panels[i * PANEL + token] = first + token < tokens ? widened_item(rows[first + token][i]) : 0.0f;
    }
    return scratch().keys.data();
  }

  // Values as panels of dimensions, (head_dim, tokens).
  template <class Item>
  const float* gather_values(const Item* const* rows, int tokens) const {
    float* panels = room(scratch().values, (size_t)PARTITION * padded());
    const size_t values = (size_t)kv_heads * head_dim;
    for (int first = 0; first < head_dim; first += PANEL)
      for (int token = 0; token < tokens; ++token, panels += PANEL) {
        const Item* row = rows[token] + values + first;
        if (first + PANEL <= head_dim)
          for (int i = 0; i < PANEL; i += LANES) store(panels + i, widened(row + i));
        else
          for (int i = 0; i < PANEL; ++i) panels[i] = first + i < head_dim ? widened_item(row[i]) : 0.0f;
      }
    return scratch().values.data();
  }

  static float widened_item(float item) { return item; }
  static float widened_item(uint16_t item) { return widen_bfloat16(item); }

  static Vec widened(const float* items) { return load(items); }
  static Vec widened(const uint16_t* items) {
#if defined(__AVX512F__)
    return (Vec)_mm512_slli_epi32(_mm512_cvtepu16_epi32(_mm256_loadu_si256((const __m256i*)items)), 16);
#elif defined(__AVX2__)
    return (Vec)_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)items)), 16);
#else
    Vec wide;
    for (int lane = 0; lane < LANES; ++lane) wide[lane] = widen_bfloat16(items[lane]);
    return wide;
#endif
  }

#if defined(__AVX2__)
  static __m256 eight(const float* items) { return _mm256_loadu_ps(items); }
  static __m256 eight(const uint16_t* items) {
    return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(_mm_loadu_si128((const __m128i*)items)), 16));
  }

  // Eight dimensions of eight tokens, to eight tokens of eight dimensions.
  template <class Item>
  static void transpose(const Item* const rows[8], int first, float* out) {
    __m256 in[8], pairs[8], quads[8];
#pragma GCC unroll 8
    for (int i = 0; i < 8; ++i) in[i] = eight(rows[i] + first);
#pragma GCC unroll 4
    for (int i = 0; i < 8; i += 2) {
      pairs[i] = _mm256_unpacklo_ps(in[i], in[i + 1]);
      pairs[i + 1] = _mm256_unpackhi_ps(in[i], in[i + 1]);
    }
#pragma GCC unroll 2
    for (int i = 0; i < 8; i += 4) {
      quads[i] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0x44);
      quads[i + 1] = _mm256_shuffle_ps(pairs[i], pairs[i + 2], 0xee);
      quads[i + 2] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0x44);
      quads[i + 3] = _mm256_shuffle_ps(pairs[i + 1], pairs[i + 3], 0xee);
    }
#pragma GCC unroll 4
    for (int i = 0; i < 4; ++i) {
      _mm256_storeu_ps(out + i * PANEL, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x20));
      _mm256_storeu_ps(out + (i + 4) * PANEL, _mm256_permute2f128_ps(quads[i], quads[i + 4], 0x31));
    }
  }
#endif
};
