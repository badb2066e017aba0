// Matrices put into the order in which products read them, from the memory that they are given in.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <sys/mman.h>
#endif

#include "halves.h"
#include "product.h"

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

// Eight codes of 8 bits as they are kept: those with even numbers, then the others.
void keep_bytes(const uint8_t* codes, uint8_t* even, uint8_t* odd) {
  uint64_t all;
  std::memcpy(&all, codes, 8);
  for (uint8_t* to : {even, odd}) {
    uint64_t half = all & 0x00ff00ff00ff00ff;
    half = (half | half >> 8) & 0x0000ffff0000ffff;
    const uint32_t bytes = static_cast<uint32_t>(half | half >> 16);
    std::memcpy(to, &bytes, 4);
    all >>= 8;
  }
}

// A block of codes of one output, as lines of 4 bytes for each of 32.
void keep(int bits, int block, const uint8_t* codes, uint8_t* lines) {
  if (bits == 4) {
    for (int l = 0; l < block / 8; l++) std::memcpy(lines + 4 * kUnit * l, codes + 4 * l, 4);
  } else if (bits == 8) {
    for (int l = 0; l < block / 4; l += 2)
      keep_bytes(codes + 4 * l, lines + 4 * kUnit * l, lines + 4 * kUnit * (l + 1));
  } else {
    for (int l = 0; l < block / 16; l++) std::memset(lines + 4 * kUnit * l, 0, 4);
    for (int i = 0; i < block; i++) {
      const int code = codes[i / 4] >> 2 * (i % 4) & 3, p = kept(i);
      lines[4 * kUnit * (p / 16) + p % 4] |= code << 2 * (p % 16 / 4);
    }
  }
}

bool are_halves(const Scales& scales, size_t count) {
  uint16_t half = 0;
  bool all = true;
  if (scales.halves)
    for (size_t i = 0; i < count; i++) all = all && (scales.halves[i] & 0x7c00) != 0x7c00;  // is a number
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

// One output's scale, the one at `from`, and zero into a record.
void finish(const Matrix& m, uint8_t* record, int r, const Scales& scales, size_t from, uint8_t zero) {
  uint8_t* scale = record + m.codes_bytes();
  if (m.half) {
    uint16_t half = 0;
    if (scales.halves) half = scales.halves[from];
    else half_of(scales.floats[from], &half);
    std::memcpy(scale + r * sizeof half, &half, sizeof half);
  } else {
    const float value = scales.halves ? float_of(scales.halves[from]) : scales.floats[from];
    std::memcpy(scale + r * sizeof value, &value, sizeof value);
  }
  record[m.record - kUnit + r] = zero;
}

}  // namespace

Matrix pack(int outputs, int inputs, int bits, int block, const uint8_t* codes, Scales scales, const uint8_t* zeros,
            Read read) {
  const Matrix m = fresh(outputs, inputs, bits, block, scales);
  const int each = 8 / bits, all = (1 << bits) - 1;
  const size_t zero_bytes = (m.blocks + each - 1) / each, block_bytes = size_t(block) * bits / 8;
  uint8_t* record = m.data.get();
  Told told(codes, read);
  for (int first = 0; first < outputs; first += kUnit) {
    const int count = std::min(outputs - first, kUnit);
    for (int b = 0; b < m.blocks; b++, record += m.record) {
      for (int r = 0; r < count; r++) {
        const size_t n = first + r, from = n * m.blocks + b;
        keep(bits, block, codes + from * block_bytes, record + 4 * r);
        const int zero = zeros ? zeros[n * zero_bytes + b / each] >> bits * (b % each) & all : 1 << (bits - 1);
        finish(m, record, r, scales, from, uint8_t(zero));
      }
    }
    told.until(codes + (first + count) * m.blocks * block_bytes, first + count == outputs);
  }
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
        const int first = u * kUnit, count = std::min(outputs - first, kUnit);
        for (int r = 0; r < count; r++) {
          uint32_t four = 0;
          for (int j = 0; j < 4; j++) four |= uint32_t(uint8_t(rows[size_t(2 * j) * outputs + first + r])) << 8 * j;
          four ^= 0x80808080;  // a code of either sign and 128
          std::memcpy(to + 4 * r, &four, 4);
        }
      }
    }
    told.until(codes + size_t(i + 8) * outputs, i + 8 == inputs);
  }
  for (int n = 0; n < outputs; n++) finish(m, m.data.get() + n / kUnit * m.unit_bytes(), n % kUnit, scales, n, 128);
  return m;
}

}  // namespace edgellm
