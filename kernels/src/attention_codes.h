// Attention over a cache of codes of 8 bits, in whole numbers, written once for all forms. Stated here once; what it does
// not state is as attention.h has it (chunks, the exponential, how chunks are merged, what becomes of them):
//   A query, multiplied by the keys' scales, is rounded to whole numbers of 16 bits: step = its largest magnitude / limit,
//   where limit is 32767, or less where a dot product might not fit into 32 bits (`limit_of`); number = x * (limit /
//   largest magnitude), to the nearest, ties to even. Where the largest magnitude is below 1e-30 all are 0 and so is step.
//   A score is float(dot product of numbers and codes) * (scale * step).
//   Of p, the exponential, weight = p * 32767, to the nearest; total and sum are those of weights and of weights times codes.
//   A query with an infinity or a NaN has a total that is NaN.
// All sums are of whole numbers, and exact: 256 slots of 32767 * 128 fit into 32 bits. So their order is free.
//
// A form gives V::Pairs, sixteen pairs of whole numbers of 16 bits, and V::Whole, sixteen of 32.
#pragma once
#include <vector>

#include "attention_tile.h"

namespace edgellm {
namespace {

constexpr float kMostWeight = 32767.0f, kRound = 12582912.0f;  // 1.5 * 2^23: what is added to it is rounded

constexpr int padded(int size) { return (size + 31) / 32 * 32; }  // features that numbers are kept for

inline float limit_of(int size) { return float(std::min(32767, 0x7fffffff / (128 * size))); }

inline int16_t lowest_bits(float shifted) {  // of a whole number that kRound was added to
  uint32_t bits;
  std::memcpy(&bits, &shifted, sizeof bits);
  return int16_t(uint16_t(bits));
}

// A query as whole numbers, the padding 0; its step, or NaN where it has no such numbers.
inline float round_query(const float* q, int size, int16_t* numbers) {
  int32_t most = 0;  // as whole numbers: in the order of floats, and a NaN is above all
  for (int i = 0; i < size; i++) {
    int32_t bits;
    std::memcpy(&bits, q + i, sizeof bits);
    most = std::max(most, bits & 0x7fffffff);
  }
  float top;
  std::memcpy(&top, &most, sizeof top);
  const bool finite = most < 0x7f800000;
  const float limit = limit_of(size), inverse = finite && top >= kLeast ? limit / top : 0;
  std::fill(numbers, numbers + padded(size), int16_t(0));
  for (int i = 0; inverse > 0 && i < size; i++) numbers[i] = lowest_bits(q[i] * inverse + kRound);
  return !finite ? NAN : inverse > 0 ? top / limit : 0;
}

// Weights of slots `from` to `to` - 1 as whole numbers; their sum.
inline float round_weights(const float* p, int from, int to, int16_t* weights) {
  float lanes[kLanes] = {};
  for (int j = from; j < to; j += kLanes)
    for (int i = 0; i < kLanes; i++) {
      const float shifted = (p[j + i] > 0 ? p[j + i] : 0.0f) * kMostWeight + kRound;
      weights[j + i] = lowest_bits(shifted);
      lanes[i] += shifted - kRound;
    }
  return together(lanes);
}

// Dot products of kQueries queries and the slots from `start` on, V::kKeys of them in all, query by query.
template <class V, int kSize, int kQueries>
void code_dots(const Cells<int8_t>& keys, const int16_t* const* q, int start, typename V::Whole* lanes) {
  using Pairs = typename V::Pairs;
  constexpr int kSlots = V::kKeys / kQueries;
  const int size = kSize ? kSize : keys.size, slots = std::min(kSlots, keys.count - start);
  const int8_t* k = keys.k + size_t(start) * size;
#pragma GCC unroll 16
  for (int j = 0; j < V::kKeys; j++) lanes[j] = V::Whole::zero();
  const auto take = [&](int j, const Pairs& codes, const Pairs* part) {
#pragma GCC unroll 16
    for (int r = 0; r < kQueries; r++) lanes[r * kSlots + j] = V::Whole::plus(lanes[r * kSlots + j], part[r], codes);
  };
  for (int i = 0; i < size; i += 32) {
    Pairs part[kQueries];
#pragma GCC unroll 16
    for (int r = 0; r < kQueries; r++) part[r] = Pairs::load(q[r] + i);
    if (i + 16 == size)
      for (int j = 0; j < slots; j++) take(j, Pairs::widen_half(k + j * size + i), part);
    else if (slots < kSlots)
      for (int j = 0; j < slots; j++) take(j, Pairs::widen(k + j * size + i), part);
    else
#pragma GCC unroll 16
      for (int j = 0; j < kSlots; j++) take(j, Pairs::widen(k + j * size + i), part);
  }
}

template <class V, int kSize, int kQueries>
void code_scores(const Cells<int8_t>& keys, const int16_t* const* q, int start, float (*p)[kChunk]) {
  constexpr int kSlots = V::kKeys / kQueries;
  for (int at = start; at < start + V::kKeys; at += kSlots) {
    typename V::Whole lanes[V::kKeys];
    int32_t sums[V::kKeys];
    code_dots<V, kSize, kQueries>(keys, q, at, lanes);
    V::Whole::together(lanes, sums);
#pragma GCC unroll 16
    for (int r = 0; r < kQueries; r++)
      for (int j = 0; j < kSlots; j++) p[r][at + j] = float(sums[r * kSlots + j]);
  }
}

template <class V, int kSize>
void code_scores_all(const Cells<int8_t>& keys, const int16_t* const* q, int rows, int start, float (*p)[kChunk]) {
  int r = 0;
  if constexpr (V::kKeys > 1)
    for (; r + 2 <= rows; r += 2) code_scores<V, kSize, 2>(keys, q + r, start, p + r);
  for (; r < rows; r++) code_scores<V, kSize, 1>(keys, q + r, start, p + r);
}

// Sums of products of pairs, of kRows rows and 16 * kWide columns, in registers.
template <class V, int kRows, int kWide>
struct Tile {
  typename V::Whole sums[kRows][kWide];
  [[gnu::always_inline]] Tile() {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int w = 0; w < kWide; w++) sums[r][w] = V::Whole::zero();
  }
  // Each row's pair, which `pair_of` gives, times the columns'.
  template <class PairOf>
  [[gnu::always_inline]] void add(const typename V::Pairs (&columns)[kWide], const PairOf& pair_of) {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++) {
      const auto pair = pair_of(r);
#pragma GCC unroll 16
      for (int w = 0; w < kWide; w++) sums[r][w] = V::Whole::plus(sums[r][w], pair, columns[w]);
    }
  }
  // Tells `take` the row, the first column and sixteen sums as numbers.
  template <class Take>
  [[gnu::always_inline]] void give(const Take& take) const {
#pragma GCC unroll 16
    for (int r = 0; r < kRows; r++)
#pragma GCC unroll 16
      for (int w = 0; w < kWide; w++) take(r, 16 * w, V::numbers(sums[r][w]));
  }
};

