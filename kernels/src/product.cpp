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

Matrix pack(int outputs, int inputs, int block, const uint8_t* codes, const float* scales, const uint8_t* zeros) {
  Matrix m{outputs, inputs, block, (inputs + block - 1) / block, (outputs + kUnit - 1) / kUnit, true, 0, nullptr};
  uint16_t half = 0;
  for (size_t i = 0; i < size_t(outputs) * m.blocks; i++) m.half = m.half && half_of(scales[i], &half);
  m.record = m.codes_bytes() + kUnit * ((m.half ? sizeof half : sizeof(float)) + 1);
  m.data = pieces().take(m.units * m.unit_bytes());
  uint8_t* record = m.data.get();
  std::memset(record, 0, m.units * m.unit_bytes());
  for (int first = 0; first < outputs; first += kUnit) {
    for (int b = 0; b < m.blocks; b++, record += m.record) {
      for (int r = 0; r < kUnit && first + r < outputs; r++) {
        const size_t n = first + r, from = n * m.blocks + b;
        for (int l = 0; l < block / 8; l++)
          std::memcpy(record + 4 * (kUnit * l + r), codes + from * block / 2 + 4 * l, 4);
        uint8_t* scale = record + m.codes_bytes();
        if (m.half && half_of(scales[from], &half)) std::memcpy(scale + r * sizeof half, &half, sizeof half);
        if (!m.half) std::memcpy(scale + r * sizeof(float), scales + from, sizeof(float));
        const uint8_t two = zeros ? zeros[n * ((m.blocks + 1) / 2) + b / 2] : 0x88;
        record[m.record - kUnit + r] = b % 2 ? two >> 4 : two & 15;
      }
    }
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
      codes[start + i / 8 * 8 + i % 2 * 4 + i % 8 / 2] = code;
      sum += code;
    }
    scales[b] = !finite ? NAN : none ? 0 : top / 127;
    minus_sums[b] = -sum;
  }
}

void multiply_plain(const Matrix& m, const Rounded& x, float* y, int first, int last) {
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
          const uint8_t two = record[4 * (i / 8 * kUnit + r) + i % 4];
          whole += (i % 8 < 4 ? two & 15 : two >> 4) * codes[i];
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

}  // namespace

const Form kPlain{"plain", [] { return true; }, round_plain, multiply_plain};

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
