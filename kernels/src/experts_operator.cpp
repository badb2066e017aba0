// ChosenExperts, in the domain `edgellm`: gated MLPs of which each row has a few, added to a sum. Expert after expert, a
// row with a share but 0 of it gets share * (what GatedMlp gives of the row), each product and sum rounded to float32.
// Rows are taken in runs of up to 1,024 pairs of a row and an expert that it has chosen (kMostPairs): in each run a matrix
// is read once for all of its rows that have chosen the expert, and not at all where none has.
#include "experts_operator.h"

#include <algorithm>
#include <vector>

#include "product_operator.h"

namespace edgellm {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;

constexpr size_t kMostPairs = 1024;  // of a row and its expert, of which what is between products is kept at a time
constexpr size_t kConstants = 3;     // the first input that is one

struct Expert {
  Product up, down;  // the first has the gate's outputs, then those that it multiplies
};

struct Kernel {
  const char* name;
  const Api* api;
  const Form* form;
  int first;  // the place of the first expert among the shares
  std::vector<Expert> experts;
};

// Rows rounded to 8 bits, and their product.
struct Rows {
  std::vector<int8_t> codes;
  std::vector<float> scales, y;
  std::vector<int32_t> minus_sums;
  void fit(size_t count, const Matrix& m) {
    const size_t blocks = count * m.blocks;
    if (scales.size() < blocks) scales.resize(blocks), minus_sums.resize(blocks);
    if (codes.size() < blocks * m.block) codes.resize(blocks * m.block);
    if (y.size() < count * m.outputs) y.resize(count * m.outputs);
  }
};

// What every thread sees of some rows. A pair is a row and an expert that it has a share of; pairs are in the order of
// experts, and of rows for each.
struct Work {
  const Kernel* kernel;
  int rows;
  size_t all;  // shares of a row
  const float *total, *x, *shares;
  float* sum;
  std::vector<int> experts, begins;  // those that are chosen, and their first pairs, with one more for the end
  std::vector<int> row_begins;       // where a row's pairs begin among `pairs`
  std::vector<int> pairs;            // of each row
  Rows between, given;               // what the first products give, and the last
  int parts, step;                   // an expert's, and the units of each

