// Attention as operators of ONNX Runtime.
#pragma once
#include <vector>

#include "ort_abi.h"

namespace edgellm {

std::vector<const ort::CustomOp*> attention_operators();

}  // namespace edgellm
