// The operators for ONNX Runtime, in the domain `edgellm`. All are one kernel, of up to three steps:
//   norm      y = the RMS norm of x + skip, and the sum itself as a second result
//   product   with a matrix of codes; what it reads is rounded to 8 bits first
//   gated     the product's first half, through SiLU, times its second half; then a second product
// BlockProduct has the second step alone, NormProduct the first two, GatedMlp the last two, NormGatedMlp all.
#include <algorithm>
#include <mutex>

#include "attention_operator.h"
#include "experts_operator.h"
#include "gather_operator.h"
#include "product_operator.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace edgellm {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;

constexpr int64_t kGatedRows = 128;     // of which what is between two products is kept at a time
constexpr int64_t kMostRows = 1 << 20;  // of one product that are rounded and kept at a time

struct Operator : ort::CustomOp {
  bool norm, gated;
};

struct Kernel {
  const char* name;
  const Api* api;
  const Form* form;
  bool norm, gated;
  float epsilon;
  Product first, second;  // the second only where it is gated
};

// What every thread sees of one product of some rows.
struct Work {
  const Kernel* kernel;
  const Product* product;
  const float *x, *skip, *gamma;  // skip and gamma where there is a norm
  float *sum, *y;
  size_t x_stride;
  int8_t* codes;
  float* scales;
  int32_t* minus_sums;
  int rows, step;
};

void round_rows(void* data, size_t part) {
  const Work& w = *static_cast<Work*>(data);
  const Form& form = *w.kernel->form;
  const Matrix& m = w.product->matrix;
  const int width = w.product->width;
  thread_local std::vector<float> row_of_thread;
  if (row_of_thread.size() < size_t(m.inputs)) row_of_thread.resize(m.inputs);
  float* own = row_of_thread.data();
  const int first = int(part) * kRowsAtOnce, last = std::min(first + kRowsAtOnce, w.rows);
  for (int row = first; row < last; row++) {
    const size_t at = size_t(row) * m.blocks;
    const float* x = w.x + row * w.x_stride;
    if (w.gamma != nullptr) {
      const size_t from = size_t(row) * width;
      form.norm(x, w.skip + from, w.gamma, w.kernel->epsilon, width, w.sum + from, own);
      x = own;
    }
    round_row(form, *w.product, x, own, w.codes + at * m.block, w.scales + at, w.minus_sums + at);
  }
}

void multiply_units(void* data, size_t part) {
  const Work& w = *static_cast<Work*>(data);
  const Matrix& m = w.product->matrix;
  const Rounded x{w.rows, w.codes, w.scales, w.minus_sums};
  const int units = w.kernel->gated && w.product == &w.kernel->first ? m.units / 2 : m.units;
  const int first = int(part) * w.step, last = std::min(first + w.step, units);
  w.kernel->form->multiply(m, x, w.y, first, last);
  if (units == m.units) return;
  w.kernel->form->multiply(m, x, w.y, first + units, last + units);
  for (int row = 0; row < w.rows; row++) {
    float* y = w.y + size_t(row) * m.outputs + first * kUnit;
    w.kernel->form->gate(y, y + units * kUnit, (last - first) * kUnit);
  }
}

// Memory for rounded inputs, kept by the thread that calls for as long as it lives.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<float> scales, between;
  std::vector<int32_t> minus_sums;
};

Scratch& scratch() {
  thread_local Scratch kept;
  return kept;
}

void multiply(const KernelContext* context, Work work) {
  const Matrix& m = work.product->matrix;
  Scratch& memory = scratch();
  const size_t blocks = size_t(work.rows) * m.blocks;
  if (memory.scales.size() < blocks) memory.scales.resize(blocks), memory.minus_sums.resize(blocks);
  if (memory.codes.size() < blocks * m.block) memory.codes.resize(blocks * m.block);
  work.codes = memory.codes.data(), work.scales = memory.scales.data(), work.minus_sums = memory.minus_sums.data();
  const int units = work.kernel->gated && work.product == &work.kernel->first ? m.units / 2 : m.units;
  const size_t parts = parts_of(units, m.units * m.unit_bytes(), work.rows);
  work.step = int((units + parts - 1) / parts);
  const Api* api = work.kernel->api;
  in_parallel(api, context, round_rows, (work.rows + kRowsAtOnce - 1) / kRowsAtOnce, &work);
  in_parallel(api, context, multiply_units, (units + work.step - 1) / work.step, &work);
}

