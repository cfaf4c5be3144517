// Attention over paged K/V, each row over its own context.
//
// The context is cut into partitions of 128 tokens from its start. A row's softmax over one partition gives a maximum,
// a sum and a weighted sum of values; partitions are merged in order. So a row's bits depend on its context alone: not
// on other rows, not on how its prompt was cut into steps, not on the number of threads.
//
// In a layer with a window a row sees the last tokens of its context only. Tiles that no query of a task sees are not
// read, and partitions of only such tiles are no tasks; what the sums leave out would add zeros.
#pragma once

#include <limits>
#include <vector>

#include "kv.h"
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
  const void* kv;  // in tiles
  const float* sinks;  // (heads,), a score that no token has, or null
  int32_t heads, kv_heads, head_dim, block_size;  // tokens in a block: whole tiles
  int32_t type;  // of the cache: float32 or bfloat16
  int32_t window;  // the tokens that a row sees, its own included; 0: the whole context
  float scale;
  float cap;  // of scores, cap · tanh(score / cap); 0: none

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

  // The first token that some of the queries see, down to whole tiles.
  int first_token(const Queries& queries) const {
    const int first = queries.position + 1 - window;
    return window && first > 0 ? first / TILE * TILE : 0;
  }

  int first_partition(const Queries& queries) const { return first_token(queries) / PARTITION; }

  // Where the tokens of a partition begin that are read, and how many they are.
  int start_of(const Queries& queries, int partition) const {
    const int first = first_token(queries);
    return first > partition * PARTITION ? first : partition * PARTITION;
  }
  int tokens_of(const Queries& queries, int partition) const {
    const int end = (partition + 1) * PARTITION;
    return (queries.visible < end ? queries.visible : end) - start_of(queries, partition);
  }

  // The task of a number; none if there are not so many.
  Task task_of(const Step& step, int number, int each) const {
    for (int i = 0; i < step.queries; ++i) {
      const Queries& queries = step.query[i];
      const int heads = queries.count == 1 ? each : 1, parts = kv_heads / heads;
      const int first = first_partition(queries);
      const int tasks = parts * (queries.partials ? partitions(queries) - first : 1);
      if (number < tasks) return {&queries, number % parts * heads, heads, first + number / parts};
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
    const int begin = first_partition(queries);
    for (int index = begin; index < partitions(queries); ++index) {
      if (index + 1 < partitions(queries))
        ask_for({&queries, kv_head, 1, index + 1});
      else
        ask_for(after);
      compute(queries, kv_head, index, scaled, index > begin ? next : merged);
      if (index > begin) merge(merged, next, rows);
    }
    write(queries, kv_head, merged);
  }

  // One partition of some queries; whoever computes the last one merges them all.
  void attend_partition(const Queries& queries, int kv_head, int index) const {
    const int rows = queries.count * group(), count = partitions(queries), begin = first_partition(queries);
    const size_t size = rows * Partial::size(padded());
    auto partial = [&](int i) { return Partial{queries.partials + (kv_head * count + i) * size, padded()}; };
    compute(queries, kv_head, index, scaled_queries(queries, kv_head), partial(index));
    if (__atomic_add_fetch(&queries.arrived[kv_head], 1, __ATOMIC_ACQ_REL) < count - begin) return;
    queries.arrived[kv_head] = 0;  // for the next layer
    for (int i = begin + 1; i < count; ++i) merge(partial(begin), partial(i), rows);
    write(queries, kv_head, partial(begin));
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

  // The softmax of some queries over one partition.
  void compute(const Queries& queries, int kv_head, int index, const float* scaled, Partial partial) const {
    const int rows = queries.count * group(), start = start_of(queries, index), tokens = tokens_of(queries, index);
    const char* keys[PARTITION / TILE];
    locate(queries, kv_head, start, tokens, keys);
    float* scores = room(scratch().scores, (size_t)rows * PARTITION);
    score(rows, tokens, keys, scaled, scores);
    for (int row = 0; row < rows; ++row) {
      float* own = scores + row * PARTITION;
      for (int i = 0; cap != 0.0f && i < tokens; i += LANES) store(own + i, soft_capped(load(own + i), cap));
      const int seen = queries.position + row / group() + 1 - start, before = window && seen > window ? seen - window : 0;
      softmax(own, before, seen < tokens ? seen : tokens, tokens, partial.maximum(row), partial.total(row));
    }
    sum_values(rows, tokens, keys, scores, partial);
  }

  // Few rows read the cache's panels as they are; for more, each is widened once. The sums have the same order.
  bool as_they_are(int rows) const { return rows <= MOST_ROWS || (Type)type == Type::float32; }

  void score(int rows, int tokens, const char* const* keys, const float* scaled, float* scores) const {
    const int tiles = (tokens + TILE - 1) / TILE;
    if (as_they_are(rows)) {
      for (int i = 0; i < tiles; ++i)
        multiply_rows((Type)type, rows, 1, keys[i], 0, head_dim, scaled, head_dim, scores + i * TILE, PARTITION, false);
      return;
    }
    float* wide = room(scratch().keys, (size_t)PARTITION * head_dim);
    for (int i = 0; i < tiles; ++i) widen_panels((Type)type, 1, keys[i], head_dim, wide + (size_t)i * TILE * head_dim);
    multiply_rows(Type::float32, rows, tiles, wide, panel_bytes(Type::float32, head_dim), head_dim, scaled, head_dim,
                  scores, PARTITION, false);
  }

  void sum_values(int rows, int tokens, const char* const* keys, const float* weights, Partial partial) const {
    const Kv cache = this->cache();
    const size_t stride = Kv::values_stride((Type)type), width = Partial::size(padded());
    const bool few = as_they_are(rows);
    const int widened = few ? 0 : cache.panels(), rest = cache.last_columns() ? 1 : 0;
    float* wide = room(scratch().values, (size_t)PARTITION * padded());
    for (int first = 0; first < tokens; first += TILE) {
      const int count = tokens - first < TILE ? tokens - first : TILE;
      const char* values = cache.values(keys[first / TILE]);
      if (few)
        multiply_rows((Type)type, rows, cache.panels(), values, stride, count, weights + first, PARTITION, partial.at,
                      width, first > 0);
      for (int panel = 0; panel < widened; ++panel)
        widen_panels((Type)type, 1, values + panel * stride, count, wide + ((size_t)panel * tokens + first) * PANEL);
      if (rest) cache.widen_last_columns(values, count, wide + ((size_t)widened * tokens + first) * PANEL);
    }
    multiply_rows(Type::float32, rows, widened + rest, wide, panel_bytes(Type::float32, tokens), tokens, weights,
                  PARTITION, partial.at + (cache.panels() - widened) * PANEL, width, false);
  }

  // weights[i] = exp(scores[i] - maximum) for the tokens from `before` to `seen`, in place, and 0 for the others.
  static void softmax(float* scores, int before, int seen, int tokens, float& maximum, float& total) {
    const float least = -std::numeric_limits<float>::infinity();
    const int end = (tokens + PANEL - 1) / PANEL * PANEL;
    for (int i = 0; i < before && i < end; ++i) scores[i] = least;
    for (int i = seen < 0 ? 0 : seen; i < end; ++i) scores[i] = least;
    maximum = least, total = 0.0f;
    if (seen <= before) {
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
      const float total = merged.total(row) + (sinks ? std::exp(sinks[head] - merged.maximum(row)) : 0.0f);
      for (int i = 0; i < head_dim; ++i) to[i] = merged.sums(row)[i] / total;
    }
  }

  Kv cache() const { return {(char*)kv, kv_heads, head_dim, (Type)type}; }

  // Asks for the K and V of a task's partition.
  void ask_for(const Task& task) const {
    if (!task.queries) return;
    const int start = start_of(*task.queries, task.partition), tokens = tokens_of(*task.queries, task.partition);
    const char* keys[PARTITION / TILE];
    locate(*task.queries, task.kv_head, start, tokens, keys);
    for (int i = 0; i < (tokens + TILE - 1) / TILE; ++i)
      for (size_t byte = 0; byte < task.heads * cache().head_bytes(); byte += 64)
        __builtin_prefetch(keys[i] + byte, 0, 2);
  }

  // The keys of a head, by tiles.
  void locate(const Queries& queries, int kv_head, int start, int tokens, const char** keys) const {
    for (int token = start; token < start + tokens; token += TILE) {
      const size_t slot = (size_t)queries.blocks[token / block_size] * block_size + token % block_size;
      *keys++ = cache().keys(slot / TILE, kv_head);
    }
  }
};
