// ARM with dot products: 32 outputs are eight registers of 4 whole numbers.
#include <arm_neon.h>

#include <cmath>
#include <cstring>

#if defined(__linux__)
#include <sys/auxv.h>
#endif

#include "attention_codes.h"
#include "product_forms.h"

namespace edgellm {
namespace {

bool here() {
#if defined(__linux__)
  return getauxval(AT_HWCAP) & (1ul << 20);  // HWCAP_ASIMDDP
#else
  return true;  // every processor of Apple's with this instruction set has it
#endif
}

void round_block(const float* x, int block, int8_t* codes, float* scale, int32_t* minus_sum) {
  int32x4_t tops = vdupq_n_s32(0);  // as whole numbers: in the order of floats, and a NaN is above all
  for (int i = 0; i < block; i += 4) {
    const int32x4_t bits = vreinterpretq_s32_f32(vld1q_f32(x + i));
    tops = vmaxq_s32(tops, vandq_s32(bits, vdupq_n_s32(0x7fffffff)));
  }
  const BlockScale scaled(vmaxvq_s32(tops));
  const float32x4_t inverse = vdupq_n_f32(scaled.inverse);
  const int32x4_t kept = vdupq_n_s32(scaled.none ? 0 : -1);
  int32x4_t sum = vdupq_n_s32(0);
  for (int i = 0; i < block; i += 8) {
    const int32x4_t a = vandq_s32(kept, vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + i), inverse)));
    const int32x4_t b = vandq_s32(kept, vcvtnq_s32_f32(vmulq_f32(vld1q_f32(x + i + 4), inverse)));
    sum = vaddq_s32(sum, vaddq_s32(a, b));
    const int8x8_t bytes = vmovn_s16(vcombine_s16(vmovn_s32(a), vmovn_s32(b)));
    const int8x8_t apart = vuzp1_s8(bytes, bytes), others = vuzp2_s8(bytes, bytes);
    vst1_s8(codes + i, vreinterpret_s8_s32(vzip1_s32(vreinterpret_s32_s8(apart), vreinterpret_s32_s8(others))));
  }
  *scale = scaled.scale;
  *minus_sum = -vaddvq_s32(sum);
}

constexpr int kAhead = 2048;  // bytes: what is not in a cache takes that long to come

// `kRows` rows of x with 16 outputs, the first or the second half of a unit. Codes of 8 bits are taken less 128.
template <int kRows, int kBits>
void tile(const Matrix& m, const Rounded& x, int row, int unit, int half, float* y) {
  constexpr int kGroups = 8 / kBits;
  const uint8x16_t mask = vdupq_n_u8((1 << kBits) - 1), middle = vdupq_n_u8(128);
  const uint8_t* record = m.unit(unit);
  const size_t stride = size_t(m.blocks) * m.block;
  float32x4_t sums[kRows][4];
  for (int r = 0; r < kRows; r++)
    for (int h = 0; h < 4; h++) sums[r][h] = vdupq_n_f32(0);
  for (int b = 0; b < m.blocks; b++, record += m.record) {
    int32x4_t whole[kRows][4];
    for (int r = 0; r < kRows; r++)
      for (int h = 0; h < 4; h++) whole[r][h] = vdupq_n_s32(0);
    const int8_t* codes = x.codes + (size_t(row) * m.blocks + b) * m.block;
    for (int l = 0; l < m.lines(); l++) {
      const uint8_t* line = record + 4 * kUnit * l + 64 * half;
      if (row == 0) __builtin_prefetch(line + kAhead);
      int8x16_t inputs[kRows][kGroups];
      for (int r = 0; r < kRows; r++)
        for (int g = 0; g < kGroups; g++) {
          int32_t four;
          std::memcpy(&four, codes + r * stride + 4 * (l * kGroups + g), 4);
          inputs[r][g] = vreinterpretq_s8_s32(vdupq_n_s32(four));
        }
      for (int h = 0; h < 4; h++) {
        const uint8x16_t all = vld1q_u8(line + 16 * h);
        for (int g = 0; g < kGroups; g++) {
          uint8x16_t some = kBits == 8 ? veorq_u8(all, middle) : all;
          if (g > 0) some = vshlq_u8(some, vdupq_n_s8(-kBits * g));
          if (kBits < 8) some = vandq_u8(some, mask);
          for (int r = 0; r < kRows; r++)
            whole[r][h] = vdotq_s32(whole[r][h], vreinterpretq_s8_u8(some), inputs[r][g]);
        }
      }
    }
    const uint8_t* scales = record + m.codes_bytes();
    const uint8x16_t zeros = vld1q_u8(record + m.record - kUnit + 16 * half);
    const uint16x8_t pairs[2] = {vmovl_u8(vget_low_u8(zeros)), vmovl_high_u8(zeros)};
    for (int h = 0; h < 4; h++) {
      const uint16x4_t part = h % 2 ? vget_high_u16(pairs[h / 2]) : vget_low_u16(pairs[h / 2]);
      const int32x4_t zero = vsubq_s32(vreinterpretq_s32_u32(vmovl_u16(part)), vdupq_n_s32(kBits == 8 ? 128 : 0));
      const int first = 16 * half + 4 * h;
      const float32x4_t scale = m.half ? vcvt_f32_f16(vreinterpret_f16_u8(vld1_u8(scales + 2 * first)))
                                       : vreinterpretq_f32_u8(vld1q_u8(scales + 4 * first));
      for (int r = 0; r < kRows; r++) {
        const size_t from = size_t(row + r) * m.blocks + b;
        const int32x4_t all = vmlaq_n_s32(whole[r][h], zero, x.minus_sums[from]);
        sums[r][h] = vfmaq_f32(sums[r][h], vcvtq_f32_s32(all), vmulq_n_f32(scale, x.scales[from]));
      }
    }
  }
  const int first = unit * kUnit + 16 * half;
  for (int r = 0; r < kRows && first < m.outputs; r++) {
    float all[16];
    for (int h = 0; h < 4; h++) vst1q_f32(all + 4 * h, sums[r][h]);
    const int count = m.outputs - first < 16 ? m.outputs - first : 16;
    std::memcpy(y + size_t(row + r) * m.outputs + first, all, size_t(count) * sizeof(float));
  }
}

