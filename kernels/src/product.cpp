#include "product.h"

#include <cmath>
#include <cstring>

#include "attention_codes.h"
#include "halves.h"

namespace edgellm {

#if defined(__x86_64__)
extern const Form kAvx512, kAvx2;
#elif defined(__aarch64__)
extern const Form kNeon;
#endif

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
  static Sixteen load(const Half* from) {
    Sixteen y;
    for (int i = 0; i < kLanes; i++) y.x[i] = float_of(from[i].bits);
    return y;
  }
  static Sixteen fma(const Sixteen& a, const Sixteen& b, const Sixteen& c) {
    Sixteen y;
    for (int i = 0; i < kLanes; i++) y.x[i] = std::fmaf(a.x[i], b.x[i], c.x[i]);
    return y;
  }
  void store(float* to) const { std::memcpy(to, x, sizeof x); }
  void store(Half* to) const {
    for (int i = 0; i < kLanes; i++) to[i].bits = nearest_half(x[i]);
  }
  static void together(const Sixteen* lanes, float* sums) {
    Sixteen copy = *lanes;
    *sums = edgellm::together(copy.x);
  }
};

void attend_codes_plain(const Cells<int8_t>& keys, const Seen* seen, int rows, float scale, Part* parts) {
  for (int r = 0; r < rows; r++) {
    std::vector<int16_t> q(padded(keys.size));
    const float step = round_query(seen[r].query, keys.size, q.data());
    float p[kChunk] = {};
    int16_t weights[kChunk];
    for (int j = seen[r].begin; j < seen[r].end; j++) {
      int32_t dot = 0;
      for (int i = 0; i < keys.size; i++) dot += q[i] * keys.k[size_t(j) * keys.size + i];
      p[j] = float(dot);
    }
    weigh(seen[r], std::isnan(step) ? 0.0f : scale * step, p, parts + r);
    const float total = round_weights(p, begin_of(seen[r]), end_of(seen[r]), weights);
    parts[r].total = std::isnan(step) ? NAN : total;
    for (int i = 0; i < keys.size; i++) {
      int32_t sum = 0;
      for (int j = seen[r].begin; j < seen[r].end; j++) sum += weights[j] * keys.v[size_t(j) * keys.size + i];
      parts[r].sum[i] = float(sum);
    }
  }
}

void attend_plain(const Keys& keys, const Seen* seen, int rows, float scale, Part* parts) {
  if (keys.cell == Cell::kCode) return attend_codes_plain(keys.of<int8_t>(), seen, rows, scale, parts);
  attend<Sixteen>(keys, seen, rows, scale, parts);
}

}  // namespace

const Form kPlain{"plain", [] { return true; }, round_plain, multiply_plain, norm, sums, gate,
                  attend_plain, merge, finish, rotate, narrow, halve<Sixteen>, widen<Sixteen>,
                  [](const float*, int, int, float*) {}, attend_in_turn<Sixteen>,
                  [](const Cells<int8_t>&, int16_t*, int16_t*, int16_t*) {},
                  [](const Cells<int8_t>& cells, const int16_t*, const int16_t*, const Seen* seen, int rows, float scale,
                     Part* parts) { attend_codes_plain(cells, seen, rows, scale, parts); }};

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
