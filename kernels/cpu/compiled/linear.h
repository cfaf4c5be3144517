// A projection with the adapters of all its rows: out = x Wᵀ + bias + Σ scale · (x Aᵀ) Bᵀ, in one operation. An adapter
// may have its own W, or some rows of it, and may scale the columns of its rows.
//
// First come the shrinks, x Aᵀ, a task for each run of rows and each panel of ranks; then the panels of W. A task of
// panels computes W's part, waits until all shrinks are done, which were claimed before it, adds each run's expand to
// the sums that it has at hand, and writes them. So an adapter costs its own weights and no meeting of the threads.
#pragma once

#include <vector>

#include "pool.h"
#include "step.h"

enum class Form : int32_t {
  store,  // out = scale · y
  add,    // out += scale · y
  gated,  // out = silu(y of part 0) · y of part 1
  gated_gelu,  // as gated, with the GELU by tanh
  capped,      // out = scale · tanh(y / scale)
  gated_clamped,  // as gated, with GPT-OSS's activation and `scale` as its limit
};

struct LinearPart {
  const void* panels;  // (columns, k)
  const float* bias;   // (columns,) or null
  int32_t columns;
  int32_t first;  // its first column in `out`; a gated projection has one output for both
};

struct Linear {
  Rows x, out;
  LinearPart part[MOST_PARTS];
  const int32_t* order;  // which of a row's numbers meets each k of the weights; null: its own
  int32_t parts, k, type, group;
  int32_t site;    // of the adapters' weights
  int32_t logits;  // whether the rows are those of the logits
  int32_t form;
  float scale;
  Rows gates;  // of each row a number whose sigmoid scales its outputs too; null for none

  void run(Pool& pool, const Step& step) const;

 private:
  void shrink(const Step& step, const Run& run, int panel) const;
  void compute(Pool& pool, const Step& step, int shrinks, int part, int panel, int panels, int first, int rows,
               const Inputs<uint32_t>* pairs, const float* wide, const void* ahead, float* tile) const;
  bool gated() const {
    return (Form)form == Form::gated || (Form)form == Form::gated_gelu || (Form)form == Form::gated_clamped;
  }

  // The panels of one task.
  struct Place {
    int part, panel, panels, columns;
  };

  int groups_of(int index, int most) const { return ((part[index].columns + PANEL - 1) / PANEL + most - 1) / most; }

  Place place_of(int group, int most) const {
    int index = 0;
    for (int groups; group >= (groups = groups_of(index, most)); ++index) group -= groups;
    const int panel = group * most, left = part[index].columns - panel * PANEL;
    const int columns = left < most * PANEL ? left : most * PANEL;
    return {index, panel, (columns + PANEL - 1) / PANEL, columns};
  }

  const char* panels_of(int index, int panel) const {
    return (const char*)part[index].panels + panel * panel_bytes((Type)type, k, group);
  }

  void replace(const LoraPart& own, int panel, int panels, int columns, int first, int rows, float* y) const;
  void write(int first, int rows, int panel, int part, int columns, const float* y, const float* up, int width) const;
};

constexpr int TILE_ROWS = 128;  // the sums of so many rows and of `TILE_PANELS` panels stay in the first cache
constexpr int TILE_PANELS = 4;
constexpr int FEW_ROWS = 16;          // more rows multiply panels that are widened once
constexpr int PAIRED_FLOATS = 1 << 20;  // of rows that a thread makes pairs of at once
constexpr int WIDE_FLOATS = 1 << 16;  // of widened panels, so that they stay in the second cache

// x / (1 + exp(-z))
inline Vec times_sigmoid(Vec x, Vec z) {
  const Vec negated = splat(0.0f) - z;
  const Vec open = x / (splat(1.0f) + exponential(negated > splat(88.0f) ? splat(88.0f) : negated));
  return negated > splat(88.0f) ? x * splat(0.0f) : open;
}

inline Vec silu(Vec x) { return times_sigmoid(x, x); }

// x / 2 · (1 + tanh(sqrt(2 / π) · (x + 0.044715 x³))), which is x times a sigmoid.
inline Vec gelu(Vec x) {
  return times_sigmoid(x, splat(1.5957691216057308f) * fma(x * x * x, splat(0.044715f), x));
}

// g · sigmoid(1.702 g) · (u + 1), for g the gate up to the limit, and u `up` from -limit to limit
inline Vec clamped_gate(Vec gate, Vec up, float limit) {
  const Vec most = splat(limit), least = splat(-limit);
  const Vec g = gate > most ? most : gate, below = up > most ? most : up;
  return times_sigmoid(g, g * splat(1.702f)) * ((below < least ? least : below) + splat(1.0f));
}

