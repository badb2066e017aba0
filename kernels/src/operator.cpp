// The operator `edgellm::MatMul4Bits` for ONNX Runtime: inputs, attributes and result of MatMulNBits with 4 bits and
// accuracy level 4, computed by the form of the product that is best on this processor.
#include <algorithm>
#include <exception>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "ort_abi.h"
#include "product.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace edgellm {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;
using ort::Status;
using ort::Value;

// A product of few rows waits for memory: a thread that begins elsewhere in the matrix waits longest, so it is cut into
// few parts, and only so small ones are worth another thread. One of many rows computes, so threads share it evenly.
constexpr size_t kLeastPart = 60 << 10;  // bytes of the matrix
constexpr int kFewRows = 8, kFewParts = 8, kManyParts = 64;
constexpr int kRowsAtOnce = 8;      // that a thread rounds at a time, where there are many

Status* fault(const Api* api, const std::string& message) {
  return api->at<Status*(int, const char*)>(ort::kCreateStatus)(ort::kInvalidArgument, message.c_str());
}

struct Shape {
  std::vector<int64_t> sizes;
  int type = 0;
  bool is(int wanted, std::initializer_list<int64_t> expected) const {
    return type == wanted && std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
  }
};

Status* shape_of(const Api* api, const Value* value, Shape* shape) {
  ort::TensorInfo* info = nullptr;
  size_t count = 0;
  if (Status* s = api->at<Status*(const Value*, ort::TensorInfo**)>(ort::kGetTensorTypeAndShape)(value, &info)) return s;
  Status* s = api->at<Status*(const ort::TensorInfo*, int*)>(ort::kGetTensorElementType)(info, &shape->type);
  if (!s) s = api->at<Status*(const ort::TensorInfo*, size_t*)>(ort::kGetDimensionsCount)(info, &count);
  shape->sizes.resize(count);
  if (!s) s = api->at<Status*(const ort::TensorInfo*, int64_t*, size_t)>(ort::kGetDimensions)(info, shape->sizes.data(), count);
  api->at<void(ort::TensorInfo*)>(ort::kReleaseTensorTypeAndShapeInfo)(info);
  return s;
}

template <class T>
Status* data_of(const Api* api, const Value* value, T** data) {
  void* found = nullptr;
  Status* s = api->at<Status*(Value*, void**)>(ort::kGetTensorMutableData)(const_cast<Value*>(value), &found);
  *data = static_cast<T*>(found);
  return s;
}

struct Kernel {
  const Api* api;
  const Form* form;
  Matrix matrix;
};

// What every thread of one product sees.
struct Work {
  const Kernel* kernel;
  const float* x;
  float* y;
  int8_t* codes;
  float* scales;
  int32_t* minus_sums;
  int rows, step;
};

void round_rows(void* data, size_t part) {
  const Work& w = *static_cast<Work*>(data);
  const Matrix& m = w.kernel->matrix;
  const int first = int(part) * kRowsAtOnce, last = std::min(first + kRowsAtOnce, w.rows);
  for (int row = first; row < last; row++) {
    const size_t at = size_t(row) * m.blocks;
    w.kernel->form->round(m, w.x + size_t(row) * m.inputs, w.codes + at * m.block, w.scales + at, w.minus_sums + at);
  }
}

void multiply_units(void* data, size_t part) {
  const Work& w = *static_cast<Work*>(data);
  const Matrix& m = w.kernel->matrix;
  const int first = int(part) * w.step, last = std::min(first + w.step, m.units);
  w.kernel->form->multiply(m, Rounded{w.rows, w.codes, w.scales, w.minus_sums}, w.y, first, last);
}

