// Codes of 3 bits as files have them: bytes of two 4-bit codes below 8, the last quarter of them in the two spare bits of
// the bytes before it (edgellm_exporters/quantize/three_bits.py). Kernels have them as 4-bit codes.
#pragma once
#include <algorithm>
#include <cstddef>
#include <cstdint>

namespace edgellm {

constexpr size_t kStoredParts = 3;  // as large as one another, and as the quarter that is in their spare bits

// Some of the bytes of two codes.
//   stored_at(from, size): gives a pointer to that many stored bytes, good until the next call.
template <class StoredAt>
void spread(size_t part, size_t from, size_t size, uint8_t* to, StoredAt stored_at) {
  while (size != 0) {
    const size_t which = from / part, start = from % part, count = std::min(size, part - start);
    if (which < kStoredParts) {
      const uint8_t* own = stored_at(from, count);
      for (size_t i = 0; i < count; i++) to[i] = own[i] & 0x77;
    } else {
      for (size_t k = 0; k < kStoredParts; k++) {
        const uint8_t* spare = stored_at(k * part + start, count);
        const int shift = int(kStoredParts - k), place = 0x11 << k;
        for (size_t i = 0; i < count; i++) to[i] = uint8_t((k == 0 ? 0 : to[i]) | (spare[i] >> shift & place));
      }
    }
    from += count, to += count, size -= count;
  }
}

}  // namespace edgellm
