// What changes from step to step: the rows, their requests' K/V and their adapters. kernels/cpu/compiled/structs.py
// mirrors these structures field by field.
#pragma once

#include "panels.h"

constexpr int MOST_PARTS = 3;  // projections stacked in one site: q, k and v

// One adapted projection of a site: y = (W x + expand) · gain + bias, where W may have rows of the adapter's own.
struct LoraPart {
  const void* b;      // panels (columns, ranks); null for none
  const float* bias;  // (columns,), scaled; may be null
  int32_t first_rank, ranks;  // columns of the site's shrink
  const float* gain;      // (columns,), of DoRA; may be null
  const void* weight;     // instead of the base's, in `type`: panels (columns, k), of the embedding rows; null for none
  const int32_t* tokens;  // ascending: the rows of the embedding or the head that `rows` replaces
  const float* rows;      // (count, k)
  int32_t type, count;

  // The index of the first of `tokens` that is not below `token`.
  int first_token(int token) const {
    int from = 0, to = count;
    while (from < to) {
      const int middle = (from + to) / 2;
      if (tokens[middle] < token)
        from = middle + 1;
      else
        to = middle;
    }
    return from;
  }
};

// One adapter's weights at one site. A norm's site has one part: its `weight` in float32.
struct LoraSite {
  const void* a;        // panels (ranks, k) of all parts; for the embedding a row of ranks for each token; null: none
  const float* scales;  // (ranks, padded to panels)
  int32_t ranks, type;
  LoraPart parts[MOST_PARTS];
};

// Consecutive rows under one adapter.
struct Run {
  int32_t first, last;
  const LoraSite* sites;
};

// Consecutive queries of one sequence.
struct Queries {
  int32_t row, count;
  int32_t position;       // of the first one
  int32_t visible;        // tokens of the context that may be read, the queries' own included
  const int32_t* blocks;  // of K/V, in the order of the context
  float* partials;        // null, or room for (partitions, heads, head_dim padded + 2): partitions become tasks
  int32_t* arrived;       // with `partials`: a zero for each K/V head
};

struct Rows {
  float* at;
  int64_t stride;  // floats from one row to the next
};

struct Step {
  int32_t rows, logits, runs, logit_runs, queries;
  const int32_t* token_ids;   // (rows,)
  const int32_t* slots;       // (rows,), where the K/V of each token are written
  const float* cosines;       // (ropes, rows, head_dim)
  const float* sines;         // (ropes, rows, head_dim), negated for the first dimension of each pair
  const int32_t* logit_rows;  // (logits,)
  const Run* run;             // of rows
  const Run* logit_run;       // of logits
  const Queries* query;
  Rows shrunk;                // room for (rows, ranks of the widest site, padded to panels)
};
