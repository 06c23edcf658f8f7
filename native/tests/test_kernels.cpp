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

#include "check.h"
#include "dtype.h"
#include "formats.h"
#include "half.h"
#include "kernels.h"

using namespace edgert;

namespace {

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

// Pages of one head as append() fills them, and what they hold according to plain arithmetic.
struct Pages {
  const KvKernels& kv;
  KvType type;
  uint32_t head_dim;
  size_t page;
  std::vector<uint8_t> bytes;    // [pages] K and V
  std::vector<double> k, v;      // [tokens][head_dim]

  Pages(const Kernels& kernels, KvType t, uint32_t dim, const std::vector<float>& keys, const std::vector<float>& values)
      : kv(kernels.kv[size_t(t)]), type(t), head_dim(dim), page(kv_page_bytes(t, dim)) {
    const uint32_t tokens = uint32_t(keys.size() / dim);
    bytes.resize((tokens + kPageTokens - 1) / kPageTokens * 2 * page);
    for (uint32_t i = 0; i < tokens; ++i)
      kv.append(&keys[size_t(i) * dim], &values[size_t(i) * dim], dim, i % kPageTokens, at(i / kPageTokens),
                at(i / kPageTokens) + page);
    k = kept(keys), v = kept(values);
  }
  uint8_t* at(uint32_t index) { return bytes.data() + index * 2 * page; }