// Sums of weights times values for kRows queries, 16 * kWide features from `at` on, slots `from` to `to` - 1.
template <class V, int kRows, int kWide>
void add_codes(const Cells<int8_t>& keys, const int16_t (*weights)[kChunk], int from, int to, int at, const Part* parts) {
  alignas(16) static const int8_t nothing[16 * kWide] = {};
  Tile<V, kRows, kWide> tile;
  for (int j = from; j < to; j += 2) {
    const int8_t* v = keys.v + size_t(j) * keys.size + at;
    const int8_t* next = j + 1 < keys.count ? v + keys.size : nothing;
    const int8_t* ahead = v + size_t(kAheadSlots<int8_t>) * keys.size;
    if (kRows < 4) __builtin_prefetch(ahead), __builtin_prefetch(ahead + keys.size);  // many queries find it near
    typename V::Pairs values[kWide];
#pragma GCC unroll 16
    for (int w = 0; w < kWide; w++) values[w] = V::Pairs::zip(v + 16 * w, next + 16 * w);
    tile.add(values, [&](int r) { return V::Pairs::of(weights[r] + j); });
  }
  tile.give([&](int r, int column, const V& numbers) { numbers.store(parts[r].sum + at + column); });
}

template <class V, int kWide>
void add_codes_of(const Cells<int8_t>& keys, const int16_t (*weights)[kChunk], int rows, int from, int to, int at,
                  const Part* parts) {
  switch (rows) {
    case 1: return add_codes<V, 1, kWide>(keys, weights, from, to, at, parts);
    case 2: return add_codes<V, 2, kWide>(keys, weights, from, to, at, parts);
    case 3: return add_codes<V, 3, kWide>(keys, weights, from, to, at, parts);
    default: return add_codes<V, 4, kWide>(keys, weights, from, to, at, parts);
  }
}

