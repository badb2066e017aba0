// What is called of the library without ONNX Runtime: which form runs here, and each form's numbers, for tests.
#include <algorithm>
#include <string>
#include <vector>

#include "product.h"

#define EXPORTED extern "C" __attribute__((visibility("default")))

using namespace edgellm;

namespace {

// The form of a name, if it was compiled and runs here.
const Form* named(const char* name) {
  for (const Form* const* form = forms(); *form != nullptr; form++)
    if (std::string(name) == (*form)->name) return (*form)->here() ? *form : nullptr;
  return nullptr;
}

}  // namespace

// The name of the form that runs here; an empty text where none does.
EXPORTED const char* edgellm_form() {
  const Form* form = best();
  return form ? form->name : "";
}

EXPORTED int edgellm_has_form(const char* name) { return named(name) != nullptr; }

// A whole product by the form of a name, on this thread: x (rows, inputs) to y (rows, outputs); block 0 for codes that
// share a scale along a row. Returns 0, or 1 where there is no such form here.
EXPORTED int edgellm_product(const char* name, int rows, int outputs, int inputs, int bits, int block, const float* x,
                             const void* codes, const float* scales, const uint8_t* zeros, float* y) {
  const Form* form = named(name);
  if (form == nullptr) return 1;
  const Matrix m = block ? pack(outputs, inputs, bits, block, static_cast<const uint8_t*>(codes), scales, zeros)
                         : pack_rows(outputs, inputs, static_cast<const int8_t*>(codes), scales);
  const size_t blocks = size_t(rows) * m.blocks;
  std::vector<int8_t> rounded(blocks * m.block);
  std::vector<float> row_scales(blocks);
  std::vector<int32_t> minus_sums(blocks);
  for (int row = 0; row < rows; row++) {
    const size_t at = size_t(row) * m.blocks;
    form->round(m, x + size_t(row) * inputs, rounded.data() + at * m.block, row_scales.data() + at, minus_sums.data() + at);
  }
  form->multiply(m, Rounded{rows, rounded.data(), row_scales.data(), minus_sums.data()}, y, 0, m.units);
  return 0;
}

// One row's norm, by the form of a name: sum = x + skip and y, all of n numbers.
EXPORTED int edgellm_norm(const char* name, int n, const float* x, const float* skip, const float* gamma, float epsilon,
                          float* sum, float* y) {
  const Form* form = named(name);
  if (form != nullptr) form->norm(x, skip, gamma, epsilon, n, sum, y);
  return form == nullptr;
}

// The sums of each block of n numbers.
EXPORTED int edgellm_sums(const char* name, int n, int block, const float* x, float* y) {
  const Form* form = named(name);
  if (form != nullptr) form->sums(x, n, block, y);
  return form == nullptr;
}

// SiLU of n numbers times others, in the place of the first.
EXPORTED int edgellm_gate(const char* name, int n, float* gate, const float* up) {
  const Form* form = named(name);
  if (form != nullptr) form->gate(gate, up, n);
  return form == nullptr;
}

namespace {

struct Queries {
  int rows, together, size;  // `together` of the rows at a time
  const float* q;
  const int *begins, *ends;
  bool many;  // by tiles of turned keys
};

// One chunk, whose first slot is `start`, for those queries that see some of it.
void attend_chunk(const Form& form, const Queries& some, const Keys& keys, int start, float scale, std::vector<Part>* all) {
  const size_t size = keys.size;
  std::vector<float> later(kManyQueries * size), turned(kChunk * size), k(keys.count * size), v(keys.count * size);
  const bool codes = keys.cell == Cell::kCode, halves = keys.cell == Cell::kHalf;
  const Cells<float> wide = halves ? Cells<float>{k.data(), v.data(), keys.count, keys.size} : keys.of<float>();
  std::vector<int16_t> rounded[3];  // rows, keys and values
  for (auto& each : rounded) each.resize(codes ? 2 * kChunk * size : 0);
  if (some.many && codes) {
    form.turn_codes(keys.of<int8_t>(), rounded[0].data(), rounded[1].data(), rounded[2].data());
  } else if (some.many) {
    if (halves) form.widen(keys.of<Half>().k, keys.count * keys.size, k.data());
    if (halves) form.widen(keys.of<Half>().v, keys.count * keys.size, v.data());
    form.turn(wide.k, keys.count, keys.size, turned.data());
  }
  for (int first = 0; first < some.rows; first += some.together) {
    Seen seen[kManyQueries];
    Part parts[kManyQueries];
    int whose[kManyQueries], n = 0;
    for (int i = first; i < some.rows && i < first + some.together; i++) {
      const int begin = std::max(0, some.begins[i] - start), end = std::min(kChunk, some.ends[i] - start);
      if (begin >= end) continue;
      seen[n] = {some.q + i * size, begin, end};
      parts[n].sum = later.data() + n * size;
      whose[n++] = i;
    }
    if (n == 0) continue;
    if (some.many && codes)
      form.attend_turned(keys.of<int8_t>(), rounded[1].data(), rounded[2].data(), seen, n, scale, parts);
    else if (some.many) form.attend_many(wide, turned.data(), seen, n, scale, parts);
    else form.attend(keys, seen, n, scale, parts);
    for (int r = 0; r < n; r++) {
      Part& own = (*all)[whose[r]];
      if (some.begins[whose[r]] < start) {
        form.merge(parts[r], keys.size, &own);
        continue;
      }
      own.top = parts[r].top, own.total = parts[r].total;
      std::copy(parts[r].sum, parts[r].sum + size, own.sum);
    }
  }
}

int attention(const char* name, const Queries& some, int count, float scale, Keys all_keys, float* y) {
  const Form* form = named(name);
  if (form == nullptr) return 1;
  const size_t size = some.size;
  std::vector<float> sums(some.rows * size);
  std::vector<Part> all(some.rows);
  for (int i = 0; i < some.rows; i++) all[i] = {0, 0, sums.data() + i * size};
  for (int start = 0; start < count; start += kChunk) {
    const size_t at = start * size * bytes_of(all_keys.cell);
    const Keys keys{all_keys.cell, static_cast<const uint8_t*>(all_keys.k) + at, static_cast<const uint8_t*>(all_keys.v) + at,
                    std::min(kChunk, count - start), some.size};
    attend_chunk(*form, some, keys, start, scale, &all);
  }
  for (int i = 0; i < some.rows; i++) form->finish(all[i], nullptr, some.size, y + i * size);
  return 0;
}

}  // namespace

// Attention of queries (rows, size) over one head's keys and values (count, size), cells of 32, 16 or 8 `bits`, up to 16 of
// them `together`: query i sees slots begins[i] to ends[i] - 1, at least one. Or up to 48, by tiles of turned keys, if they
// are `many`.
EXPORTED int edgellm_attention(const char* name, int many, int bits, int rows, int together, int count, int size, float scale,
                               const float* q, const void* k, const void* v, const int* begins, const int* ends, float* y) {
  const Cell cell = bits == 32 ? Cell::kFloat : bits == 16 ? Cell::kHalf : Cell::kCode;
  return attention(name, {rows, together, size, q, begins, ends, many != 0}, count, scale, {cell, k, v, count, size}, y);
}

// Numbers as the nearest float16, 16 at a time.
EXPORTED int edgellm_halve(const char* name, int count, const float* x, uint16_t* halves) {
  const Form* form = named(name);
  if (form != nullptr) form->halve(x, count, reinterpret_cast<Half*>(halves));
  return form == nullptr;
}
