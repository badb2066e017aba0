// A mixture of experts as an operator of ONNX Runtime.
#pragma once
#include "ort_abi.h"

namespace edgellm {

const ort::CustomOp* experts_operator();

}  // namespace edgellm
