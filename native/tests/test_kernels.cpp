// Kernels of every ISA level this CPU offers, against plain double arithmetic and against the
// scalar level. Prints one line a level; exits 1 at the first difference that is too large.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <string>
#include <vector>

#include "dtype.h"
#include "formats.h"
#include "half.h"
#include "kernels.h"

using namespace edgert;

namespace {

std::mt19937 rng(7);
const char* level = "";

float uniform(float lo, float hi) { return std::uniform_real_distribution<float>(lo, hi)(rng); }

std::vector<float> random_floats(size_t n, float limit) {
  std::vector<float> v(n);
  for (float& f : v) f = uniform(-limit, limit);
  return v;
}

[[noreturn]] void fail(const std::string& what, size_t at, double expected, double found) {
  std::fprintf(stderr, "%s: %s [%zu]: expected %.9g, found %.9g\n", level, what.c_str(), at, expected, found);
  std::exit(1);
}

void near(const std::string& what, size_t at, double expected, double found, double tolerance) {
  if (!(std::fabs(expected - found) <= tolerance)) fail(what, at, expected, found);
}

template <class T>
void same(const std::string& what, const std::vector<T>& expected, const std::vector<T>& found) {
  for (size_t i = 0; i < expected.size(); ++i)
    if (std::memcmp(&expected[i], &found[i], sizeof(T)) != 0) fail(what, i, double(expected[i]), double(found[i]));
}

// Where the f16 numbers of a type's block stand; everything else in a block may be any bytes.
std::vector<int> half_offsets(DType t) {
  switch (t) {
    case DType::Q4_1: case DType::Q5_1: case DType::Q4_K: case DType::Q5_K: return {0, 2};
    case DType::Q2_K: return {80, 82};
    case DType::Q3_K: return {108};
    case DType::Q6_K: return {208};
    case DType::MXFP4: return {};
    default: return {0};
  }
}

std::vector<uint8_t> random_rows(DType t, uint32_t rows, uint32_t cols) {
  const DTypeInfo& info = dtype_info(t);
  std::vector<uint8_t> raw(size_t(rows) * cols / info.block * info.bytes);
  if (!find_format(t)) {
    for (size_t i = 0; i < raw.size(); i += info.bytes) {
      const float f = uniform(-1, 1);
      const uint16_t half = float_to_half(f);
      uint32_t bits;
      std::memcpy(&bits, &f, 4);
      const uint16_t brain = uint16_t(bits >> 16);
      std::memcpy(&raw[i], t == DType::F32 ? static_cast<const void*>(&f) : t == DType::F16 ? &half : &brain, info.bytes);
    }
    return raw;
  }
  for (uint8_t& b : raw) b = uint8_t(rng());
  for (size_t i = 0; i < raw.size(); i += info.bytes) {
    for (int at : half_offsets(t)) {
      const uint16_t h = float_to_half(uniform(-0.05f, 0.05f));
      std::memcpy(&raw[i + at], &h, 2);
    }
    if (t == DType::MXFP4) raw[i] = uint8_t(110 + rng() % 16);  // an exponent
  }
  return raw;
}

struct Packed {
  PackedMatrix m;
  std::vector<uint8_t> data;
};

Packed pack(DType t, const std::vector<uint8_t>& raw, uint32_t rows, uint32_t cols, uint32_t lanes) {
  Packed p;
  p.m = {t, rows, cols, lanes, packed_tile_bytes(t, cols, lanes), nullptr};
  // Kernels may prefetch past the end but must not read there: nothing is added behind the tiles.
  p.data.resize(p.m.stride * p.m.tiles());
  p.m.data = p.data.data();
  const size_t row_bytes = raw.size() / rows;
  for (uint32_t r = 0; r < rows; r += lanes)
    pack_tile(t, raw.data() + r * row_bytes, std::min(lanes, rows - r), cols, lanes, p.data.data() + r / lanes * p.m.stride);
  return p;
}

struct Acts {
  std::vector<int8_t> q;
  std::vector<float> scale, fsum16, fsum32;
  std::vector<int32_t> sum16, sum32;
  QuantActs view;

  Acts(uint32_t n, uint32_t cols, uint32_t parts)
      : q(n * parts * cols), scale(q.size() / 32), fsum16(q.size() / 16), fsum32(q.size() / 32), sum16(q.size() / 16),
        sum32(q.size() / 32),
        view{q.data(), scale.data(), sum16.data(), sum32.data(), fsum16.data(), fsum32.data(), cols, parts} {}

