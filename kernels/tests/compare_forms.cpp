// Every form of the product that this processor runs against the plain one, bit for bit, without Python or ONNX Runtime:
// for processors that are only emulated. With Debian's g++-aarch64-linux-gnu and qemu-user, in this folder:
//
//   aarch64-linux-gnu-g++ -O2 -std=c++17 -ffp-contract=off -march=armv8.2-a+dotprod -I../src -static
//       -o /tmp/compare_forms compare_forms.cpp ../src/product.cpp ../src/packing.cpp ../src/neon.cpp && qemu-aarch64 /tmp/compare_forms
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

enum class Kind { kHalf, kFloat, kByte };  // of scales

struct Case {
  int bits, block, outputs, inputs, rows;  // block 0: one for a row
  Kind kind;
  bool zeros;
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
  const int block = c.block ? c.block : c.inputs, each = 8 / (c.bits == 3 ? 4 : c.bits);
  const size_t blocks = (c.inputs + block - 1) / block;
  std::vector<uint8_t> codes(c.outputs * blocks * block * c.bits / 8), zeros(c.outputs * ((blocks + each - 1) / each));
  std::vector<uint8_t> bytes(c.outputs * (blocks + 1));
  std::vector<float> scales(c.outputs * blocks), x(size_t(c.rows) * c.inputs);
  for (auto& code : codes) code = uint8_t(draw());
  for (auto& zero : zeros) zero = uint8_t(draw());
  for (auto& scale : scales) scale = c.kind == Kind::kHalf ? float(draw() % 512) / 4096 : number(-0.01f, 0.01f);
  for (size_t i = 0; i < bytes.size(); i++) bytes[i] = uint8_t(i % (blocks + 1) == 0 ? draw() % 33 : draw());
  for (auto& value : x) value = number(-2, 2);
  if (c.rows > 3) x[c.inputs] = NAN;  // of one row
  const uint8_t* points = c.zeros ? zeros.data() : nullptr;
  const Scales given = c.kind == Kind::kByte ? Scales(bytes.data(), int64_t(blocks)) : Scales(scales.data());
  const Matrix m = c.block ? pack(c.outputs, c.inputs, c.bits, c.block, codes.data(), given, points)
                           : pack_rows(c.outputs, c.inputs, reinterpret_cast<const int8_t*>(codes.data()), scales.data());
  const std::vector<float> expected = product(kPlain, m, x, c.rows);
  int count = 0;
  for (const Form* const* form = forms(); *form != nullptr; form++)
    if ((*form)->here()) count += !same(product(**form, m, x, c.rows), expected);
  return count;
}

// What is between products, of rows of n numbers.
int apart_between(int n) {
  std::vector<float> x(n), skip(n), gamma(n), expected[2] = {std::vector<float>(n), std::vector<float>(n)};
  for (int i = 0; i < n; i++) x[i] = number(-9, 9), skip[i] = number(-9, 9), gamma[i] = number(0, 2);
  std::vector<float> gated = x, sums(n / 32 + 1);
  kPlain.norm(x.data(), skip.data(), gamma.data(), 1e-5f, n, expected[0].data(), expected[1].data());
  kPlain.sums(x.data(), n, 32, sums.data());
  kPlain.gate(gated.data(), skip.data(), n);
  int count = 0;
  for (const Form* const* form = forms(); *form != nullptr; form++) {
    if (!(*form)->here()) continue;
    std::vector<float> total(n), y(n), own = x, own_sums(n / 32 + 1);
    (*form)->norm(x.data(), skip.data(), gamma.data(), 1e-5f, n, total.data(), y.data());
    (*form)->sums(x.data(), n, 32, own_sums.data());
    (*form)->gate(own.data(), skip.data(), n);
    count += !(same(total, expected[0]) && same(y, expected[1]) && same(own_sums, sums) && same(own, gated));
  }
  return count;
}

// Numbers as a cache keeps them; codes without scales.
std::vector<uint8_t> cells_of(Cell cell, const std::vector<float>& x) {
  std::vector<uint8_t> cells(x.size() * bytes_of(cell));
  const std::vector<float> scales(x.size(), 1.0f / 60);
  if (cell == Cell::kFloat) std::memcpy(cells.data(), x.data(), cells.size());
  else if (cell == Cell::kHalf) kPlain.halve(x.data(), int(x.size()), reinterpret_cast<Half*>(cells.data()));
  else kPlain.narrow(x.data(), scales.data(), int(x.size()), reinterpret_cast<int8_t*>(cells.data()));
  return cells;
}

// Numbers to the nearest of 16 bits and back.
int apart_halves() {
  std::vector<float> x(1 << 16);
  for (float& each : x) {
    const uint32_t bits = draw();
    std::memcpy(&each, &bits, sizeof each);
    if (std::isnan(each)) each = number(-1e-5f, 1e-5f);
  }
  const int count = int(x.size());
  const auto expected = cells_of(Cell::kHalf, x);
  std::vector<float> wide(count), expected_wide(count);
  kPlain.widen(reinterpret_cast<const Half*>(expected.data()), count, expected_wide.data());
  int wrong = 0;
  for (const Form* const* form = forms(); *form != nullptr; form++) {
    if (!(*form)->here()) continue;
    std::vector<uint8_t> found(expected.size());
    (*form)->halve(x.data(), count, reinterpret_cast<Half*>(found.data()));
    (*form)->widen(reinterpret_cast<const Half*>(found.data()), count, wide.data());
    wrong += found != expected || !same(wide, expected_wide);
  }
  return wrong;
}

