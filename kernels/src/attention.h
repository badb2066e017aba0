// Attention of queries over a chunk of keys and values, written once for all forms: a form gives `V`, sixteen numbers in
// its registers. Every form computes the same bits, stated here once:
//   Keys are taken in chunks of 256, counted from the first slot of the cache.
//   A score is scale * the dot product of query and key: lane i of sixteen starts at 0 and adds elements i, i + 16, ... by
//   fma; the upper half of the lanes is added to the lower, four times.
//   top = the largest score of the chunk; p = exponential(max(score - top, -87)); lane i of sixteen adds the p of slots
//   i, i + 16, ..., and lanes are added as above: total. A sum starts at 0 and adds p * value, slot by slot, by fma.
//   Chunks are merged in their order (`merge`), and the result is sum / total (`finish`).
// So a query's result depends on the keys and values that it sees and on nothing else.
#pragma once
#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "product.h"

namespace edgellm {
namespace {

constexpr int kAheadSlots = 32;  // what is not in a cache takes that long to come

inline float difference(float score, float top) {
  const float x = score - top;
  return exponential(x < -87.0f ? -87.0f : x);
}

// The scores of the next V::kKeys slots, of which there are `count`.
template <class V>
void last_dots(const float* q, const float* k, int count, int size, float* scores) {
  V lanes[V::kKeys];
  for (int j = 0; j < V::kKeys; j++) lanes[j] = V::of(0);
  for (int j = 0; j < count; j++)
    for (int i = 0; i < size; i += 16) lanes[j] = V::fma(V::load(q + i), V::load(k + j * size + i), lanes[j]);
  V::together(lanes, scores);
}

// The same for all of them. `kSize` is a head's size, 0 where it is known only here.
template <class V, int kSize>
void dots(const Keys& keys, const float* q, int start, float* scores) {
  const int size = kSize ? kSize : keys.size;
  const float* k = keys.k + size_t(start) * size;
  if (start + V::kKeys > keys.count) return last_dots<V>(q, k, keys.count - start, size, scores);
  V lanes[V::kKeys];
#pragma GCC unroll 16
  for (int j = 0; j < V::kKeys; j++) lanes[j] = V::of(0);
  for (int i = 0; i < size; i += 16) {
    const V part = V::load(q + i);
#pragma GCC unroll 16
    for (int j = 0; j < V::kKeys; j++) lanes[j] = V::fma(part, V::load(k + j * size + i), lanes[j]);
  }
  V::together(lanes, scores);
}

// The values of slots `from` to `to` - 1 into the sums of kRows queries, 16 * kWide features of them from `at` on.
template <class V, int kRows, int kWide, class Row>
void add_values(const Keys& keys, const Row* p, int from, int to, int at, const Part* parts) {
  V kept[kRows][kWide];
  for (int r = 0; r < kRows; r++)
    for (int w = 0; w < kWide; w++) kept[r][w] = V::load(parts[r].sum + at + 16 * w);
  for (int j = from; j < to; j++) {
    const float* v = keys.v + size_t(j) * keys.size + at;
    V value[kWide];
    for (int w = 0; w < kWide; w++) {
      value[w] = V::load(v + 16 * w);
      if (kRows < 4) __builtin_prefetch(v + size_t(kAheadSlots) * keys.size + 16 * w);  // many queries find it near
    }
    for (int r = 0; r < kRows; r++) {
      const V weight = V::of(p[r][j]);
      for (int w = 0; w < kWide; w++) kept[r][w] = V::fma(weight, value[w], kept[r][w]);
    }
  }
  for (int r = 0; r < kRows; r++)
    for (int w = 0; w < kWide; w++) kept[r][w].store(parts[r].sum + at + 16 * w);
}

// Of up to four queries: together what all see, each by itself what is before and after.
template <class V, int kWide>
void add_tile(const Keys& keys, const Seen* seen, const float (*p)[kChunk], int rows, int at, const Part* parts) {
  int from = seen[0].begin, to = seen[0].end;
  for (int r = 1; r < rows; r++) from = std::max(from, seen[r].begin), to = std::min(to, seen[r].end);
  if (from >= to || rows == 1) from = to = kChunk;
  for (int r = 0; r < rows; r++)
    add_values<V, 1, kWide>(keys, p + r, seen[r].begin, std::min(from, seen[r].end), at, parts + r);
  if (from == kChunk) return;
  if (rows == 4) add_values<V, 4, kWide>(keys, p, from, to, at, parts);
  if (rows == 3) add_values<V, 3, kWide>(keys, p, from, to, at, parts);
  if (rows == 2) add_values<V, 2, kWide>(keys, p, from, to, at, parts);
  for (int r = 0; r < rows; r++) add_values<V, 1, kWide>(keys, p + r, to, seen[r].end, at, parts + r);
}

// Scores of one query as weights, with their largest and their sum.
inline void weigh(const Seen& seen, float scale, float* p, Part* part) {
  const int before = seen.begin / kLanes * kLanes, after = (seen.end + kLanes - 1) / kLanes * kLanes;
  float tops[kLanes], lanes[kLanes] = {};
  for (float& top : tops) top = -INFINITY;
  for (int j = before; j < seen.begin; j++) p[j] = -INFINITY;
  for (int j = seen.end; j < after; j++) p[j] = -INFINITY;
  for (int j = seen.begin; j < seen.end; j++) p[j] *= scale;
  for (int j = before; j < after; j += kLanes)
    for (int i = 0; i < kLanes; i++) tops[i] = p[j + i] > tops[i] ? p[j + i] : tops[i];
  const float top = *std::max_element(tops, tops + kLanes);
  for (int j = before; j < after; j++) p[j] = difference(p[j], top);
  for (int j = before; j < seen.begin; j++) p[j] = 0;
  for (int j = seen.end; j < after; j++) p[j] = 0;
  for (int j = before; j < after; j += kLanes)
    for (int i = 0; i < kLanes; i++) lanes[i] += p[j + i];
  part->top = top;
  part->total = together(lanes);
}

template <class V>
void attend(const Keys& keys, const Seen* seen, int rows, float scale, Part* parts) {
  alignas(64) float p[kMostQueries][kChunk];
  int first = kChunk, last = 0;
  for (int r = 0; r < rows; r++) {
    first = std::min(first, seen[r].begin / kLanes * kLanes), last = std::max(last, seen[r].end);
    std::fill(parts[r].sum, parts[r].sum + keys.size, 0.0f);
  }
  const auto some = keys.size == 64 ? dots<V, 64> : keys.size == 128 ? dots<V, 128> : dots<V, 0>;
  for (int start = first; start < last; start += V::kKeys) {  // all queries while the keys are near
    const float* ahead = keys.k + size_t(start + kAheadSlots) * keys.size;
    for (int i = 0; rows < kMostQueries && i < V::kKeys * keys.size; i += 16) __builtin_prefetch(ahead + i);
    for (int r = 0; r < rows; r++)
      if (start < seen[r].end && start + V::kKeys > seen[r].begin) some(keys, seen[r].query, start, p[r] + start);
  }
  for (int r = 0; r < rows; r++) weigh(seen[r], scale, p[r], parts + r);
  int at = 0;
  for (; rows == 1 && at + 16 * V::kWideAlone <= keys.size; at += 16 * V::kWideAlone)
    add_tile<V, V::kWideAlone>(keys, seen, p, 1, at, parts);
  for (; at + 16 * V::kWide <= keys.size; at += 16 * V::kWide)
    for (int r = 0; r < rows; r += 4)
      add_tile<V, V::kWide>(keys, seen + r, p + r, std::min(4, rows - r), at, parts + r);
  for (; at < keys.size; at += 16)
    for (int r = 0; r < rows; r += 4) add_tile<V, 1>(keys, seen + r, p + r, std::min(4, rows - r), at, parts + r);
}

// Many queries over a chunk, some at a time; attention_tile.h is faster at the same numbers.
template <class V>
void attend_in_turn(const Keys& keys, const float*, const Seen* seen, int rows, float scale, Part* parts) {
  for (int r = 0; r < rows; r += kMostQueries)
    attend<V>(keys, seen + r, std::min(kMostQueries, rows - r), scale, parts + r);
}

// A later chunk into what the earlier ones gave.
void merge(const Part& later, int size, Part* all) {
  const float top = later.top > all->top ? later.top : all->top;
  const float kept = difference(all->top, top), added = difference(later.top, top);
  all->top = top;
  all->total = std::fmaf(later.total, added, all->total * kept);
  for (int i = 0; i < size; i++) all->sum[i] = std::fmaf(later.sum[i], added, all->sum[i] * kept);
}

void finish(const Part& all, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = all.sum[i] / all.total;
}

// A head's features turned by their position, the first half of `turned` with the second; the others as they are.
void rotate(const float* x, const float* cosine, const float* sine, int turned, int size, float* y) {
  const int half = turned / 2;
  for (int i = 0; i < half; i++) {
    const float a = x[i], b = x[i + half];
    y[i] = a * cosine[i] - b * sine[i];
    y[i + half] = b * cosine[i] + a * sine[i];
  }
  for (int i = turned; i < size; i++) y[i] = x[i];
}

// Numbers as codes of 8 bits, each feature with a scale of its own, and back.
void narrow(const float* x, const float* scales, int size, int8_t* codes) {
  for (int i = 0; i < size; i++) {
    float code = x[i] / scales[i];
    code = code > 127.0f ? 127.0f : code;
    code = code > -128.0f ? code : -128.0f;
    codes[i] = static_cast<int8_t>(static_cast<int>(code + 12582912.0f - 12582912.0f));  // to the nearest, ties to even
  }
}

void widen(const int8_t* codes, const float* scales, int count, int size, float* x) {
  for (int j = 0; j < count; j++)
    for (int i = 0; i < size; i++) x[j * size + i] = float(codes[j * size + i]) * scales[i];
}

}  // namespace
}  // namespace edgellm
