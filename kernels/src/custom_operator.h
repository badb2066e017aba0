// What all operators share: what ONNX Runtime asks of each in the same way, their faults as its statuses, and its threads.
#pragma once
#include <exception>
#include <memory>
#include <string>

#include "values.h"

namespace edgellm {

// Do it. What it throws becomes a status, for no exception may pass through ONNX Runtime's C interface.
template <class Work>
ort::Status* guarded(const ort::Api* api, const char* name, Work work) {
  try {
    work();
    return nullptr;
  } catch (const Refused& refused) {
    return refused.status;
  } catch (const std::exception& error) {
    const std::string message = std::string(name) + ": " + error.what();
    return api->at<ort::Status*(int, const char*)>(ort::kCreateStatus)(ort::kInvalidArgument, message.c_str());
  }
}

// f(work, part) for each part, on all threads. Each thread has its share of them, or, if they are uneven, takes the next.
// Without a context all of them are done by the thread that calls.
inline void in_parallel(const ort::Api* api, const ort::KernelContext* context, void (*f)(void*, size_t), size_t parts,
                        void* work, bool uneven = false) {
  if (context != nullptr && parts > 1) {
    using Parallel = ort::Status*(const ort::KernelContext*, void (*)(void*, size_t), size_t, size_t, void*);
    return check(api->at<Parallel>(ort::kKernelContextParallelFor)(context, f, parts, uneven ? parts : 0, work));
  }
  for (size_t part = 0; part < parts; part++) f(work, part);
}

// An operator whose kernels are made and run so; a kernel has its operator's name and the interface, `name` and `api`.
// It takes one input and gives one output, both float32, unless what is given back is told otherwise.
template <class Kernel, std::unique_ptr<Kernel> (*make)(const ort::CustomOp*, const ort::Api*, const ort::KernelInfo*),
          void (*run)(const Kernel&, ort::KernelContext*), class Operator = ort::CustomOp>
Operator operator_named(const char* (*name)(const ort::CustomOp*)) {
  using ort::CustomOp;
  Operator op{};
  op.version = ort::kApiVersion;
  op.name = name;
  op.provider = [](const CustomOp*) { return static_cast<const char*>(nullptr); };
  op.input_type = op.output_type = [](const CustomOp*, size_t) { return ort::kFloat; };
  op.input_count = op.output_count = [](const CustomOp*) -> size_t { return 1; };
  op.destroy = [](void* kernel) { delete static_cast<Kernel*>(kernel); };
  op.input_characteristic = op.output_characteristic = [](const CustomOp*, size_t) { return 0; };  // it must be there
  op.input_memory = [](const CustomOp*, size_t) { return 0; };
  op.variadic_input_minimum = op.variadic_output_minimum = [](const CustomOp*) { return 1; };
  op.variadic_input_homogeneous = op.variadic_output_homogeneous = [](const CustomOp*) { return 1; };
  op.create_kernel_2 = [](const CustomOp* self, const ort::Api* api, const ort::KernelInfo* info, void** made) {
    return guarded(api, self->name(self), [&] { *made = make(self, api, info).release(); });
  };
  op.compute_2 = [](void* self, ort::KernelContext* context) {
    const Kernel& kernel = *static_cast<const Kernel*>(self);
    return guarded(kernel.api, kernel.name, [&] { run(kernel, context); });
  };
  op.start_version = [](const CustomOp*) { return 1; };
  op.end_version = [](const CustomOp*) { return 0x7fffffff; };
  return op;
}

}  // namespace edgellm
