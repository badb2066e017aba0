// AVX-512 with VNNI: 32 outputs are two registers of 16 whole numbers.
#include <immintrin.h>

#include <cmath>
#include <cstring>

#include "attention_codes.h"
#include "product_forms.h"

namespace edgellm {
namespace {

bool here() {
  return __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512vl") &&
         __builtin_cpu_supports("avx512dq") && __builtin_cpu_supports("avx512vnni");
}

inline __m512i broadcast(const void* four) {
  int32_t word;
  std::memcpy(&word, four, 4);
  return _mm512_set1_epi32(word);
}

void round_block(const float* x, int block, int8_t* codes, float* scale, int32_t* minus_sum) {
  const __m512i magnitude = _mm512_set1_epi32(0x7fffffff);
  __m512i tops = _mm512_setzero_si512();  // as whole numbers: in the order of floats, and a NaN is above all
  for (int i = 0; i < block; i += 16)
    tops = _mm512_max_epi32(tops, _mm512_and_si512(_mm512_loadu_si512(x + i), magnitude));
  const BlockScale scaled(_mm512_reduce_max_epi32(tops));
  const __m512 inverse = _mm512_set1_ps(scaled.inverse);
  const __mmask16 kept = scaled.none ? 0 : 0xffff;
  const __m128i order = _mm_setr_epi8(0, 2, 4, 6, 1, 3, 5, 7, 8, 10, 12, 14, 9, 11, 13, 15);
  __m512i sum = _mm512_setzero_si512();
  for (int i = 0; i < block; i += 16) {
    const __m512i code = _mm512_maskz_cvtps_epi32(kept, _mm512_mul_ps(_mm512_loadu_ps(x + i), inverse));
    sum = _mm512_add_epi32(sum, code);
    const __m128i bytes = _mm_shuffle_epi8(_mm512_cvtepi32_epi8(code), order);
    _mm_storeu_si128(reinterpret_cast<__m128i*>(codes + i), bytes);
  }
  *scale = scaled.scale;
  *minus_sum = -_mm512_reduce_add_epi32(sum);
}

constexpr int kAhead = 4096;  // bytes: what is not in a cache takes that long to come

// `kRows` rows of x with one unit. `kLines` are a block's, 0 where a row is one block.
template <int kRows, int kBits, int kLines, bool kHalf>
void tile(const Matrix& m, const Rounded& x, int row, int unit, float* y) {
  constexpr int kGroups = 8 / kBits, kChains = kRows == 1 ? 2 : 1;  // sums that do not wait for each other
  const __m512i mask = _mm512_set1_epi8((1 << kBits) - 1);
  const int lines = kLines ? kLines : m.lines();
  const size_t block = size_t(lines) * 4 * kGroups, codes_bytes = size_t(4) * kUnit * lines;
  const size_t record_bytes = codes_bytes + kUnit * (kHalf ? 3 : 5), stride = size_t(m.blocks) * block;
  const uint8_t* record = m.unit(unit);
  __m512 sums[kRows][2];
  for (int r = 0; r < kRows; r++) sums[r][0] = sums[r][1] = _mm512_setzero_ps();
  for (int b = 0; b < m.blocks; b++, record += record_bytes) {
    __m512i whole[kRows][kChains][2];
    for (int r = 0; r < kRows; r++)
      for (int c = 0; c < kChains; c++) whole[r][c][0] = whole[r][c][1] = _mm512_setzero_si512();
    const int8_t* codes = x.codes + (size_t(row) * m.blocks + b) * block;
    const auto take = [&](int l) {  // one line
      const uint8_t* line = record + 4 * kUnit * l;
      if (row == 0) {
        _mm_prefetch(reinterpret_cast<const char*>(line + kAhead), _MM_HINT_T0);
        _mm_prefetch(reinterpret_cast<const char*>(line + kAhead + 64), _MM_HINT_T0);
      }
      const __m512i all0 = _mm512_loadu_si512(line), all1 = _mm512_loadu_si512(line + 64);
#pragma GCC unroll 4
      for (int g = 0; g < kGroups; g++) {
        const int chain = (l * kGroups + g) % kChains;
        __m512i some0 = all0, some1 = all1;
        if (g > 0) some0 = _mm512_srli_epi16(all0, kBits * g), some1 = _mm512_srli_epi16(all1, kBits * g);
        if (kBits < 8) some0 = _mm512_and_si512(some0, mask), some1 = _mm512_and_si512(some1, mask);
#pragma GCC unroll 6
        for (int r = 0; r < kRows; r++) {
          const __m512i four = broadcast(codes + r * stride + 4 * (l * kGroups + g));
          whole[r][chain][0] = _mm512_dpbusd_epi32(whole[r][chain][0], some0, four);
          whole[r][chain][1] = _mm512_dpbusd_epi32(whole[r][chain][1], some1, four);
        }
      }
    };
    if constexpr (kLines != 0) {
#pragma GCC unroll 32
      for (int l = 0; l < kLines; l++) take(l);
    } else {
      for (int l = 0; l < lines; l += 4)  // a multiple of 16 codes
#pragma GCC unroll 4
        for (int i = 0; i < 4; i++) take(l + i);
    }
    if (row == 0) _mm_prefetch(reinterpret_cast<const char*>(record + codes_bytes + kAhead), _MM_HINT_T0);
    for (int h = 0; h < 2; h++) {
      const void* bytes = record + record_bytes - kUnit + 16 * h;
      const __m512i zero = _mm512_cvtepu8_epi32(_mm_loadu_si128(static_cast<const __m128i*>(bytes)));
      const uint8_t* scales = record + codes_bytes + h * (kHalf ? 32 : 64);
      const __m512 scale = kHalf ? _mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(scales)))
                                 : _mm512_loadu_ps(scales);
      for (int r = 0; r < kRows; r++) {
        const size_t from = size_t(row + r) * m.blocks + b;
        __m512i all = whole[r][0][h];
        if (kChains == 2) all = _mm512_add_epi32(all, whole[r][kChains - 1][h]);
        const __m512i minus_sum = _mm512_set1_epi32(x.minus_sums[from]);
        if (kLines) all = _mm512_dpwssd_epi32(all, zero, minus_sum);  // fit into 16 bits; a zero's upper half is 0
        else all = _mm512_add_epi32(all, _mm512_mullo_epi32(zero, minus_sum));
        const __m512 both = _mm512_mul_ps(scale, _mm512_set1_ps(x.scales[from]));
        sums[r][h] = _mm512_fmadd_ps(_mm512_cvtepi32_ps(all), both, sums[r][h]);
      }
    }
  }
  const int left = m.outputs - unit * kUnit;
  const __mmask16 here0 = left >= 16 ? 0xffff : (1u << left) - 1;
  const __mmask16 here1 = left >= 32 ? 0xffff : left > 16 ? (1u << (left - 16)) - 1 : 0;
  for (int r = 0; r < kRows; r++) {
    float* to = y + size_t(row + r) * m.outputs + unit * kUnit;
    _mm512_mask_storeu_ps(to, here0, sums[r][0]);
    _mm512_mask_storeu_ps(to + 16, here1, sums[r][1]);
  }
}

