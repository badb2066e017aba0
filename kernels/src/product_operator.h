// What operators with products share: their constants, and how the work is cut.
#pragma once
#include "custom_operator.h"
#include "product.h"

namespace edgellm {

constexpr int kRowsAtOnce = 8;  // that a thread rounds at a time, where there are many

// A matrix, and what it reads: `width` numbers, and after them the sums of each `sums` of these, where that is not 0.
struct Product {
  Matrix matrix;
  int width, sums;
};

// A product whose constants are the inputs from `at` on: codes, scales, zeros. Its attributes' names end in `suffix`.
Product product_of(const ort::Api* api, const ort::KernelInfo* info, size_t at, const std::string& suffix);

// A row x as a product reads it, rounded to 8 bits; `own` has room for all that it reads, and may be x.
void round_row(const Form& form, const Product& product, const float* x, float* own, int8_t* codes, float* scales,
               int32_t* minus_sums);

// Into how many parts a product of some rows with matrices of so many units and bytes is cut.
size_t parts_of(size_t units, size_t bytes, size_t rows);

}  // namespace edgellm
