#include "packed.h"

#include <cstring>

#include "formats.h"
#include "half.h"

namespace edgert {
namespace {

// One block of a row as it stands in the file, taken apart: up to 256 codes with their scales.
struct Parts {
  uint8_t q[256];   // codes; two's complement for Signed
  uint16_t d = 0, dmin = 0;
  uint8_t sc[16], mn[16];  // per group (Super)
};

uint16_t load16(const uint8_t* p) { return uint16_t(p[0] | (p[1] << 8)); }

void nibbles(const uint8_t* qs, uint8_t* q) {
  for (int i = 0; i < 16; ++i) {
    q[i] = qs[i] & 15;
    q[i + 16] = qs[i] >> 4;
  }
}

void fifth_bits(const uint8_t* qh, uint8_t* q) {
  for (int i = 0; i < 32; ++i) q[i] |= ((qh[i / 8] >> (i % 8)) & 1) << 4;
}

// Q4_K and Q5_K: eight 6-bit scales and minima in 12 bytes.
void k_scales(const uint8_t* s, uint8_t* sc, uint8_t* mn) {
  for (int i = 0; i < 4; ++i) {
    sc[i] = s[i] & 63;
    mn[i] = s[i + 4] & 63;
    sc[i + 4] = (s[i + 8] & 15) | ((s[i] >> 6) << 4);
    mn[i + 4] = (s[i + 8] >> 4) | ((s[i + 4] >> 6) << 4);
  }
}

void take_apart(DType type, const uint8_t* b, Parts& p) {
  switch (type) {
    case DType::Q4_0:
    case DType::IQ4_NL:
      p.d = load16(b);
      nibbles(b + 2, p.q);
      break;
    case DType::Q4_1:
      p.d = load16(b);
      p.dmin = load16(b + 2);
      nibbles(b + 4, p.q);
      break;
    case DType::Q5_0:
      p.d = load16(b);
      nibbles(b + 6, p.q);
      fifth_bits(b + 2, p.q);
      break;
    case DType::Q5_1:
      p.d = load16(b);
      p.dmin = load16(b + 2);
      nibbles(b + 8, p.q);
      fifth_bits(b + 4, p.q);
      break;
    case DType::Q8_0:
      p.d = load16(b);
      std::memcpy(p.q, b + 2, 32);
      break;
    case DType::MXFP4:
      // The codebook holds doubled values, so the scale is 2^(e - 128); as bf16 it is exact.
      p.d = b[0] < 2 ? uint16_t(0x20 << b[0]) : uint16_t((b[0] - 1) << 7);
      nibbles(b + 1, p.q);
      break;
    case DType::Q2_K:
      std::memcpy(p.sc, b, 16);
      for (int i = 0; i < 8; ++i)
        for (int l = 0; l < 32; ++l) p.q[32 * i + l] = (b[16 + 32 * (i / 4) + l] >> (2 * (i % 4))) & 3;
      p.d = load16(b + 80);
      p.dmin = load16(b + 82);
      break;
    case DType::Q3_K: {
      const uint8_t* s = b + 96;
      for (int i = 0; i < 8; ++i)
        for (int l = 0; l < 32; ++l)
          p.q[32 * i + l] = ((b[32 + 32 * (i / 4) + l] >> (2 * (i % 4))) & 3) | ((b[l] >> i) & 1) << 2;
      for (int i = 0; i < 16; ++i)
        p.sc[i] = ((i < 8 ? s[i] & 15 : s[i - 8] >> 4)) | (((s[8 + i % 4] >> (2 * (i / 4))) & 3) << 4);
      p.d = load16(b + 108);
      break;
    }
    case DType::Q4_K:
      p.d = load16(b);
      p.dmin = load16(b + 2);
      k_scales(b + 4, p.sc, p.mn);
      for (int i = 0; i < 8; ++i)
        for (int l = 0; l < 32; ++l) p.q[32 * i + l] = (b[16 + 32 * (i / 2) + l] >> (4 * (i % 2))) & 15;
      break;
    case DType::Q5_K:
      p.d = load16(b);
      p.dmin = load16(b + 2);
      k_scales(b + 4, p.sc, p.mn);
      for (int i = 0; i < 8; ++i)
        for (int l = 0; l < 32; ++l)
          p.q[32 * i + l] = ((b[48 + 32 * (i / 2) + l] >> (4 * (i % 2))) & 15) | ((b[16 + l] >> i) & 1) << 4;
      break;
    case DType::Q6_K:
      for (int i = 0; i < 8; ++i) {
        const int h = i / 4, part = i % 4;
        const uint8_t *low = b + 64 * h + 32 * (part % 2), *high = b + 128 + 32 * h;
        for (int l = 0; l < 32; ++l)
          p.q[32 * i + l] = ((low[l] >> (4 * (part / 2))) & 15) | ((high[l] >> (2 * part)) & 3) << 4;
      }
      std::memcpy(p.sc, b + 192, 16);
      p.d = load16(b + 208);
      break;
    case DType::IQ4_XS: {
      p.d = load16(b);
      const uint16_t high = load16(b + 2);
      for (int i = 0; i < 8; ++i) {
        p.sc[i] = ((b[4 + i / 2] >> (4 * (i % 2))) & 15) | (((high >> (2 * i)) & 3) << 4);
        nibbles(b + 8 + 16 * i, p.q + 32 * i);
      }
      break;
    }
    default:
      break;
  }
}

// Stores the 32 codes of one row in the quad vectors of a block, a quad (32 bits) at a time.
template <int Bits>
void put_codes(const uint8_t* q, uint32_t row, uint32_t R, uint8_t* dst) {
  const uint32_t vec = R * 4;
  uint32_t w[8];
  std::memcpy(w, q, 32);
  const auto store = [&](uint32_t vector, uint32_t word) { std::memcpy(dst + vector * vec + row * 4, &word, 4); };
  if constexpr (Bits == 8) {
    for (uint32_t j = 0; j < 8; ++j) store(j, w[j]);
  } else if constexpr (Bits >= 4) {
    for (uint32_t j = 0; j < 4; ++j) store(j, (w[j] & 0x0f0f0f0f) | (w[j + 4] & 0x0f0f0f0f) << 4);
  } else {
    for (uint32_t i = 0; i < 2; ++i) {
      uint32_t word = 0;
      for (uint32_t j = 0; j < 4; ++j) word |= (w[4 * i + j] & 0x03030303) << (2 * j);
      store(i, word);
    }
  }
  if constexpr (Bits == 5 || Bits == 3) {
    uint32_t word = 0;
    for (uint32_t j = 0; j < 8; ++j) word |= (w[j] >> (Bits - 1) & 0x01010101) << j;
    store(Bits == 5 ? 4 : 2, word);
  }
  if constexpr (Bits == 6)
    for (uint32_t i = 0; i < 2; ++i) {
      uint32_t word = 0;
      for (uint32_t j = 0; j < 4; ++j) word |= (w[4 * i + j] >> 4 & 0x03030303) << (2 * j);
      store(4 + i, word);
    }
}

void put_codes(const Format& f, const uint8_t* q, uint32_t row, uint32_t R, uint8_t* dst) {
  switch (f.bits) {
    case 2: return put_codes<2>(q, row, R, dst);
    case 3: return put_codes<3>(q, row, R, dst);
    case 4: return put_codes<4>(q, row, R, dst);
    case 5: return put_codes<5>(q, row, R, dst);
    case 6: return put_codes<6>(q, row, R, dst);
    default: return put_codes<8>(q, row, R, dst);
  }
}

uint8_t get_code(const Format& f, const uint8_t* src, uint32_t k, uint32_t row, uint32_t R) {
  const uint32_t vec = R * 4, j = k / 4, at = row * 4 + k % 4;
  if (f.bits == 8) return src[j * vec + at];
  if (f.bits >= 4) {
    uint8_t c = (src[(j % 4) * vec + at] >> (4 * (j / 4))) & 15;
    const uint8_t* high = src + 4 * vec;
    if (f.bits == 5) c |= ((high[at] >> j) & 1) << 4;
    if (f.bits == 6) c |= ((high[(j / 4) * vec + at] >> (2 * (j % 4))) & 3) << 4;
    return c;
  }
  uint8_t c = (src[(j / 4) * vec + at] >> (2 * (j % 4))) & 3;
  if (f.bits == 3) c |= ((src[2 * vec + at] >> j) & 1) << 2;
  return c;
}

void store16(uint8_t* p, uint16_t v) {
  p[0] = uint8_t(v);
  p[1] = uint8_t(v >> 8);
}

}  // namespace

size_t packed_tile_bytes(DType type, uint32_t cols, uint32_t R) {
  const Format* f = find_format(type);
  if (!f) return size_t(cols) * R * dtype_info(type).bytes;
  const size_t blocks = cols / 32;
  return R * (blocks * block_bytes(*f) + blocks / 8 * super_header_bytes(*f));
}

void pack_tile(DType type, const uint8_t* src, uint32_t rows, uint32_t cols, uint32_t R, uint8_t* dst) {
  const DTypeInfo& info = dtype_info(type);
  const size_t row_bytes = size_t(cols) / info.block * info.bytes;
  if (rows < R) std::memset(dst, 0, packed_tile_bytes(type, cols, R));
  const Format* f = find_format(type);
  if (!f) {
    for (uint32_t r = 0; r < rows; ++r)
      for (uint32_t k = 0; k < cols; ++k)
        std::memcpy(dst + (size_t(k) * R + r) * info.bytes, src + r * row_bytes + size_t(k) * info.bytes, info.bytes);
    return;
  }
  const uint32_t per_file_block = info.block / 32;  // 1 or 8
  const int groups = 32 / f->group;
  const bool super = f->scale == ScaleKind::Super;
  Parts p;
  for (uint32_t r = 0; r < rows; ++r) {
    const uint8_t* s = src + r * row_bytes;
    uint8_t* d = dst;
    for (uint32_t b = 0; b < cols / info.block; ++b, s += info.bytes) {
      take_apart(type, s, p);
      store16(d + 2 * r, p.d);
      if (f->has_min) store16(d + 2 * (R + r), p.dmin);
      if (super) d += R * super_header_bytes(*f);
      for (uint32_t i = 0; i < per_file_block; ++i) {
        uint8_t* codes = d + size_t(R) * (block_bytes(*f) - code_bytes(*f));
        if (super)
          for (int g = 0; g < groups; ++g) {
            d[g * R + r] = p.sc[i * groups + g];
            if (f->has_min && !f->nibble_pair) d[(groups + g) * R + r] = p.mn[i * groups + g];
          }
        put_codes(*f, p.q + 32 * i, r, R, codes);
        d += size_t(R) * block_bytes(*f);
      }
    }
  }
}

void unpack_row(const PackedMatrix& m, uint32_t row, float* dst) {
  const uint32_t R = m.tile_rows, r = row % R;
  const uint8_t* s = m.tile(row / R);
  const Format* f = find_format(m.type);
  if (!f) {
    const size_t size = dtype_info(m.type).bytes;
    for (uint32_t k = 0; k < m.cols; ++k)
      dequantize(m.type, s + (size_t(k) * R + r) * size, dst + k, 1);
    return;
  }
  const int groups = 32 / f->group;
  const int8_t* table = code_table(m.type);
  float d = 0, dmin = 0;
  for (uint32_t b = 0; b < m.cols / 32; ++b, dst += 32) {
    if (f->scale != ScaleKind::Super || b % 8 == 0) {
      d = f->scale == ScaleKind::BF16 ? bf16_to_float(load16(s + 2 * r)) : half_to_float(load16(s + 2 * r));
      if (f->has_min) dmin = half_to_float(load16(s + 2 * (R + r)));
      if (f->scale == ScaleKind::Super) s += R * super_header_bytes(*f);
    }
    const uint8_t* codes = s + size_t(R) * (block_bytes(*f) - code_bytes(*f));
    for (int g = 0; g < groups; ++g) {
      float scale = d, min = dmin;
      if (f->scale == ScaleKind::Super) {
        int sc = s[g * R + r], mn = 0;
        if (f->nibble_pair) {
          mn = sc >> 4;
          sc &= 15;
        } else if (f->has_min) {
          mn = s[(groups + g) * R + r];
        }
        if (f->type == DType::Q6_K) sc = int8_t(sc);
        scale = d * float(sc - f->scale_bias);
        min = -(dmin * float(mn));
      }
      for (int k = g * f->group; k < (g + 1) * f->group; ++k) {
        const uint8_t c = get_code(*f, codes, uint32_t(k), r, R);
        const int v = f->code == CodeKind::Signed ? int8_t(c) : f->code == CodeKind::Table ? table[c] : c - f->offset;
        dst[k] = f->has_min ? scale * float(v) + min : scale * float(v);
      }
    }
    s += size_t(R) * block_bytes(*f);
  }
}

}  // namespace edgert
