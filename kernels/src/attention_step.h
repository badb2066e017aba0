// What every thread sees of one step of attention, and what threads do of it where there are many queries.
#pragma once
#include <cstddef>
#include <cstdint>

#include "product.h"

namespace edgellm {

constexpr int kLargestHead = 4096;  // features

struct Attention {
  const Form* form;
  Cell cell;                         // of the cache
  bool turns, norms;                 // queries and keys are turned by their position, normed before that
  int heads, cached_heads, window;   // window 0: none
  float scale, epsilon;              // of scores; of the norms of heads
};

struct Step {
  const Attention* kernel;
  const float *x, *cosines, *sines, *k_scales, *v_scales;
  const float *q_norm, *k_norm;  // weights of heads' norms, null where there are none
  float *q, *y;  // q: queries turned by position, null where blocks turn their own
  uint8_t *k, *v;
  const int32_t* last;
  int64_t batch, time, slots;
  int size, turned, together;  // `together` query heads read one head of the cache
  bool first;                  // of a prompt: rows begin at slot 0
  int block;                   // queries of one head that are taken together
  int64_t groups;              // how many such there are of a row and a head of the cache
  int chunks;                  // of the longest row
  float* parts;                // where each chunk's is kept apart; null where a thread takes all chunks

  int64_t past(int64_t row) const { return first ? 0 : last[row] + 1 - time; }
  int64_t queries() const { return time * together; }  // of a row, for each head of the cache
  size_t place(int64_t row, int head, int64_t slot) const {  // in bytes
    return ((size_t(row) * kernel->cached_heads + head) * slots + slot) * size * bytes_of(kernel->cell);
  }
  const float* scales(const float* all, int head) const { return all ? all + size_t(head) * size : nullptr; }
  int64_t width() const { return (int64_t(kernel->heads) + 2 * kernel->cached_heads) * size; }
  size_t part_size() const { return size_t(size) + 2; }
};

// A head of a token, normed if there is a `norm`, and turned by the token's position.
void turn_head(const Step&, const float* x, const float* norm, int64_t slot, float* y);

// A head of its queries, which reads that `head` of the cache: so too, and multiplied by the keys' scales if there are any.
void turn_query(const Step&, const float* x, int head, int64_t slot, float* y);

// How many queries of one head go through turned keys together; 0 where they are too few to be worth turning keys.
int block_of(const Step&);

// One block of queries, by one thread: `data` is a Step.
void attend_block(void* data, size_t index);

}  // namespace edgellm