// A few queries over a chunk as it lies.
template <class V>
void attend_codes(const Cells<int8_t>& keys, const Seen* seen, int rows, float scale, Part* parts) {
  alignas(64) float p[kMostQueries][kChunk];
  alignas(64) int16_t weights[kMostQueries][kChunk];
  thread_local std::vector<int16_t> rounded;
  const size_t width = padded(keys.size);
  if (rounded.size() < kMostQueries * width) rounded.resize(kMostQueries * width);
  const int16_t* q[kMostQueries];
  float steps[kMostQueries];
  int first = kChunk, last = 0;
  for (int r = 0; r < rows; r++) {
    q[r] = rounded.data() + r * width;
    steps[r] = round_query(seen[r].query, keys.size, rounded.data() + r * width);
    first = std::min(first, begin_of(seen[r])), last = std::max(last, seen[r].end);
  }
  const auto some = keys.size == 64    ? code_scores_all<V, 64>
                    : keys.size == 128 ? code_scores_all<V, 128>
                                       : code_scores_all<V, 0>;
  for (int start = first; start < last; start += V::kKeys) {
    const int8_t* ahead = keys.k + size_t(start + kAheadSlots<int8_t>) * keys.size;
    for (int i = 0; rows < kMostQueries && i < V::kKeys * keys.size; i += kLine) __builtin_prefetch(ahead + i);
    some(keys, q, rows, start, p);
  }
  for (int r = 0; r < rows; r++) {
    const bool finite = !std::isnan(steps[r]);
    weigh(seen[r], finite ? scale * steps[r] : 0.0f, p[r], parts + r);
    std::fill(weights[r] + first, weights[r] + (last + 1) / 2 * 2, int16_t(0));
    const float total = round_weights(p[r], begin_of(seen[r]), end_of(seen[r]), weights[r]);
    parts[r].total = finite ? total : NAN;
  }
  for (int r = 0; r < rows; r += 4) {
    const int count = std::min(4, rows - r);
    int at = 0;
    for (; count <= 2 && at + 16 * V::kWideAlone <= keys.size; at += 16 * V::kWideAlone)
      add_codes_of<V, V::kWideAlone>(keys, weights + r, count, first, last, at, parts + r);
    for (; at + 16 * V::kWide <= keys.size; at += 16 * V::kWide)
      add_codes_of<V, V::kWide>(keys, weights + r, count, first, last, at, parts + r);
    for (; at < keys.size; at += 16) add_codes_of<V, 1>(keys, weights + r, count, first, last, at, parts + r);
  }
}

