// The quantised types as the packed layout sees them: one compile-time row a type. Kernels and the
// packer are templates over these rows, so that a type is described once.
#pragma once
#include <cstdint>

#include "dtype.h"

namespace edgert {

enum class ScaleKind { F16, BF16, Super };  // one 16-bit scale a block, or bytes under a 256-wide `d`
enum class CodeKind { Plain, Signed, Table };

struct Format {
  DType type;
  int bits;         // width of a code: 2, 3, 4, 5, 6 or 8
  CodeKind code;    // Plain: unsigned code minus `offset`; Signed: int8; Table: 16-entry codebook
  int offset;
  ScaleKind scale;
  bool has_min;     // value = scale * code + min (simple types), - dmin * m (256-wide types)
  int group;        // columns that share a scale: 32 or 16
  int scale_bias;   // subtracted from a byte scale (Super)
  bool nibble_pair; // scale in the low, minimum in the high nibble of one byte (Q2_K)
};

inline constexpr Format kFormats[] = {
    {DType::Q4_0, 4, CodeKind::Plain, 8, ScaleKind::F16, false, 32, 0, false},
    {DType::Q4_1, 4, CodeKind::Plain, 0, ScaleKind::F16, true, 32, 0, false},
    {DType::Q5_0, 5, CodeKind::Plain, 16, ScaleKind::F16, false, 32, 0, false},
    {DType::Q5_1, 5, CodeKind::Plain, 0, ScaleKind::F16, true, 32, 0, false},
    {DType::Q8_0, 8, CodeKind::Signed, 0, ScaleKind::F16, false, 32, 0, false},
    {DType::Q2_K, 2, CodeKind::Plain, 0, ScaleKind::Super, true, 16, 0, true},
    {DType::Q3_K, 3, CodeKind::Plain, 4, ScaleKind::Super, false, 16, 32, false},
    {DType::Q4_K, 4, CodeKind::Plain, 0, ScaleKind::Super, true, 32, 0, false},
    {DType::Q5_K, 5, CodeKind::Plain, 0, ScaleKind::Super, true, 32, 0, false},
    {DType::Q6_K, 6, CodeKind::Plain, 32, ScaleKind::Super, false, 16, 0, false},
    {DType::IQ4_NL, 4, CodeKind::Table, 0, ScaleKind::F16, false, 32, 0, false},
    {DType::IQ4_XS, 4, CodeKind::Table, 0, ScaleKind::Super, false, 32, 32, false},
    {DType::MXFP4, 4, CodeKind::Table, 0, ScaleKind::BF16, false, 32, 0, false},
};

inline constexpr int8_t kTableIq4[16] = {-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113};
inline constexpr int8_t kTableMxfp4[16] = {0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12};

constexpr const int8_t* code_table(DType t) { return t == DType::MXFP4 ? kTableMxfp4 : kTableIq4; }

// Bytes of codes, per row, in a block of 32 columns.
constexpr int code_bytes(const Format& f) { return f.bits * 4; }
// Bytes, per row, of everything in a block of 32 columns but the 256-wide header.
constexpr int block_bytes(const Format& f) {
  if (f.scale != ScaleKind::Super) return code_bytes(f) + 2 + (f.has_min ? 2 : 0);
  const int groups = 32 / f.group;
  return code_bytes(f) + groups + (f.has_min && !f.nibble_pair ? groups : 0);
}
// Bytes, per row, in front of eight blocks of a 256-wide type.
constexpr int super_header_bytes(const Format& f) {
  return f.scale == ScaleKind::Super ? (f.has_min ? 4 : 2) : 0;
}

constexpr const Format* find_format(DType t) {
  for (const Format& f : kFormats)
    if (f.type == t) return &f;
  return nullptr;
}

}  // namespace edgert
