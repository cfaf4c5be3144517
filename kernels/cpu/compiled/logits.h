// What a choice of tokens needs of each row of logits, read once.
#pragma once

#include "pool.h"
#include "step.h"

struct Best {
  float highest;   // NaN if any logit is
  int32_t index;   // of the first of the highest
  float log_total; // log Σ exp(logit)
};

struct FindBest {
  Rows logits;
  Best* best;  // one for each row
  int32_t size;

  void run(Pool& pool, const Step& step) const {
    for (int row; (row = pool.claim()) < step.logits;) best[row] = find(logits.at + row * logits.stride);
  }

 private:
  Best find(const float* x) const {
    const float least = -std::numeric_limits<float>::infinity();
    Vec highest = splat(least), wrong = splat(0.0f);
    int i = 0;
    for (; i + LANES <= size; i += LANES) {
      highest = maximum(load(x + i), highest);
      wrong = wrong + (load(x + i) - load(x + i));  // NaN for NaN and for infinities
    }
    float most = least, bad = sum(wrong);
    for (int lane = 0; lane < LANES; ++lane) most = highest[lane] > most ? highest[lane] : most;
    for (int j = i; j < size; ++j) most = x[j] > most ? x[j] : most, bad += x[j] - x[j];
    if (bad != bad && has_nan(x)) return {std::numeric_limits<float>::quiet_NaN(), 0, most};
    int index = 0;
    while (index < size - 1 && x[index] != most) ++index;
    return {most, index, std::isinf(most) ? most : most + std::log(total(x, most))};
  }

  bool has_nan(const float* x) const {
    for (int i = 0; i < size; ++i)
      if (x[i] != x[i]) return true;
    return false;
  }

  float total(const float* x, float most) const {
    Vec sums = splat(0.0f);
    int i = 0;
    for (; i + LANES <= size; i += LANES) sums = sums + exponential(load(x + i) - splat(most));
    float rest = sum(sums);
    for (; i < size; ++i) rest += std::exp(x[i] - most);
    return rest;
  }
};