 private:
  std::vector<double> kept(const std::vector<float>& x) const {
    std::vector<double> out(x.size());
    for (size_t i = 0; i < x.size(); i += 16)
      for (size_t j = i; j < i + 16; ++j) {
        if (type == KvType::F16) {
          out[j] = half_to_float(float_to_half(std::clamp(x[j], -65504.0f, 65504.0f)));
          continue;
        }
        float top = 0;
        for (size_t c = j / 32 * 32; c < j / 32 * 32 + 32; ++c)
          if (!std::isnan(x[c])) top = std::max(top, std::min(std::fabs(x[c]), 127 * 65504.0f));
        // In float, so that what lies in the middle between two codes goes to the same.
        const float scale = half_to_float(float_to_half(top / 127)), inverse = scale > 0 ? 1 / scale : 0;
        const float limited = std::isnan(x[j]) ? 0 : std::clamp(x[j], -top, top);
        out[j] = double(scale) * std::clamp(std::nearbyint(limited * inverse), -127.0f, 127.0f);
      }
    return out;
  }
};

// Rows with different first and last tokens over two chunks, one of them empty in the first.
void test_attention(const Kernels& k, KvType type, uint32_t head_dim, uint32_t rows) {
  const uint32_t tokens = kChunkTokens + 130;
  const std::string what = std::string(type == KvType::Q8 ? "q8" : "f16") + " attention, head size " + std::to_string(head_dim);
  const std::vector<float> keys = random_floats(size_t(tokens) * head_dim, 2), values = random_floats(keys.size(), 2);
  Pages pages(k, type, head_dim, keys, values);
  same(what + ", pages", Pages(kernels_scalar(), type, head_dim, keys, values).bytes, pages.bytes);
  const std::vector<float> plain = random_floats(size_t(rows) * head_dim, 0.6f);
  std::vector<float> q = plain, acc(q.size(), NAN), scores(16 * kChunkTokens), max(rows, NAN), sum(rows, 0.0f);
  std::vector<const float*> qs(rows);
  std::vector<float*> accs(rows);
  std::vector<uint32_t> begin(rows), end(rows);
  for (uint32_t r = 0; r < rows; ++r) {
    pages.kv.code_query(q.data() + size_t(r) * head_dim, head_dim);
    qs[r] = q.data() + size_t(r) * head_dim;
    accs[r] = acc.data() + size_t(r) * head_dim;
    begin[r] = r == 1 ? kChunkTokens + 5 : rng() % 40;
    end[r] = r == 2 ? kChunkTokens - 9 : kChunkTokens + 30 + rng() % 100;
  }
  for (uint32_t chunk = 0; chunk < 2; ++chunk) {
    const uint32_t base = chunk * kChunkTokens;
    const uint8_t *key_pages[kChunkPages], *value_pages[kChunkPages];
    for (uint32_t p = 0; p < kChunkPages; ++p) {
      key_pages[p] = pages.at(chunk * kChunkPages + p);
      value_pages[p] = key_pages[p] + pages.page;
    }
    std::vector<uint32_t> lo(rows), hi(rows);
    for (uint32_t r = 0; r < rows; ++r) {
      lo[r] = std::min(std::max(begin[r], base) - base, kChunkTokens);
      hi[r] = std::min(std::max(end[r], base) - base, kChunkTokens);
    }
    pages.kv.attend({qs.data(), key_pages, value_pages, lo.data(), hi.data(), rows, head_dim, scores.data(), accs.data(),
                     max.data(), sum.data()});
  }
  for (uint32_t r = 0; r < rows; ++r) {
    std::vector<double> out(head_dim, 0.0), score(tokens, -INFINITY);
    double total = 0, top = -INFINITY;
    for (uint32_t t = begin[r]; t < end[r]; ++t) {
      score[t] = 0;
      for (uint32_t c = 0; c < head_dim; ++c) score[t] += double(plain[r * head_dim + c]) * pages.k[t * head_dim + c];
      top = std::max(top, score[t]);
    }
    for (uint32_t t = begin[r]; t < end[r]; ++t) {
      const double weight = std::exp2(score[t] - top);
      total += weight;
      for (uint32_t c = 0; c < head_dim; ++c) out[c] += weight * pages.v[t * head_dim + c];
    }
    // A score of size s carries s * 2^-24 * (a few); the softmax passes it on as a relative error. For q8
    // pages the query has two parts of int8: an error of 2^-16 of its largest value at most, which meets
    // head_dim keys of either sign.
    const double bound = type == KvType::F16 ? 2e-5 : 2e-5 + 2e-5 * std::sqrt(head_dim);
    for (uint32_t c = 0; c < head_dim; ++c) near(what, r, out[c] / total, accs[r][c] / sum[r], bound);
  }
}

// What a page holds of numbers that its type can hardly hold or not at all.
void test_append(const Kernels& k, KvType type) {
  const uint32_t head_dim = 128;
  std::vector<float> x = random_floats(3 * head_dim, 3);
  x[0] = 1e9f, x[1] = -INFINITY, x[2] = 1e-7f;                       // too large, too large, subnormal
  for (uint32_t i = 32; i < 64; ++i) x[i] = 0;                       // a block of zeros
  for (uint32_t i = 64; i < 96; ++i) x[i] *= 3e-6f;                  // one with a subnormal scale
  for (uint32_t i = 96; i < 128; ++i) x[i] *= 1e-9f;                 // one whose scale is zero
  if (type == KvType::Q8) x[130] = NAN, x[170] = INFINITY;
  Pages pages(k, type, head_dim, x, x);
  const uint8_t *keys = pages.at(0), *values = keys + pages.page;
  const auto half = [](const uint8_t* p, size_t i) {
    uint16_t h;
    std::memcpy(&h, p + 2 * i, 2);
    return double(half_to_float(h));
  };
  const size_t codes = size_t(kPageTokens) * head_dim;
  for (uint32_t t = 0; t < 3; ++t)
    for (uint32_t c = 0; c < head_dim; ++c) {
      double key = half(keys, c * kPageTokens + t), value = half(values, t * head_dim + c);
      if (type == KvType::Q8) {
        const size_t scale = c / 32 * kPageTokens + t;
        key = half(keys + codes, scale) * int8_t(keys[(c / 4 * kPageTokens + t) * 4 + c % 4]);
        value = half(values + codes, scale) * int8_t(values[t * head_dim + c]);
      }
      near("key in its page", t * head_dim + c, pages.k[t * head_dim + c], key, 0);
      near("value in its page", t * head_dim + c, pages.v[t * head_dim + c], value, 0);
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
    for (KvType type : {KvType::F16, KvType::Q8}) {
      test_append(k, type);
      for (uint32_t head_dim : {16u, 48u, 32u, 64u, 128u, 256u})
        for (uint32_t rows : {1u, 3u, 5u, 8u, 16u})
          if (type == KvType::F16 || head_dim % 32 == 0) test_attention(k, type, head_dim, rows);
    }
    std::printf("%s: %u lanes, kernels agree\n", level, k.lanes);
  }
  return 0;
}
