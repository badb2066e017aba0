// Numbers of 16 bits in float32, and back where nothing is lost.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace edgellm {

constexpr float kLargestHalf = 65504.0f;

// The float16 of the same value; false if there is none.
inline bool half_of(float value, uint16_t* half) {
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

inline float float_of(uint16_t half) {
  const uint32_t exponent = half >> 10 & 31;
  const float sign = half & 0x8000 ? -1.0f : 1.0f;
  if (exponent == 0) return sign * float(half & 0x3ff) / 16777216.0f;
  const uint32_t bits = (exponent == 31 ? 255 : exponent + 112) << 23 | uint32_t(half & 0x3ff) << 13;
  float value;
  std::memcpy(&value, &bits, 4);
  return sign * value;
}

// The nearest float16, ties to even; beyond the largest, this.
inline uint16_t nearest_half(float value) {
  uint32_t bits;
  std::memcpy(&bits, &value, 4);
  const uint32_t sign = bits >> 16 & 0x8000;
  bits &= 0x7fffffff;
  if (bits > 0x7f800000) return static_cast<uint16_t>(sign | 0x7e00);          // not a number
  if (bits >= 0x477fe000) return static_cast<uint16_t>(sign | 0x7bff);         // 65,504 and beyond
  if (bits < 0x38800000)                                                       // in units of the smallest
    return static_cast<uint16_t>(sign | static_cast<uint32_t>(std::nearbyintf(std::fabs(value) * 16777216.0f)));
  return static_cast<uint16_t>(sign | (bits - 0x38000000 + 0xfff + (bits >> 13 & 1)) >> 13);
}

}  // namespace edgellm