// t[row][rank] = scale · Σ x[row] · A[rank] for the rows of a run and one panel of ranks.
inline void Linear::shrink(const Step& step, const Run& run, int panel) const {
  const LoraSite& lora = run.sites[site];
  const Type type = (Type)lora.type;
  float* t = step.shrunk.at + run.first * step.shrunk.stride + panel * PANEL;
  const size_t bytes = panel_bytes(type, k);
  multiply_rows(type, run.last - run.first, 1, (const char*)lora.a + panel * bytes, bytes, k,
                x.at + run.first * x.stride, x.stride, t, step.shrunk.stride, false);
  for (int row = 0; row < run.last - run.first; ++row)
    for (int v = 0; v < PANEL; v += LANES) {
      float* at = t + row * step.shrunk.stride + v;
      store(at, load(at) * load(lora.scales + panel * PANEL + v));
    }
}

// The sums that come from an adapter's own weights instead of the base's, for rows of one run.
inline void Linear::replace(const LoraPart& own, int panel, int panels, int columns, int first, int rows,
                            float* y) const {
  const int width = panels * PANEL;
  if (own.weight) {
    const size_t bytes = panel_bytes((Type)own.type, k);
    multiply_rows((Type)own.type, rows, panels, (const char*)own.weight + panel * bytes, bytes, k,
                  x.at + first * x.stride, x.stride, y, width, false);
  }
  if (!own.count) return;
  for (int i = own.first_token(panel * PANEL); i < own.count && own.tokens[i] < panel * PANEL + columns; ++i)
    for (int row = 0; row < rows; ++row)
      y[row * width + own.tokens[i] - panel * PANEL] = dot(x.at + (first + row) * x.stride, own.rows + (size_t)i * k, k);
}

// The sums of some rows and panels of one part, into a tile as wide as the panels.
inline void Linear::compute(Pool& pool, const Step& step, int shrinks, int index, int panel, int panels, int first,
                            int rows, const Inputs<uint32_t>* pairs, const float* wide, const void* ahead,
                            float* tile) const {
  const LinearPart& base = part[index];
  const int width = panels * PANEL;
  const Type held = wide ? Type::float32 : (Type)type;
  const void* weights = wide ? (const void*)wide : panels_of(index, panel);
  const size_t stride = panel_bytes(held, k, group);
  const Run* runs = logits ? step.logit_run : step.run;
  const int run_count = logits ? step.logit_runs : step.runs;
  bool based = true;  // whether a row needs the base's weights
  for (int r = 0; r < run_count; ++r)
    if (runs[r].first <= first && first + rows <= runs[r].last) based = !runs[r].sites[site].parts[index].weight;
  if (based && pairs)
    multiply_pairs(held, rows, panels, weights, stride, k, *pairs, tile, width, ahead);
  else if (based)
    multiply_rows(held, rows, panels, weights, stride, k, x.at + first * x.stride, x.stride, tile, width, false, ahead,
                  group);
  const int columns = base.columns - panel * PANEL < panels * PANEL ? base.columns - panel * PANEL : panels * PANEL;
  if (base.bias && based)
    for (int row = 0; row < rows; ++row)
      for (int c = 0; c < columns; ++c) tile[row * width + c] += base.bias[panel * PANEL + c];
  if (shrinks) pool.await_finished(shrinks);
  for (int r = 0; r < run_count; ++r) {
    const int from = runs[r].first > first ? runs[r].first : first;
    const int to = runs[r].last < first + rows ? runs[r].last : first + rows;
    const LoraSite& lora = runs[r].sites[site];
    const LoraPart& adapted = lora.parts[index];
    if (from >= to) continue;
    float* y = tile + (from - first) * width;
    if (adapted.weight || adapted.count) replace(adapted, panel, panels, columns, from, to - from, y);
    const size_t bytes = panel_bytes((Type)lora.type, adapted.ranks);
    if (adapted.b)
      multiply_rows((Type)lora.type, to - from, panels, (const char*)adapted.b + panel * bytes, bytes, adapted.ranks,
                    step.shrunk.at + from * step.shrunk.stride + adapted.first_rank, step.shrunk.stride, y, width, true);
    if (adapted.gain)
      for (int row = 0; row < to - from; ++row)
        for (int c = 0; c < columns; ++c) y[row * width + c] *= adapted.gain[panel * PANEL + c];
    if (adapted.bias)
      for (int row = 0; row < to - from; ++row)
        for (int c = 0; c < columns; ++c) y[row * width + c] += adapted.bias[panel * PANEL + c];
  }
}