// What `attend_turned` reads of a chunk: the keys' pairs of features as `turn` puts numbers of 32 bits, and of each two
// slots' values pairs, (count / 2, size). Both have room for kChunk * padded(size); `rows` has as much.
template <void turn(const float*, int, int, float*)>
void turn_codes(const Cells<int8_t>& cells, int16_t* rows, int16_t* keys, int16_t* values) {
  const int size = cells.size, width = padded(size);
  for (int j = 0; j < cells.count; j++) {
    for (int i = 0; i < size; i++) rows[j * width + i] = cells.k[size_t(j) * size + i];
    std::fill(rows + j * width + size, rows + (j + 1) * width, int16_t(0));
  }
  turn(reinterpret_cast<const float*>(rows), cells.count, width / 2, reinterpret_cast<float*>(keys));  // bits, not numbers
  for (int j = 0; j < cells.count; j += 2, values += 2 * size) {
    const int8_t* v = cells.v + size_t(j) * size;
    const int8_t* next = v + (j + 1 < cells.count ? size : 0);
    const int kept = j + 1 < cells.count ? 0xffff : 0;
    for (int i = 0; i < size; i++) {
      const uint32_t pair = uint32_t(uint16_t(v[i])) | uint32_t(uint16_t(next[i]) & kept) << 16;
      std::memcpy(values + 2 * i, &pair, sizeof pair);
    }
  }
}

// Scores of V::kCodeRows queries with a panel's slots.
template <class V, int kPairs>
void code_score_tile(const int16_t* const* q, const int16_t* panel, int pairs, const float* scales, float* const* scores) {
  constexpr int kRows = V::kCodeRows, kWide = V::kCodeWide;
  const int count = kPairs ? kPairs : pairs;
  for (int at = 0; at < kPanel; at += 16 * kWide) {
    Tile<V, kRows, kWide> dots;
    const auto take = [&](int i) {
      typename V::Pairs keys[kWide];
#pragma GCC unroll 16
      for (int w = 0; w < kWide; w++) keys[w] = V::Pairs::load(panel + 2 * (i * kPanel + at + 16 * w));
      dots.add(keys, [&](int r) { return V::Pairs::of(q[r] + 2 * i); });
    };
    for (int i = 0; i < count; i += 4)  // a multiple of 16
#pragma GCC unroll 4
      for (int n = 0; n < 4; n++) take(i + n);
    dots.give([&](int r, int column, const V& numbers) {
      V::times(numbers, V::of(scales[r])).store(scores[r] + at + column);
    });
  }
}

template <class V>
void code_scores_of(const int16_t* keys, int width, const int16_t* q, const float* scales, const Seen* seen, int rows,
                    Weights* p) {
  const auto tile = width == 64 ? code_score_tile<V, 32> : width == 128 ? code_score_tile<V, 64> : code_score_tile<V, 0>;
  over_panels<V::kCodeRows>(seen, rows, p, [&](int start, const int* whose, float* const* scores) {
    const int16_t* numbers[V::kCodeRows];
    float steps[V::kCodeRows];
    for (int r = 0; r < V::kCodeRows; r++) numbers[r] = q + size_t(whose[r]) * width, steps[r] = scales[whose[r]];
    tile(numbers, keys + size_t(start) * width, width / 2, steps, scores);
  });
}

// Sums of weights times values of slots `from` to `to` - 1, of kRows queries and 16 * kWide features from `at` on.
template <class V, int kRows, int kWide>
void add_turned(const int16_t* values, int size, const int16_t (*weights)[kChunk], int from, int to, int at,
                const Part* parts) {
  Tile<V, kRows, kWide> tile;
#pragma GCC unroll 4
  for (int j = from; j < to; j += 2) {
    typename V::Pairs value[kWide];
#pragma GCC unroll 16
    for (int w = 0; w < kWide; w++) value[w] = V::Pairs::load(values + size_t(j) * size + 2 * (at + 16 * w));
    tile.add(value, [&](int r) { return V::Pairs::of(weights[r] + j); });
  }
  tile.give([&](int r, int column, const V& numbers) { numbers.store(parts[r].sum + at + column); });
}

