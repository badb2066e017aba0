// BlockGather, in the domain `edgellm`: rows of a table of codes of 2, 3, 4 or 8 bits in blocks, as ONNX Runtime's
// GatherBlockQuantized gives them. The table stays where it is. If that is a file, a row is read from the file: as mapped
// memory it would bring its page along and some beside it, which would stay for good.
#include "gather_operator.h"

#include "custom_operator.h"
#include "three_bits.h"

namespace edgellm {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;

struct Table {
  const char* name;
  const Api* api;
  int64_t rows;
  int width, bits, block, blocks;
  size_t row_bytes, zero_bytes;
  const uint8_t *codes, *zeros;  // zeros are null where every zero is half of the codes
  Scales scales;
  bool three;       // codes are as three_bits.h has them, and `bits` is 4
  MappedFile file;  // of the codes
};

// The codes of a row; they stay until the next call of this thread.
const uint8_t* codes_of(const Table& t, int64_t row) {
  thread_local std::vector<uint8_t> read, made;
  const auto stored_at = [&](size_t from, size_t size) -> const uint8_t* {
    if (!t.file.found()) return t.codes + from;
    if (read.size() < size) read.resize(size);
    if (!t.file.read(from, size, read.data())) throw std::runtime_error("its file cannot be read");
    return read.data();
  };
  if (!t.three) return stored_at(row * t.row_bytes, t.row_bytes);
  if (made.size() < t.row_bytes) made.resize(t.row_bytes);
  spread(t.rows * t.row_bytes / (kStoredParts + 1), row * t.row_bytes, t.row_bytes, made.data(), stored_at);
  return made.data();
}

// One row: (code - zero) * scale, in float32.
void widen_row(const Table& t, int64_t row, float* y) {
  const int each = 8 / t.bits, all = (1 << t.bits) - 1;
  const uint8_t* codes = codes_of(t, row);
  for (int b = 0, start = 0; b < t.blocks; b++, start += t.block) {
    const size_t at = size_t(row) * t.blocks + b;
    const float scale = t.scales.at(at);
    const uint8_t* zeros = t.zeros ? t.zeros + row * t.zero_bytes : nullptr;
    const int zero = zeros ? zeros[b / each] >> t.bits * (b % each) & all : 1 << (t.bits - 1);
    const int end = start + t.block < t.width ? start + t.block : t.width;
    if (t.bits == 8) {
      for (int i = start; i < end; i++) y[i] = float(codes[i] - zero) * scale;
      continue;
    }
    float values[16];
    for (int code = 0; code <= all; code++) values[code] = float(code - zero) * scale;
    for (int i = start; i < end; i++) y[i] = values[codes[i / each] >> t.bits * (i % each) & all];
  }
}

void run(const Table& t, KernelContext* context) {
  const ort::Value* input = input_of(t.api, context, 0);
  Shape shape = shape_of(t.api, input);
  if (shape.type != ort::kInt64) throw std::invalid_argument("takes places as int64");
  int64_t count = 1;
  for (const int64_t size : shape.sizes) count *= size;
  const int64_t* places = data_of<const int64_t>(t.api, input);
  for (int64_t i = 0; i < count; i++)
    if (places[i] < -t.rows || places[i] >= t.rows)
      throw std::invalid_argument("has " + std::to_string(t.rows) + " rows, none at " + std::to_string(places[i]));
  shape.sizes.push_back(t.width);
  float* y = output_of(t.api, context, 0, shape.sizes);
  for (int64_t i = 0; i < count; i++) widen_row(t, places[i] < 0 ? places[i] + t.rows : places[i], y + i * t.width);
}

std::unique_ptr<Table> table_of(const ort::CustomOp* self, const Api* api, const KernelInfo* info) {
  const int64_t rows = number_of(api, info, "N"), width = number_of(api, info, "K");
  const int64_t stored = number_of(api, info, "bits"), block = number_of(api, info, "block_size");
  const bool three = stored == 3;
  const int64_t bits = three ? 4 : stored;
  if (rows < 1 || width < 1 || rows > 1 << 24 || width > 1 << 24) throw std::invalid_argument("sizes out of range");
  if ((bits != 2 && bits != 4 && bits != 8) || block < 16 || block > 1 << 24 || width * bits % 8 != 0 ||
      (three && rows * width % 8 != 0))
    throw std::invalid_argument("has codes of 2, 3, 4 and 8 bits in blocks of 16 or more, rows of whole bytes");
  const int64_t blocks = (width + block - 1) / block, bytes = (blocks * bits + 7) / 8, row = width * bits / 8;
  const auto* codes = three ? constant<uint8_t>(api, info, 1, "codes", ort::kUint8, {{3, rows * width / 8}})
                            : constant<uint8_t>(api, info, 1, "codes", ort::kUint8, {{rows, row}});
  const Scales scales = scales_of(api, info, 2, {{rows, blocks}}, rows, blocks);
  const uint8_t* zeros = nullptr;
  if (number_of(api, info, "zeros") != 0) zeros = constant<uint8_t>(api, info, 3, "zeros", ort::kUint8, {{rows, bytes}});
  return std::unique_ptr<Table>(new Table{self->name(self), api, rows, int(width), int(bits), int(block), int(blocks),
                                          size_t(row), size_t(bytes), codes, zeros, scales, three,
                                          {codes, size_t(rows * width * stored / 8)}});
}

ort::CustomOp description() {
  auto op = operator_named<Table, table_of, run>([](const ort::CustomOp*) { return "BlockGather"; });
  op.input_type = [](const ort::CustomOp*, size_t i) {
    return i == 0 ? ort::kInt64 : i == 2 ? ort::kAny : ort::kUint8;
  };
  op.input_count = [](const ort::CustomOp*) -> size_t { return 4; };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i == 3 ? 1 : 0; };
  return op;
}

}  // namespace

const ort::CustomOp* gather_operator() {
  static const ort::CustomOp op = description();
  return &op;
}

}  // namespace edgellm
