// AVX2: 32 outputs are four registers of 8 whole numbers. Products of 4 and 8 bits are at most 15 * 127, a pair of them
// at most 3,810, so eight pairs fit into 16 bits before they are added in 32. Codes of 8 bits are taken less 128 and by
// their magnitude, the sign given to the input: a pair is then at most 2 * 128 * 127, which just fits.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "attention_codes.h"
#include "product_forms.h"

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
  const BlockScale scaled(largest(tops));
  const __m256 inverse = _mm256_set1_ps(scaled.inverse);
  const __m256i kept = _mm256_set1_epi32(scaled.none ? 0 : -1);
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, -1, -1, -1, -1, -1, -1, -1, -1);
  __m256i sum = _mm256_setzero_si256();
  for (int i = 0; i < block; i += 8) {
    const __m256i code = _mm256_and_si256(kept, _mm256_cvtps_epi32(_mm256_mul_ps(_mm256_loadu_ps(x + i), inverse)));
    sum = _mm256_add_epi32(sum, code);
    const __m128i pairs = _mm_packs_epi32(_mm256_castsi256_si128(code), _mm256_extracti128_si256(code, 1));
    const __m128i bytes = _mm_shuffle_epi8(_mm_packs_epi16(pairs, pairs), order);
    _mm_storel_epi64(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  *scale = scaled.scale;
  *minus_sum = -total(sum);
}

constexpr int kAhead = 2048;  // bytes: what is not in a cache takes that long to come

inline __m256i load(const void* bytes) { return _mm256_loadu_si256(static_cast<const __m256i*>(bytes)); }

// `kRows` rows of x with 16 outputs, the first or the second half of a unit. `kLines` are a block's, 0 where a row is one.
template <int kRows, int kBits, int kLines, bool kHalf>
void tile(const Matrix& m, const Rounded& x, int row, int unit, int half, float* y) {
  constexpr int kGroups = 8 / kBits, kRun = kLines && kLines < 4 ? kLines : 4;  // lines whose pairs fit into 16 bits
  const __m256i mask = _mm256_set1_epi8((1 << kBits) - 1), middle = _mm256_set1_epi8(-128), ones = _mm256_set1_epi16(1);
  const int lines = kLines ? kLines : m.lines();
  const size_t block = size_t(lines) * 4 * kGroups, codes_bytes = size_t(4) * kUnit * lines;
  const size_t record_bytes = codes_bytes + kUnit * (kHalf ? 3 : 5), stride = size_t(m.blocks) * block;
  const uint8_t* record = m.unit(unit);
  __m256 sums[kRows][2];
  for (int r = 0; r < kRows; r++) sums[r][0] = sums[r][1] = _mm256_setzero_ps();
  for (int b = 0; b < m.blocks; b++, record += record_bytes) {
    __m256i whole[kRows][2];
    for (int r = 0; r < kRows; r++) whole[r][0] = whole[r][1] = _mm256_setzero_si256();
    const int8_t* codes = x.codes + (size_t(row) * m.blocks + b) * block;
    for (int run = 0; run < lines; run += kRun) {
      __m256i pairs[kRows][2];
      for (int r = 0; r < kRows; r++) pairs[r][0] = pairs[r][1] = _mm256_setzero_si256();
#pragma GCC unroll 4
      for (int l = run; l < run + kRun; l++) {
        const uint8_t* line = record + 4 * kUnit * l + 64 * half;
        if (row == 0) _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
        const __m256i all[2] = {load(line), load(line + 32)};
#pragma GCC unroll 4
        for (int g = 0; g < kGroups; g++) {
#pragma GCC unroll 2
          for (int h = 0; h < 2; h++) {
            __m256i some = kBits == 8 ? _mm256_xor_si256(all[h], middle) : all[h];
            if (g > 0) some = _mm256_srli_epi16(some, kBits * g);
            if (kBits < 8) some = _mm256_and_si256(some, mask);
            const __m256i magnitude = kBits == 8 ? _mm256_abs_epi8(some) : some;
#pragma GCC unroll 2
            for (int r = 0; r < kRows; r++) {
              __m256i four = broadcast(codes + r * stride + 4 * (l * kGroups + g));
              if (kBits == 8) {
                const __m256i products = _mm256_maddubs_epi16(magnitude, _mm256_sign_epi8(four, some));
                whole[r][h] = _mm256_add_epi32(whole[r][h], _mm256_madd_epi16(products, ones));
              } else {
                pairs[r][h] = _mm256_add_epi16(pairs[r][h], _mm256_maddubs_epi16(magnitude, four));
              }
            }
          }
        }
      }
      for (int r = 0; r < kRows && kBits < 8; r++)
        for (int h = 0; h < 2; h++)
          whole[r][h] = _mm256_add_epi32(whole[r][h], _mm256_madd_epi16(pairs[r][h], ones));
    }
    for (int h = 0; h < 2; h++) {
      const void* bytes = record + record_bytes - kUnit + 16 * half + 8 * h;
      __m256i zero = _mm256_cvtepu8_epi32(_mm_loadl_epi64(static_cast<const __m128i*>(bytes)));
      if (kBits == 8) zero = _mm256_sub_epi32(zero, _mm256_set1_epi32(128));
      const uint8_t* scales = record + codes_bytes + (16 * half + 8 * h) * (kHalf ? 2 : 4);
      const __m256 scale = kHalf ? _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(scales)))
                                 : _mm256_loadu_ps(reinterpret_cast<const float*>(scales));
      for (int r = 0; r < kRows; r++) {
        const size_t from = size_t(row + r) * m.blocks + b;
        const __m256i minus_sum = _mm256_set1_epi32(x.minus_sums[from]);
        // where no zero is negative, its upper half is 0, and both fit into 16 bits
        const __m256i shift = kBits == 8 ? _mm256_mullo_epi32(zero, minus_sum) : _mm256_madd_epi16(zero, minus_sum);
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

struct Units {
  template <int kBits, int kLines, bool kHalf>
  static void of(const Matrix& m, const Rounded& x, float* y, int first, int last) {
    for (int u = first; u < last; u++) {
      for (int half = 0; half < 2; half++) {
        int row = 0;
        for (; row + 2 <= x.rows; row += 2) tile<2, kBits, kLines, kHalf>(m, x, row, u, half, y);
        if (row < x.rows) tile<1, kBits, kLines, kHalf>(m, x, row, u, half, y);
      }
    }
  }
};

// Sixteen pairs of whole numbers, for attention.
struct Pairs {
  __m256i low, high;
  static Pairs load(const int16_t* from) {
    const __m256i* halves = reinterpret_cast<const __m256i*>(from);
    return {_mm256_loadu_si256(halves), _mm256_loadu_si256(halves + 1)};
  }
  static Pairs of(const int16_t* pair) {  // sixteen times
    const __m256i all = broadcast(pair);
    return {all, all};
  }
  static __m128i codes(const int8_t* from) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(from)); }
  static Pairs widen(const int8_t* from) {
    return {_mm256_cvtepi8_epi16(codes(from)), _mm256_cvtepi8_epi16(codes(from + 16))};
  }
  static Pairs widen_half(const int8_t* from) {  // eight pairs; the others are 0
    return {_mm256_cvtepi8_epi16(codes(from)), _mm256_setzero_si256()};
  }
  static Pairs zip(const int8_t* a, const int8_t* b) {  // each of sixteen with its partner
    const __m128i p = codes(a), q = codes(b);
    return {_mm256_cvtepi8_epi16(_mm_unpacklo_epi8(p, q)), _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(p, q))};
  }
};

