#include <algorithm>
#include <cmath>
#include <cstdint>
#include <random>
#include <string>
#include <vector>

#include "half.h"
#include "kernels.h"
#include "memory.h"
#include "probe.h"
#include "probe_threads.h"
#include "scratch.h"

namespace edgert {
namespace {

constexpr uint32_t kCols = 1024;
constexpr size_t kMatrixBytes = size_t{128} << 10;

DType type_of(const std::string& name) {
  for (uint32_t id = 0; id < 64; ++id)
    if (const DTypeInfo* info = dtype_info(id); info && name == info->name) return info->type;
  throw EngineError("the matmul probe knows no type \"" + name + "\"; it takes " + dtype_names());
}

bool is_float(DType t) { return t == DType::F32 || t == DType::F16 || t == DType::BF16; }

std::vector<float> random_floats(std::mt19937& rng, size_t n) {
  std::vector<float> v(n);
  for (float& f : v) f = std::uniform_real_distribution<float>(-1, 1)(rng);
  return v;
}

struct Matrix {
  Buffer data;
  PackedMatrix m;
};

Matrix random_matrix(std::mt19937& rng, DType type, uint32_t lanes) {
  const DTypeInfo& info = dtype_info(type);
  const size_t row_bytes = size_t{kCols} / info.block * info.bytes;
  std::vector<uint8_t> raw(row_bytes * lanes);
  Matrix out;
  out.m = {type, 0, kCols, lanes, packed_tile_bytes(type, kCols, lanes), nullptr};
  out.m.rows = lanes * static_cast<uint32_t>(std::max<size_t>(kMatrixBytes / out.m.stride, 1));
  out.data = Buffer(out.m.stride * out.m.tiles(), "the matmul probe");
  out.m.data = out.data.data();
  for (uint32_t t = 0; t < out.m.tiles(); ++t) {
    // Of such bytes any two are an ordinary f16 or bf16, any four an ordinary f32: no kernel is slowed
    // by subnormal numbers, as real weights slow none.
    for (uint8_t& b : raw) b = static_cast<uint8_t>(0x20 | (rng() & 0x1b));
    pack_tile(type, raw.data(), lanes, kCols, lanes, out.data.data() + t * out.m.stride);
  }
  return out;
}

struct Acts {
  std::vector<int8_t> q;
  std::vector<float> scale, fsum16, fsum32;
  std::vector<int32_t> sum16, sum32;

  Acts(const Kernels& k, const std::vector<float>& x)
      : q(x.size()), scale(x.size() / 32), fsum16(x.size() / 16), fsum32(x.size() / 32), sum16(x.size() / 16),
        sum32(x.size() / 32) {
    for (uint32_t i = 0; i < x.size() / kCols; ++i) k.quantize(x.data() + size_t{i} * kCols, view().token(i));
  }
  QuantActs view() {
    return {q.data(), scale.data(), sum16.data(), sum32.data(), fsum16.data(), fsum32.data(), kCols, 1};
  }
};

void check_range(const char* what, int value, int most) {
  if (value < 1 || value > most)
    throw EngineError(std::string(what) + " must be 1 to " + std::to_string(most) + ", not " +
                      std::to_string(value));
}

}  // namespace

double probe_matmul(const std::string& type_name, int tokens, int threads, double seconds) {
  check_probe("matmul", threads, seconds);
  const DType type = type_of(type_name);
  check_range("tokens of the matmul probe", tokens, static_cast<int>(kMaxChunk));
  const Kernels& k = kernels_for(isa_select());
  const auto n = static_cast<uint32_t>(tokens);
  return work_rate(threads, seconds, [&](int index) {
    std::mt19937 rng(static_cast<uint32_t>(index));
    Matrix w = random_matrix(rng, type, k.lanes);
    std::vector<float> x = random_floats(rng, size_t{n} * kCols), y(size_t{n} * w.m.rows);
    return [&k, n, floats = is_float(type), w = std::move(w), acts = Acts(k, x), x = std::move(x),
            y = std::move(y)]() mutable {
      if (floats)
        k.matmul_float(w.m, 0, w.m.tiles(), x.data(), n, y.data(), w.m.rows);
      else
        k.matmul(w.m, 0, w.m.tiles(), acts.view(), n, y.data(), w.m.rows);
      return static_cast<double>(w.m.rows) * kCols;
    };
  });
}

double probe_attend(KvType type, int head_dim, int group, int threads, double seconds) {
  check_probe("attention", threads, seconds);
  if (head_dim < 16 || head_dim % 16 != 0 || head_dim > static_cast<int>(kMaxHeadDim))
    throw EngineError("head_dim of the attention probe must be a multiple of 16 up to " +
                      std::to_string(kMaxHeadDim) + ", not " + std::to_string(head_dim));
  if (type == KvType::Q8 && head_dim % 32 != 0)
    throw EngineError("q8 keys and values want a head_dim that is a multiple of 32, not " + std::to_string(head_dim));
  check_range("group of the attention probe", group, 64);
  const Kernels& k = kernels_for(isa_select());
  const auto dim = static_cast<uint32_t>(head_dim), rows = static_cast<uint32_t>(group);
  return work_rate(threads, seconds, [&](int index) {
    std::mt19937 rng(static_cast<uint32_t>(index));
    const size_t page = kv_page_bytes(type, dim);
    std::vector<uint8_t> pages(2 * kChunkPages * page);  // all keys, then all values, as the cache has them
    for (uint32_t t = 0; t < kChunkTokens; ++t) {
      const std::vector<float> key = random_floats(rng, dim), value = random_floats(rng, dim);
      uint8_t* keys = pages.data() + t / kPageTokens * page;
      k.kv[size_t(type)].append(key.data(), value.data(), dim, t % kPageTokens, keys, keys + kChunkPages * page);
    }
    std::vector<float> q = random_floats(rng, size_t{rows} * dim), acc(q.size()), scores(16 * kChunkTokens);
    for (uint32_t r = 0; r < rows; ++r) k.kv[size_t(type)].code_query(q.data() + size_t{r} * dim, dim);
    return [&k, type, dim, rows, page, pages = std::move(pages), q = std::move(q), acc = std::move(acc),
            scores = std::move(scores), lo = std::vector<uint32_t>(rows, 0),
            hi = std::vector<uint32_t>(rows, kChunkTokens), max = std::vector<float>(rows),
            sum = std::vector<float>(rows)]() mutable {
      const uint8_t *keys[kChunkPages], *values[kChunkPages];
      for (uint32_t p = 0; p < kChunkPages; ++p) {
        keys[p] = pages.data() + p * page;
        values[p] = keys[p] + kChunkPages * page;
      }
      const float* queries[64];
      float* accs[64];
      for (uint32_t r = 0; r < rows; ++r) {
        queries[r] = q.data() + size_t{r} * dim;
        accs[r] = acc.data() + size_t{r} * dim;
        max[r] = -INFINITY;
        sum[r] = 0;
      }
      k.kv[size_t(type)].attend(
          {queries, keys, values, lo.data(), hi.data(), rows, dim, scores.data(), accs, max.data(), sum.data()});
      return static_cast<double>(rows) * kChunkTokens;
    };
  });
}

}  // namespace edgert
