// Weight matrices in the layout the kernels read.
//
// A matrix of [rows x cols] is cut into tiles of R rows (R is the number of float lanes of the ISA
// level that will read it). Inside a tile the rows are interleaved so that lane r of a vector
// always belongs to row r: no horizontal sums, and every row is accumulated in the order of its
// columns whatever the vector width.
//
// Quantised types. A tile is a sequence of blocks of 32 columns. The 32 codes of a row are eight
// quads of four; "quad vector j" is R x 4 bytes, row-major, holding quad j of every row.
//   4-bit codes   4 vectors; the low nibbles of vector j hold quad j, the high nibbles quad j + 4
//   5th bit       1 vector;  bit j of a byte belongs to quad j
//   5th, 6th bit  2 vectors; bits 2(j%4), +1 of vector j/4 belong to quad j
//   2-bit codes   2 vectors, the same
//   8-bit codes   8 vectors, signed
// In front of the codes of a block: R scales (f16; bf16 for MXFP4), then R minima (f16) if the type
// has them. The 256-wide types put R f16 `d` (and R f16 `dmin`) once in front of eight blocks, and
// in front of each block R bytes of scale per group (Q2_K: scale and minimum in one byte) and R
// bytes of minimum.
//
// F32, F16 and BF16: element k of all R rows lies together, k after k.
#pragma once
#include <cstddef>
#include <cstdint>

#include "dtype.h"

namespace edgert {

struct PackedMatrix {
  DType type = DType::F32;
  uint32_t rows = 0;
  uint32_t cols = 0;
  uint32_t tile_rows = 0;        // R
  size_t stride = 0;             // bytes from one tile to the next
  const uint8_t* data = nullptr;

  uint32_t tiles() const { return (rows + tile_rows - 1) / tile_rows; }
  const uint8_t* tile(uint32_t i) const { return data + size_t(i) * stride; }
};

// Bytes of one tile of `tile_rows` rows of `cols` columns.
size_t packed_tile_bytes(DType type, uint32_t cols, uint32_t tile_rows);

// Packs `rows` (at most tile_rows; missing ones become zeros) consecutive rows as they stand in a
// GGUF file into one tile.
void pack_tile(DType type, const uint8_t* src, uint32_t rows, uint32_t cols, uint32_t tile_rows, uint8_t* dst);

// Dequantises one row into `dst` (cols floats). Same arithmetic as dequantize() of the file's row.
void unpack_row(const PackedMatrix& m, uint32_t row, float* dst);

}  // namespace edgert