inline void Linear::write(
    int first, int rows, int panel, int index, int columns, const float* y, const float* up, int width) const {
  for (int row = 0; row < rows; ++row) {
    float* to = out.at + (first + row) * out.stride + part[index].first + panel * PANEL;
    const float* from = y + row * width;
    const float* other = up + row * width;
    const float factor = gates.at ? scale / (1.0f + std::exp(-gates.at[(first + row) * gates.stride])) : scale;
    float last[LANES];
    for (int c = 0; c < columns; c += LANES) {
      Vec value = load(from + c);
      if ((Form)form == Form::gated) value = silu(value) * load(other + c);
      if ((Form)form == Form::gated_gelu) value = gelu(value) * load(other + c);
      if ((Form)form == Form::gated_clamped)
        value = clamped_gate(value, load(other + c), scale);
      else if ((Form)form == Form::capped)
        value = soft_capped(value, scale);
      else if (factor != 1.0f)
        value = value * splat(factor);
      if (c + LANES <= columns) {
        store(to + c, (Form)form == Form::add ? load(to + c) + value : value);
        continue;
      }
      store(last, value);
      for (int i = c; i < columns; ++i) to[i] = (Form)form == Form::add ? to[i] + last[i - c] : last[i - c];
    }
  }
}

inline void Linear::run(Pool& pool, const Step& step) const {
  alignas(64) static thread_local float tile[2][TILE_ROWS * TILE_PANELS * PANEL];
  static thread_local std::vector<float> wides[2];
  static thread_local PairedRows paired_rows;
  const int rows = logits ? step.logits : step.rows, runs = logits ? step.logit_runs : step.runs;
  const Run* adapted = logits ? step.logit_run : step.run;
  int shrinks = 0;
  for (int r = 0; r < runs; ++r) shrinks += (adapted[r].sites[site].ranks + PANEL - 1) / PANEL;
  const int outputs = gated() ? 1 : parts;
  const bool many = rows > FEW_ROWS;
  const int fit = WIDE_FLOATS / (k * PANEL), most = !many ? 2 : fit < 1 ? 1 : fit > TILE_PANELS ? TILE_PANELS : fit;
  const bool pairs = takes_pairs((Type)type);
  const int at_once = PAIRED_FLOATS / k > TILE_ROWS ? PAIRED_FLOATS / k / TILE_ROWS * TILE_ROWS : TILE_ROWS;
  int paired = -1;  // the first of the rows in `paired_rows`
  int tasks = shrinks;
  for (int i = 0; i < outputs; ++i) tasks += groups_of(i, most);
  // The next task is claimed before this one is computed, so that its weights can be asked for meanwhile.
  for (int task = pool.claim(), next; task < tasks; task = next) {
    next = pool.claim();
    if (task < shrinks) {
      int r = 0;
      for (int panels; task >= (panels = (adapted[r].sites[site].ranks + PANEL - 1) / PANEL); ++r) task -= panels;
      shrink(step, adapted[r], task);
      pool.finish();
      continue;
    }
    const Place place = place_of(task - shrinks, most);
    const bool wide = many && !pairs && !quantized((Type)type) && (Type)type != Type::float32, follows = !many && next >= shrinks && next < tasks;
    const Place after = follows ? place_of(next - shrinks, most) : place;
    const int products = parts / outputs;
    for (int i = 0; wide && i < products; ++i) {
      wides[i].resize(most * panel_bytes(Type::float32, k) / 4);
      widen_panels((Type)type, place.panels, panels_of(place.part + i, place.panel), k, wides[i].data());
    }
    for (int first = 0; first < rows; first += TILE_ROWS) {
      const int count = rows - first < TILE_ROWS ? rows - first : TILE_ROWS;
      if (pairs && paired != first / at_once * at_once) {
        paired = first / at_once * at_once;
        paired_rows.fill((Type)type, rows - paired < at_once ? rows - paired : at_once, k, x.at + paired * x.stride,
                         x.stride, group, order);
      }
      const Inputs<uint32_t> inputs = pairs ? paired_rows.from(first - paired) : Inputs<uint32_t>{};
      for (int i = 0; i < products; ++i)
        compute(pool, step, shrinks, place.part + i, place.panel, place.panels, first, count,
                pairs ? &inputs : nullptr, wide ? wides[i].data() : nullptr, follows ? panels_of(after.part + i, after.panel) : nullptr, tile[i]);
      write(first, count, place.panel, place.part, place.columns, tile[0], tile[1], place.panels * PANEL);
    }
  }
}
