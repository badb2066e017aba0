// What is done to a row's numbers between products, written once for all forms: each file that holds a form includes it
// and is compiled for its own instructions. Nothing but single operations of float32 and fma in a stated order is used,
// so the compiler may take several elements at a time and the bits stay the same.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>

namespace edgellm {
namespace {  // in each file apart, or the linker would keep one form's instructions for all

constexpr int kLanes = 16;

// Sixteen sums as one: each upper half is added to the lower.
inline float together(float* lanes) {
  for (int half = kLanes / 2; half > 0; half /= 2)
    for (int i = 0; i < half; i++) lanes[i] += lanes[i + half];
  return lanes[0];
}

// Lane i of sixteen starts at 0 and adds the squares of elements i, i + 16, ... of v = x + skip, each by fma; v is x where
// there is no skip.
// y = v * scale * gamma, where scale = 1 / sqrt(sum / n + epsilon).
void norm(const float* x, const float* skip, const float* gamma, float epsilon, int n, float* sum, float* y) {
  float lanes[kLanes] = {};
  const int whole = n / kLanes * kLanes;
  for (int i = 0; i < n; i++) sum[i] = skip != nullptr ? x[i] + skip[i] : x[i];
  for (int i = 0; i < whole; i += kLanes)
    for (int j = 0; j < kLanes; j++) lanes[j] = std::fmaf(sum[i + j], sum[i + j], lanes[j]);
  for (int i = whole; i < n; i++) lanes[i - whole] = std::fmaf(sum[i], sum[i], lanes[i - whole]);
  const float scale = 1.0f / std::sqrt(together(lanes) / float(n) + epsilon);
  for (int i = 0; i < n; i++) y[i] = sum[i] * scale * gamma[i];
}

// The sum of each block of x: lane i of sixteen adds elements i, i + 16, ...; what the last block lacks is not there.
void sums(const float* x, int n, int block, float* y) {
  for (int start = 0; start < n; start += block) {
    float lanes[kLanes] = {};
    const int count = n - start < block ? n - start : block, whole = count / kLanes * kLanes;
    for (int i = 0; i < whole; i += kLanes)
      for (int j = 0; j < kLanes; j++) lanes[j] += x[start + i + j];
    for (int i = whole; i < count; i++) lanes[i - whole] += x[start + i];
    *y++ = together(lanes);
  }
}

// e to the x, for x from -87 to 88: x = n ln 2 + r, and a polynomial in r.
inline float exponential(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded to a whole number
  const float shifted = std::fmaf(x, 1.44269504f, kRound), n = shifted - kRound;
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  float r = std::fmaf(n, -0.693359375f, x);
  r = std::fmaf(n, 2.12194440e-4f, r);
  float p = 1.9875691500e-4f;
  p = std::fmaf(p, r, 1.3981999507e-3f);
  p = std::fmaf(p, r, 8.3334519073e-3f);
  p = std::fmaf(p, r, 4.1665795894e-2f);
  p = std::fmaf(p, r, 1.6666665459e-1f);
  p = std::fmaf(p, r, 5.0000001201e-1f);
  p = std::fmaf(p, r * r, r) + 1.0f;
  const uint32_t power = (bits - 0x4b400000u + 127u) << 23;
  float two;
  std::memcpy(&two, &power, sizeof two);
  return p * two;
}

// gate / (1 + exp(-gate)) * up, into gate; rounded where the sigmoid, its product with gate, and that with up are.
void gate(float* gate, const float* up, int n) {
  for (int i = 0; i < n; i++) {
    float x = -gate[i];
    x = x < -87.0f ? -87.0f : x;
    x = x > 88.0f ? 88.0f : x;
    const float sigmoid = 1.0f / (1.0f + exponential(x));
    gate[i] = gate[i] * sigmoid * up[i];
  }
}

}  // namespace
}  // namespace edgellm