void run(const Kernel& kernel, KernelContext* context) {
  const Api* api = kernel.api;
  const Product &first = kernel.first, &last = kernel.gated ? kernel.second : kernel.first;
  const ort::Value* input = input_of(api, context, 0);
  Shape shape = shape_of(api, input);
  if (shape.sizes.empty() || shape.sizes.back() != first.width || shape.type != ort::kFloat)
    throw std::invalid_argument("takes float32 rows of " + std::to_string(first.width) + " numbers");
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.sizes.size(); i++) rows *= shape.sizes[i];
  Work work{};
  work.kernel = &kernel, work.product = &first;
  work.x = data_of<float>(api, input), work.x_stride = first.width;
  if (kernel.norm) {
    const ort::Value *skip = input_of(api, context, 1), *gamma = input_of(api, context, 2);
    if (const Shape s = shape_of(api, skip); s.sizes != shape.sizes || s.type != ort::kFloat)
      throw std::invalid_argument("adds rows of one shape only");
    if (!shape_of(api, gamma).is(ort::kFloat, {first.width})) throw std::invalid_argument("gamma of another shape or type");
    work.skip = data_of<float>(api, skip), work.gamma = data_of<float>(api, gamma);
    work.sum = output_of(api, context, 1, shape.sizes);
  }
  shape.sizes.back() = last.matrix.outputs;
  float* y = output_of(api, context, 0, shape.sizes);
  const int64_t most = kernel.gated ? kGatedRows : kMostRows;
  for (int64_t row = 0; row < rows; row += most) {
    Work some = work;
    some.rows = int(std::min(most, rows - row));
    const size_t at = size_t(row) * first.width;
    some.x += at;
    if (kernel.norm) some.skip += at, some.sum += at;
    some.y = y + size_t(row) * last.matrix.outputs;
    if (!kernel.gated) {
      multiply(context, some);
      continue;
    }
    std::vector<float>& between = scratch().between;
    const size_t stride = first.matrix.outputs;
    if (between.size() < some.rows * stride) between.resize(some.rows * stride);
    float* end = some.y;
    some.y = between.data();
    multiply(context, some);
    some.product = &last, some.gamma = nullptr;
    some.x = between.data(), some.x_stride = stride, some.y = end;
    multiply(context, some);
  }
}

const Operator& operator_of(const ort::CustomOp* self) { return *static_cast<const Operator*>(self); }

std::unique_ptr<Kernel> kernel_of(const ort::CustomOp* self, const Api* api, const KernelInfo* info) {
  const Operator& op = operator_of(self);
  auto kernel = std::make_unique<Kernel>(Kernel{self->name(self), api, best(), op.norm, op.gated, 0, {}, {}});
  if (kernel->form == nullptr) throw std::invalid_argument("it has no form for this processor");
  const size_t at = op.norm ? 3 : 1;
  kernel->first = product_of(api, info, at, "");
  if (op.norm) kernel->epsilon = float_attribute(api, info, "epsilon");
  if (op.gated) {
    kernel->second = product_of(api, info, at + 3, "_down");
    if (kernel->first.matrix.outputs != 2 * kernel->second.width || kernel->second.width % kUnit != 0)
      throw std::invalid_argument("half of the first product must be what the second reads, a multiple of 32");
  }
  return kernel;
}

// Which of a product's constants an input is: 0 codes, 1 scales, 2 zeros; -1 if it comes before them.
int constant_place(const ort::CustomOp* self, size_t i) {
  const size_t before = operator_of(self).norm ? 3 : 1;
  return i < before ? -1 : int((i - before) % 3);
}

Operator description(const char* (*name)(const ort::CustomOp*), bool norm, bool gated) {
  auto op = operator_named<Kernel, kernel_of, run, Operator>(name);
  op.norm = norm, op.gated = gated;
  op.input_type = [](const ort::CustomOp* self, size_t i) {  // codes are of either sign, scales of either size
    const int place = constant_place(self, i);
    return place == 0 || place == 1 ? ort::kAny : place == 2 ? ort::kUint8 : ort::kFloat;
  };
  op.input_count = [](const ort::CustomOp* self) -> size_t {
    return (operator_of(self).norm ? 3 : 1) + (operator_of(self).gated ? 6 : 3);
  };
  op.output_count = [](const ort::CustomOp* self) -> size_t { return operator_of(self).norm ? 2 : 1; };
  op.input_characteristic = [](const ort::CustomOp* self, size_t i) { return constant_place(self, i) == 2 ? 1 : 0; };
  return op;
}

}  // namespace
}  // namespace edgellm

// What ONNX Runtime calls when the library is registered with a session's options.
EXPORTED ort::Status* RegisterCustomOps(ort::SessionOptions* options, const ort::ApiBase* base) {
  using namespace edgellm;
  const ort::Api* api = base->get_api(ort::kApiVersion);
  if (api == nullptr) {  // the first version's table has what it takes to say so
    const ort::Api* first = base->get_api(1);
    const std::string needs = "edgellm-kernels needs version " + std::to_string(ort::kApiVersion) +
                              " of ONNX Runtime's interface, which ONNX Runtime " + base->version() + " does not have";
    return first->at<ort::Status*(int, const char*)>(ort::kCreateStatus)(ort::kFail, needs.c_str());
  }
  static const Operator ops[] = {
      description([](const ort::CustomOp*) { return "BlockProduct"; }, false, false),
      description([](const ort::CustomOp*) { return "NormProduct"; }, true, false),
      description([](const ort::CustomOp*) { return "GatedMlp"; }, false, true),
      description([](const ort::CustomOp*) { return "NormGatedMlp"; }, true, true),
  };
  static ort::Domain* domain = nullptr;  // one for good: sessions keep pointers to it
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  if (domain == nullptr) {
    ort::Domain* made = nullptr;
    if (auto* s = api->at<ort::Status*(const char*, ort::Domain**)>(ort::kCreateCustomOpDomain)("edgellm", &made)) return s;
    std::vector<const ort::CustomOp*> all = attention_operators();
    for (const Operator& op : ops) all.push_back(&op);
    all.push_back(gather_operator());
    all.push_back(experts_operator());
    for (const ort::CustomOp* op : all)
      if (auto* s = api->at<ort::Status*(ort::Domain*, const ort::CustomOp*)>(ort::kCustomOpDomainAdd)(made, op)) return s;
    domain = made;
  }
  return api->at<ort::Status*(ort::SessionOptions*, ort::Domain*)>(ort::kAddCustomOpDomain)(options, domain);
}
