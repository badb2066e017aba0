#include "product_operator.h"

#include <algorithm>

namespace edgellm {
namespace {

// A product of few rows waits for memory: a thread that begins elsewhere in the matrix waits longest, so it is cut into
// few parts, and only so small ones are worth another thread. One of many rows computes, so threads share it evenly: a
// matrix of few units is cut into each of them.
constexpr size_t kLeastPart = 60 << 10, kLargePart = 1 << 20;  // bytes of the matrix
constexpr size_t kFewRows = 8, kFewParts = 8, kManyParts = 64;

}  // namespace

size_t parts_of(size_t units, size_t bytes, size_t rows) {
  if (rows > kFewRows) return std::clamp<size_t>(rows * bytes / (kFewRows * kLeastPart), 1, std::min(units, kManyParts));
  return std::clamp<size_t>(bytes / kLeastPart, 1, std::max(kFewParts, bytes / kLargePart));
}

void round_row(const Form& form, const Product& product, const float* x, float* own, int8_t* codes, float* scales,
               int32_t* minus_sums) {
  if (product.sums != 0) {
    if (x != own) std::copy(x, x + product.width, own);
    form.sums(own, product.width, product.sums, own + product.width);
    x = own;
  }
  form.round(product.matrix, x, codes, scales, minus_sums);
}

// A product whose constants are the inputs from `at` on: codes, scales, zeros. Its attributes' names end in `suffix`.
Product product_of(const ort::Api* api, const ort::KernelInfo* info, size_t at, const std::string& suffix) {
  const int64_t outputs = number_of(api, info, "N" + suffix), inputs = number_of(api, info, "K" + suffix);
  const int64_t bits = number_of(api, info, "bits" + suffix), block = number_of(api, info, "block_size" + suffix);
  const int64_t sums = number_of(api, info, "sums" + suffix);
  if (outputs < 1 || inputs < 1 || outputs > 1 << 24 || inputs > 1 << 24 || sums < 0 || sums > inputs)
    throw std::invalid_argument("sizes out of range");
  int64_t width = inputs;
  if (sums != 0) {
    width = inputs * sums / (sums + 1);
    while (width + (width + sums - 1) / sums < inputs) width++;
    if (width + (width + sums - 1) / sums != inputs) throw std::invalid_argument("no such row has a sum of each block");
  }
  if (block == 0) {
    if (inputs % 16 != 0 || inputs > kLongestRow || sums != 0)
      throw std::invalid_argument("rows of a scale have a multiple of 16 inputs, at most 65536, and no sums");
    const auto* codes = constant<int8_t>(api, info, at, "codes", ort::kInt8, {{inputs, outputs}});
    const Scales scales = scales_of(api, info, at + 1, {{outputs}});
    const Product made{pack_rows(int(outputs), int(inputs), codes, scales, forget), int(width), 0};
    forget_all(scales.floats, outputs), forget_all(scales.halves, outputs);
    return made;
  }
  if ((block != 16 && block != 32 && block != 64 && block != 128) || (bits < 2 || (bits > 4 && bits != 8)))
    throw std::invalid_argument(
        "has blocks of 16, 32, 64 and 128 in 2, 3, 4 and 8 bits, not of " + std::to_string(block) + " in " + std::to_string(bits));
  const int64_t blocks = (inputs + block - 1) / block, bytes = (blocks * (bits == 3 ? 4 : bits) + 7) / 8;
  const auto* codes = bits == 3
      ? constant<uint8_t>(api, info, at, "codes", ort::kUint8, {{3, outputs * blocks * block / 8}})
      : constant<uint8_t>(api, info, at, "codes", ort::kUint8, {{outputs, blocks, block * bits / 8}});
  const Scales scales = scales_of(api, info, at + 1, {{outputs, blocks}, {outputs * blocks}}, outputs, blocks);
  const uint8_t* zeros = nullptr;
  if (number_of(api, info, "zeros" + suffix) != 0)
    zeros = constant<uint8_t>(api, info, at + 2, "zeros", ort::kUint8, {{outputs, bytes}, {outputs * bytes}});
  const Matrix packed = pack(int(outputs), int(inputs), int(bits), int(block), codes, scales, zeros, forget);
  forget_all(scales.floats, outputs * blocks), forget_all(scales.halves, outputs * blocks);
  forget_all(scales.bytes, outputs * (blocks + 1)), forget_all(zeros, outputs * bytes);
  return Product{packed, int(width), int(sums)};
}

}  // namespace edgellm
