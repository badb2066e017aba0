#include "product.h"

#include <algorithm>
#include <cmath>
#include <cstdlib>
#include <cstring>
#include <mutex>
#include <new>

#if defined(__linux__)
#include <fcntl.h>
#include <sys/mman.h>
#include <unistd.h>

#include <vector>
#endif

#include "attention.h"

namespace edgellm {

#if defined(__x86_64__)
extern const Form kAvx512, kAvx2;
#elif defined(__aarch64__)
extern const Form kNeon;
#endif

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

}  // namespace

namespace {

// The float16 of the same value; false if there is none.
bool half_of(float value, uint16_t* half) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000, exponent = bits >> 23 & 0xff;
  const float small = std::fabs(value) * 16777216.0f;  // in units of the smallest float16
  if (small < 1024) {
    *half = static_cast<uint16_t>(sign | static_cast<uint32_t>(small));
    return small == std::floor(small);
  }
  *half = static_cast<uint16_t>(sign | (exponent - 112) << 10 | (bits >> 13 & 0x3ff));
  return exponent <= 142 && (bits & 0x1fff) == 0;
}

float float_of(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * float(half & 0x3ff) / 16777216.0f;
  const uint32_t bits = (exponent + 112) << 23 | uint32_t(half & 0x3ff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return sign * value;
}

}  // namespace

namespace {

// A block of codes of one output, as lines of 4 bytes for each of 32.
void keep(int bits, int block, const uint8_t* codes, uint8_t* lines) {
  if (bits == 4) {
    for (int l = 0; l < block / 8; l++) std::memcpy(lines + 4 * kUnit * l, codes + 4 * l, 4);
  } else if (bits == 8) {
    for (int l = 0; l < block / 4; l += 2)
      for (int j = 0; j < 4; j++) {
        lines[4 * kUnit * l + j] = codes[4 * l + 2 * j];
        lines[4 * kUnit * (l + 1) + j] = codes[4 * l + 2 * j + 1];
      }
  } else {
    for (int i = 0; i < block; i++) {
      const int code = codes[i / 4] >> 2 * (i % 4) & 3, p = kept(i);
      lines[4 * kUnit * (p / 16) + p % 4] |= code << 2 * (p % 16 / 4);
    }
  }
}

// Memory for a matrix, all zero, and whether its scales are float16.
Matrix fresh(int outputs, int inputs, int bits, int block, const float* scales) {
  const int blocks = (inputs + block - 1) / block, units = (outputs + kUnit - 1) / kUnit;
  Matrix m{outputs, inputs, bits, block, blocks, units, true, 0, nullptr};
  uint16_t half = 0;
  for (size_t i = 0; i < size_t(outputs) * m.blocks; i++) m.half = m.half && half_of(scales[i], &half);
  m.record = m.codes_bytes() + kUnit * ((m.half ? sizeof half : sizeof(float)) + 1);
  m.data = pieces().take(m.units * m.unit_bytes());
  std::memset(m.data.get(), 0, m.units * m.unit_bytes());
  return m;
}

// One output's scale and zero into a record.
void finish(const Matrix& m, uint8_t* record, int r, float value, uint8_t zero) {
  uint8_t* scale = record + m.codes_bytes();
  uint16_t half;
  if (m.half && half_of(value, &half)) std::memcpy(scale + r * sizeof half, &half, sizeof half);
  if (!m.half) std::memcpy(scale + r * sizeof value, &value, sizeof value);
  record[m.record - kUnit + r] = zero;
}

}  // namespace

Matrix pack(int outputs, int inputs, int bits, int block, const uint8_t* codes, const float* scales, const uint8_t* zeros) {
  const Matrix m = fresh(outputs, inputs, bits, block, scales);
  const int each = 8 / bits, all = (1 << bits) - 1;
  const size_t zero_bytes = (m.blocks + each - 1) / each;
  uint8_t* record = m.data.get();
  for (int first = 0; first < outputs; first += kUnit) {
    for (int b = 0; b < m.blocks; b++, record += m.record) {
      for (int r = 0; r < kUnit && first + r < outputs; r++) {
        const size_t n = first + r, from = n * m.blocks + b;
        keep(bits, block, codes + from * block * bits / 8, record + 4 * r);
        const int zero = zeros ? zeros[n * zero_bytes + b / each] >> bits * (b % each) & all : 1 << (bits - 1);
        finish(m, record, r, scales[from], uint8_t(zero));
      }
    }
  }
  return m;
}

Matrix pack_rows(int outputs, int inputs, const int8_t* codes, const float* scales) {
  const Matrix m = fresh(outputs, inputs, 8, inputs, scales);
  for (int u = 0; u < m.units; u++) {
    uint8_t* record = m.data.get() + u * m.unit_bytes();
    const int count = outputs - u * kUnit < kUnit ? outputs - u * kUnit : kUnit;
    for (int i = 0; i < inputs; i++) {
      const int8_t* from = codes + size_t(i) * outputs + u * kUnit;
      uint8_t* line = record + 4 * kUnit * (kept(i) / 4) + kept(i) % 4;
      for (int r = 0; r < count; r++) line[4 * r] = uint8_t(from[r] + 128);
    }
    for (int r = 0; r < count; r++) finish(m, record, r, scales[u * kUnit + r], 128);
  }
  return m;
}

