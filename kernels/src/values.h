// What an operator reads of ONNX Runtime's objects, with what it says where they are not as they should be.
#pragma once
#include <algorithm>
#include <initializer_list>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "mapped_file.h"
#include "ort_abi.h"
#include "product.h"

namespace edgellm {

// ONNX Runtime said no, and why; its status is given back to it as it is.
struct Refused {
  ort::Status* status;
};

inline void check(ort::Status* status) {
  if (status != nullptr) throw Refused{status};
}

struct Shape {
  std::vector<int64_t> sizes;
  int type = 0;
  bool is(int wanted, std::initializer_list<int64_t> expected) const {
    return type == wanted && std::equal(sizes.begin(), sizes.end(), expected.begin(), expected.end());
  }
};

inline Shape shape_of(const ort::Api* api, const ort::Value* value) {
  using namespace ort;
  Shape shape;
  TensorInfo* info = nullptr;
  size_t count = 0;
  check(api->at<Status*(const Value*, TensorInfo**)>(kGetTensorTypeAndShape)(value, &info));
  Status* s = api->at<Status*(const TensorInfo*, int*)>(kGetTensorElementType)(info, &shape.type);
  if (!s) s = api->at<Status*(const TensorInfo*, size_t*)>(kGetDimensionsCount)(info, &count);
  shape.sizes.resize(count);
  if (!s) s = api->at<Status*(const TensorInfo*, int64_t*, size_t)>(kGetDimensions)(info, shape.sizes.data(), count);
  api->at<void(TensorInfo*)>(kReleaseTensorTypeAndShapeInfo)(info);
  check(s);
  return shape;
}

template <class T>
T* data_of(const ort::Api* api, const ort::Value* value) {
  void* found = nullptr;
  check(api->at<ort::Status*(ort::Value*, void**)>(ort::kGetTensorMutableData)(const_cast<ort::Value*>(value), &found));
  return static_cast<T*>(found);
}

inline const ort::Value* input_of(const ort::Api* api, const ort::KernelContext* context, size_t index) {
  using Input = ort::Status*(const ort::KernelContext*, size_t, const ort::Value**);
  const ort::Value* value = nullptr;
  check(api->at<Input>(ort::kKernelContextGetInput)(context, index, &value));
  if (value == nullptr) throw std::invalid_argument("an input is missing");
  return value;
}

template <class T>
T* output_data(const ort::Api* api, ort::KernelContext* context, size_t index, const std::vector<int64_t>& sizes) {
  using Output = ort::Status*(ort::KernelContext*, size_t, const int64_t*, size_t, ort::Value**);
  ort::Value* value = nullptr;
  check(api->at<Output>(ort::kKernelContextGetOutput)(context, index, sizes.data(), sizes.size(), &value));
  if (value == nullptr) throw std::invalid_argument("an output is missing");
  return data_of<T>(api, value);
}

inline float* output_of(const ort::Api* api, ort::KernelContext* context, size_t index, const std::vector<int64_t>& sizes) {
  return output_data<float>(api, context, index, sizes);
}

inline int64_t number_of(const ort::Api* api, const ort::KernelInfo* info, const std::string& name) {
  using Number = ort::Status*(const ort::KernelInfo*, const char*, int64_t*);
  int64_t value = 0;
  check(api->at<Number>(ort::kKernelInfoGetAttributeInt64)(info, name.c_str(), &value));
  return value;
}

inline float float_attribute(const ort::Api* api, const ort::KernelInfo* info, const char* name) {
  float value = 0;
  check(api->at<ort::Status*(const ort::KernelInfo*, const char*, float*)>(ort::kKernelInfoGetAttributeFloat)(info, name, &value));
  return value;
}

using Shapes = std::initializer_list<std::initializer_list<int64_t>>;

// An input that does not change, and its shape.
inline std::pair<const ort::Value*, Shape> constant_value(const ort::Api* api, const ort::KernelInfo* info, size_t index) {
  using Constant = ort::Status*(const ort::KernelInfo*, size_t, int*, const ort::Value**);
  int is_constant = 0;
  const ort::Value* value = nullptr;
  check(api->at<Constant>(ort::kKernelInfoGetConstantInputTensor)(info, index, &is_constant, &value));
  if (!is_constant || value == nullptr) throw std::invalid_argument("its matrix must be constant");
  return {value, shape_of(api, value)};
}

// The same; its shape must be one of these.
inline std::pair<const ort::Value*, Shape> constant_value(const ort::Api* api, const ort::KernelInfo* info, size_t index,
                                                          const char* what, std::initializer_list<int> types,
                                                          Shapes shapes) {
  const auto found = constant_value(api, info, index);
  for (const auto& expected : shapes)
    for (const int type : types)
      if (found.second.is(type, expected)) return found;
  throw std::invalid_argument(std::string(what) + " of another shape or type");
}

template <class T>
const T* constant(const ort::Api* api, const ort::KernelInfo* info, size_t index, const char* what, int type, Shapes shapes) {
  return data_of<const T>(api, constant_value(api, info, index, what, {type}, shapes).first);
}

// Scales, in float32 or float16; or in bytes, if they are of so many blocks of rows.
inline Scales scales_of(const ort::Api* api, const ort::KernelInfo* info, size_t index, Shapes shapes, int64_t rows = 0,
                        int64_t blocks = 0) {
  const auto given = constant_value(api, info, index);
  if (blocks != 0 && given.second.is(ort::kUint8, {rows, blocks + 1}))
    return Scales(data_of<const uint8_t>(api, given.first), blocks);
  const auto [value, shape] = constant_value(api, info, index, "scales", {ort::kFloat, ort::kFloat16}, shapes);
  if (shape.type == ort::kFloat16) return Scales(data_of<const uint16_t>(api, value));
  return Scales(data_of<const float>(api, value));
}

// Give back the memory of what was read of a file to be kept in another order.
template <class T>
void forget_all(const T* numbers, int64_t count) {
  if (numbers != nullptr) forget(numbers, size_t(count) * sizeof(T));
}

}  // namespace edgellm