  // What the codes of token i stand for in column c.
  double value(uint32_t i, uint32_t c) const {
    double v = 0;
    for (uint32_t p = 0; p < view.parts; ++p) {
      const size_t at = size_t(i * view.parts + p) * view.cols + c;
      v += double(scale[at / 32]) * q[at];
    }
    return v;
  }
};

Acts quantized(const Kernels& k, const std::vector<float>& x, uint32_t n, uint32_t cols, uint32_t parts) {
  Acts a(n, cols, parts);
  for (uint32_t i = 0; i < n; ++i) k.quantize(x.data() + size_t(i) * cols, a.view.token(i));
  return a;
}

void test_quantize(const Kernels& k, uint32_t parts) {
  const uint32_t cols = 320;
  std::vector<float> x = random_floats(cols, 3);
  std::fill(x.begin(), x.begin() + 32, 0.0f);                     // a block of zeros
  for (uint32_t i = 32; i < 64; ++i) x[i] *= 1e-35f;              // one whose inverse would overflow
  for (uint32_t i = 64; i < 96; ++i) x[i] = i % 2 ? -2.5f : 2.5f;  // one of extremes
  const Acts a = quantized(k, x, 1, cols, parts), s = quantized(kernels_scalar(), x, 1, cols, parts);
  for (uint32_t i = 0; i < cols; ++i) {
    // Rounded to nearest: half a step, and a little for the product. A second part divides the step by
    // 254, and float arithmetic leaves its own rounding.
    const double step = a.scale[i / 32], bound = parts == 1 ? 0.501 * step : 0.501 * step / 254 + 0x1p-24 * std::fabs(x[i]);
    near("quantize", i, x[i], a.value(0, i), std::max(bound, 1e-30));
  }
  for (uint32_t b = 0; b < parts * cols / 32; ++b) {
    int lo = 0, hi = 0;
    for (int i = 0; i < 16; ++i) lo += a.q[b * 32 + i], hi += a.q[b * 32 + 16 + i];
    near("sum16", b, lo, a.sum16[2 * b], 0);
    near("sum16", b, hi, a.sum16[2 * b + 1], 0);
    near("sum32", b, lo + hi, a.sum32[b], 0);
  }
  same("quantize codes", s.q, a.q);
  same("quantize scales", s.scale, a.scale);
  same("quantize sums", s.fsum16, a.fsum16);
  same("quantize sums", s.fsum32, a.fsum32);
}

// `parts` of the activations of quantised weights.
void test_matmul(const Kernels& k, DType t, uint32_t parts) {
  const Format* format = find_format(t);
  const Kernels& scalar = kernels_scalar();
  const std::vector<uint32_t> widths = !format                   ? std::vector<uint32_t>{1, 31, 64, 97}
                                       : dtype_info(t).block == 32 ? std::vector<uint32_t>{32, 96, 288}
                                                                   : std::vector<uint32_t>{256, 768};
  for (uint32_t cols : widths)
    for (uint32_t rows : {1u, 8u, 17u, 33u})
      for (uint32_t n : {1u, 2u, 3u, 5u, 9u}) {
        const std::string what = std::string(dtype_info(t).name) + " matmul " + std::to_string(rows) + "x" +
                                 std::to_string(cols) + ", " + std::to_string(n) + " tokens";
        const std::vector<uint8_t> raw = random_rows(t, rows, cols);
        const Packed mine = pack(t, raw, rows, cols, k.lanes), theirs = pack(t, raw, rows, cols, scalar.lanes);
        const std::vector<float> x = random_floats(size_t(n) * cols, 2);
        const auto multiply = [&](const Kernels& by, const Packed& w, Acts& acts, uint32_t begin) {
          const size_t stride = size_t(w.m.tiles()) * w.m.tile_rows;
          std::vector<float> y(n * stride, NAN);
          if (format)
            by.matmul(w.m, begin, w.m.tiles(), acts.view, n, y.data() + size_t(begin) * w.m.tile_rows, stride);
          else
            by.matmul_float(w.m, begin, w.m.tiles(), x.data(), n, y.data() + size_t(begin) * w.m.tile_rows, stride);
          std::vector<float> out;
          for (uint32_t i = 0; i < n; ++i)
            out.insert(out.end(), y.begin() + i * stride, y.begin() + i * stride + rows);
          return out;
        };
        Acts acts = format ? quantized(k, x, n, cols, parts) : Acts(0, 32, 1);
        const std::vector<float> y = multiply(k, mine, acts, 0);
        same(what, multiply(scalar, theirs, acts, 0), y);
        if (const uint32_t last = mine.m.tiles() - 1; last > 0) {  // a thread's share starts anywhere
          const std::vector<float> part = multiply(k, mine, acts, last);
          for (uint32_t i = 0; i < n; ++i)
            for (uint32_t r = last * k.lanes; r < rows; ++r)
              near(what + " from the last tile", r, y[i * rows + r], part[i * rows + r], 0);
        }
        std::vector<float> w(cols), file(cols);
        for (uint32_t r = 0; r < rows; ++r) {
          unpack_row(mine.m, r, w.data());
          dequantize(t, raw.data() + r * (raw.size() / rows), file.data(), cols);
          same(what + " unpacked", file, w);
          for (uint32_t i = 0; i < n; ++i) {
            double sum = 0, size = 0;
            for (uint32_t c = 0; c < cols; ++c) {
              const double a = format ? acts.value(i, c) : x[i * cols + c];
              sum += w[c] * a;
              // The 256-wide types subtract a minimum: both terms can be larger than their difference.
              size += std::fabs(w[c] * a) + (format && format->has_min ? 0.05 * 63 * std::fabs(a) : 0);
            }
            // Each float operation rounds by at most 2^-24 of what is summed; a sum of cols terms,
            // 32 of them at a time exact in integers when quantised, stays within (cols/32 + 8) of them.
            near(what, r, sum, y[i * rows + r], size * 0x1p-24 * (format ? cols / 32 + 8 : cols + 8));
          }
        }
      }
}

void test_vectors(const Kernels& k) {
  const Kernels& scalar = kernels_scalar();
  for (uint32_t n : {1u, 7u, 16u, 33u, 576u}) {
    const std::vector<float> x = random_floats(n, 6), w = random_floats(n, 2);
    std::vector<float> y(n), z(n);
    double square = 0;
    for (float f : x) square += double(f) * f;
    const double inverse = 1 / std::sqrt(square / n + 1e-5);
    k.rmsnorm(x.data(), w.data(), 1e-5f, n, y.data());
    for (uint32_t i = 0; i < n; ++i)
      near("rmsnorm", i, x[i] * inverse * w[i], y[i], 1e-6 * std::fabs(x[i] * inverse * w[i]));
    z = x;
    k.rmsnorm(z.data(), w.data(), 1e-5f, n, z.data());
    same("rmsnorm in place", y, z);
    z = x;
    k.add(z.data(), w.data(), n);
    for (uint32_t i = 0; i < n; ++i) near("add", i, x[i] + w[i], z[i], 0);

    if (n % 16 == 0) {
      std::vector<uint16_t> half(n);
      z = random_floats(n, 3);
      z[0] = 1e6f, z[1] = -INFINITY, z[2] = 1e-7f;  // too large, too large, subnormal
      k.to_half(z.data(), n, half.data());
      for (uint32_t i = 0; i < n; ++i)
        near("to_half", i, half_to_float(float_to_half(std::clamp(z[i], -65504.0f, 65504.0f))), half_to_float(half[i]), 0);
    }

    std::vector<float> gate = random_floats(n, 12);
    gate[0] = -120, gate[n / 2] = 120;  // where exp would leave the floats
    for (bool gelu : {false, true}) {
      (gelu ? k.gate_gelu : k.gate_silu)(gate.data(), x.data(), n, y.data());
      (gelu ? scalar.gate_gelu : scalar.gate_silu)(gate.data(), x.data(), n, z.data());
      same(gelu ? "gelu" : "silu", z, y);
      for (uint32_t i = 0; i < n; ++i) {
        const double g = gate[i];
        const double a = gelu ? 0.5 * g * (1 + std::tanh(std::sqrt(2 / M_PI) * (g + 0.044715 * g * g * g)))
                              : g / (1 + std::exp(-g));
        // Left of -5 gelu's factor is so small that the rounding of its exponent shows: absolute there.
        near(gelu ? "gelu" : "silu", i, a * x[i], y[i], 2e-6 * std::fabs(a * x[i]) + 1e-6 * std::fabs(double(x[i])));
      }
    }
  }
}

// Rows with different first and last tokens over two chunks, one of them empty in the first.
void test_attention(const Kernels& k, uint32_t head_dim, uint32_t rows) {
  const uint32_t tokens = 2 * kChunkTokens;
  const size_t page_values = size_t(2) * kPageTokens * head_dim;
  std::vector<uint16_t> cache(tokens / kPageTokens * page_values);
  for (uint16_t& h : cache) h = float_to_half(uniform(-2, 2));
  std::vector<float> q = random_floats(size_t(rows) * head_dim, 0.6f), acc(q.size(), NAN);
  std::vector<float> scores(16 * kChunkTokens), max(rows, NAN), sum(rows, 0.0f);
  std::vector<const float*> qs(rows);
  std::vector<float*> accs(rows);
  std::vector<uint32_t> begin(rows), end(rows);
  for (uint32_t r = 0; r < rows; ++r) {
    qs[r] = q.data() + size_t(r) * head_dim;
    accs[r] = acc.data() + size_t(r) * head_dim;
    begin[r] = r == 1 ? kChunkTokens + 5 : rng() % 40;
    end[r] = r == 2 ? kChunkTokens - 9 : kChunkTokens + 30 + rng() % 100;
  }
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const uint32_t base = chunk * kChunkTokens;
    std::vector<const uint16_t*> keys(kChunkPages), values(kChunkPages);
    for (uint32_t p = 0; p < kChunkPages; ++p) {
      keys[p] = cache.data() + (chunk * kChunkPages + p) * page_values;
      values[p] = keys[p] + page_values / 2;
    }
    std::vector<uint32_t> lo(rows), hi(rows);
    for (uint32_t r = 0; r < rows; ++r) {
      lo[r] = std::min(std::max(begin[r], base) - base, kChunkTokens);
      hi[r] = std::min(std::max(end[r], base) - base, kChunkTokens);
    }
    k.attend({qs.data(), keys.data(), values.data(), lo.data(), hi.data(), rows, head_dim, scores.data(), accs.data(),
              max.data(), sum.data()});
  }
  for (uint32_t r = 0; r < rows; ++r) {
    std::vector<double> out(head_dim, 0.0);
    double total = 0, top = -INFINITY;
    std::vector<double> score(tokens, -INFINITY);
    const auto key = [&](uint32_t t, uint32_t c) {
      return half_to_float(cache[t / kPageTokens * page_values + c * kPageTokens + t % kPageTokens]);
    };
    const auto value = [&](uint32_t t, uint32_t c) {
      return half_to_float(cache[t / kPageTokens * page_values + page_values / 2 + t % kPageTokens * head_dim + c]);
    };
    for (uint32_t t = begin[r]; t < end[r]; ++t) {
      score[t] = 0;
      for (uint32_t c = 0; c < head_dim; ++c) score[t] += double(qs[r][c]) * key(t, c);
      top = std::max(top, score[t]);
    }
    for (uint32_t t = begin[r]; t < end[r]; ++t) {
      const double weight = std::exp2(score[t] - top);
      total += weight;
      for (uint32_t c = 0; c < head_dim; ++c) out[c] += weight * value(t, c);
    }
    // A score of size s carries s * 2^-24 * (a few); the softmax passes it on as a relative error.
    for (uint32_t c = 0; c < head_dim; ++c)
      near("attention, head size " + std::to_string(head_dim), r, out[c] / total, accs[r][c] / sum[r], 2e-5);
  }
}

}  // namespace

int main() {
  constexpr DType floats[] = {DType::F32, DType::F16, DType::BF16};
  for (Isa isa : isa_available()) {
    const Kernels& k = kernels_for(isa);
    level = isa_name(isa);
    for (uint32_t parts : {1u, 2u}) test_quantize(k, parts);
    for (const Format& f : kFormats)
      for (uint32_t parts : {1u, 2u}) test_matmul(k, f.type, parts);
    for (DType t : floats) test_matmul(k, t, 1);
    test_vectors(k);
    for (uint32_t head_dim : {16u, 48u, 64u, 256u})
      for (uint32_t rows : {1u, 3u, 5u, 16u}) test_attention(k, head_dim, rows);
    std::printf("%s: %u lanes, kernels agree\n", level, k.lanes);
  }
  return 0;
}
