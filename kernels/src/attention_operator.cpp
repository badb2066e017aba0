// The operators `CachedAttention`, `CachedAttention16` and `CachedAttention8` for ONNX Runtime: causal attention of new
// tokens over a cache, which they write in place where the output is the input's memory. The second keeps float16, the
// third codes of 8 bits with a scale for each feature. Inputs and results are those of GroupQueryAttention: queries, keys
// and values of a token side by side, the cache's keys and values (batch, heads, slots, size), the last slot of each row,
// the tokens of the longest row, tables of cosines and sines, and weights of the RMS norms that each head of queries and
// of keys has before it is turned.
#include "attention_operator.h"

#include <algorithm>
#include <cstring>

#include "attention_step.h"
#include "custom_operator.h"

namespace edgellm {
namespace {

using ort::Api;
using ort::KernelContext;
using ort::KernelInfo;

constexpr int64_t kAlone = 8192;       // pairs of a query and a slot that are not worth a second thread
constexpr int64_t kEnoughItems = 16;   // to share among threads as they are; fewer are cut into chunks
constexpr int kTokensAtOnce = 8;       // that a thread writes into the cache
constexpr int kInputs = 5;             // before the tables, norms and scales
constexpr int kOptional = 4;           // tables and norms

struct Operator : ort::CustomOp {
  Cell cell;
};

ort::ElementType type_of(Cell cell) {
  return cell == Cell::kFloat ? ort::kFloat : cell == Cell::kHalf ? ort::kFloat16 : ort::kInt8;
}

Cell cell_of(const ort::CustomOp* self) { return static_cast<const Operator*>(self)->cell; }

struct Kernel : Attention {
  const char* name;
  const Api* api;
};

// Numbers into the cache, as what it keeps.
void write_cells(const Step& s, const float* x, const float* scales, uint8_t* cells) {
  const Form& form = *s.kernel->form;
  if (s.kernel->cell == Cell::kFloat) std::memcpy(cells, x, size_t(s.size) * sizeof(float));
  else if (s.kernel->cell == Cell::kHalf) form.halve(x, s.size, reinterpret_cast<Half*>(cells));
  else form.narrow(x, scales, s.size, reinterpret_cast<int8_t*>(cells));
}

// New tokens: their queries turned, their keys and values into the cache.
void write_tokens(void* data, size_t index) {
  const Step& s = *static_cast<Step*>(data);
  const Attention& kernel = *s.kernel;
  const int64_t begin = int64_t(index) * kTokensAtOnce, end = std::min(begin + kTokensAtOnce, s.batch * s.time);
  thread_local std::vector<float> turned_key;
  if (turned_key.size() < size_t(s.size)) turned_key.resize(s.size);
  for (int64_t token = begin; token < end; token++) {
    const int64_t row = token / s.time, slot = s.past(row) + token % s.time;
    if (slot > s.last[row]) continue;  // what fills a short row up
    const float* x = s.x + token * s.width();
    float* q = s.q ? s.q + size_t(token) * kernel.heads * s.size : nullptr;
    for (int head = 0; head < kernel.heads; head++, x += s.size)
      if (q) turn_query(s, x, head / s.together, slot, q + size_t(head) * s.size);
    for (int head = 0; head < kernel.cached_heads; head++, x += s.size) {
      const float* value = x + size_t(kernel.cached_heads) * s.size;
      const size_t to = s.place(row, head, slot);
      turn_head(s, x, s.k_norm, slot, turned_key.data());
      write_cells(s, turned_key.data(), s.scales(s.k_scales, head), s.k + to);
      write_cells(s, value, s.scales(s.v_scales, head), s.v + to);
    }
  }
}

// Some queries of one row that read one head of the cache.
struct Group {
  int64_t row;
  int head, count;
  const float* query[kMostQueries];  // null for one that fills a short row up
  float* y[kMostQueries];
  int64_t begin[kMostQueries], end[kMostQueries];  // slots that it sees
  int first_chunk, last_chunk;
};

Group group_of(const Step& s, int64_t index) {
  Group g{};
  g.row = index / s.groups / s.kernel->cached_heads;
  g.head = int(index / s.groups % s.kernel->cached_heads);
  const int64_t start = index % s.groups * s.block;
  g.count = int(std::min<int64_t>(s.block, s.queries() - start));
  int64_t least = s.slots, most = 0;
  for (int i = 0; i < g.count; i++) {
    const int64_t token = (start + i) / s.together, slot = s.past(g.row) + token;
    const int head = g.head * s.together + int((start + i) % s.together);
    const size_t at = ((size_t(g.row) * s.time + token) * s.kernel->heads + head) * s.size;
    g.query[i] = slot > s.last[g.row] ? nullptr : s.q + at;
    g.y[i] = s.y + at;
    if (g.query[i] == nullptr) continue;
    g.end[i] = slot + 1;
    g.begin[i] = s.kernel->window == 0 ? 0 : std::max<int64_t>(0, slot + 1 - s.kernel->window);
    least = std::min(least, g.begin[i]), most = std::max(most, g.end[i]);
  }
  g.first_chunk = most == 0 ? 0 : int(least / kChunk), g.last_chunk = most == 0 ? -1 : int((most - 1) / kChunk);
  return g;
}

// A thread's own memory: what queries have so far, and what a chunk gives them.
float* memory_of(const Step& s) {
  thread_local std::vector<float> sums;
  const size_t count = size_t(2 * kMostQueries) * s.size;
  if (sums.size() < count) sums.resize(count);
  return sums.data();
}

// One chunk of a group. `take` is told the place of each query that sees some of it, and what it gives.
template <class Take>
void attend_chunk(const Step& s, const Group& g, int chunk, float* memory, const Take& take) {
  const Attention& kernel = *s.kernel;
  const int64_t start = int64_t(chunk) * kChunk;
  const int64_t most = *std::max_element(g.end, g.end + g.count);
  const int count = int(std::min<int64_t>(most - start, kChunk));
  const size_t at = s.place(g.row, g.head, start);
  const Keys keys{kernel.cell, s.k + at, s.v + at, count, s.size};
  Seen seen[kMostQueries];
  Part parts[kMostQueries];
  int whose[kMostQueries], rows = 0;
  for (int i = 0; i < g.count; i++) {
    const int64_t begin = std::max(g.begin[i], start), end = std::min(g.end[i], start + kChunk);
    if (g.query[i] == nullptr || begin >= end) continue;
    seen[rows] = {g.query[i], int(begin - start), int(end - start)};
    parts[rows].sum = memory + size_t(kMostQueries + rows) * s.size;
    whose[rows++] = i;
  }
  if (rows > 0) kernel.form->attend(keys, seen, rows, kernel.scale, parts);
  for (int r = 0; r < rows; r++) take(whose[r], parts[r]);
}

void fill_up(const Step& s, const Group& g) {
  for (int i = 0; i < g.count; i++)
    if (g.query[i] == nullptr) std::fill(g.y[i], g.y[i] + s.size, 0.0f);
}

void copy_part(const Part& from, int size, Part* to) {
  to->top = from.top, to->total = from.total;
  std::copy(from.sum, from.sum + size, to->sum);
}

// A whole group by one thread.
void attend_group(void* data, size_t index) {
  const Step& s = *static_cast<Step*>(data);
  const Group g = group_of(s, int64_t(index));
  float* memory = memory_of(s);
  Part all[kMostQueries];
  bool begun[kMostQueries] = {};
  for (int i = 0; i < g.count; i++) all[i].sum = memory + size_t(i) * s.size;
  for (int chunk = g.first_chunk; chunk <= g.last_chunk; chunk++)
    attend_chunk(s, g, chunk, memory, [&](int i, const Part& part) {
      if (begun[i]) s.kernel->form->merge(part, s.size, &all[i]);
      else copy_part(part, s.size, &all[i]);
      begun[i] = true;
    });
  for (int i = 0; i < g.count; i++)
    if (begun[i]) s.kernel->form->finish(all[i], s.scales(s.v_scales, g.head), s.size, g.y[i]);
  fill_up(s, g);
}

float* part_of(const Step& s, int64_t group, int chunk, int query) {
  return s.parts + ((size_t(group) * s.chunks + chunk) * kMostQueries + query) * s.part_size();
}

// One chunk of a group by one thread, kept apart.
void attend_piece(void* data, size_t index) {
  const Step& s = *static_cast<Step*>(data);
  const int64_t group = int64_t(index) / s.chunks;
  const int chunk = int(int64_t(index) % s.chunks);
  const Group g = group_of(s, group);
  if (chunk < g.first_chunk || chunk > g.last_chunk) return;
  attend_chunk(s, g, chunk, memory_of(s), [&](int i, const Part& part) {
    float* to = part_of(s, group, chunk, i);
    to[0] = part.top, to[1] = part.total;
    std::copy(part.sum, part.sum + s.size, to + 2);
  });
}

// The pieces of each group, merged in their order.
void join_pieces(const Step& s, int64_t groups) {
  for (int64_t group = 0; group < groups; group++) {
    const Group g = group_of(s, group);
    for (int i = 0; i < g.count; i++) {
      if (g.query[i] == nullptr) continue;
      const int first = int(g.begin[i] / kChunk), last = int((g.end[i] - 1) / kChunk);
      float* at = part_of(s, group, first, i);
      Part all{at[0], at[1], at + 2};
      for (int chunk = first + 1; chunk <= last; chunk++) {
        at = part_of(s, group, chunk, i);
        s.kernel->form->merge(Part{at[0], at[1], at + 2}, s.size, &all);
      }
      s.kernel->form->finish(all, s.scales(s.v_scales, g.head), s.size, g.y[i]);
    }
    fill_up(s, g);
  }
}

// The cache's next state: the input's own memory, or a copy of it.
uint8_t* cache_of(const Api* api, KernelContext* context, size_t input, size_t output, const Shape& shape, Cell cell) {
  const void* past = data_of<void>(api, input_of(api, context, input));
  void* present = output_data<void>(api, context, output, shape.sizes);
  size_t bytes = bytes_of(cell);
  for (const int64_t size : shape.sizes) bytes *= size_t(size);
  if (present != past) std::memcpy(present, past, bytes);
  return static_cast<uint8_t*>(present);
}

// So many scales, or weights of a norm.
const float* floats_of(const Api* api, const KernelContext* context, size_t index, int64_t count) {
  const ort::Value* value = input_of(api, context, index);
  const Shape shape = shape_of(api, value);
  int64_t found = 1;
  for (const int64_t size : shape.sizes) found *= size;
  if (found != count || shape.type != ort::kFloat)
    throw std::invalid_argument("scales or weights of a norm of another shape or type");
  return data_of<float>(api, value);
}

void read_tables(const Api* api, const KernelContext* context, int64_t slots_used, Step* s) {
  if (!s->kernel->turns) return;
  const ort::Value *cosines = input_of(api, context, kInputs), *sines = input_of(api, context, kInputs + 1);
  const Shape shape = shape_of(api, cosines);
  if (shape.sizes.size() != 2 || shape.sizes != shape_of(api, sines).sizes || shape.sizes[0] < slots_used ||
      shape.sizes[1] < 1 || 2 * shape.sizes[1] > s->size || shape.type != ort::kFloat)
    throw std::invalid_argument("tables of another shape or type, or too few positions");
  s->turned = int(2 * shape.sizes[1]);
  s->cosines = data_of<float>(api, cosines), s->sines = data_of<float>(api, sines);
}

void run(const Kernel& kernel, KernelContext* context) {
  const Api* api = kernel.api;
  const Shape x = shape_of(api, input_of(api, context, 0)), cache = shape_of(api, input_of(api, context, 1));
  if (x.sizes.size() != 3 || x.type != ort::kFloat || cache.sizes.size() != 4 || cache.type != type_of(kernel.cell) ||
      cache.sizes != shape_of(api, input_of(api, context, 2)).sizes)
    throw std::invalid_argument("inputs of another shape or type");
  Step s{};
  s.kernel = &kernel;
  s.batch = x.sizes[0], s.time = x.sizes[1], s.slots = cache.sizes[2], s.size = int(cache.sizes[3]);
  s.together = kernel.heads / kernel.cached_heads;
  if (cache.sizes[0] != s.batch || cache.sizes[1] != kernel.cached_heads || cache.sizes[3] < 16 ||
      cache.sizes[3] > kLargestHead || s.size % 16 != 0 || x.sizes[2] != s.width())
    throw std::invalid_argument("heads of another number or size than the cache's, or none of a multiple of 16");
  const ort::Value *last = input_of(api, context, 3), *longest = input_of(api, context, 4);
  if (!shape_of(api, last).is(ort::kInt32, {s.batch}) || !shape_of(api, longest).is(ort::kInt32, {}))
    throw std::invalid_argument("lengths of another shape or type");
  s.x = data_of<float>(api, input_of(api, context, 0)), s.last = data_of<int32_t>(api, last);
  const int64_t total = *data_of<int32_t>(api, longest);
  s.first = total == s.time;
  int64_t pairs = 0, used = 0;  // slots of the longest row, by its own last
  for (int64_t row = 0; row < s.batch; row++) {
    if (s.past(row) < 0 || s.last[row] < 0 || s.last[row] >= s.slots || s.last[row] >= total)
      throw std::invalid_argument("a row that does not fit into the cache");
    used = std::max<int64_t>(used, s.last[row] + 1);
    pairs += s.time * (s.last[row] + 1) * kernel.heads;
  }
  read_tables(api, context, total, &s);
  if (kernel.norms) {
    s.q_norm = floats_of(api, context, kInputs + 2, s.size);
    s.k_norm = floats_of(api, context, kInputs + 3, s.size);
  }
  if (kernel.cell == Cell::kCode) {
    s.k_scales = floats_of(api, context, kInputs + kOptional, int64_t(kernel.cached_heads) * s.size);
    s.v_scales = floats_of(api, context, kInputs + kOptional + 1, int64_t(kernel.cached_heads) * s.size);
  }
  s.k = cache_of(api, context, 1, 1, cache, kernel.cell), s.v = cache_of(api, context, 2, 2, cache, kernel.cell);
  s.y = output_of(api, context, 0, {s.batch, s.time, int64_t(kernel.heads) * s.size});
  thread_local std::vector<float> queries, pieces;  // of the thread that calls
  const size_t elements = size_t(s.batch) * s.time * kernel.heads * s.size;
  const int many = block_of(s);
  if (!many && queries.size() < elements) queries.resize(elements);
  s.q = many ? nullptr : queries.data();
  const bool alone = pairs <= kAlone;
  const KernelContext* threads = alone ? nullptr : context;
  in_parallel(api, threads, write_tokens, size_t(s.batch * s.time + kTokensAtOnce - 1) / kTokensAtOnce, &s);
  s.block = many ? many : kMostQueries;
  s.groups = (s.queries() + s.block - 1) / s.block;
  s.chunks = int((used + kChunk - 1) / kChunk);
  const int64_t groups = s.batch * kernel.cached_heads * s.groups;
  if (many) return in_parallel(api, threads, attend_block, size_t(groups), &s);
  if (alone || groups >= kEnoughItems || s.chunks == 1) return in_parallel(api, threads, attend_group, size_t(groups), &s);
  const size_t needed = size_t(groups) * s.chunks * kMostQueries * s.part_size();
  if (pieces.size() < needed) pieces.resize(needed);
  s.parts = pieces.data();
  in_parallel(api, context, attend_piece, size_t(groups * s.chunks), &s);
  join_pieces(s, groups);
}

std::unique_ptr<Kernel> kernel_of(const ort::CustomOp* self, const Api* api, const KernelInfo* info) {
  auto kernel = std::make_unique<Kernel>(Kernel{{best(), cell_of(self), false, false, 0, 0, 0, 0, 0}, self->name(self), api});
  const int64_t heads = number_of(api, info, "num_heads"), cached = number_of(api, info, "kv_num_heads");
  const int64_t window = number_of(api, info, "window");
  if (kernel->form == nullptr) throw std::invalid_argument("it has no form for this processor");
  if (heads < 1 || heads > 1 << 16 || cached < 1 || heads % cached != 0 || window < 0 || window > 1 << 30)
    throw std::invalid_argument("sizes out of range");
  kernel->heads = int(heads), kernel->cached_heads = int(cached), kernel->window = int(window);
  kernel->turns = number_of(api, info, "do_rotary") != 0;
  kernel->norms = number_of(api, info, "norms") != 0;
  kernel->scale = float_attribute(api, info, "scale"), kernel->epsilon = float_attribute(api, info, "epsilon");
  return kernel;
}

Operator description(const char* (*name)(const ort::CustomOp*), Cell cell) {
  auto op = operator_named<Kernel, kernel_of, run, Operator>(name);
  op.cell = cell;
  op.input_type = [](const ort::CustomOp* self, size_t i) {
    if (i == 1 || i == 2) return type_of(cell_of(self));
    return i == 3 || i == 4 ? ort::kInt32 : ort::kFloat;
  };
  op.input_count = [](const ort::CustomOp* self) -> size_t {
    return kInputs + kOptional + (cell_of(self) == Cell::kCode ? 2 : 0);
  };
  op.output_type = [](const ort::CustomOp* self, size_t i) {
    return i > 0 ? type_of(cell_of(self)) : ort::kFloat;
  };
  op.output_count = [](const ort::CustomOp*) -> size_t { return 3; };
  op.input_characteristic = [](const ort::CustomOp*, size_t i) { return i >= kInputs && i < kInputs + kOptional ? 1 : 0; };
  return op;
}

}  // namespace

void turn_head(const Step& s, const float* x, const float* norm, int64_t slot, float* y) {
  float sum[kLargestHead], normed[kLargestHead];
  if (norm != nullptr) {
    s.kernel->form->norm(x, nullptr, norm, s.kernel->epsilon, s.size, sum, normed);
    x = normed;
  }
  const size_t at = s.kernel->turns ? size_t(slot) * (s.turned / 2) : 0;
  s.kernel->form->rotate(x, s.cosines + at, s.sines + at, s.turned, s.size, y);
}

void turn_query(const Step& s, const float* x, int head, int64_t slot, float* y) {
  turn_head(s, x, s.q_norm, slot, y);
  const float* scales = s.scales(s.k_scales, head);
  for (int i = 0; scales != nullptr && i < s.size; i++) y[i] *= scales[i];
}

std::vector<const ort::CustomOp*> attention_operators() {
  static const Operator floats = description([](const ort::CustomOp*) { return "CachedAttention"; }, Cell::kFloat);
  static const Operator halves = description([](const ort::CustomOp*) { return "CachedAttention16"; }, Cell::kHalf);
  static const Operator codes = description([](const ort::CustomOp*) { return "CachedAttention8"; }, Cell::kCode);
  return {&floats, &halves, &codes};
}

}  // namespace edgellm