// Attention of some queries over one chunk, by tiles of turned keys if there are `many`.
int apart_attention(Cell cell, int size, int count, int rows, bool many) {
  std::vector<float> q(size_t(rows) * size), k(size_t(count) * size), v(k.size());
  for (auto* numbers : {&q, &k, &v})
    for (float& each : *numbers) each = number(-2, 2);
  if (rows > 4) q[4 * size] = NAN, q[3 * size] = 1e30f;
  Seen seen[kManyQueries];
  for (int r = 0; r < rows; r++) {
    const int end = 1 + int(draw() % count), begin = int(draw() % end);
    seen[r] = {q.data() + size_t(r) * size, begin, end};
  }
  const auto k_cells = cells_of(cell, k), v_cells = cells_of(cell, v);
  const Keys keys{cell, k_cells.data(), v_cells.data(), count, size};
  const auto attend_many = [&](const Form& form, Part* parts) {
    if (cell == Cell::kCode) {
      std::vector<int16_t> ordered[3];  // rows, keys and values
      for (auto& each : ordered) each.resize(size_t(kChunk) * ((size + 31) / 32 * 32), 12345);
      form.turn_codes(keys.of<int8_t>(), ordered[0].data(), ordered[1].data(), ordered[2].data());
      return form.attend_turned(keys.of<int8_t>(), ordered[1].data(), ordered[2].data(), seen, rows, 0.2f, parts);
    }
    std::vector<float> turned(size_t(kChunk) * size, NAN);
    Cells<float> wide{k.data(), v.data(), count, size};
    std::vector<float> wide_k(k.size()), wide_v(v.size());
    if (cell == Cell::kHalf) {
      form.widen(keys.of<Half>().k, count * size, wide_k.data());
      form.widen(keys.of<Half>().v, count * size, wide_v.data());
      wide.k = wide_k.data(), wide.v = wide_v.data();
    }
    form.turn(wide.k, count, size, turned.data());
    form.attend_many(wide, turned.data(), seen, rows, 0.2f, parts);
  };
  const auto result = [&](const Form& form) {
    std::vector<float> found(size_t(rows) * (size + 2));
    Part parts[kManyQueries];
    for (int r = 0; r < rows; r++) parts[r].sum = found.data() + size_t(r) * (size + 2);
    if (many) attend_many(form, parts);
    else form.attend(keys, seen, rows, 0.2f, parts);
    for (int r = 0; r < rows; r++) parts[r].sum[size] = parts[r].top, parts[r].sum[size + 1] = parts[r].total;
    if (rows > 1) form.merge(parts[1], size, &parts[0]);
    form.finish(parts[0], q.data(), size, parts[0].sum);
    form.rotate(parts[0].sum, q.data(), k.data(), size / 2, size, parts[rows - 1].sum);
    return found;
  };
  const std::vector<float> expected = result(kPlain);
  int wrong = 0;
  for (const Form* const* form = forms(); *form != nullptr; form++)
    if ((*form)->here()) wrong += !same(result(**form), expected);
  return wrong;
}

}  // namespace

int main() {
  int cases = 0, wrong = 0;
  const auto tried = [&](const Case& c) { cases++, wrong += apart(c); };
  for (const int outputs : {1, 5, 32, 33, 70})
    for (int rows = 1; rows <= 9; rows += 2)
      for (const Kind kind : {Kind::kHalf, Kind::kFloat, Kind::kByte}) {
        for (const int bits : {2, 3, 4, 8})
          for (const int block : {16, 32, 64, 128})
            for (const int inputs : {7, 64, 130, 300})
              for (const bool zeros : {true, false}) tried({bits, block, outputs, inputs, rows, kind, zeros});
        for (const int inputs : {16, 128, 144, 592})
          if (kind != Kind::kByte) tried({8, 0, outputs, inputs, rows, kind, false});
      }
  for (int n = 1; n < 200; n++) cases++, wrong += apart_between(n);
  for (const int size : {16, 32, 48, 64, 80, 128, 256})
    for (const int count : {1, 15, 17, 100, 256})
      for (int rows = 1; rows <= kManyQueries; rows++) {
        for (const Cell cell : {Cell::kFloat, Cell::kHalf, Cell::kCode}) {
          if (rows <= kMostQueries) cases++, wrong += apart_attention(cell, size, count, rows, false);
          cases++, wrong += apart_attention(cell, size, count, rows, true);
        }
      }
  cases++, wrong += apart_halves();
  std::printf("%d cases, %d apart; forms here:", cases, wrong);
  for (const Form* const* form = forms(); *form != nullptr; form++)
    if ((*form)->here()) std::printf(" %s", (*form)->name);
  std::printf("\n");
  return wrong != 0;
}