  const Expert& any() const { return kernel->experts.front(); }  // all have its sizes
  float share(int row, int expert) const { return shares[size_t(row) * all + size_t(kernel->first + expert)]; }
};

// Find the pairs of the next rows, at least of one; gives how many rows that are.
int find_pairs(Work& w, int left) {
  const int count = int(w.kernel->experts.size());
  w.row_begins.assign(1, 0);
  w.experts.clear(), w.begins.assign(1, 0);
  int rows = 0;
  for (int pairs = 0; rows < left; rows++) {
    for (int e = 0; e < count; e++) pairs += w.share(rows, e) != 0;
    if (rows > 0 && size_t(pairs) > kMostPairs) break;
    w.row_begins.push_back(pairs);
  }
  w.pairs.resize(w.row_begins.back());
  std::vector<int> next(w.row_begins.begin(), w.row_begins.end() - 1);
  int pair = 0;
  for (int e = 0; e < count; e++) {
    for (int row = 0; row < rows; row++)
      if (w.share(row, e) != 0) w.pairs[next[row]++] = pair++;
    if (pair == w.begins.back()) continue;
    w.experts.push_back(e), w.begins.push_back(pair);
  }
  return rows;
}

float* room(int inputs) {
  thread_local std::vector<float> row;
  if (row.size() < size_t(inputs)) row.resize(inputs);
  return row.data();
}

// Rows as the experts read them, for each pair.
void round_inputs(void* data, size_t part) {
  Work& w = *static_cast<Work*>(data);
  const Product& product = w.any().up;
  const Matrix& m = product.matrix;
  Rows& to = w.between;
  const size_t codes = size_t(m.blocks) * m.block;
  const int first = int(part) * kRowsAtOnce, last = std::min(first + kRowsAtOnce, w.rows);
  for (int row = first; row < last; row++) {
    const int *pairs = w.pairs.data() + w.row_begins[row], *end = w.pairs.data() + w.row_begins[row + 1];
    if (pairs == end) continue;
    const size_t at = size_t(*pairs) * m.blocks;
    int8_t* made = to.codes.data() + *pairs * codes;
    round_row(*w.kernel->form, product, w.x + size_t(row) * product.width, room(m.inputs), made, to.scales.data() + at,
              to.minus_sums.data() + at);
    while (++pairs < end) {
      const size_t other = size_t(*pairs) * m.blocks;
      std::copy(made, made + codes, to.codes.data() + *pairs * codes);
      std::copy_n(to.scales.data() + at, m.blocks, to.scales.data() + other);
      std::copy_n(to.minus_sums.data() + at, m.blocks, to.minus_sums.data() + other);
    }
  }
}

// What stands between, as the last products read it.
void round_between(void* data, size_t part) {
  Work& w = *static_cast<Work*>(data);
  const Product& product = w.any().down;
  const Matrix& m = product.matrix;
  Rows& to = w.given;
  const size_t stride = w.any().up.matrix.outputs;
  const int first = int(part) * kRowsAtOnce, last = std::min(first + kRowsAtOnce, w.begins.back());
  for (int pair = first; pair < last; pair++) {
    const size_t at = size_t(pair) * m.blocks;
    round_row(*w.kernel->form, product, w.between.y.data() + pair * stride, room(m.inputs),
              to.codes.data() + at * m.block, to.scales.data() + at, to.minus_sums.data() + at);
  }
}

// Some units of one expert's product.
void multiply_part(Work& w, size_t part, bool gated) {
  const int place = int(part) / w.parts, begin = w.begins[place], rows = w.begins[place + 1] - begin;
  const Expert& expert = w.kernel->experts[w.experts[place]];
  const Matrix& m = gated ? expert.up.matrix : expert.down.matrix;
  Rows& all = gated ? w.between : w.given;
  const size_t at = size_t(begin) * m.blocks;
  const Rounded x{rows, all.codes.data() + at * m.block, all.scales.data() + at, all.minus_sums.data() + at};
  float* y = all.y.data() + size_t(begin) * m.outputs;
  const int units = gated ? m.units / 2 : m.units;
  const int first = int(part) % w.parts * w.step, last = std::min(first + w.step, units);
  if (first >= last) return;
  w.kernel->form->multiply(m, x, y, first, last);
  if (!gated) return;
  w.kernel->form->multiply(m, x, y, first + units, last + units);
  for (int row = 0; row < rows; row++) {
    float* gate = y + size_t(row) * m.outputs + first * kUnit;
    w.kernel->form->gate(gate, gate + units * kUnit, (last - first) * kUnit);
  }
}

void multiply_up(void* data, size_t part) { multiply_part(*static_cast<Work*>(data), part, true); }
void multiply_down(void* data, size_t part) { multiply_part(*static_cast<Work*>(data), part, false); }

void add(void* data, size_t part) {
  Work& w = *static_cast<Work*>(data);
  const int width = w.any().down.matrix.outputs;
  const int first = int(part) * kRowsAtOnce, last = std::min(first + kRowsAtOnce, w.rows);
  for (int row = first; row < last; row++) {
    float* sum = w.sum + size_t(row) * width;
    std::copy_n(w.total + size_t(row) * width, width, sum);
    for (int i = w.row_begins[row]; i < w.row_begins[row + 1]; i++) {
      const int pair = w.pairs[i];
      const int place = int(std::upper_bound(w.begins.begin(), w.begins.end(), pair) - w.begins.begin()) - 1;
      const float share = w.share(row, w.experts[place]);
      const float* y = w.given.y.data() + size_t(pair) * width;
      for (int j = 0; j < width; j++) sum[j] += y[j] * share;
    }
  }
}

void multiply(const KernelContext* context, Work& w, bool gated) {
  const Matrix& m = gated ? w.any().up.matrix : w.any().down.matrix;
  const size_t pairs = w.begins.back(), count = w.experts.size();
  const int units = gated ? m.units / 2 : m.units;
  const size_t each = (parts_of(count * units, count * m.units * m.unit_bytes(), pairs) + count - 1) / count;
  w.step = int((units + each - 1) / each), w.parts = (units + w.step - 1) / w.step;
  in_parallel(w.kernel->api, context, gated ? multiply_up : multiply_down, count * w.parts, &w, true);
}

void run_rows(const KernelContext* context, Work& w) {
  const size_t pairs = w.begins.back();
  const Api* api = w.kernel->api;
  const size_t row_parts = (w.rows + kRowsAtOnce - 1) / kRowsAtOnce;
  if (pairs > 0) {
    w.between.fit(pairs, w.any().up.matrix), w.given.fit(pairs, w.any().down.matrix);
    in_parallel(api, context, round_inputs, row_parts, &w);
    multiply(context, w, true);
    in_parallel(api, context, round_between, (pairs + kRowsAtOnce - 1) / kRowsAtOnce, &w);
    multiply(context, w, false);
  }
  in_parallel(api, context, add, row_parts, &w);
}

void run(const Kernel& kernel, KernelContext* context) {
  thread_local Work w;  // with memory that is kept by the thread that calls
  const Api* api = kernel.api;
  const ort::Value *total = input_of(api, context, 0), *x = input_of(api, context, 1), *shares = input_of(api, context, 2);
  const Shape shape = shape_of(api, total), x_shape = shape_of(api, x), given = shape_of(api, shares);
  w.kernel = &kernel;
  const int width = w.any().down.matrix.outputs, inputs = w.any().up.width;
  const int64_t last = kernel.first + int64_t(kernel.experts.size());
  for (const Shape* each : {&shape, &x_shape, &given})
    if (each->type != ort::kFloat || each->sizes.empty() || each->sizes.size() != shape.sizes.size() ||
        !std::equal(shape.sizes.begin(), shape.sizes.end() - 1, each->sizes.begin()))
      throw std::invalid_argument("takes a sum, rows and shares in float32, as many of each");
  if (shape.sizes.back() != width || x_shape.sizes.back() != inputs || given.sizes.back() < last)
    throw std::invalid_argument("takes rows of " + std::to_string(inputs) + " numbers, sums of " +
                                std::to_string(width) + " and at least " + std::to_string(last) + " shares");
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.sizes.size(); i++) rows *= shape.sizes[i];
  w.all = size_t(given.sizes.back());
  w.total = data_of<float>(api, total), w.x = data_of<float>(api, x), w.shares = data_of<float>(api, shares);
  w.sum = output_of(api, context, 0, shape.sizes);
  for (int64_t row = 0; row < rows; row += w.rows) {
    w.rows = find_pairs(w, int(std::min<int64_t>(rows - row, 1 << 20)));
    run_rows(context, w);
    w.total += size_t(w.rows) * width, w.sum += size_t(w.rows) * width;
    w.x += size_t(w.rows) * inputs, w.shares += size_t(w.rows) * w.all;
  }
}