void forget(const void* bytes, size_t size) {
#if defined(__linux__)
  const size_t page = sysconf(_SC_PAGESIZE), address = reinterpret_cast<size_t>(bytes);
  const size_t first = (address + page - 1) / page, last = (address + size) / page;
  if (first >= last) return;
  // A page of memory that is no file's would be lost, one that was written to would come back as it was before; the
  // system says of each which it is (Documentation/admin-guide/mm/pagemap.rst).
  constexpr uint64_t kThere = 1ull << 63, kSwapped = 1ull << 62, kOfFile = 1ull << 61;
  std::vector<uint64_t> pages(last - first);
  const size_t wanted = pages.size() * sizeof(uint64_t);
  const int map = open("/proc/self/pagemap", O_RDONLY | O_CLOEXEC);
  if (map < 0) return;
  const ssize_t got = pread(map, pages.data(), wanted, off_t(first * sizeof(uint64_t)));
  close(map);
  if (got != ssize_t(wanted)) return;
  for (const uint64_t flags : pages)
    if (flags & kSwapped || (flags & kThere && !(flags & kOfFile))) return;
  madvise(reinterpret_cast<void*>(first * page), (last - first) * page, MADV_DONTNEED);
#else
  (void)bytes, (void)size;
#endif
}

namespace {

void round_plain(const Matrix& m, const float* x, int8_t* codes, float* scales, int32_t* minus_sums) {
  for (int b = 0; b < m.blocks; b++) {
    const int start = b * m.block;
    float top = 0;
    bool finite = true;
    for (int i = start; i < start + m.block && i < m.inputs; i++) {
      finite = finite && std::isfinite(x[i]);
      top = std::fmax(top, std::fabs(x[i]));
    }
    const bool none = !(top >= kLeast) || !finite;
    const float inverse = none ? 0 : 127 / top;
    int32_t sum = 0;
    for (int i = 0; i < m.block; i++) {
      const float value = none || start + i >= m.inputs ? 0 : x[start + i];
      const int8_t code = static_cast<int8_t>(std::nearbyintf(value * inverse));
      codes[start + kept(i)] = code;
      sum += code;
    }
    scales[b] = !finite ? NAN : none ? 0 : top / 127;
    minus_sums[b] = -sum;
  }
}

void multiply_plain(const Matrix& m, const Rounded& x, float* y, int first, int last) {
  const int each = 32 / m.bits;  // codes of an output in a line
  for (int n = first * kUnit; n < last * kUnit && n < m.outputs; n++) {
    const int r = n % kUnit;
    for (int row = 0; row < x.rows; row++) {
      const uint8_t* record = m.unit(n / kUnit);
      float sum = 0;
      for (int b = 0; b < m.blocks; b++, record += m.record) {
        const size_t from = size_t(row) * m.blocks + b;
        const int8_t* codes = x.codes + from * m.block;
        int32_t whole = record[m.record - kUnit + r] * x.minus_sums[from];
        for (int i = 0; i < m.block; i++) {  // in the order in which codes of x are kept
          const uint8_t byte = record[4 * (i / each * kUnit + r) + i % 4];
          whole += (byte >> m.bits * (i % each / 4) & ((1 << m.bits) - 1)) * codes[i];
        }
        const uint8_t* scales = record + m.codes_bytes();
        uint16_t half;
        float scale;
        if (m.half) std::memcpy(&half, scales + r * sizeof half, sizeof half), scale = float_of(half);
        else std::memcpy(&scale, scales + r * sizeof scale, sizeof scale);
        sum = std::fmaf(float(whole), scale * x.scales[from], sum);
      }
      y[size_t(row) * m.outputs + n] = sum;
    }
  }
}

// Sixteen numbers, for attention.
struct Sixteen {
  static constexpr int kKeys = 1, kWide = 1, kWideAlone = 1;
  float x[kLanes];
  static Sixteen of(float value) {
    Sixteen y;
    for (float& each : y.x) each = value;
    return y;
  }
  static Sixteen load(const float* from) {
    Sixteen y;
    std::memcpy(y.x, from, sizeof y.x);
    return y;
  }
  static Sixteen fma(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
    Sixteen y;
    for (int i = 0; i < kLanes; i++) y.x[i] = std::fmaf(a.x[i], b.x[i], c.x[i]);
    return y;
  }
  void store(float* to) const { std::memcpy(to, x, sizeof x); }
  static void together(const Sixteen* lanes, float* sums) {
    Sixteen copy = *lanes;
    *sums = edgellm::together(copy.x);
  }
};

}  // namespace

const Form kPlain{"plain", [] { return true; }, round_plain, multiply_plain, norm, sums, gate,
                  attend<Sixteen>, merge, finish, rotate, narrow, widen};

const Form* const* forms() {
#if defined(__x86_64__)
  static const Form* const all[] = {&kAvx512, &kAvx2, &kPlain, nullptr};
#elif defined(__aarch64__)
  static const Form* const all[] = {&kNeon, &kPlain, nullptr};
#else
  static const Form* const all[] = {&kPlain, nullptr};
#endif
  return all;
}

const Form* best() {
  for (const Form* const* form = forms(); *form != &kPlain; form++)
    if ((*form)->here()) return *form;
  return nullptr;
}

}  // namespace edgellm
