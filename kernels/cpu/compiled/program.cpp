// A model's forward pass as a program: operations in order, recorded once, run by all threads with one call a step.
// The functions at the end are all that Python calls (kernels/cpu/compiled/library.py).

#include <memory>

#include "attention.h"
#include "elementwise.h"
#include "experts.h"
#include "linear.h"
#include "logits.h"
#include "panels_write.h"

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

int looks_up_bytes() { return LOOKS_UP_BYTES; }

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
                  int threads, void* panels) {
  share(threads, columns, k, [=](int from, int to) {
    if ((Type)type == Type::float32)
      write_columns<float>((Type)type, (const float*)source, column_stride, k_stride, from, to, k, first, panels);
    else
      write_columns<uint16_t>((Type)type, (const uint16_t*)source, column_stride, k_stride, from, to, k, first, panels);
  });
}

// As `panels_write` for all columns of a matrix that is quantised: codes (columns, k) of a byte each, scales (columns,
// groups) and, of int4, zero points (columns, groups).
void panels_write_codes(int type, const uint8_t* codes, const float* scales, const int8_t* zeros, int columns, int k,
                        int group, int threads, void* panels) {
  share(threads, columns, k, [=](int from, int to) {
    for (int c = from; c < to; ++c) {
      const QuantizedColumn column((Type)type, k, group, c, panels);
      for (int g = 0, first = 0; first < k; ++g, first += group) {
        uint8_t of_group[GROUP] = {};
        memcpy(of_group, codes + (size_t)c * k + first, k - first < group ? k - first : group);
        const size_t at = (size_t)c * groups_of(k, group) + g;
        column.put(g, of_group, scales[at], zeros ? zeros[at] : (int8_t)0);
      }
    }
  });
}

// As `panels_write` for all columns of a matrix in floats of type `held`, which is quantised to int8, int4 or nf4.
void panels_quantize(int type, int held, const void* source, int64_t column_stride, int columns, int k, int group,
                     int threads, void* panels) {
  share(threads, columns, k, [=](int from, int to) {
    quantize_columns((Type)type, (Type)held, source, column_stride, from, to, k, group, panels);
  });
}

// Adds the squares of W + scale · B A over some panels of a matrix (columns, k): to `sums[column]`, or to `sums[k]` if
// `by_k`. `a` is transposed, (k, ranks), `b` is (columns, ranks), both float32.
void panels_squares(int type, const void* panels, int first, int last, int columns, int k, int group, const float* a,
                    const float* b, int ranks, float scale, int by_k, double* sums) {
  std::vector<float> memory((size_t)k * PANEL + (size_t)ranks * PANEL);
  float *wide = memory.data(), *factors = wide + (size_t)k * PANEL;
  for (int panel = first; panel < last; ++panel) {
    const int start = panel * PANEL, count = columns - start < PANEL ? columns - start : PANEL;
    const char* from = (const char*)panels + panel * panel_bytes((Type)type, k, group);
    if (quantized((Type)type))
      dequantize_panel((Type)type, from, k, group, wide);
    else
      widen_panels((Type)type, 1, from, k, wide);
    for (int rank = 0; rank < ranks; ++rank)
      for (int c = 0; c < PANEL; ++c)
        factors[rank * PANEL + c] = c < count ? scale * b[(size_t)(start + c) * ranks + rank] : 0.0f;
    multiply_rows(Type::float32, k, 1, factors, 0, ranks, a, ranks, wide, PANEL, true);
    double of_columns[PANEL] = {};
    for (int i = 0; i < k; ++i) {
      double squares[PANEL], of_k = 0.0;
      for (int c = 0; c < PANEL; ++c) squares[c] = (double)wide[i * PANEL + c] * wide[i * PANEL + c];
      for (int c = 0; c < PANEL; ++c) of_columns[c] += squares[c];
      for (int c = 0; by_k && c < PANEL; ++c) of_k += squares[c];
      if (by_k) sums[i] += of_k;
    }
    for (int c = 0; c < count && !by_k; ++c) sums[start + c] += of_columns[c];
  }
}

}  // extern "C"