struct Units {
  template <int kBits, int kLines, bool kHalf>
  static void of(const Matrix& m, const Rounded& x, float* y, int first, int last) {
    for (int u = first; u < last; u++) {
      int row = 0;
      for (; x.rows > 8 && row + 6 <= x.rows; row += 6) tile<6, kBits, kLines, kHalf>(m, x, row, u, y);
      for (; row + 4 <= x.rows; row += 4) tile<4, kBits, kLines, kHalf>(m, x, row, u, y);
      if (x.rows - row == 3) tile<3, kBits, kLines, kHalf>(m, x, row, u, y);
      if (x.rows - row == 2) tile<2, kBits, kLines, kHalf>(m, x, row, u, y);
      if (x.rows - row == 1) tile<1, kBits, kLines, kHalf>(m, x, row, u, y);
    }
  }
};

// The place where one of sixteen stands whose lanes are added by `together`, to come out in order.
constexpr int place(int i) { return (i & 4) << 1 | (i & 8) >> 1 | (i & 1) << 1 | (i & 2) >> 1; }

// Sixteen pairs of whole numbers, for attention.
struct Pairs {
  __m512i x;
  static Pairs load(const int16_t* from) { return {_mm512_loadu_si512(from)}; }
  static Pairs of(const int16_t* pair) { return {broadcast(pair)}; }  // sixteen times
  static Pairs widen(const int8_t* codes) {
    return {_mm512_cvtepi8_epi16(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(codes)))};
  }
  static Pairs widen_half(const int8_t* codes) {  // eight pairs; the others are 0
    return {_mm512_zextsi256_si512(_mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(codes))))};
  }
  static Pairs zip(const int8_t* a, const int8_t* b) {  // each of sixteen with its partner
    const __m512i low = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(a)));
    const __m512i high = _mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(b)));
    return {_mm512_mask_mov_epi16(low, 0xaaaaaaaa, _mm512_slli_epi32(high, 16))};
  }
};

