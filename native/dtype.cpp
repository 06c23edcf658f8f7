// Dequantisation, one function a type. Each decodes one block with the float32 operations of the
// `gguf` Python package in its order; this file must be compiled without contraction into fused
// multiply-adds, which would round once where numpy rounds twice.
#include "dtype.h"

#include <array>
#include <bit>
#include <cstring>

#include "half.h"

namespace edgert {
namespace {

static_assert(std::endian::native == std::endian::little, "GGUF data is read as little endian");

uint16_t load16(const uint8_t* p) {
  uint16_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

uint32_t load32(const uint8_t* p) {
  uint32_t v;
  std::memcpy(&v, p, sizeof v);
  return v;
}

float half(const uint8_t* p) { return half_to_float(load16(p)); }

// 4-bit code `j` of 32: the low nibbles of 16 bytes come first, then the high ones.
int nibble(const uint8_t* qs, int j) { return qs[j & 15] >> (j & 16 ? 4 : 0) & 0xF; }

void f32(const uint8_t* b, float* y) { *y = std::bit_cast<float>(load32(b)); }
void f16(const uint8_t* b, float* y) { *y = half(b); }
void bf16(const uint8_t* b, float* y) { *y = bf16_to_float(load16(b)); }

// d, 16 bytes of codes
void q4_0(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(nibble(b + 2, j) - 8);
}

// d, m, 16 bytes of codes
void q4_1(const uint8_t* b, float* y) {
  const float d = half(b), m = half(b + 2);
  for (int j = 0; j < 32; ++j) y[j] = d * static_cast<float>(nibble(b + 4, j)) + m;
}

// d, 32 fifth bits, 16 bytes of low bits
void q5_0(const uint8_t* b, float* y) {
  const float d = half(b);
  const uint32_t high = load32(b + 2);
  for (int j = 0; j < 32; ++j) {
    const int q = nibble(b + 6, j) | static_cast<int>(high >> j & 1) << 4;
    y[j] = d * static_cast<float>(q - 16);
  }
}

// d, m, 32 fifth bits, 16 bytes of low bits
void q5_1(const uint8_t* b, float* y) {
  const float d = half(b), m = half(b + 2);
  const uint32_t high = load32(b + 4);
  for (int j = 0; j < 32; ++j) {
    const int q = nibble(b + 8, j) | static_cast<int>(high >> j & 1) << 4;
    y[j] = d * static_cast<float>(q) + m;
  }
}

// d, 32 signed bytes
void q8_0(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int j = 0; j < 32; ++j) y[j] = static_cast<float>(static_cast<int8_t>(b[2 + j])) * d;
}

// 16 bytes of 4-bit scale and minimum, 64 bytes of 2-bit codes, d, dmin
void q2_k(const uint8_t* b, float* y) {
  const uint8_t *scales = b, *qs = b + 16;
  const float d = half(b + 80), dmin = half(b + 82);
  for (int j = 0; j < 256; ++j) {
    const uint8_t s = scales[j / 16];
    const float dl = d * static_cast<float>(s & 0xF), ml = dmin * static_cast<float>(s >> 4);
    const int q = qs[j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3;
    y[j] = dl * static_cast<float>(q) - ml;
  }
}

// 32 bytes of third bits, 64 bytes of low bits, 12 bytes of 6-bit scales, d
void q3_k(const uint8_t* b, float* y) {
  const uint8_t *mask = b, *qs = b + 32, *scales = b + 96;
  const float d = half(b + 108);
  float dl[16];
  for (int i = 0; i < 16; ++i) {
    const int low = i < 8 ? scales[i] & 0xF : scales[i - 8] >> 4;
    const int high = scales[8 + i % 4] >> (i / 4 * 2) & 3;
    dl[i] = d * static_cast<float>((low | high << 4) - 32);
  }
  for (int j = 0; j < 256; ++j) {
    const int low = qs[j / 128 * 32 + j % 32] >> (j % 128 / 32 * 2) & 3;
    const int offset = mask[j % 32] >> (j / 32) & 1 ? 0 : 4;  // a set bit means no offset
    y[j] = dl[j / 16] * static_cast<float>(low - offset);
  }
}

// The 8 scales and 8 minima of Q4_K and Q5_K, 6 bits each in 12 bytes, times d and dmin.
void k_scales(const uint8_t* p, float d, float dmin, float* scale, float* min) {
  for (int i = 0; i < 4; ++i) {
    scale[i] = d * static_cast<float>(p[i] & 0x3F);
    min[i] = dmin * static_cast<float>(p[i + 4] & 0x3F);
    scale[i + 4] = d * static_cast<float>((p[i + 8] & 0xF) | (p[i] >> 2 & 0x30));
    min[i + 4] = dmin * static_cast<float>(p[i + 8] >> 4 | (p[i + 4] >> 2 & 0x30));
  }
}

// d, dmin, 12 bytes of scales, 128 bytes of codes
void q4_k(const uint8_t* b, float* y) {
  float scale[8], min[8];
  k_scales(b + 4, half(b), half(b + 2), scale, min);
  const uint8_t* qs = b + 16;
  for (int j = 0; j < 256; ++j) {
    const int g = j / 32, q = qs[g / 2 * 32 + j % 32] >> (g % 2 * 4) & 0xF;
    y[j] = scale[g] * static_cast<float>(q) - min[g];
  }
}

// d, dmin, 12 bytes of scales, 32 bytes of fifth bits, 128 bytes of low bits
void q5_k(const uint8_t* b, float* y) {
  float scale[8], min[8];
  k_scales(b + 4, half(b), half(b + 2), scale, min);
  const uint8_t *high = b + 16, *qs = b + 48;
  for (int j = 0; j < 256; ++j) {
    const int g = j / 32, low = qs[g / 2 * 32 + j % 32] >> (g % 2 * 4) & 0xF;
    const int q = low | (high[j % 32] >> g & 1) << 4;
    y[j] = scale[g] * static_cast<float>(q) - min[g];
  }
}

// 128 bytes of low bits, 64 bytes of high pairs, 16 signed scales, d
void q6_k(const uint8_t* b, float* y) {
  const uint8_t *ql = b, *qh = b + 128, *scales = b + 192;
  const float d = half(b + 208);
  for (int j = 0; j < 256; ++j) {
    const int part = j / 128, r = j % 128;
    const int low = ql[part * 64 + r % 64] >> (r / 64 * 4) & 0xF;
    const int high = qh[part * 32 + r % 32] >> (r / 32 * 2) & 3;
    const float ds = d * static_cast<float>(static_cast<int8_t>(scales[j / 16]));
    y[j] = ds * static_cast<float>((low | high << 4) - 32);
  }
}

constexpr std::array<float, 16> kIq4 = {-127, -104, -83, -65, -49, -35, -22, -10,
                                        1,    13,   25,  38,  53,  69,  89,  113};

// d, 16 bytes of indices into the table
void iq4_nl(const uint8_t* b, float* y) {
  const float d = half(b);
  for (int j = 0; j < 32; ++j) y[j] = d * kIq4[nibble(b + 2, j)];
}

// d, 8 high pairs of scale bits, 4 bytes of low scale bits, 128 bytes of indices
void iq4_xs(const uint8_t* b, float* y) {
  const float d = half(b);
  const uint32_t high = load16(b + 2);
  for (int g = 0; g < 8; ++g) {
    const int scale = (b[4 + g / 2] >> (g % 2 * 4) & 0xF) | static_cast<int>(high >> (2 * g) & 3) << 4;
    const float dl = d * static_cast<float>(scale - 32);
    for (int j = 0; j < 32; ++j) y[g * 32 + j] = dl * kIq4[nibble(b + 8 + g * 16, j)];
  }
}

// Twice the values of E2M1; the scale is halved to match. Code 8, minus zero, decodes to plus zero.
constexpr std::array<float, 16> kMxfp4 = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

// power-of-two exponent, 16 bytes of codes
void mxfp4(const uint8_t* b, float* y) {
  const uint32_t e = b[0];
  const float d = std::bit_cast<float>(e < 2 ? 0x00200000u << e : (e - 1) << 23);
  for (int j = 0; j < 32; ++j) y[j] = d * kMxfp4[nibble(b + 1, j)];
}

struct Row {
  DTypeInfo info;
  void (*decode)(const uint8_t* src, float* dst, size_t n);
};

// The loop is a template so that the decoder of a block is inlined into it.
template <void (*block_decoder)(const uint8_t*, float*), uint32_t block, uint32_t bytes>
constexpr Row row(DType type, const char* name) {
  return {{type, name, block, bytes}, [](const uint8_t* src, float* dst, size_t n) {
            for (size_t i = 0; i < n; i += block, src += bytes) block_decoder(src, dst + i);
          }};
}

constexpr Row kRows[] = {
    row<f32, 1, 4>(DType::F32, "F32"),
    row<f16, 1, 2>(DType::F16, "F16"),
    row<q4_0, 32, 18>(DType::Q4_0, "Q4_0"),
    row<q4_1, 32, 20>(DType::Q4_1, "Q4_1"),
    row<q5_0, 32, 22>(DType::Q5_0, "Q5_0"),
    row<q5_1, 32, 24>(DType::Q5_1, "Q5_1"),
    row<q8_0, 32, 34>(DType::Q8_0, "Q8_0"),
    row<q2_k, 256, 84>(DType::Q2_K, "Q2_K"),
    row<q3_k, 256, 110>(DType::Q3_K, "Q3_K"),
    row<q4_k, 256, 144>(DType::Q4_K, "Q4_K"),
    row<q5_k, 256, 176>(DType::Q5_K, "Q5_K"),
    row<q6_k, 256, 210>(DType::Q6_K, "Q6_K"),
    row<iq4_nl, 32, 18>(DType::IQ4_NL, "IQ4_NL"),
    row<iq4_xs, 256, 136>(DType::IQ4_XS, "IQ4_XS"),
    row<bf16, 1, 2>(DType::BF16, "BF16"),
    row<mxfp4, 32, 17>(DType::MXFP4, "MXFP4"),
};

const Row* find(uint32_t type_id) {
  for (const Row& r : kRows)
    if (static_cast<uint32_t>(r.info.type) == type_id) return &r;
  return nullptr;
}

}  // namespace

const DTypeInfo* dtype_info(uint32_t type_id) {
  const Row* r = find(type_id);
  return r ? &r->info : nullptr;
}

std::string dtype_names() {
  std::string names;
  for (const Row& r : kRows) names += (names.empty() ? "" : ", ") + std::string(r.info.name);
  return names;
}

void dequantize(DType type, const void* src, float* dst, size_t n) {
  find(static_cast<uint32_t>(type))->decode(static_cast<const uint8_t*>(src), dst, n);
}

}  // namespace edgert
