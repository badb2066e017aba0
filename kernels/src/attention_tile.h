// Attention of many queries over a chunk: the numbers of attention.h, in tiles. The keys of the chunk lie turned, so that
// sixteen slots are the lanes of a register, each lane of a dot product is a register of its own, and nothing is added
// across one. Values of few slots stay near while the queries pass. What no query of a tile sees is not computed.
//
// Beside the operations of attention.h a form gives `V`: sums, differences and products of lanes, `most(a, b)`, which is
// b where a is not greater, `power`, and how large its tiles are: kScoreRows queries by kScoreWide times sixteen slots,
// kValueRows queries by kValueWide times sixteen features.
#pragma once
#include "attention.h"

namespace edgellm {
namespace {

constexpr int kPanel = 32;         // slots that lie turned beside each other
constexpr int kStride = kChunk + kLanes;  // of weights: rows of queries do not fall on the same lines of a cache
constexpr int kNearSlots = 128;    // whose values stay in a processor's first cache

using Weights = float[kStride];

// A chunk's keys (count, size) as panels (size, kPanel); slots that are not there are 0. They may be other bits than a
// float's, and are copied as such.
inline void turn_one_by_one(const float* k, int count, int size, float* turned) {
  for (int first = 0; first < count; first += kPanel, turned += size_t(size) * kPanel) {
    const int here = std::min(kPanel, count - first);
    for (int i = 0; i < size; i++) {
      float* to = turned + i * kPanel;
      for (int j = 0; j < here; j++) std::memcpy(to + j, k + size_t(first + j) * size + i, sizeof(float));
      std::memset(to + here, 0, (kPanel - here) * sizeof(float));
    }
  }
}

// exponential(max(x - top, -87)) of each lane, step by step as elementwise.h has it.
template <class V>
inline V difference_of(V x, V top) {
  const V least = V::of(-87.0f), round = V::of(12582912.0f);
  const V d = V::most(least, V::minus(x, top));
  const V shifted = V::fma(d, V::of(1.44269504f), round), n = V::minus(shifted, round);
  V r = V::fma(n, V::of(-0.693359375f), d);
  r = V::fma(n, V::of(2.12194440e-4f), r);
  V p = V::of(1.9875691500e-4f);
  p = V::fma(p, r, V::of(1.3981999507e-3f));
  p = V::fma(p, r, V::of(8.3334519073e-3f));
  p = V::fma(p, r, V::of(4.1665795894e-2f));
  p = V::fma(p, r, V::of(1.6666665459e-1f));
  p = V::fma(p, r, V::of(5.0000001201e-1f));
  p = V::plus(V::fma(p, V::times(r, r), r), V::of(1.0f));
  return V::times(p, shifted.power());
}

// Lanes kLane, kLane + kApart, kLane + 2 * kApart, ... of dot products, added as attention.h says: with kApart of 16 one
// lane, else the sum of two such.
template <class V, int kRows, int kWide, int kLane, int kApart>
[[gnu::always_inline]] inline void add_lanes(const float* const* q, const float* turned, int size, V (&y)[kRows][kWide]) {
  if constexpr (kApart == kLanes) {
    for (int r = 0; r < kRows; r++)
      for (int w = 0; w < kWide; w++) y[r][w] = V::of(0);
#pragma GCC unroll 1
    for (int i = kLane; i < size; i += kLanes) {
      V key[kWide];
      for (int w = 0; w < kWide; w++) key[w] = V::load(turned + i * kPanel + 16 * w);
      for (int r = 0; r < kRows; r++) {
        const V feature = V::of(q[r][i]);
        for (int w = 0; w < kWide; w++) y[r][w] = V::fma(feature, key[w], y[r][w]);
      }
    }
  } else {
    V other[kRows][kWide];
    add_lanes<V, kRows, kWide, kLane, 2 * kApart>(q, turned, size, y);
    add_lanes<V, kRows, kWide, kLane + kApart, 2 * kApart>(q, turned, size, other);
    for (int r = 0; r < kRows; r++)
      for (int w = 0; w < kWide; w++) y[r][w] = V::plus(y[r][w], other[r][w]);
  }
}

// Scores of kScoreRows queries with a panel's slots. `kSize` is a head's size, 0 where it is known only here.
template <class V, int kSize>
void score_tile(const float* const* q, const float* panel, int size, float scale, float* const* scores) {
  for (int at = 0; at < kPanel; at += 16 * V::kScoreWide) {
    V dots[V::kScoreRows][V::kScoreWide];
    add_lanes<V, V::kScoreRows, V::kScoreWide, 0, 1>(q, panel + at, kSize ? kSize : size, dots);
    for (int r = 0; r < V::kScoreRows; r++)
      for (int w = 0; w < V::kScoreWide; w++) V::times(dots[r][w], V::of(scale)).store(scores[r] + at + 16 * w);
  }
}

// Scores in tiles of kRows queries and a panel, where some of them see some of it: `tile` is told the panel's first slot,
// which queries these are, and where their scores go.
template <int kRows, class Tile>
void over_panels(const Seen* seen, int rows, Weights* p, const Tile& tile) {
  alignas(64) float nowhere[kPanel];  // where a tile has more rows than there are queries
  for (int start = 0; start < kChunk; start += kPanel)
    for (int first = 0; first < rows; first += kRows) {
      int whose[kRows];
      float* scores[kRows];
      int begin = kChunk, end = 0;
      for (int r = 0; r < kRows; r++) {
        whose[r] = std::min(first + r, rows - 1);
        scores[r] = first + r < rows ? p[whose[r]] + start : nowhere;
        begin = std::min(begin, seen[whose[r]].begin), end = std::max(end, seen[whose[r]].end);
      }
      if (begin < start + kPanel && end > start) tile(start, whose, scores);
    }
}

template <class V>
void scores_of(const float* turned, int size, const Seen* seen, int rows, float scale, Weights* p) {
  const auto tile = size == 64 ? score_tile<V, 64> : size == 128 ? score_tile<V, 128> : score_tile<V, 0>;
  over_panels<V::kScoreRows>(seen, rows, p, [&](int start, const int* whose, float* const* scores) {
    const float* q[V::kScoreRows];
    for (int r = 0; r < V::kScoreRows; r++) q[r] = seen[whose[r]].query;
    tile(q, turned + size_t(start) * size, size, scale, scores);
  });
}

// What of a row no query sees, from `before` to `after`, the slots that are taken together.
inline void fill_edges(const Seen& seen, int before, int after, float value, float* p) {
  std::fill(p + before, p + seen.begin, value);
  std::fill(p + seen.end, p + after, value);
}

// Slots of a chunk, whole sixteens.
struct Slots {
  int begin, end;
};

// What some queries see in all. Scores that one of them does not see become -infinity; `tops` are the largest of each.
template <class V, int kRows>
[[gnu::always_inline]] inline Slots tops_of(const Seen* seen, Weights* p, V (&tops)[kRows], Part* parts) {
  Slots all{kChunk, 0};
  for (int r = 0; r < kRows; r++)
    all = {std::min(all.begin, begin_of(seen[r])), std::max(all.end, end_of(seen[r]))};
  for (int r = 0; r < kRows; r++) {
    fill_edges(seen[r], all.begin, all.end, -INFINITY, p[r]);
    tops[r] = V::of(-INFINITY);
  }
  for (int j = all.begin; j < all.end; j += kLanes)
    for (int r = 0; r < kRows; r++) tops[r] = V::most(V::load(p[r] + j), tops[r]);
  for (int r = 0; r < kRows; r++) tops[r] = V::of(parts[r].top = tops[r].top());
  return all;
}

template <class V>
float total_of(const V& sums) {
  alignas(64) float lanes[kLanes];
  sums.store(lanes);
  return together(lanes);
}

// Scores of some queries as weights, with their largest and their sum: `weigh` of attention.h, but for the scale. What a
// query does not see is 0 in its sum. Queries do not wait for each other.
template <class V, int kRows>
void weigh_rows(const Seen* seen, Weights* p, Part* parts) {
  V tops[kRows], sums[kRows];
  const Slots all = tops_of<V, kRows>(seen, p, tops, parts);
  for (int j = all.begin; j < all.end; j += kLanes)
    for (int r = 0; r < kRows; r++) difference_of(V::load(p[r] + j), tops[r]).store(p[r] + j);
  for (int r = 0; r < kRows; r++) fill_edges(seen[r], all.begin, all.end, 0.0f, p[r]), sums[r] = V::of(0);
  for (int j = all.begin; j < all.end; j += kLanes)
    for (int r = 0; r < kRows; r++) sums[r] = V::plus(sums[r], V::load(p[r] + j));
  for (int r = 0; r < kRows; r++) parts[r].total = total_of(sums[r]);
}

template <class V>
void weigh_all(const Seen* seen, int rows, Weights* p, Part* parts) {
  int r = 0;
  for (; r + V::kWeighRows <= rows; r += V::kWeighRows) weigh_rows<V, V::kWeighRows>(seen + r, p + r, parts + r);
  for (; r < rows; r++) weigh_rows<V, 1>(seen + r, p + r, parts + r);
}

template <class V, int kWide>
void add_values_of(int rows, const Cells<float>& keys, const Weights* p, int from, int to, int at, const Part* parts) {
  switch (rows) {
    case 1: return add_values<V, 1, kWide>(keys, p, from, to, at, parts);
    case 2: return add_values<V, 2, kWide>(keys, p, from, to, at, parts);
    case 3: return add_values<V, 3, kWide>(keys, p, from, to, at, parts);
    case 4: return add_values<V, 4, kWide>(keys, p, from, to, at, parts);
    case 5: return add_values<V, 5, kWide>(keys, p, from, to, at, parts);
    default: return add_values<V, 6, kWide>(keys, p, from, to, at, parts);
  }
}

// Values of slots `start` to `stop` - 1 into a tile's sums: together what all its queries see, then what only some do.
template <class V, int kWide>
void add_near(const Cells<float>& keys, const Seen* seen, const Weights* p, int rows, int start, int stop, int at, const Part* parts) {
  int from = start, to = stop;
  for (int r = 0; r < rows; r++) from = std::max(from, seen[r].begin), to = std::min(to, seen[r].end);
  const bool shared = from < to;
  for (int r = 0; r < rows; r++) {
    const int begin = std::max(start, seen[r].begin), end = std::min(shared ? from : stop, seen[r].end);
    if (begin < end) add_values<V, 1, kWide>(keys, p + r, begin, end, at, parts + r);
  }
  if (!shared) return;
  add_values_of<V, kWide>(rows, keys, p, from, to, at, parts);
  for (int r = 0; r < rows; r++) {
    const int end = std::min(stop, seen[r].end);
    if (to < end) add_values<V, 1, kWide>(keys, p + r, to, end, at, parts + r);
  }
}

template <class V>
void attend_many(const Cells<float>& keys, const float* turned, const Seen* seen, int rows, float scale, Part* parts) {
  static_assert(V::kValueRows <= 6 && kPanel % (16 * V::kScoreWide) == 0);
  alignas(64) Weights p[kManyQueries];
  scores_of<V>(turned, keys.size, seen, rows, scale, p);
  weigh_all<V>(seen, rows, p, parts);
  int least = kChunk, most = 0;
  for (int r = 0; r < rows; r++) {
    std::fill(parts[r].sum, parts[r].sum + keys.size, 0.0f);
    least = std::min(least, seen[r].begin), most = std::max(most, seen[r].end);
  }
  for (int start = least / kNearSlots * kNearSlots; start < most; start += kNearSlots)
    for (int r = 0; r < rows; r += V::kValueRows) {
      const int count = std::min(V::kValueRows, rows - r), stop = start + kNearSlots;
      int at = 0;
      for (; at + 16 * V::kValueWide <= keys.size; at += 16 * V::kValueWide)
        add_near<V, V::kValueWide>(keys, seen + r, p + r, count, start, stop, at, parts + r);
      for (; at < keys.size; at += 16) add_near<V, 1>(keys, seen + r, p + r, count, start, stop, at, parts + r);
    }
}

}  // namespace
}  // namespace edgellm