struct Whole {
  __m512i x;
  static Whole zero() { return {_mm512_setzero_si512()}; }
  static Whole plus(Whole sum, Pairs a, Pairs b) { return {_mm512_dpwssd_epi32(sum.x, a.x, b.x)}; }
  static void together(const Whole* lanes, int32_t* sums) {  // as Sixteen's
    __m512i a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
      const __m512i p = lanes[place(i)].x, q = lanes[place(i + 8)].x;
      a[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(p, q, 0x44), _mm512_shuffle_i32x4(p, q, 0xee));
    }
    for (int i = 0; i < 4; i++)
      b[i] = _mm512_add_epi32(_mm512_shuffle_i32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_i32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; i++)
      c[i] = _mm512_add_epi32(_mm512_unpacklo_epi64(b[i], b[i + 2]), _mm512_unpackhi_epi64(b[i], b[i + 2]));
    const __m512 p = _mm512_castsi512_ps(c[0]), q = _mm512_castsi512_ps(c[1]);
    const __m512i even = _mm512_castps_si512(_mm512_shuffle_ps(p, q, 0x88));
    const __m512i odd = _mm512_castps_si512(_mm512_shuffle_ps(p, q, 0xdd));
    _mm512_storeu_si512(sums, _mm512_add_epi32(even, odd));
  }
};

// Sixteen numbers, for attention.
struct Sixteen {
  static constexpr int kKeys = 16, kWide = 2, kWideAlone = 4;
  static constexpr int kScoreRows = 4, kScoreWide = 2, kValueRows = 6, kValueWide = 4, kWeighRows = 4;
  static constexpr int kCodeRows = 6, kCodeWide = 2, kCodeValueRows = 6, kCodeValueWide = 2;
  using Pairs = edgellm::Pairs;
  using Whole = edgellm::Whole;
  __m512 x;
  static Sixteen of(float value) { return {_mm512_set1_ps(value)}; }
  static Sixteen load(const float* from) { return {_mm512_loadu_ps(from)}; }
  static Sixteen load(const Half* from) {
    return {_mm512_cvtph_ps(_mm256_loadu_si256(reinterpret_cast<const __m256i*>(from)))};
  }
  static Sixteen fma(Sixteen a, Sixteen b, Sixteen c) { return {_mm512_fmadd_ps(a.x, b.x, c.x)}; }
  static Sixteen numbers(Whole whole) { return {_mm512_cvtepi32_ps(whole.x)}; }
  static Sixteen plus(Sixteen a, Sixteen b) { return {_mm512_add_ps(a.x, b.x)}; }
  static Sixteen minus(Sixteen a, Sixteen b) { return {_mm512_sub_ps(a.x, b.x)}; }
  static Sixteen times(Sixteen a, Sixteen b) { return {_mm512_mul_ps(a.x, b.x)}; }
  static Sixteen most(Sixteen a, Sixteen b) { return {_mm512_max_ps(a.x, b.x)}; }
  float top() const { return _mm512_reduce_max_ps(x); }
  Sixteen power() const {  // 2 to the number that rounding has left in the lowest bits
    const __m512i number = _mm512_add_epi32(_mm512_castps_si512(x), _mm512_set1_epi32(int(127u - 0x4b400000u)));
    return {_mm512_castsi512_ps(_mm512_slli_epi32(number, 23))};
  }
  void store(float* to) const { _mm512_storeu_ps(to, x); }
  void store_lowest(int16_t* to) const {  // 16 bits of each
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtepi32_epi16(_mm512_castps_si512(x)));
  }
  void store(Half* to) const {
    const __m512 within = _mm512_min_ps(_mm512_set1_ps(kLargestHalf), _mm512_max_ps(_mm512_set1_ps(-kLargestHalf), x));
    constexpr int kNearest = _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC;
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), _mm512_cvtps_ph(within, kNearest));
  }
  // The lanes of each of 16 added: halves of two at a time beside each other, then quarters, and so on.
  static void together(const Sixteen* lanes, float* sums) {
    __m512 a[8], b[4], c[2];
    for (int i = 0; i < 8; i++) {
      const __m512 p = lanes[place(i)].x, q = lanes[place(i + 8)].x;
      a[i] = _mm512_add_ps(_mm512_shuffle_f32x4(p, q, 0x44), _mm512_shuffle_f32x4(p, q, 0xee));
    }
    for (int i = 0; i < 4; i++)
      b[i] = _mm512_add_ps(_mm512_shuffle_f32x4(a[i], a[i + 4], 0x88), _mm512_shuffle_f32x4(a[i], a[i + 4], 0xdd));
    for (int i = 0; i < 2; i++)
      c[i] = _mm512_add_ps(_mm512_shuffle_ps(b[i], b[i + 2], 0x44), _mm512_shuffle_ps(b[i], b[i + 2], 0xee));
    const __m512 d = _mm512_add_ps(_mm512_shuffle_ps(c[0], c[1], 0x88), _mm512_shuffle_ps(c[0], c[1], 0xdd));
    _mm512_storeu_ps(sums, d);
  }
};

