// Attention of a prompt: a block of queries goes through the cache chunk by chunk, and each chunk's keys are turned (and
// made float32, if they are float16; codes are turned as whole numbers, their values too) once for all of them.
#include <algorithm>
#include <cstring>
#include <new>

#include "attention_step.h"

namespace edgellm {
namespace {

constexpr int kBlockQueries = 4 * kManyQueries;
constexpr int64_t kFewQueries = 64;    // of a head, for which keys are better read as they lie
constexpr int64_t kEnoughBlocks = 12;  // that threads share evenly: each takes the next when it is done

// Numbers of a thread, kept as long as it lives, that begin at a line of the processor's caches.
class Lines {
 public:
  Lines() = default;
  Lines(const Lines&) = delete;
  Lines& operator=(const Lines&) = delete;
  ~Lines() { ::operator delete(data_, kLine); }
  float* of(size_t count) {
    if (count > count_) {
      float* fresh = static_cast<float*>(::operator new(count * sizeof(float), kLine));
      ::operator delete(data_, kLine);
      data_ = fresh, count_ = count;
    }
    return data_;
  }

 private:
  static constexpr std::align_val_t kLine{64};
  float* data_ = nullptr;
  size_t count_ = 0;
};

struct Memory {
  float *turned, *keys, *values;  // of a chunk; keys and values where the cache has others than float32
  int16_t* numbers(float* place) const { return reinterpret_cast<int16_t*>(place); }  // half as large
  float *queries, *sums, *later;  // of a block, turned by position; what they have so far; what a chunk gives some
};

Memory memory_of(const Step& s) {
  thread_local Lines lines;
  const size_t chunk = size_t(kChunk) * s.size, wide = s.kernel->cell == Cell::kFloat ? 0 : chunk;
  const size_t block = size_t(kBlockQueries) * s.size;
  float* all = lines.of(chunk + 2 * wide + 2 * block + size_t(kManyQueries) * s.size);
  float* queries = all + chunk + 2 * wide;
  return {all, all + chunk, all + chunk + wide, queries, queries + block, queries + 2 * block};
}

// Queries of one row that read one head of the cache.
struct Block {
  int64_t row, start, past, last;  // `start` is the first query's number; query i is token i / together's
  int head, count;                 // of those that do not fill a short row up
};

Block block_at(const Step& s, int64_t index) {
  const int64_t heads = s.batch * s.kernel->cached_heads, size = s.block;
  const int64_t block = s.groups - 1 - index / heads;  // what sees most first
  Block b{index % heads / s.kernel->cached_heads, block * size, 0, 0, int(index % heads % s.kernel->cached_heads), 0};
  b.past = s.past(b.row), b.last = s.last[b.row];
  const int64_t here = std::min(s.queries(), (b.last + 1 - b.past) * s.together);
  b.count = int(std::clamp<int64_t>(here - b.start, 0, size));
  return b;
}

size_t token_of(const Step& s, const Block& b, int i) { return size_t(b.row) * s.time + (b.start + i) / s.together; }
int head_of(const Step& s, const Block& b, int i) { return b.head * s.together + int((b.start + i) % s.together); }

void turn_queries(const Step& s, const Block& b, float* queries) {
  for (int i = 0; i < b.count; i++, queries += s.size) {
    const float* x = s.x + token_of(s, b, i) * s.width() + size_t(head_of(s, b, i)) * s.size;
    turn_query(s, x, b.head, b.past + (b.start + i) / s.together, queries);
  }
}

// The chunk's keys and values: codes as they lie, else as numbers. Turned, its keys are in `memory`.
Keys read_chunk(const Step& s, const Block& b, int64_t start, int count, const Memory& memory) {
  const Attention& kernel = *s.kernel;
  const size_t at = s.place(b.row, b.head, start);
  Keys keys{kernel.cell, s.k + at, s.v + at, count, s.size};
  if (kernel.cell == Cell::kCode) {
    kernel.form->turn_codes(keys.of<int8_t>(), memory.numbers(memory.keys), memory.numbers(memory.turned),
                            memory.numbers(memory.values));
    return keys;
  }
  if (kernel.cell == Cell::kHalf) {
    const Cells<Half> halves = keys.of<Half>();
    kernel.form->widen(halves.k, count * s.size, memory.keys);
    kernel.form->widen(halves.v, count * s.size, memory.values);
    keys.k = memory.keys, keys.v = memory.values;
  }
  kernel.form->turn(keys.of<float>().k, count, s.size, memory.turned);
  return keys;
}

void attend_many(const Attention& kernel, const Keys& keys, const Memory& memory, const Seen* seen, int rows, Part* parts) {
  if (kernel.cell != Cell::kCode)
    return kernel.form->attend_many(keys.of<float>(), memory.turned, seen, rows, kernel.scale, parts);
  kernel.form->attend_turned(keys.of<int8_t>(), memory.numbers(memory.turned), memory.numbers(memory.values), seen, rows,
                             kernel.scale, parts);
}

// One chunk, from slot `start` on, for all queries of a block that see some of it.
void attend_chunk(const Step& s, const Block& b, int64_t start, const Memory& memory, Part* all) {
  const int64_t last_slot = b.past + (b.start + b.count - 1) / s.together;
  const Keys keys = read_chunk(s, b, start, int(std::min<int64_t>(last_slot + 1 - start, kChunk)), memory);
  Seen seen[kManyQueries];
  Part parts[kManyQueries];
  int whose[kManyQueries];
  for (int first = 0; first < b.count; first += kManyQueries) {
    int rows = 0;
    for (int i = first; i < std::min(b.count, first + kManyQueries); i++) {
      const int64_t slot = b.past + (b.start + i) / s.together;
      const int64_t least = s.kernel->window == 0 ? 0 : std::max<int64_t>(0, slot + 1 - s.kernel->window);
      const int64_t begin = std::max(least, start), end = std::min(slot + 1, start + kChunk);
      if (begin >= end) continue;
      seen[rows] = {memory.queries + size_t(i) * s.size, int(begin - start), int(end - start)};
      const bool begun = least < start;
      parts[rows].sum = begun ? memory.later + size_t(rows) * s.size : all[i].sum;
      whose[rows++] = begun ? i : -1 - i;
    }
    if (rows > 0) attend_many(*s.kernel, keys, memory, seen, rows, parts);
    for (int r = 0; r < rows; r++) {
      if (whose[r] >= 0) s.kernel->form->merge(parts[r], s.size, all + whose[r]);
      else all[-1 - whose[r]] = parts[r];
    }
  }
}

}  // namespace

int block_of(const Step& s) {
  if (s.queries() < kFewQueries) return 0;
  const int64_t each = s.queries() * s.batch * s.kernel->cached_heads / kEnoughBlocks;
  return int(std::clamp<int64_t>(each / kManyQueries * kManyQueries, kManyQueries, kBlockQueries));
}

void attend_block(void* data, size_t index) {
  const Step& s = *static_cast<Step*>(data);
  const Block b = block_at(s, int64_t(index));
  const Memory memory = memory_of(s);
  Part all[kBlockQueries];
  for (int i = 0; i < b.count; i++) all[i].sum = memory.sums + size_t(i) * s.size;
  turn_queries(s, b, memory.queries);
  if (b.count > 0) {
    const int64_t first = b.past + b.start / s.together, last = b.past + (b.start + b.count - 1) / s.together;
    const int64_t least = s.kernel->window == 0 ? 0 : std::max<int64_t>(0, first + 1 - s.kernel->window);
    for (int64_t start = least / kChunk * kChunk; start <= last; start += kChunk) attend_chunk(s, b, start, memory, all);
  }
  const int64_t count = std::min<int64_t>(s.block, s.queries() - b.start);
  for (int i = 0; i < count; i++) {
    float* y = s.y + (token_of(s, b, i) * s.kernel->heads + head_of(s, b, i)) * s.size;
    if (i < b.count) s.kernel->form->finish(all[i], s.scales(s.v_scales, b.head), s.size, y);
    else std::memset(y, 0, size_t(s.size) * sizeof(float));  // what fills a short row up
  }
}

}  // namespace edgellm
