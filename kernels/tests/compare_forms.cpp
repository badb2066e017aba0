// Every form of the product that this processor runs against the plain one, bit for bit, without Python or ONNX Runtime:
// for processors that are only emulated. With Debian's g++-aarch64-linux-gnu and qemu-user, in this folder:
//
//   aarch64-linux-gnu-g++ -O2 -std=c++17 -ffp-contract=off -march=armv8.2-a+dotprod -I../src -static
//       -o /tmp/compare_forms compare_forms.cpp ../src/product.cpp ../src/neon.cpp && qemu-aarch64 /tmp/compare_forms
#include <cmath>
#include <cstdio>
#include <cstring>
#include <random>
#include <vector>

#include "product.h"

using namespace edgellm;

namespace {

std::mt19937 draw(1);

float number(float low, float high) { return std::uniform_real_distribution<float>(low, high)(draw); }

struct Case {
  int block, outputs, inputs, rows;
  bool half, zeros;
};

std::vector<float> product(const Form& form, const Matrix& m, const std::vector<float>& x, int rows) {
  const size_t blocks = size_t(rows) * m.blocks;
  std::vector<int8_t> codes(blocks * m.block);
  std::vector<float> scales(blocks), y(size_t(rows) * m.outputs, 7);
  std::vector<int32_t> sums(blocks);
  for (int r = 0; r < rows; r++) {
    const size_t at = size_t(r) * m.blocks;
    form.round(m, x.data() + size_t(r) * m.inputs, codes.data() + at * m.block, scales.data() + at, sums.data() + at);
  }
  form.multiply(m, Rounded{rows, codes.data(), scales.data(), sums.data()}, y.data(), 0, m.units);
  return y;
}

bool same(const std::vector<float>& a, const std::vector<float>& b) {
  for (size_t i = 0; i < a.size(); i++)
    if (!(std::isnan(a[i]) && std::isnan(b[i])) && std::memcmp(&a[i], &b[i], sizeof(float)) != 0) return false;
  return true;
}

int apart(const Case& c) {
  const size_t blocks = (c.inputs + c.block - 1) / c.block;
  std::vector<uint8_t> codes(c.outputs * blocks * c.block / 2), zeros(c.outputs * ((blocks + 1) / 2));
  std::vector<float> scales(c.outputs * blocks), x(size_t(c.rows) * c.inputs);
  for (auto& code : codes) code = uint8_t(draw());
  for (auto& zero : zeros) zero = uint8_t(draw());
  for (auto& scale : scales) scale = c.half ? float(draw() % 512) / 4096 : number(-0.01f, 0.01f);
  for (auto& value : x) value = number(-2, 2);
  if (c.rows > 3) x[c.inputs] = NAN;  // of one row
  const Matrix m =
      pack(c.outputs, c.inputs, c.block, codes.data(), scales.data(), c.zeros ? zeros.data() : nullptr);
  const std::vector<float> expected = product(kPlain, m, x, c.rows);
  int count = 0;
  for (const Form* const* form = forms(); *form != nullptr; form++)
    if ((*form)->here()) count += !same(product(**form, m, x, c.rows), expected);
  return count;
}

}  // namespace

int main() {
  int cases = 0, wrong = 0;
  for (const int block : {16, 32, 64, 128})
    for (const int outputs : {1, 5, 32, 33, 70})
      for (const int inputs : {7, 64, 130, 300})
        for (int rows = 1; rows <= 9; rows += 2)
          for (const bool half : {true, false})
            for (const bool zeros : {true, false}) {
              cases++;
              wrong += apart({block, outputs, inputs, rows, half, zeros});
            }
  std::printf("%d cases, %d apart; forms here:", cases, wrong);
  for (const Form* const* form = forms(); *form != nullptr; form++)
    if ((*form)->here()) std::printf(" %s", (*form)->name);
  std::printf("\n");
  return wrong != 0;
}