// Sixteen slots of sixteen features, as attention_tile.h wants them: pairs of neighbours, fours, then quarters in place.
inline void turn_square(const float* k, int count, int size, float* turned) {
  __m512 a[16], b[16];
  for (int j = 0; j < 16; j++) a[j] = j < count ? _mm512_loadu_ps(k + size_t(j) * size) : _mm512_setzero_ps();
  for (int j = 0; j < 16; j += 2)
    b[j] = _mm512_unpacklo_ps(a[j], a[j + 1]), b[j + 1] = _mm512_unpackhi_ps(a[j], a[j + 1]);
  for (int j = 0; j < 16; j += 4)
    for (int h = 0; h < 2; h++) {
      const __m512d low = _mm512_castps_pd(b[j + h]), high = _mm512_castps_pd(b[j + h + 2]);
      a[j + 2 * h] = _mm512_castpd_ps(_mm512_unpacklo_pd(low, high));
      a[j + 2 * h + 1] = _mm512_castpd_ps(_mm512_unpackhi_pd(low, high));
    }
  for (int i = 0; i < 4; i++) {  // a[4 * j + i] has features i, i + 4, i + 8, i + 12 of slots 4 * j to 4 * j + 3
    const __m512 low0 = _mm512_shuffle_f32x4(a[i], a[4 + i], 0x44), low1 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0x44);
    const __m512 high0 = _mm512_shuffle_f32x4(a[i], a[4 + i], 0xee), high1 = _mm512_shuffle_f32x4(a[8 + i], a[12 + i], 0xee);
    _mm512_storeu_ps(turned + i * kPanel, _mm512_shuffle_f32x4(low0, low1, 0x88));
    _mm512_storeu_ps(turned + (i + 4) * kPanel, _mm512_shuffle_f32x4(low0, low1, 0xdd));
    _mm512_storeu_ps(turned + (i + 8) * kPanel, _mm512_shuffle_f32x4(high0, high1, 0x88));
    _mm512_storeu_ps(turned + (i + 12) * kPanel, _mm512_shuffle_f32x4(high0, high1, 0xdd));
  }
}

void turn(const float* k, int count, int size, float* turned) {
  for (int first = 0; first < count; first += kPanel, turned += size_t(size) * kPanel)
    for (int half = 0; half < kPanel; half += 16)
      for (int i = 0; i < size; i += 16)
        turn_square(k + size_t(first + half) * size + i, count - first - half, size, turned + i * kPanel + half);
}

}  // namespace

extern const Form kAvx512;
const Form kAvx512{"avx512-vnni", here, round<round_block>, Kinds<Units>::multiply, norm, sums, gate,
                  attend_any<Sixteen>, merge, finish, rotate, narrow, halve<Sixteen>, widen<Sixteen>,
                  turn, attend_many<Sixteen>, turn_codes<turn>, attend_turned<Sixteen>};

}  // namespace edgellm