template <int kBits>
void units(const Matrix& m, const Rounded& x, float* y, int first, int last) {
  for (int u = first; u < last; u++) {
    for (int half = 0; half < 2; half++) {
      int row = 0;
      for (; row + 2 <= x.rows; row += 2) tile<2, kBits>(m, x, row, u, half, y);
      if (row < x.rows) tile<1, kBits>(m, x, row, u, half, y);
    }
  }
}

void multiply(const Matrix& m, const Rounded& x, float* y, int first, int last) {
  switch (m.bits) {
    case 2: return units<2>(m, x, y, first, last);
    case 4: return units<4>(m, x, y, first, last);
    default: return units<8>(m, x, y, first, last);
  }
}

// Sixteen pairs of whole numbers, for attention.
struct Pairs {
  int16x8_t x[4];
  static Pairs load(const int16_t* from) {
    return {{vld1q_s16(from), vld1q_s16(from + 8), vld1q_s16(from + 16), vld1q_s16(from + 24)}};
  }
  static Pairs of(const int16_t* pair) {  // sixteen times
    int32_t bits;
    std::memcpy(&bits, pair, sizeof bits);
    const int16x8_t all = vreinterpretq_s16_s32(vdupq_n_s32(bits));
    return {{all, all, all, all}};
  }
  static Pairs widen(const int8_t* from) {
    const int8x16_t a = vld1q_s8(from), b = vld1q_s8(from + 16);
    return {{vmovl_s8(vget_low_s8(a)), vmovl_high_s8(a), vmovl_s8(vget_low_s8(b)), vmovl_high_s8(b)}};
  }
  static Pairs widen_half(const int8_t* from) {  // eight pairs; the others are 0
    const int8x16_t a = vld1q_s8(from);
    return {{vmovl_s8(vget_low_s8(a)), vmovl_high_s8(a), vdupq_n_s16(0), vdupq_n_s16(0)}};
  }
  static Pairs zip(const int8_t* a, const int8_t* b) {  // each of sixteen with its partner
    const int8x16_t p = vld1q_s8(a), q = vld1q_s8(b), low = vzip1q_s8(p, q), high = vzip2q_s8(p, q);
    return {{vmovl_s8(vget_low_s8(low)), vmovl_high_s8(low), vmovl_s8(vget_low_s8(high)), vmovl_high_s8(high)}};
  }
};

struct Whole {
  int32x4_t x[4];
  static Whole zero() { return {{vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0), vdupq_n_s32(0)}}; }
  static Whole plus(Whole sum, const Pairs& a, const Pairs& b) {
    for (int i = 0; i < 4; i++) {
      const int32x4_t low = vmull_s16(vget_low_s16(a.x[i]), vget_low_s16(b.x[i])), high = vmull_high_s16(a.x[i], b.x[i]);
      sum.x[i] = vaddq_s32(sum.x[i], vpaddq_s32(low, high));
    }
    return sum;
  }
  static void together(const Whole* lanes, int32_t* sums) {  // the lanes of each of 4 added
    for (int i = 0; i < 4; i++) {
      const Whole& each = lanes[i];
      sums[i] = vaddvq_s32(vaddq_s32(vaddq_s32(each.x[0], each.x[1]), vaddq_s32(each.x[2], each.x[3])));
    }
  }
};

