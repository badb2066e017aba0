// Matrices put into the order in which products read them, from the memory that they are given in.
#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>
#include <stdexcept>
#include <vector>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "halves.h"
#include "product.h"
#include "three_bits.h"

namespace edgellm {
namespace {

constexpr size_t kHugePage = size_t(2) << 20, kPiece = 16 * kHugePage, kLine = 64;

// Memory for matrices, of which small ones share a piece, so that they lie in huge pages: reading a page that the
// processor must first look up costs more than reading what is on it. A piece goes with the last matrix in it.
class Pieces {
 public:
  std::shared_ptr<uint8_t> take(size_t bytes) {
    bytes = (bytes + kLine - 1) / kLine * kLine;
    const std::lock_guard<std::mutex> lock(mutex_);
    std::shared_ptr<uint8_t> piece = current_.lock();
    if (piece == nullptr || used_ + bytes > size_) {
      size_ = std::max(kPiece, (bytes + kHugePage - 1) / kHugePage * kHugePage);  // what is not used takes no memory
      current_ = piece = fresh(size_);
      used_ = 0;
    }
    std::shared_ptr<uint8_t> part(piece, piece.get() + used_);
    used_ += bytes;
    return part;
  }

 private:
  static std::shared_ptr<uint8_t> fresh(size_t size) {
    void* p = std::aligned_alloc(kHugePage, size);
    if (p == nullptr) throw std::bad_alloc();
#if defined(__linux__)
    madvise(p, size, MADV_HUGEPAGE);
#endif
    return std::shared_ptr<uint8_t>(static_cast<uint8_t*>(p), [](uint8_t* piece) { std::free(piece); });
  }

  std::mutex mutex_;
  std::weak_ptr<uint8_t> current_;
  size_t size_ = 0, used_ = 0;
};

Pieces& pieces() {
  static Pieces all;
  return all;
}

constexpr int kLeastPower = -24, kPowers = 32;  // the least of two's powers, and how many more there are
constexpr size_t kForgotten = 1 << 20;  // bytes that are read between two times that some are told to be

// Tells what was read of a matrix's codes, some of it at a time.
class Told {
 public:
  Told(const void* codes, Read read) : from_(static_cast<const uint8_t*>(codes)), read_(read) {}
  void until(const void* end, bool last) {
    const size_t size = static_cast<const uint8_t*>(end) - from_;
    if (read_ == nullptr || (size < kForgotten && !last)) return;
    read_(from_, size);
    from_ += size;
  }