struct Whole {
  __m256i low, high;
  static Whole zero() { return {_mm256_setzero_si256(), _mm256_setzero_si256()}; }
  static Whole plus(Whole sum, Pairs a, Pairs b) {
    return {_mm256_add_epi32(sum.low, _mm256_madd_epi16(a.low, b.low)),
            _mm256_add_epi32(sum.high, _mm256_madd_epi16(a.high, b.high))};
  }
  static void together(const Whole* lanes, int32_t* sums) {  // the lanes of each of 4 added
    __m256i a[4];
    for (int i = 0; i < 4; i++) a[i] = _mm256_add_epi32(lanes[i].low, lanes[i].high);
    const __m256i all = _mm256_hadd_epi32(_mm256_hadd_epi32(a[0], a[1]), _mm256_hadd_epi32(a[2], a[3]));
    const __m128i four = _mm_add_epi32(_mm256_castsi256_si128(all), _mm256_extracti128_si256(all, 1));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), four);
  }
};

// Sixteen numbers, for attention.
struct Sixteen {
  static constexpr int kKeys = 4, kWide = 1, kWideAlone = 2;
  static constexpr int kScoreRows = 4, kScoreWide = 1, kValueRows = 6, kValueWide = 1, kWeighRows = 4;
  static constexpr int kCodeRows = 4, kCodeWide = 1, kCodeValueRows = 4, kCodeValueWide = 1;
  using Pairs = edgellm::Pairs;
  using Whole = edgellm::Whole;
  __m256 low, high;
  static Sixteen of(float value) { return {_mm256_set1_ps(value), _mm256_set1_ps(value)}; }
  static Sixteen load(const float* from) { return {_mm256_loadu_ps(from), _mm256_loadu_ps(from + 8)}; }
  static Sixteen load(const Half* from) {
    const __m128i* halves = reinterpret_cast<const __m128i*>(from);
    return {_mm256_cvtph_ps(_mm_loadu_si128(halves)), _mm256_cvtph_ps(_mm_loadu_si128(halves + 1))};
  }
  static Sixteen fma(Sixteen a, Sixteen b, Sixteen c) {
    return {_mm256_fmadd_ps(a.low, b.low, c.low), _mm256_fmadd_ps(a.high, b.high, c.high)};
  }
  static Sixteen numbers(Whole whole) { return {_mm256_cvtepi32_ps(whole.low), _mm256_cvtepi32_ps(whole.high)}; }
  static Sixteen plus(Sixteen a, Sixteen b) { return {_mm256_add_ps(a.low, b.low), _mm256_add_ps(a.high, b.high)}; }
  static Sixteen minus(Sixteen a, Sixteen b) { return {_mm256_sub_ps(a.low, b.low), _mm256_sub_ps(a.high, b.high)}; }
  static Sixteen times(Sixteen a, Sixteen b) { return {_mm256_mul_ps(a.low, b.low), _mm256_mul_ps(a.high, b.high)}; }
  static Sixteen most(Sixteen a, Sixteen b) { return {_mm256_max_ps(a.low, b.low), _mm256_max_ps(a.high, b.high)}; }
  float top() const {
    const __m256 eight = _mm256_max_ps(low, high);
    __m128 four = _mm_max_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    four = _mm_max_ps(four, _mm_shuffle_ps(four, four, 0x4e));
    return _mm_cvtss_f32(_mm_max_ps(four, _mm_shuffle_ps(four, four, 0xb1)));
  }
  static __m256 power(__m256 x) {
    const __m256i number = _mm256_add_epi32(_mm256_castps_si256(x), _mm256_set1_epi32(int(127u - 0x4b400000u)));
    return _mm256_castsi256_ps(_mm256_slli_epi32(number, 23));
  }
  Sixteen power() const { return {power(low), power(high)}; }  // 2 to the number that rounding has left in the lowest bits
  void store(float* to) const {
    _mm256_storeu_ps(to, low);
    _mm256_storeu_ps(to + 8, high);
  }
  void store_lowest(int16_t* to) const {  // 16 bits of each
    const __m256i mask = _mm256_set1_epi32(0xffff);
    const __m256i a = _mm256_and_si256(_mm256_castps_si256(low), mask), b = _mm256_and_si256(_mm256_castps_si256(high), mask);
    const __m256i all = _mm256_permute4x64_epi64(_mm256_packus_epi32(a, b), 0xd8);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), all);
  }
  static __m128i halves(__m256 x) {
    const __m256 within = _mm256_min_ps(_mm256_set1_ps(kLargestHalf), _mm256_max_ps(_mm256_set1_ps(-kLargestHalf), x));
    return _mm256_cvtps_ph(within, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  }
  void store(Half* to) const {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), halves(low));
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to + 8), halves(high));
  }
  static void together(const Sixteen* lanes, float* sums) {  // the lanes of each of 4 added
    __m128 a[4], b[2];
    for (int i = 0; i < 4; i++) {
      const __m256 eight = _mm256_add_ps(lanes[i].low, lanes[i].high);
      a[i] = _mm_add_ps(_mm256_castps256_ps128(eight), _mm256_extractf128_ps(eight, 1));
    }
    for (int i = 0; i < 2; i++)
      b[i] = _mm_add_ps(_mm_shuffle_ps(a[2 * i], a[2 * i + 1], 0x44), _mm_shuffle_ps(a[2 * i], a[2 * i + 1], 0xee));
    _mm_storeu_ps(sums, _mm_add_ps(_mm_shuffle_ps(b[0], b[1], 0x88), _mm_shuffle_ps(b[0], b[1], 0xdd)));
  }
};

}  // namespace

extern const Form kAvx2;
const Form kAvx2{"avx2", here, round<round_block>, Kinds<Units>::multiply, norm, sums, gate,
                  attend_any<Sixteen>, merge, finish, rotate, narrow, halve<Sixteen>, widen<Sixteen>,
                  turn_one_by_one, attend_many<Sixteen>, turn_codes<turn_one_by_one>, attend_turned<Sixteen>};

}  // namespace edgellm
