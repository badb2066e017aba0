// The product of rows of numbers with a matrix of codes of 2, 4 or 8 bits, in the format of ONNX Runtime's MatMulNBits at
// accuracy level 4: inputs are rounded to 8 bits, block by block, and the product of a block is exact in whole numbers.
// Or codes of 8 bits that share a scale along a whole row, as of MatMulIntegerToFloat: then a row is one block.
//
// Every form of it (one for each kind of processor) computes the same bits, stated here once:
//   of a block of inputs, top = the largest magnitude; scale = top / 127; code = x * (127 / top), to the nearest, ties to
//   even. A block whose top is below 1e-30 has scale 0; one with an infinity or a NaN has scale NaN.
//   y starts at 0; block after block, y = fma(float(sum of (code of w - zero) * code of x), scale of w * scale of x, y),
//   everything in float32.
// So a row's result depends on nothing but the row and the matrix: not on its neighbours, not on threads.
#pragma once
#include <cstddef>
#include <cstdint>
#include <memory>

namespace edgellm {

constexpr int kUnit = 32;      // outputs that are computed together
constexpr int kMostRows = 4;   // inputs that are read together
constexpr int kLargestBlock = 128;
constexpr int kLongestRow = 65536;  // as one block: 255 * 127 times it fits into 32 bits
constexpr float kLeast = 1e-30f;

// The order in which a row's codes are kept, of the row and of a matrix alike: of each 8 those with even numbers first.
constexpr int kept(int i) { return i / 8 * 8 + i % 2 * 4 + i % 8 / 2; }

// A matrix of `outputs` rows and `inputs` columns, read from its first byte to its last. Outputs are padded to units of
// 32. A unit is a row of records, one for each block: lines of codes, 32 scales, 32 zeros (bytes). A line has 4 bytes of
// each of the 32 outputs, with 32 / bits codes: the one kept at p stands in byte p % 4, p / 4 * bits above its lowest
// bit. Scales are float16 if all are such numbers, else float32.
struct Matrix {
  int outputs, inputs, bits, block, blocks, units;
  bool half;  // scales are float16
  size_t record;
  std::shared_ptr<uint8_t> data;
  int lines() const { return block * bits / 32; }
  size_t codes_bytes() const { return size_t(kUnit) * 4 * lines(); }
  size_t unit_bytes() const { return blocks * record; }
  const uint8_t* unit(int u) const { return data.get() + u * unit_bytes(); }
};

// Scales as they are given: float32, float16, or bytes: of each row its power of two, counted from 2^-24, and then whole
// numbers of these for its blocks (edgellm_runtime/graphs/narrow_scales.py).
struct Scales {
  Scales(const float* numbers) : floats(numbers) {}
  Scales(const uint16_t* numbers) : halves(numbers) {}
  Scales(const uint8_t* numbers, int64_t blocks) : bytes(numbers), blocks(size_t(blocks)) {}
  float at(size_t i) const;         // throws where a power is none
  int power(size_t row) const;      // so too; of bytes, counted from the least
  const float* floats = nullptr;
  const uint16_t* halves = nullptr;
  const uint8_t* bytes = nullptr;
  size_t blocks = 0;  // of a row of bytes
};

using Read = void (*)(const void* bytes, size_t size);  // told which codes will hardly be read again

// As MatMulNBits has it: codes (outputs, blocks, block * bits / 8), scales (outputs, blocks), zeros (outputs, bytes of
// blocks * bits), the earlier code or zero of a byte in its lower bits; or null where every zero is half of the codes.
// Of 3 bits: codes as three_bits.h has them, zeros as of 4 bits; the matrix has 4 then.
Matrix pack(int outputs, int inputs, int bits, int block, const uint8_t* codes, Scales scales, const uint8_t* zeros,
            Read read = nullptr);

// As MatMulIntegerToFloat has it: codes (inputs, outputs), scales (outputs). Inputs are a multiple of 16, at most 65,536.
Matrix pack_rows(int outputs, int inputs, const int8_t* codes, Scales scales, Read read = nullptr);

// Rows that were rounded.
struct Rounded {
  int rows;
  const int8_t* codes;          // (rows, blocks * block), in the order in which they are kept
  const float* scales;          // (rows, blocks)
  const int32_t* minus_sums;    // (rows, blocks): minus the sum of a block's codes
};

constexpr int kChunk = 256;      // slots of a cache that are read together
constexpr int kMostQueries = 16; // that read them together
constexpr int kManyQueries = 48; // that read them turned

struct Half {
  uint16_t bits;  // of a float16
};

// What a cache keeps: numbers of 32 or 16 bits, or codes of 8.
enum class Cell { kFloat, kHalf, kCode };
constexpr size_t bytes_of(Cell cell) { return cell == Cell::kFloat ? 4 : cell == Cell::kHalf ? 2 : 1; }

// A chunk of one head's keys and values (count, size), `size` a multiple of 16.
template <class T>
struct Cells {
  const T *k, *v;
  int count, size;
};

// The same, of the kind that is said.
struct Keys {
  Cell cell;
  const void *k, *v;
  int count, size;
  template <class T>
  Cells<T> of() const { return {static_cast<const T*>(k), static_cast<const T*>(v), count, size}; }
};

// A query and the slots of a chunk that it sees, begin to end - 1, at least one.
struct Seen {
  const float* query;
  int begin, end;
};

// What attention over some slots gives one query; `sum` has as many numbers as a head.
struct Part {
  float top, total;
  float* sum;
};

// One kind of processor's form.
struct Form {
  const char* name;
  bool (*here)();  // whether this processor has the instructions
  // One row x (inputs) into codes, scales and minus_sums of a Rounded's row.
  void (*round)(const Matrix&, const float* x, int8_t* codes, float* scales, int32_t* minus_sums);
  // Outputs of units first to last - 1 for all rows, into y (rows, outputs).
  void (*multiply)(const Matrix&, const Rounded&, float* y, int first, int last);
  // What elementwise.h states, of one row.
  void (*norm)(const float* x, const float* skip, const float* gamma, float epsilon, int n, float* sum, float* y);
  void (*sums)(const float* x, int n, int block, float* y);
  void (*gate)(float* gate, const float* up, int n);
  // What attention.h states.
  void (*attend)(const Keys&, const Seen*, int rows, float scale, Part*);
  void (*merge)(const Part& later, int size, Part* all);
  void (*finish)(const Part& all, const float* scales, int size, float* y);
  void (*rotate)(const float* x, const float* cosine, const float* sine, int turned, int size, float* y);
  void (*narrow)(const float* x, const float* scales, int size, int8_t* codes);
  void (*halve)(const float* x, int count, Half* halves);
  void (*widen)(const Half* halves, int count, float* x);  // count: a multiple of 16
  // The same numbers for up to kManyQueries, from the chunk's keys and those as `turn` puts them into kChunk * size.
  void (*turn)(const float* k, int count, int size, float* turned);
  void (*attend_many)(const Cells<float>&, const float* turned, const Seen*, int rows, float scale, Part*);
  // So too of codes: `turn_codes` puts a chunk's into keys and values, and needs `rows`; each has room for kChunk times the
  // size, rounded up to a multiple of 32.
  void (*turn_codes)(const Cells<int8_t>&, int16_t* rows, int16_t* keys, int16_t* values);
  void (*attend_turned)(const Cells<int8_t>&, const int16_t* keys, const int16_t* values, const Seen*, int rows, float scale,
                        Part*);
};

extern const Form kPlain;  // the reference, in plain C++
const Form* const* forms();   // all that were compiled, the fastest first; ends with a null
const Form* best();           // the fastest that runs here and is worth it; null if there is none

}  // namespace edgellm
