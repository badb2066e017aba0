// Attention of queries over a chunk of keys and values, written once for all forms: a form gives `V`, sixteen numbers in
// its registers. Every form computes the same bits, stated here once:
//   Keys are taken in chunks of 256, counted from the first slot of the cache.
//   A score is scale * the dot product of query and key: lane i of sixteen starts at 0 and adds elements i, i + 16, ... by
//   fma; the upper half of the lanes is added to the lower, four times.
//   top = the largest score of the chunk; p = exponential(max(score - top, -87)); lane i of sixteen adds the p of slots
//   i, i + 16, ..., and lanes are added as above: total. A sum starts at 0 and adds p * value, slot by slot, by fma.
//   Chunks are merged in their order (`merge`), and the result is sum / total (`finish`).
// Numbers of 16 bits are taken as the float32 of the same value. Of codes of 8 bits, which have a scale for each feature,
// the query is multiplied by the keys' scales before all that, and sum / total by the values' after it; products with
// them are of whole numbers, as attention_codes.h has it.
// So a query's result depends on the keys and values that it sees and on nothing else.
#pragma once
#include <algorithm>
#include <cmath>

#include "elementwise.h"
#include "halves.h"
#include "product.h"

namespace edgellm {
namespace {

// Slots ahead that are asked for: what is not in a processor's cache takes that long to come.
template <class T>
constexpr int kAheadSlots = 128 / sizeof(T);
constexpr int kLine = 64;  // bytes of a cache's line

inline float difference(float score, float top) {
  const float x = score - top;
  return exponential(x < -87.0f ? -87.0f : x);
}

// Dot products of kQueries queries and the slots from `start` on, V::kKeys of them in all: `lanes` query by query. Slots
// that are not there are 0. `kSize` is a head's size, 0 where it is known only here.
template <class V, int kSize, int kQueries, class T>
void dots(const Cells<T>& keys, const Seen* seen, int start, V* lanes) {
  constexpr int kSlots = V::kKeys / kQueries;
  const int size = kSize ? kSize : keys.size;
  const T* k = keys.k + size_t(start) * size;
#pragma GCC unroll 16
  for (int j = 0; j < V::kKeys; j++) lanes[j] = V::of(0);
  if (start + kSlots > keys.count) {
    for (int j = 0; j < keys.count - start; j++)
      for (int r = 0; r < kQueries; r++)
        for (int i = 0; i < size; i += 16)
          lanes[r * kSlots + j] = V::fma(V::load(seen[r].query + i), V::load(k + j * size + i), lanes[r * kSlots + j]);
    return;
  }
  for (int i = 0; i < size; i += 16) {
    V part[kQueries];
#pragma GCC unroll 2
    for (int r = 0; r < kQueries; r++) part[r] = V::load(seen[r].query + i);
#pragma GCC unroll 16
    for (int j = 0; j < kSlots; j++) {
      const V key = V::load(k + j * size + i);
#pragma GCC unroll 2
      for (int r = 0; r < kQueries; r++) lanes[r * kSlots + j] = V::fma(part[r], key, lanes[r * kSlots + j]);
    }
  }
}

// The scores, but for the scale, of a query or of two with V::kKeys slots.
template <class V, int kSize, class T>
void score(const Cells<T>& keys, const Seen* seen, int start, float (*p)[kChunk]) {
  V lanes[V::kKeys];
  dots<V, kSize, 1>(keys, seen, start, lanes);
  V::together(lanes, p[0] + start);
}

template <class V, int kSize, class T>
void score_two(const Cells<T>& keys, const Seen* seen, int start, float (*p)[kChunk]) {
  constexpr int kHalf = V::kKeys / 2;
  for (int half = start; half < start + V::kKeys; half += kHalf) {
    V lanes[V::kKeys];
    float sums[V::kKeys];
    dots<V, kSize, 2>(keys, seen, half, lanes);
    V::together(lanes, sums);
    std::copy(sums, sums + kHalf, p[0] + half);
    std::copy(sums + kHalf, sums + V::kKeys, p[1] + half);
  }
}

// The values of slots `from` to `to` - 1 into the sums of kRows queries, 16 * kWide features of them from `at` on.
template <class V, int kRows, int kWide, class Row, class T>
void add_values(const Cells<T>& keys, const Row* p, int from, int to, int at, const Part* parts) {
  V kept[kRows][kWide];
  for (int r = 0; r < kRows; r++)
    for (int w = 0; w < kWide; w++) kept[r][w] = V::load(parts[r].sum + at + 16 * w);
  for (int j = from; j < to; j++) {
    const T* v = keys.v + size_t(j) * keys.size + at;
    V value[kWide];
    for (int w = 0; w < kWide; w++) {
      value[w] = V::load(v + 16 * w);
      if (kRows < 4 && w * 16 * sizeof(T) % kLine == 0)  // many queries find it near
        __builtin_prefetch(v + size_t(kAheadSlots<T>) * keys.size + 16 * w);
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
template <class V, int kWide, class T>
void add_tile(const Cells<T>& keys, const Seen* seen, const float (*p)[kChunk], int rows, int at, const Part* parts) {
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

// What a query sees, with all of the sixteens that it begins and ends in.
inline int begin_of(const Seen& seen) { return seen.begin / kLanes * kLanes; }
inline int end_of(const Seen& seen) { return (seen.end + kLanes - 1) / kLanes * kLanes; }

// Scores of one query as weights, with their largest and their sum.
inline void weigh(const Seen& seen, float scale, float* p, Part* part) {
  const int before = begin_of(seen), after = end_of(seen);
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

template <class V, int kSize, class T>
void score_all(const Cells<T>& keys, const Seen* seen, int rows, int start, float (*p)[kChunk]) {
  const auto sees = [&](const Seen& each) { return start < each.end && start + V::kKeys > each.begin; };
  int r = 0;
  if constexpr (V::kKeys > 1)
    for (; r + 2 <= rows; r += 2)
      if (sees(seen[r]) || sees(seen[r + 1])) score_two<V, kSize>(keys, seen + r, start, p + r);
  for (; r < rows; r++)
    if (sees(seen[r])) score<V, kSize>(keys, seen + r, start, p + r);
}

template <class V, class T>
void attend_cells(const Cells<T>& keys, const Seen* seen, int rows, float scale, Part* parts) {
  alignas(64) float p[kMostQueries][kChunk];
  int first = kChunk, last = 0;
  for (int r = 0; r < rows; r++) {
    first = std::min(first, begin_of(seen[r])), last = std::max(last, seen[r].end);
    std::fill(parts[r].sum, parts[r].sum + keys.size, 0.0f);
  }
  const auto some = keys.size == 64 ? score_all<V, 64, T> : keys.size == 128 ? score_all<V, 128, T> : score_all<V, 0, T>;
  for (int start = first; start < last; start += V::kKeys) {  // all queries while the keys are near
    const T* ahead = keys.k + size_t(start + kAheadSlots<T>) * keys.size;
    for (int i = 0; rows < kMostQueries && i < V::kKeys * keys.size; i += kLine / sizeof(T)) __builtin_prefetch(ahead + i);
    some(keys, seen, rows, start, p);
  }
  for (int r = 0; r < rows; r++) weigh(seen[r], scale, p[r], parts + r);
  int at = 0;
  for (; rows <= 2 && at + 16 * V::kWideAlone <= keys.size; at += 16 * V::kWideAlone)
    add_tile<V, V::kWideAlone>(keys, seen, p, rows, at, parts);
  for (; at + 16 * V::kWide <= keys.size; at += 16 * V::kWide)
    for (int r = 0; r < rows; r += 4)
      add_tile<V, V::kWide>(keys, seen + r, p + r, std::min(4, rows - r), at, parts + r);
  for (; at < keys.size; at += 16)
    for (int r = 0; r < rows; r += 4) add_tile<V, 1>(keys, seen + r, p + r, std::min(4, rows - r), at, parts + r);
}

template <class V>
void attend(const Keys& keys, const Seen* seen, int rows, float scale, Part* parts) {
  switch (keys.cell) {
    case Cell::kFloat: return attend_cells<V>(keys.of<float>(), seen, rows, scale, parts);
    case Cell::kHalf: return attend_cells<V>(keys.of<Half>(), seen, rows, scale, parts);
    case Cell::kCode: return;  // attention_codes.h
  }
}

// Many queries over a chunk, some at a time; attention_tile.h is faster at the same numbers.
template <class V>
void attend_in_turn(const Cells<float>& keys, const float*, const Seen* seen, int rows, float scale, Part* parts) {
  for (int r = 0; r < rows; r += kMostQueries)
    attend_cells<V>(keys, seen + r, std::min(kMostQueries, rows - r), scale, parts + r);
}

// A later chunk into what the earlier ones gave.
void merge(const Part& later, int size, Part* all) {
  const float top = later.top > all->top ? later.top : all->top;
  const float kept = difference(all->top, top), added = difference(later.top, top);
  all->top = top;
  all->total = std::fmaf(later.total, added, all->total * kept);
  for (int i = 0; i < size; i++) all->sum[i] = std::fmaf(later.sum[i], added, all->sum[i] * kept);
}

void finish(const Part& all, const float* scales, int size, float* y) {
  for (int i = 0; i < size; i++) y[i] = all.sum[i] / all.total;
  for (int i = 0; scales != nullptr && i < size; i++) y[i] *= scales[i];
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

// Numbers as codes of 8 bits, each feature with a scale of its own.
void narrow(const float* x, const float* scales, int size, int8_t* codes) {
  for (int i = 0; i < size; i++) {
    float code = x[i] / scales[i];
    code = code > 127.0f ? 127.0f : code;
    code = code > -128.0f ? code : -128.0f;
    codes[i] = static_cast<int8_t>(static_cast<int>(code + 12582912.0f - 12582912.0f));  // to the nearest, ties to even
  }
}

// Numbers as the nearest of 16 bits, ties to even; those beyond the largest as this.
template <class V>
void halve(const float* x, int count, Half* halves) {
  for (int i = 0; i < count; i += 16) V::load(x + i).store(halves + i);
}

template <class V>
void widen(const Half* halves, int count, float* x) {
  for (int i = 0; i < count; i += 16) V::load(halves + i).store(x + i);
}

}  // namespace
}  // namespace edgellm
