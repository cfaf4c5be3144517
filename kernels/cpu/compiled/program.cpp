// A model's forward pass as a program: operations in order, recorded once, run by all threads with one call a step.
// The functions at the end are all that Python calls (kernels/cpu/compiled/library.py).

#include <memory>

#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "linear.h"
#include "logits.h"

enum class Kind : int32_t { embed, rms_norm, linear, rotate_write, attention, find_best, experts };

struct Operation {
  int64_t kind;
  const void* arguments;
};

struct Program {
  const Operation* operations;
  int count;
  Pool* pool;
  const Step* step;
};

static void run_all(int, void* context) {
  // A copy: after the last meeting the caller may change the program.
  const Program program = *(const Program*)context;
  Pool& pool = *program.pool;
  for (int i = 0; i < program.count; ++i) {
    const void* arguments = program.operations[i].arguments;
    switch ((Kind)program.operations[i].kind) {
      case Kind::embed:
        ((const Embed*)arguments)->run(pool, *program.step);
        break;
      case Kind::rms_norm:
        ((const RmsNorm*)arguments)->run(pool, *program.step);
        break;
      case Kind::linear:
        ((const Linear*)arguments)->run(pool, *program.step);
        break;
      case Kind::rotate_write:
        ((const RotateWrite*)arguments)->run(pool, *program.step);
        break;
      case Kind::attention:
        ((const Attention*)arguments)->run(pool, *program.step);
        break;
      case Kind::experts:
        ((const Experts*)arguments)->run(pool, *program.step);
        break;
      case Kind::find_best:
        ((const FindBest*)arguments)->run(pool, *program.step);
        break;
    }
    pool.meet();
  }
}

extern "C" {

int lanes() { return LANES; }

int rounds_rows() { return ROUNDS_ROWS; }

// What Python has to know as well, in the order of structs.py's `shared`.
void shared(int64_t* out) {
  const int64_t values[] = {
      PANEL,           PARTITION,       TILE,          MOST_PARTS,    sizeof(Rows),        sizeof(LoraPart),
      sizeof(LoraSite), sizeof(Run),    sizeof(Queries), sizeof(Step), sizeof(LinearPart), sizeof(Linear),
      sizeof(Embed),   sizeof(RmsNorm), sizeof(RotateWrite), sizeof(Attention), sizeof(Best), sizeof(FindBest),
      sizeof(Experts), sizeof(Operation)};
  memcpy(out, values, sizeof values);
}

// Floats of one row's part of a softmax.
size_t partial_floats(int head_dim) { return Partial::size((head_dim + PANEL - 1) / PANEL * PANEL); }

void* pool_new(int threads) { return new Pool(threads); }

void pool_delete(void* pool) { delete (Pool*)pool; }

void program_run(void* pool, const Operation* operations, int count, const Step* step) {
  if (!count) return;  // there would be no meeting, and `program` would end before all threads have read it
  Program program{operations, count, (Pool*)pool, step};
  program.pool->run(run_all, &program);
}

size_t panels_bytes(int type, int columns, int k, int group) {
  return (size_t)((columns + PANEL - 1) / PANEL) * panel_bytes((Type)type, k, group);
}

// Writes `columns` columns of a matrix, from column `first` of the panels on. The weight of column c and k lies at
// c · column_stride + k · k_stride items of `source`, which has the panels' type. Panels must be zero where nothing is
// written.
void panels_write(int type, const void* source, int64_t column_stride, int64_t k_stride, int columns, int k, int first,
                  void* panels) {
  const size_t bytes = panel_bytes((Type)type, k);
  for (int c = 0; c < columns; ++c) {
    char* panel = (char*)panels + (first + c) / PANEL * bytes;
    for (int i = 0; i < k; ++i) {
      const size_t to = item_in_panel((Type)type, (first + c) % PANEL, i);
      const int64_t from = c * column_stride + i * k_stride;
      if ((Type)type == Type::float32)
        ((float*)panel)[to] = ((const float*)source)[from];
      else
        ((uint16_t*)panel)[to] = ((const uint16_t*)source)[from];
    }
  }
}

// As `panels_write` for all columns of a matrix that is quantised: codes (columns, k) of a byte each, scales (columns,
// groups) and, of int4, zero points (columns, groups). Panels must be zero before.
void panels_write_codes(int type, const uint8_t* codes, const float* scales, const int8_t* zeros, int columns, int k,
                        int group, void* panels) {
  const size_t bytes = panel_bytes((Type)type, k, group), weights = weight_bytes((Type)type, k);
  const int groups = groups_of(k, group);
  for (int c = 0; c < columns; ++c) {
    uint8_t* panel = (uint8_t*)panels + c / PANEL * bytes;
    float* to = (float*)(panel + weights) + c % PANEL;
    int8_t* points = (int8_t*)(panel + weights + (size_t)groups * PANEL * 4) + c % PANEL;
    for (int i = 0; i < k; ++i) {
      const size_t item = item_in_panel((Type)type, c % PANEL, i);
      const uint8_t code = codes[(size_t)c * k + i];
      if (item_bits((Type)type) == 8)
        panel[item] = code;
      else
        panel[item / 2] |= code << item % 2 * 4;
    }
    for (int g = 0; g < groups; ++g) {
      to[g * PANEL] = scales[(size_t)c * groups + g];
      if ((Type)type == Type::int4) points[g * PANEL] = zeros[(size_t)c * groups + g];
    }
  }
}

// As `panels_write` for all columns of a float32 matrix, quantised to int8: the scale of each column and 128 k makes its
// largest weight 127.
void panels_quantize(const float* source, int64_t column_stride, int columns, int k, void* panels) {
  const size_t bytes = panel_bytes(Type::int8, k);
  for (int c = 0; c < columns; ++c) {
    int8_t* panel = (int8_t*)panels + c / PANEL * bytes;
    float* scales = (float*)(panel + weight_bytes(Type::int8, k)) + c % PANEL;
    const float* row = source + c * column_stride;
    for (int first = 0; first < k; first += GROUP, scales += PANEL) {
      const int last = first + GROUP < k ? first + GROUP : k;
      float largest = 0.0f, wrong = 0.0f;
      for (int i = first; i < last; ++i) {
        largest = std::fabs(row[i]) > largest ? std::fabs(row[i]) : largest;
        wrong += row[i] - row[i];  // NaN for NaN and for infinities
      }
      *scales = largest / 127.0f + wrong;
      const float inverse = wrong == 0.0f && largest > 1e-36f ? 127.0f / largest : 0.0f;
      for (int i = first; i < last; ++i) panel[item_in_panel(Type::int8, c % PANEL, i)] = (int8_t)std::lrint(row[i] * inverse);
    }
  }
}

}  // extern "C"