// Sixteen numbers, for attention.
struct Sixteen {
  static constexpr int kKeys = 4, kWide = 1, kWideAlone = 2;
  static constexpr int kScoreRows = 4, kScoreWide = 1, kValueRows = 6, kValueWide = 1, kWeighRows = 2;
  static constexpr int kCodeRows = 4, kCodeWide = 1, kCodeValueRows = 4, kCodeValueWide = 1;
  using Pairs = edgellm::Pairs;
  using Whole = edgellm::Whole;
  float32x4_t x[4];
  static Sixteen of(float value) {
    const float32x4_t four = vdupq_n_f32(value);
    return {{four, four, four, four}};
  }
  static Sixteen load(const float* from) {
    return {{vld1q_f32(from), vld1q_f32(from + 4), vld1q_f32(from + 8), vld1q_f32(from + 12)}};
  }
  static Sixteen load(const Half* from) {
    Sixteen y;
    for (int i = 0; i < 4; i++) y.x[i] = vcvt_f32_f16(vreinterpret_f16_u16(vld1_u16(&from[4 * i].bits)));
    return y;
  }
  static Sixteen numbers(const Whole& whole) {
    Sixteen y;
    for (int i = 0; i < 4; i++) y.x[i] = vcvtq_f32_s32(whole.x[i]);
    return y;
  }
  static Sixteen fma(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
    Sixteen y;
    for (int i = 0; i < 4; i++) y.x[i] = vfmaq_f32(c.x[i], a.x[i], b.x[i]);
    return y;
  }
  template <class Operation>
  static Sixteen each(const Sixteen& a, const Sixteen& b, const Operation& of_four) {
    Sixteen y;
    for (int i = 0; i < 4; i++) y.x[i] = of_four(a.x[i], b.x[i]);
    return y;
  }
  static Sixteen plus(const Sixteen& a, const Sixteen& b) { return each(a, b, vaddq_f32); }
  static Sixteen minus(const Sixteen& a, const Sixteen& b) { return each(a, b, vsubq_f32); }
  static Sixteen times(const Sixteen& a, const Sixteen& b) { return each(a, b, vmulq_f32); }
  static Sixteen most(const Sixteen& a, const Sixteen& b) {
    return each(a, b, [](float32x4_t p, float32x4_t q) { return vbslq_f32(vcgtq_f32(p, q), p, q); });
  }
  float top() const { return vmaxvq_f32(vmaxq_f32(vmaxq_f32(x[0], x[1]), vmaxq_f32(x[2], x[3]))); }
  Sixteen power() const {  // 2 to the number that rounding has left in the lowest bits
    Sixteen y;
    for (int i = 0; i < 4; i++) {
      const uint32x4_t number = vaddq_u32(vreinterpretq_u32_f32(x[i]), vdupq_n_u32(127u - 0x4b400000u));
      y.x[i] = vreinterpretq_f32_u32(vshlq_n_u32(number, 23));
    }
    return y;
  }
  void store(float* to) const {
    for (int i = 0; i < 4; i++) vst1q_f32(to + 4 * i, x[i]);
  }
  void store_lowest(int16_t* to) const {  // 16 bits of each
    for (int i = 0; i < 4; i++) vst1_s16(to + 4 * i, vmovn_s32(vreinterpretq_s32_f32(x[i])));
  }
  void store(Half* to) const {
    const float32x4_t most = vdupq_n_f32(kLargestHalf);
    for (int i = 0; i < 4; i++) {
      const float32x4_t within = vminq_f32(most, vmaxq_f32(vnegq_f32(most), x[i]));
      vst1_u16(&to[4 * i].bits, vreinterpret_u16_f16(vcvt_f16_f32(within)));
    }
  }
  static void together(const Sixteen* lanes, float* sums) {  // the lanes of each of 4 added
    float32x4_t a[4], b[2];
    for (int i = 0; i < 4; i++)
      a[i] = vaddq_f32(vaddq_f32(lanes[i].x[0], lanes[i].x[2]), vaddq_f32(lanes[i].x[1], lanes[i].x[3]));
    for (int i = 0; i < 2; i++) {
      const float32x4_t p = a[2 * i], q = a[2 * i + 1];
      b[i] = vaddq_f32(vcombine_f32(vget_low_f32(p), vget_low_f32(q)), vcombine_f32(vget_high_f32(p), vget_high_f32(q)));
    }
    vst1q_f32(sums, vpaddq_f32(b[0], b[1]));
  }
};

}  // namespace

extern const Form kNeon;
const Form kNeon{"neon-dotprod", here, round<round_block>, multiply, norm, sums, gate,
                  attend_any<Sixteen>, merge, finish, rotate, narrow, halve<Sixteen>, widen<Sixteen>,
                  turn_one_by_one, attend_many<Sixteen>, turn_codes<turn_one_by_one>, attend_turned<Sixteen>};

}  // namespace edgellm