 private:
  const uint8_t* from_;
  Read read_;
};

// A block of codes of one output, as lines of 4 bytes for each of 32: in the order that `kept` says.
void keep2(int block, const uint8_t* codes, uint8_t* lines) {
  const auto spread = [](uint32_t half) {  // each 4 bits of 16 into the lower half of a byte
    half = (half | half << 8) & 0x00ff00ff;
    return (half | half << 4) & 0x0f0f0f0f;
  };
  for (int l = 0; l < block / 16; l++) {
    const uint32_t low = codes[4 * l] | codes[4 * l + 1] << 8, high = codes[4 * l + 2] | codes[4 * l + 3] << 8;
    const uint32_t all = spread(low) | spread(high) << 4;
    for (int i = 0; i < 4; i++) lines[4 * kUnit * l + i] = uint8_t(all >> 8 * i);
  }
}

void keep4(int block, const uint8_t* codes, uint8_t* lines) {
  for (int l = 0; l < block / 8; l++) std::memcpy(lines + 4 * kUnit * l, codes + 4 * l, 4);
}

void keep8(int block, const uint8_t* codes, uint8_t* lines) {
  for (int from = 0; from < block; from += 16, lines += 16 * kUnit) {
    uint8_t even[8], odd[8];
    for (int i = 0; i < 8; i++) even[i] = codes[from + 2 * i], odd[i] = codes[from + 2 * i + 1];
    std::memcpy(lines, even, 4), std::memcpy(lines + 4 * kUnit, odd, 4);
    std::memcpy(lines + 8 * kUnit, even + 4, 4), std::memcpy(lines + 12 * kUnit, odd + 4, 4);
  }
}

bool are_halves(const Scales& scales, size_t count) {
  uint16_t half = 0;
  bool all = true;
  if (scales.bytes) return true;  // with any power that there is
  if (scales.halves)
    for (size_t i = 0; i < count; i++) all &= (scales.halves[i] & 0x7c00) != 0x7c00;  // is a number
  else
    for (size_t i = 0; i < count && all; i++) all = half_of(scales.floats[i], &half);
  return all;
}

// Memory for a matrix, whose last unit is all zero, and whether its scales are float16.
Matrix fresh(int outputs, int inputs, int bits, int block, const Scales& scales) {
  const int blocks = (inputs + block - 1) / block, units = (outputs + kUnit - 1) / kUnit;
  Matrix m{outputs, inputs, bits, block, blocks, units, are_halves(scales, size_t(outputs) * blocks), 0, nullptr};
  m.record = m.codes_bytes() + kUnit * ((m.half ? sizeof(uint16_t) : sizeof(float)) + 1);
  m.data = pieces().take(m.units * m.unit_bytes());
  if (outputs % kUnit != 0) std::memset(m.data.get() + (units - 1) * m.unit_bytes(), 0, m.unit_bytes());
  return m;
}

using NarrowHalves = uint16_t[kPowers + 1][256];

// The float16 of each byte of scales with each power.
const NarrowHalves& narrow_halves() {
  static NarrowHalves all;
  static const bool made = [] {
    for (int power = 0; power <= kPowers; power++)
      for (int whole = 0; whole < 256; whole++) half_of(std::ldexp(float(whole), power + kLeastPower), &all[power][whole]);
    return true;
  }();
  (void)made;
  return all;
}

// The scales of a block of some outputs, from output `first` on, into a record.
void set_scales(const Matrix& m, uint8_t* record, int count, const Scales& scales, int first, int block) {
  uint8_t* to = record + m.codes_bytes();
  const NarrowHalves& narrow = narrow_halves();
  for (int r = 0; r < count; r++) {
    const size_t row = size_t(first + r), at = row * m.blocks + block;
    if (m.half) {
      uint16_t half = 0;
      if (scales.bytes) half = narrow[scales.power(row)][scales.bytes[row * (m.blocks + 1) + 1 + block]];
      else if (scales.halves) half = scales.halves[at];
      else half_of(scales.floats[at], &half);
      std::memcpy(to + r * sizeof half, &half, sizeof half);
    } else {
      const float value = scales.at(at);
      std::memcpy(to + r * sizeof value, &value, sizeof value);
    }
  }
}

// Four rows of codes as one line of some outputs: a byte of each, a code of either sign and 128.
void interleave(const int8_t* rows, size_t stride, int count, uint8_t* to) {
  const int8_t *a = rows, *b = a + stride, *c = b + stride, *d = c + stride;
  for (int r = 0; r < count; r++) {
    to[4 * r] = uint8_t(a[r]) ^ 128, to[4 * r + 1] = uint8_t(b[r]) ^ 128;
    to[4 * r + 2] = uint8_t(c[r]) ^ 128, to[4 * r + 3] = uint8_t(d[r]) ^ 128;
  }
}

}  // namespace

float Scales::at(size_t i) const {
  if (halves) return float_of(halves[i]);
  if (floats) return floats[i];
  const size_t row = i / blocks;
  return std::ldexp(float(bytes[row * (blocks + 1) + 1 + i % blocks]), power(row) + kLeastPower);
}

int Scales::power(size_t row) const {
  const uint8_t found = bytes[row * (blocks + 1)];
  if (found > kPowers) throw std::invalid_argument("scales whose power of two is none of 33");
  return found;
}

Matrix pack(int outputs, int inputs, int bits, int block, const uint8_t* codes, Scales scales, const uint8_t* zeros,
            Read read) {
  const bool three = bits == 3;
  if (three) bits = 4;
  const Matrix m = fresh(outputs, inputs, bits, block, scales);
  const int each = 8 / bits, all = (1 << bits) - 1;
  const size_t zero_bytes = (m.blocks + each - 1) / each, block_bytes = size_t(block) * bits / 8;
  const auto keep = bits == 2 ? keep2 : bits == 4 ? keep4 : keep8;
  const size_t row_bytes = m.blocks * block_bytes, part = outputs * row_bytes / (kStoredParts + 1);
  std::vector<uint8_t> unit(three ? kUnit * row_bytes : 0);
  uint8_t* record = m.data.get();
  Told told(codes, three ? nullptr : read);
  for (int first = 0; first < outputs; first += kUnit) {
    const int count = std::min(outputs - first, kUnit);
    const uint8_t* rows = three ? unit.data() : codes + first * row_bytes;
    if (three) spread(part, first * row_bytes, count * row_bytes, unit.data(), [&](size_t at, size_t) { return codes + at; });
    for (int b = 0; b < m.blocks; b++, record += m.record) {
      for (int r = 0; r < count; r++) keep(block, rows + (b + size_t(r) * m.blocks) * block_bytes, record + 4 * r);
      set_scales(m, record, count, scales, first, b);
      uint8_t* zero = record + m.record - kUnit;
      for (int r = 0; r < count; r++)
        zero[r] = zeros ? zeros[(first + r) * zero_bytes + b / each] >> bits * (b % each) & all : 1 << (bits - 1);
    }
    told.until(codes + (first + count) * row_bytes, first + count == outputs);
  }
  if (three && read != nullptr) read(codes, kStoredParts * part);
  return m;
}

Matrix pack_rows(int outputs, int inputs, const int8_t* codes, Scales scales, Read read) {
  const Matrix m = fresh(outputs, inputs, 8, inputs, scales);
  Told told(codes, read);
  for (int i = 0; i < inputs; i += 8) {  // eight rows of codes are two lines of each unit
    for (int line = 0; line < 2; line++) {
      const int8_t* rows = codes + size_t(i + line) * outputs;
      for (int u = 0; u < m.units; u++) {
        uint8_t* to = m.data.get() + u * m.unit_bytes() + 4 * kUnit * (i / 4 + line);
        const int first = u * kUnit, count = outputs - first;
        if (count < kUnit) interleave(rows + first, 2 * size_t(outputs), count, to);
        else interleave(rows + first, 2 * size_t(outputs), kUnit, to);  // a number that the compiler knows
      }
    }
    told.until(codes + size_t(i + 8) * outputs, i + 8 == inputs);
  }
  for (int u = 0; u < m.units; u++) {
    const int count = std::min(outputs - u * kUnit, kUnit);
    uint8_t* record = m.data.get() + u * m.unit_bytes();
    set_scales(m, record, count, scales, u * kUnit, 0);
    std::memset(record + m.record - kUnit, 128, count);
  }
  return m;
}

}  // namespace edgellm
