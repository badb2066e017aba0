// AVX2: 32 outputs are four registers of 8 whole numbers. Products of 4 and 8 bits are at most 15 * 127, a pair of them
// at most 3,810, so eight pairs fit into 16 bits before they are added in 32.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "product.h"

namespace edgellm {
namespace {

bool here() { return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("f16c"); }

inline __m256i broadcast(const void* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  return _mm256_set1_epi32(word);
}

inline int32_t largest(__m256i x) {
  __m128i y = _mm_max_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_max_epi32(y, _mm_shuffle_epi32(y, 0xb1));
  return _mm_cvtsi128_si32(y);
}

inline int32_t total(__m256i x) {
  __m128i y = _mm_add_epi32(_mm256_castsi256_si128(x), _mm256_extracti128_si256(x, 1));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0x4e));
  y = _mm_add_epi32(y, _mm_shuffle_epi32(y, 0xb1));
  return _mm_cvtsi128_si32(y);
}

void round_block(const float* x, int block, int8_t* codes, float* scale, int32_t* minus_sum) {
  const __m256i magnitude = _mm256_set1_epi32(0x7fffffff);
  __m256i tops = _mm256_setzero_si256();  // as whole numbers: in the order of floats, and a NaN is above all
  for (int i = 0; i < block; i += 8) {
    const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x + i));
    tops = _mm256_max_epi32(tops, _mm256_and_si256(bits, magnitude));
  }
  const int32_t bits = largest(tops);
  float top;
  std::memcpy(&top, &bits, 4);
  const bool finite = bits < 0x7f800000, none = !finite || top < kLeast;
  const __m256 inverse = _mm256_set1_ps(none ? 0 : 127 / top);
  const __m256i kept = _mm256_set1_epi32(none ? 0 : -1);
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < block; i += 8) {
    const __m256i code = _mm256_and_si256(kept, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
    sum = _mm256_add_epi32(sum, code);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    const __m128i bytes = _mm_shuffle_epi8(_mm_packs_epi16(pairs, pairs), order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  *scale = !finite ? NAN : none ? 0 : top / 127;
  *minus_sum = -total(sum);
}

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

constexpr int kAhead = 2048;  // bytes: what is not in a cache takes that long to come

// `kRows` rows of x with 16 outputs, the first or the second half of a unit.
template <int kRows, int kLines, bool kHalf>
void tile(const Matrix& m, const Rounded& x, int row, int unit, int half, float* y) {
  constexpr int kBlock = 8 * kLines, kRun = kLines < 4 ? kLines : 4;  // lines whose eight pairs fit into 16 bits
  const __m256i low = _mm256_set1_epi8(15), ones = _mm256_set1_epi16(1);
  constexpr size_t kCodes = kUnit * kBlock / 2, kRecord = kCodes + kUnit * (kHalf ? 3 : 5);
  const uint8_t* record = m.unit(unit);
  const size_t stride = size_t(m.blocks) * kBlock;
  __m256 sums[kRows][2];
  for (int r = 0; r < kRows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (int b = 0; b < m.blocks; b++, record += kRecord) {
    __m256i whole[kRows][2];
    for (int r = 0; r < kRows; r++) whole[r][0] = whole[r][1] = _mm256_setzero_si256();
    const int8_t* codes = x.codes + (size_t(row) * m.blocks + b) * kBlock;
    for (int run = 0; run < kLines; run += kRun) {
      __m256i pairs[kRows][2];
      for (int r = 0; r < kRows; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int l = run; l < run + kRun; l++) {
        const uint8_t* line = record + 4 * kUnit * l + 64 * half;
        if (row == 0) _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
        const __m256i two0 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line));
        const __m256i two1 = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(line + 32));
        const __m256i even0 = _mm256_and_si256(two0, low), odd0 = _mm256_and_si256(_mm256_srli_epi16(two0, 4), low);
        const __m256i even1 = _mm256_and_si256(two1, low), odd1 = _mm256_and_si256(_mm256_srli_epi16(two1, 4), low);
#pragma GCC unroll 2
        for (int r = 0; r < kRows; r++) {
          const __m256i x0 = broadcast(codes + r * stride + 8 * l), x1 = broadcast(codes + r * stride + 8 * l + 4);
          pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(even0, x0));
          pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(even1, x0));
          pairs[r][0] = _mm256_add_epi16(pairs[r][0], _mm256_maddubs_epi16(odd0, x1));
          pairs[r][1] = _mm256_add_epi16(pairs[r][1], _mm256_maddubs_epi16(odd1, x1));
        }
      }
      for (int r = 0; r < kRows; r++)
        for (int h = 0; h < 2; h++)
          whole[r][h] = _mm256_add_epi32(whole[r][h], _mm256_madd_epi16(pairs[r][h], ones));
    }
    for (int h = 0; h < 2; h++) {
      const void* bytes = record + kRecord - kUnit + 16 * half + 8 * h;
      const __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
      const uint8_t* scales = record + kCodes + (16 * half + 8 * h) * (kHalf ? 2 : 4);
      const __m256 scale = kHalf ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)))
                                 : _mm256_loadu_ps(reinterpret_cast<const float*>(scales));
      for (int r = 0; r < kRows; r++) {
        const size_t from = size_t(row + r) * m.blocks + b;
        const __m256i shift = _mm256_madd_epi16(zero, _mm256_set1_epi32(x.minus_sums[from]));  // both fit into 16 bits
        const __m256 both = _mm256_mul_ps(scale, _mm256_set1_ps(x.scales[from]));
        sums[r][h] = _mm256_fmadd_ps(_mm256_cvtepi32_ps(_mm256_add_epi32(whole[r][h], shift)), both, sums[r][h]);
      }
    }
  }
  const int first = unit * kUnit + 16 * half;
  for (int r = 0; r < kRows; r++) {
    float* to = y + size_t(row + r) * m.outputs + first;
    if (first + 16 <= m.outputs) {
      _mm256_storeu_ps(to, sums[r][0]);
      _mm256_storeu_ps(to + 8, sums[r][1]);
    } else if (first < m.outputs) {
      float all[16];
      _mm256_storeu_ps(all, sums[r][0]);
      _mm256_storeu_ps(all + 8, sums[r][1]);
      std::memcpy(to, all, size_t(m.outputs - first) * sizeof(float));
    }
  }
}

template <int kLines, bool kHalf>
void units(const Matrix& m, const Rounded& x, float* y, int first, int last) {
  for (int u = first; u < last; u++) {
    for (int half = 0; half < 2; half++) {
      int row = 0;
      for (; row + 2 <= x.rows; row += 2) tile<2, kLines, kHalf>(m, x, row, u, half, y);
      if (row < x.rows) tile<1, kLines, kHalf>(m, x, row, u, half, y);
    }
  }
}

template <bool kHalf>
void multiply_scaled(const Matrix& m, const Rounded& x, float* y, int first, int last) {
  switch (m.block) {
    case 16: return units<2, kHalf>(m, x, y, first, last);
    case 32: return units<4, kHalf>(m, x, y, first, last);
    case 64: return units<8, kHalf>(m, x, y, first, last);
    default: return units<16, kHalf>(m, x, y, first, last);
  }
}

void multiply(const Matrix& m, const Rounded& x, float* y, int first, int last) {
  m.half ? multiply_scaled<true>(m, x, y, first, last) : multiply_scaled<false>(m, x, y, first, last);
}

}  // namespace

extern const Form kAvx2;
const Form kAvx2{"avx2", here, round, multiply};

}  // namespace edgellm
