// What the forms of a product share: how a block of inputs is scaled, rows block by block, and which instance of a form's
// units computes a matrix.
#pragma once
#include <cmath>
#include <cstring>

#include "product.h"

namespace edgellm {
namespace {  // in each file apart, as elementwise.h has it

// By the bits of a block's largest magnitude, without its sign.
struct BlockScale {
  explicit BlockScale(int32_t bits) {
    float top;
    std::memcpy(&top, &bits, sizeof top);
    const bool finite = bits < 0x7f800000;
    none = !finite || top < kLeast;
    inverse = none ? 0 : 127 / top;
    scale = !finite ? NAN : none ? 0 : top / 127;
  }
  bool none;  // all codes are 0
  float inverse, scale;
};

template <void (*round_block)(const float* x, int block, int8_t* codes, float* scale, int32_t* minus_sum)>
void round(const Matrix& m, const float* x, int8_t* codes, float* scales, int32_t* minus_sums) {
  const int whole = m.inputs / m.block;
  for (int b = 0; b < whole; b++)
    round_block(x + b * m.block, m.block, codes + b * m.block, scales + b, minus_sums + b);
  if (whole < m.blocks) {
    float last[kLargestBlock] = {};
    std::memcpy(last, x + whole * m.block, size_t(m.inputs - whole * m.block) * sizeof(float));
    round_block(last, m.block, codes + whole * m.block, scales + whole, minus_sums + whole);
  }
}

// Units::of<kBits, kLines, kHalf> computes a matrix of so many bits and lines in a block (0: a row is one), whose scales are
// float16 or float32.
template <class Units>
struct Kinds {
  template <int kBits, bool kHalf>
  static void blocks(const Matrix& m, const Rounded& x, float* y, int first, int last) {
    switch (m.block) {
      case 16: return Units::template of<kBits, kBits / 2, kHalf>(m, x, y, first, last);
      case 32: return Units::template of<kBits, kBits, kHalf>(m, x, y, first, last);
      case 64: return Units::template of<kBits, 2 * kBits, kHalf>(m, x, y, first, last);
      case 128: return Units::template of<kBits, 4 * kBits, kHalf>(m, x, y, first, last);
      default: return Units::template of<8, 0, kHalf>(m, x, y, first, last);
    }
  }

  template <int kBits>
  static void bits(const Matrix& m, const Rounded& x, float* y, int first, int last) {
    m.half ? blocks<kBits, true>(m, x, y, first, last) : blocks<kBits, false>(m, x, y, first, last);
  }

  static void multiply(const Matrix& m, const Rounded& x, float* y, int first, int last) {
    switch (m.bits) {
      case 2: return bits<2>(m, x, y, first, last);
      case 4: return bits<4>(m, x, y, first, last);
      default: return bits<8>(m, x, y, first, last);
    }
  }
};

}  // namespace
}  // namespace edgellm
