// Rows of a table of codes as an operator of ONNX Runtime.
#pragma once
#include "ort_abi.h"

namespace edgellm {

const ort::CustomOp* gather_operator();

}  // namespace edgellm