Status* in_parallel(const Api* api, const KernelContext* context, void (*f)(void*, size_t), size_t parts, Work* work) {
  if (parts > 1) {
    using Parallel = Status*(const KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    return api->at<Parallel>(ort::kKernelContextParallelFor)(context, f, parts, 0, work);
  }
  for (size_t part = 0; part < parts; part++) f(work, part);
  return nullptr;
}

// Memory for rounded inputs, kept by the thread that calls for as long as it lives.
struct Scratch {
  std::vector<int8_t> codes;
  std::vector<float> scales;
  std::vector<int32_t> minus_sums;
};

Status* compute(void* self, KernelContext* context) try {
  const Kernel& kernel = *static_cast<Kernel*>(self);
  const Api* api = kernel.api;
  const Matrix& m = kernel.matrix;
  const Value* input = nullptr;
  Value* output = nullptr;
  Shape shape;
  Work work{};
  if (Status* s = api->at<Status*(const KernelContext*, size_t, const Value**)>(ort::kKernelContextGetInput)(context, 0, &input)) return s;
  if (Status* s = shape_of(api, input, &shape)) return s;
  if (shape.sizes.empty() || shape.sizes.back() != m.inputs || shape.type != ort::kFloat)
    return fault(api, "MatMul4Bits takes float32 rows of " + std::to_string(m.inputs) + " numbers");
  int64_t rows = 1;
  for (size_t i = 0; i + 1 < shape.sizes.size(); i++) rows *= shape.sizes[i];
  shape.sizes.back() = m.outputs;
  using Output = Status*(KernelContext*, size_t, const int64_t*, size_t, Value**);
  if (Status* s = api->at<Output>(ort::kKernelContextGetOutput)(context, 0, shape.sizes.data(), shape.sizes.size(), &output)) return s;
  if (Status* s = data_of(api, input, &work.x)) return s;
  if (Status* s = data_of(api, output, &work.y)) return s;

  thread_local Scratch scratch;
  const size_t blocks = size_t(rows) * m.blocks;
  if (scratch.scales.size() < blocks) scratch.scales.resize(blocks), scratch.minus_sums.resize(blocks);
  if (scratch.codes.size() < blocks * m.block) scratch.codes.resize(blocks * m.block);
  work.kernel = &kernel;
  work.codes = scratch.codes.data(), work.scales = scratch.scales.data(), work.minus_sums = scratch.minus_sums.data();
  work.rows = int(rows);
  const size_t most = rows > kFewRows ? kManyParts : kFewParts;
  const size_t parts = std::clamp<size_t>(m.units * m.unit_bytes() / kLeastPart, 1, most);
  work.step = int((m.units + parts - 1) / parts);
  if (Status* s = in_parallel(api, context, round_rows, (rows + kRowsAtOnce - 1) / kRowsAtOnce, &work)) return s;
  return in_parallel(api, context, multiply_units, (m.units + work.step - 1) / work.step, &work);
} catch (const std::exception& error) {
  return fault(static_cast<Kernel*>(self)->api, std::string("MatMul4Bits: ") + error.what());
}

Status* constant(const Api* api, const KernelInfo* info, size_t index, const Value** value, Shape* shape) {
  int is_constant = 0;
  using Constant = Status*(const KernelInfo*, size_t, int*, const Value**);
  if (Status* s = api->at<Constant>(ort::kKernelInfoGetConstantInputTensor)(info, index, &is_constant, value)) return s;
  if (!is_constant || *value == nullptr) return fault(api, "MatMul4Bits: its matrix must be constant");
  return shape_of(api, *value, shape);
}

Status* create(const ort::CustomOp*, const Api* api, const KernelInfo* info, void** made) try {
  int64_t outputs = 0, inputs = 0, block = 0;
  for (auto [name, value] : {std::pair{"N", &outputs}, {"K", &inputs}, {"block_size", &block}})
    if (Status* s = api->at<Status*(const KernelInfo*, const char*, int64_t*)>(ort::kKernelInfoGetAttributeInt64)(info, name, value)) return s;
  if ((block != 16 && block != 32 && block != 64 && block != 128) || outputs < 1 || inputs < 1 || outputs > 1 << 24 || inputs > 1 << 24)
    return fault(api, "MatMul4Bits has blocks of 16, 32, 64 and 128, not of " + std::to_string(block));
  const Form* form = best();
  if (form == nullptr) return fault(api, "MatMul4Bits has no form for this processor");
  size_t count = 0;
  if (Status* s = api->at<Status*(const KernelInfo*, size_t*)>(ort::kKernelInfoGetInputCount)(info, &count)) return s;
  const int64_t blocks = (inputs + block - 1) / block;
  const Value *codes = nullptr, *scales = nullptr, *zeros = nullptr;
  const uint8_t *code_data = nullptr, *zero_data = nullptr;
  const float* scale_data = nullptr;
  Shape shape;
  if (Status* s = constant(api, info, 1, &codes, &shape)) return s;
  if (!shape.is(ort::kUint8, {outputs, blocks, block / 2})) return fault(api, "MatMul4Bits: codes of another shape");
  if (Status* s = constant(api, info, 2, &scales, &shape)) return s;
  if (!shape.is(ort::kFloat, {outputs, blocks}) && !shape.is(ort::kFloat, {outputs * blocks}))
    return fault(api, "MatMul4Bits: scales of another shape or type");
  if (count > 3) {
    const int64_t bytes = (blocks + 1) / 2;
    if (Status* s = constant(api, info, 3, &zeros, &shape)) return s;
    if (!shape.is(ort::kUint8, {outputs, bytes}) && !shape.is(ort::kUint8, {outputs * bytes}))
      return fault(api, "MatMul4Bits: zeros of another shape or type");
    if (Status* s = data_of(api, zeros, &zero_data)) return s;
  }
  if (Status* s = data_of(api, codes, &code_data)) return s;
  if (Status* s = data_of(api, scales, &scale_data)) return s;
  *made = new Kernel{api, form, pack(int(outputs), int(inputs), int(block), code_data, scale_data, zero_data)};
  forget(code_data, size_t(outputs * blocks * block / 2));
  return nullptr;
} catch (const std::exception& error) {
  return fault(api, std::string("MatMul4Bits: ") + error.what());
}

ort::CustomOp description() {
  ort::CustomOp op{};
  op.version = ort::kApiVersion;
  op.name = [](const ort::CustomOp*) { return "MatMul4Bits"; };
  op.provider = [](const ort::CustomOp*) { return static_cast<const char*>(nullptr); };
  op.input_type = [](const ort::CustomOp*, size_t i) { return i % 2 ? ort::kUint8 : ort::kFloat; };
  op.input_count = [](const ort::CustomOp*) -> size_t { return 4; };
  op.output_type = [](const ort::CustomOp*, size_t) { return ort::kFloat; };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i == 3 ? 1 : 0; };  // zeros are optional
  op.output_characteristic = [](const ort::CustomOp*, size_t) { return 0; };
  op.input_memory = [](const ort::CustomOp*, size_t) { return 0; };
  op.variadic_input_minimum = op.variadic_output_minimum = [](const ort::CustomOp*) { return 1; };
  op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const ort::CustomOp*) { return 1; };
  op.create_kernel_2 = create;
  op.compute_2 = compute;
  op.start_version = [](const ort::CustomOp*) { return 1; };
  op.end_version = [](const ort::CustomOp*) { return 0x7fffffff; };
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
  static const ort::CustomOp op = description();
  static ort::Domain* domain = nullptr;  // one for good: sessions keep pointers to it
  static std::mutex making;
  const std::lock_guard<std::mutex> lock(making);
  if (domain == nullptr) {
    if (auto* s = api->at<ort::Status*(const char*, ort::Domain**)>(ort::kCreateCustomOpDomain)("edgellm", &domain)) return s;
    if (auto* s = api->at<ort::Status*(ort::Domain*, const ort::CustomOp*)>(ort::kCustomOpDomainAdd)(domain, &op)) return s;
  }
  return api->at<ort::Status*(ort::SessionOptions*, ort::Domain*)>(ort::kAddCustomOpDomain)(options, domain);
}

