// A layer's routed experts: each row goes through the few that its router scores highest, and adds their outputs.
//
// Rows are gathered expert by expert, and in an expert they keep their order, so that rows under one adapter stay side
// by side. Its projections are those of linear.h over its rows. A row adds the outputs of its experts in the order of
// their scores, so its bits depend on nothing but itself.
#pragma once

#include <algorithm>

#include "linear.h"

struct Experts {
  Rows x;         // (rows, hidden)
  Rows scores;    // (rows, experts), of the router
  Rows gathered;  // room for (rows · chosen, hidden): the experts' inputs, and then their outputs
  Rows inner;     // room for (rows · chosen, columns of a gate)
  Rows out;       // (rows, hidden); the weighted outputs are added
  const Linear* linears;  // gate and up, and down, of each expert, as for row 0 of `gathered` and `inner`
  int32_t* choices;       // room for (rows, chosen): experts, the highest score first
  float* weights;         // room for (rows, chosen)
  int32_t* places;        // room for (rows, chosen): the row of `gathered` of each choice
  int32_t* sources;       // room for (rows · chosen,): the row of `x` of each row of `gathered`
  int32_t* firsts;        // room for (experts + 1,): the first row of `gathered` of each expert
  int32_t experts, chosen, hidden;
  int32_t normalised;  // the weights of a row's experts add up to 1
  float scale;

  void run(Pool& pool, const Step& step) const {
    for (int row; (row = pool.claim()) < step.rows;) choose(row);
    pool.meet();
    if (pool.claim() == 0) arrange(step.rows);
    pool.meet();
    for (int place; (place = pool.claim()) < step.rows * chosen;)
      memcpy(gathered.at + place * gathered.stride, x.at + sources[place] * x.stride, hidden * sizeof(float));
    pool.meet();
    for (int projection = 0; projection < 2; ++projection)
      for (int expert = 0; expert < experts; ++expert) {
        if (firsts[expert] == firsts[expert + 1]) continue;
        project(pool, step, expert, projection);
        pool.meet();
      }
    for (int row; (row = pool.claim()) < step.rows;) add(row);
  }

 private:
  // The experts of a row and their weights: softmax over all scores, of which the highest count.
  void choose(int row) const {
    const float* own = scores.at + row * scores.stride;
    int32_t* best = choices + row * chosen;
    for (int i = 0; i < chosen; ++i) {
      best[i] = -1;
      for (int expert = 0; expert < experts; ++expert)
        if (std::find(best, best + i, expert) == best + i && (best[i] < 0 || own[expert] > own[best[i]]))
          best[i] = expert;
    }
    float total = 0.0f;
    for (int i = 0; i < (normalised ? chosen : experts); ++i) total += std::exp(own[normalised ? best[i] : i] - own[best[0]]);
    for (int i = 0; i < chosen; ++i) weights[row * chosen + i] = std::exp(own[best[i]] - own[best[0]]) / total;
  }

  void arrange(int rows) const {
    std::fill(firsts, firsts + experts + 1, 0);
    for (int i = 0; i < rows * chosen; ++i) ++firsts[choices[i] + 1];
    for (int expert = 0; expert < experts; ++expert) firsts[expert + 1] += firsts[expert];
    for (int i = 0; i < rows * chosen; ++i) {
      places[i] = firsts[choices[i]]++;
      sources[places[i]] = i / chosen;
    }
    for (int expert = experts; expert > 0; --expert) firsts[expert] = firsts[expert - 1];
    firsts[0] = 0;
  }

  // One projection of an expert's rows, which are a step of their own.
  void project(Pool& pool, const Step& step, int expert, int projection) const {
    static thread_local std::vector<Run> runs;
    const int first = firsts[expert], last = firsts[expert + 1];
    runs.clear();
    for (int r = 0; r < step.runs; ++r) {
      const int from = std::lower_bound(sources + first, sources + last, step.run[r].first) - (sources + first);
      const int to = std::lower_bound(sources + first, sources + last, step.run[r].last) - (sources + first);
      if (from < to) runs.push_back({from, to, step.run[r].sites});
    }
    Step own = step;
    own.rows = last - first;
    own.runs = (int)runs.size();
    own.run = runs.data();
    Linear linear = linears[2 * expert + projection];
    linear.x.at += first * linear.x.stride;
    linear.out.at += first * linear.out.stride;
    linear.run(pool, own);
  }

  void add(int row) const {
    float* to = out.at + row * out.stride;
    for (int i = 0; i < hidden; ++i) {
      float sum = 0.0f;
      for (int choice = row * chosen; choice < (row + 1) * chosen; ++choice)
        sum += weights[choice] * gathered.at[places[choice] * gathered.stride + i];
      to[i] += scale * sum;
    }
  }
};