std::unique_ptr<Kernel> kernel_of(const ort::CustomOp* self, const Api* api, const KernelInfo* info) {
  auto kernel = std::make_unique<Kernel>(Kernel{self->name(self), api, best(), 0, {}});
  if (kernel->form == nullptr) throw std::invalid_argument("it has no form for this processor");
  const int64_t first = number_of(api, info, "first"), count = number_of(api, info, "experts");
  if (first < 0 || first > 1 << 20 || count < 1 || count > 1 << 20) throw std::invalid_argument("experts out of range");
  kernel->first = int(first);
  size_t at = kConstants;
  for (int64_t e = 0; e < count; e++) {
    Expert expert;
    expert.up = product_of(api, info, at, ""), at += 2 + (number_of(api, info, "zeros") != 0);
    expert.down = product_of(api, info, at, "_down"), at += 2 + (number_of(api, info, "zeros_down") != 0);
    kernel->experts.push_back(expert);
  }
  const Expert& any = kernel->experts.front();
  if (any.up.matrix.outputs != 2 * any.down.width || any.down.width % kUnit != 0)
    throw std::invalid_argument("half of the first product must be what the second reads, a multiple of 32");
  return kernel;
}

ort::CustomOp description() {
  auto op = operator_named<Kernel, kernel_of, run>([](const ort::CustomOp*) { return "ChosenExperts"; });
  op.input_type = [](const ort::CustomOp*, size_t i) { return i < kConstants ? ort::kFloat : ort::kAny; };
  op.input_count = [](const ort::CustomOp*) -> size_t { return kConstants + 1; };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i < kConstants ? 0 : 2; };  // or any number
  op.variadic_input_homogeneous = [](const ort::CustomOp*) { return 0; };
  return op;
}

}  // namespace

const ort::CustomOp* experts_operator() {
  static const ort::CustomOp op = description();
  return &op;
}

}  // namespace edgellm