// Scores of some queries as weights, with their largest and their sum; 0 where a query does not see. Queries do not wait
// for each other.
template <class V, int kRows>
void weigh_codes(const Seen* seen, Weights* p, int16_t (*weights)[kChunk], Part* parts) {
  V tops[kRows], sums[kRows];
  const Slots all = tops_of<V, kRows>(seen, p, tops, parts);
  for (int r = 0; r < kRows; r++) {
    std::fill(weights[r], weights[r] + all.begin, int16_t(0));
    std::fill(weights[r] + all.end, weights[r] + kChunk, int16_t(0));
    sums[r] = V::of(0);
  }
  const V zero = V::of(0), round = V::of(kRound);
  for (int j = all.begin; j < all.end; j += kLanes)
    for (int r = 0; r < kRows; r++) {
      const V weight = V::times(V::most(difference_of(V::load(p[r] + j), tops[r]), zero), V::of(kMostWeight));
      const V shifted = V::plus(weight, round);
      shifted.store_lowest(weights[r] + j);
      sums[r] = V::plus(sums[r], V::minus(shifted, round));
    }
  for (int r = 0; r < kRows; r++) parts[r].total = total_of(sums[r]);
}

// Up to kManyQueries over a chunk that `turn_codes` has turned.
template <class V>
void attend_turned(const Cells<int8_t>& cells, const int16_t* keys, const int16_t* values, const Seen* seen, int rows,
                   float scale, Part* parts) {
  constexpr int kRows = V::kCodeValueRows, kWide = V::kCodeValueWide;
  const int size = cells.size, width = padded(size);
  alignas(64) Weights p[kManyQueries];
  alignas(64) int16_t weights[kManyQueries][kChunk];
  thread_local std::vector<int16_t> q;
  if (q.size() < size_t(kManyQueries) * width) q.resize(size_t(kManyQueries) * width);
  float steps[kManyQueries], scales[kManyQueries];
  for (int r = 0; r < rows; r++) {
    steps[r] = round_query(seen[r].query, size, q.data() + size_t(r) * width);
    scales[r] = std::isnan(steps[r]) ? 0.0f : scale * steps[r];
  }
  code_scores_of<V>(keys, width, q.data(), scales, seen, rows, p);
  int row = 0;
  for (; row + V::kWeighRows <= rows; row += V::kWeighRows)
    weigh_codes<V, V::kWeighRows>(seen + row, p + row, weights + row, parts + row);
  for (; row < rows; row++) weigh_codes<V, 1>(seen + row, p + row, weights + row, parts + row);
  for (int r = 0; r < rows; r++)
    if (std::isnan(steps[r])) parts[r].total = NAN;
  for (int at = 0; at < size;) {
    const int wide = at + 16 * kWide <= size ? kWide : 1;
    for (int r = 0; r < rows;) {
      const int count = r + kRows <= rows ? kRows : 1;
      int from = kChunk, to = 0;
      for (int i = r; i < r + count; i++) from = std::min(from, begin_of(seen[i])), to = std::max(to, seen[i].end);
      const auto add = count == 1 ? (wide == 1 ? add_turned<V, 1, 1> : add_turned<V, 1, kWide>)
                                  : (wide == 1 ? add_turned<V, kRows, 1> : add_turned<V, kRows, kWide>);
      add(values, size, weights + r, from, to, at, parts + r);
      r += count;
    }
    at += 16 * wide;
  }
}

// All kinds of cells; `attend` of attention.h but for codes.
template <class V>
void attend_any(const Keys& keys, const Seen* seen, int rows, float scale, Part* parts) {
  if (keys.cell == Cell::kCode) return attend_codes<V>(keys.of<int8_t>(), seen, rows, scale, parts);
  attend<V>(keys, seen, rows, scale, parts);
}

}  // namespace
}  // namespace edgellm