// The name of the form that runs here; an empty text where none does.
EXPORTED const char* edgellm_form() {
  const edgellm::Form* form = edgellm::best();
  return form ? form->name : "";
}

// Whether a form was compiled, and runs here.
EXPORTED int edgellm_has_form(const char* name) {
  for (const edgellm::Form* const* form = edgellm::forms(); *form != nullptr; form++)
    if (std::string(name) == (*form)->name) return (*form)->here();
  return 0;
}

// A whole product by the form of a name, without ONNX Runtime: x (rows, inputs) to y (rows, outputs), on this thread.
// Returns 0, or 1 where there is no such form here.
EXPORTED int edgellm_product(const char* name, int rows, int outputs, int inputs, int block, const float* x,
                             const uint8_t* codes, const float* scales, const uint8_t* zeros, float* y) {
  using namespace edgellm;
  for (const Form* const* form = forms(); *form != nullptr; form++) {
    if (std::string(name) != (*form)->name || !(*form)->here()) continue;
    const Matrix m = pack(outputs, inputs, block, codes, scales, zeros);
    const size_t blocks = size_t(rows) * m.blocks;
    std::vector<int8_t> rounded(blocks * block);
    std::vector<float> row_scales(blocks);
    std::vector<int32_t> minus_sums(blocks);
    for (int row = 0; row < rows; row++) {
      const size_t at = size_t(row) * m.blocks;
      (*form)->round(m, x + size_t(row) * inputs, rounded.data() + at * block, row_scales.data() + at, minus_sums.data() + at);
    }
    (*form)->multiply(m, Rounded{rows, rounded.data(), row_scales.data(), minus_sums.data()}, y, 0, m.units);
    return 0;
  }
  return 1;
}
