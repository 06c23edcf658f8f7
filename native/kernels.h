// What every ISA level offers: one table of functions. kernels_impl.h implements them once over a
// handful of vector primitives; kernels_<isa>.cpp supplies the primitives and is the only place
// compiled with that ISA's flags. Only plain pointers cross this line.
//
// All levels compute every float in the same order, so their results differ at most where an ISA
// has no fused multiply-add.
#pragma once
#include <cstddef>
#include <cstdint>

#include "isa.h"
#include "packed.h"

namespace edgert {

// Activations of n tokens, quantised to int8 in blocks of 32: value = scale * q. With two parts the
// second codes what the first leaves over, in a row of its own: 15 bits together. Token i has rows
// [parts * i, parts * (i + 1)); row r starts r strides into each array. `fsum` are scale times the sum
// of the codes.
struct QuantActs {
  int8_t* q;        // [n * parts][cols]
  float* scale;     // [n * parts][cols/32]
  int32_t* sum16;   // [n * parts][cols/16]
  int32_t* sum32;   // [n * parts][cols/32]
  float* fsum16;    // [n * parts][cols/16]
  float* fsum32;    // [n * parts][cols/32]
  uint32_t cols;    // also the stride of q; the others have cols/16 or cols/32
  uint32_t parts;   // 1 or 2

  QuantActs row(uint32_t r) const {
    const size_t g16 = size_t(r) * (cols / 16), g32 = size_t(r) * (cols / 32);
    return {q + size_t(r) * cols, scale + g32, sum16 + g16, sum32 + g32, fsum16 + g16, fsum32 + g32, cols, parts};
  }
  QuantActs token(uint32_t i) const { return row(i * parts); }
};

// How keys and values are kept, 16 tokens of one layer and KV head a page. F16: K
// [head_dim][16], V [16][head_dim]. Q8: kernels_attend.h; each 32 channels of a token are int8 codes with an
// f16 scale, 34 bytes.
enum class KvType : uint8_t { F16, Q8 };

// Attention of `rows` queries of one KV head to a run of pages of one chunk. Scores are logarithms to
// base 2: weights are powers of 2.
inline constexpr uint32_t kPageTokens = 16;
inline constexpr uint32_t kChunkPages = 16;
inline constexpr uint32_t kChunkTokens = kPageTokens * kChunkPages;

// Bytes of a page's K, and of its V.
constexpr size_t kv_page_bytes(KvType type, uint32_t head_dim) {
  return size_t(kPageTokens) * (type == KvType::Q8 ? head_dim / 32 * 34 : head_dim * 2);
}

// A record is key and value of one token of one layer and KV head. F16: K [head_dim], V [head_dim]. Q8: the f16
// scales of K and of V, [head_dim/32] each, then the codes of both.
constexpr size_t kv_record_bytes(KvType type, uint32_t head_dim) { return 2 * kv_page_bytes(type, head_dim) / kPageTokens; }

// The index of kIndexTokens keys of one layer and KV head: each channel of a key in two bits, between levels that
// are the channel's own in this block. First the levels, floats [2][head_dim]: that of code 0, and the step from
// one to the next; then codes [kIndexTokens/16][head_dim/16][16 tokens][4]: byte k of token t has in bits 2i and 2i + 1 the
// code of channel 4i + k of its 16.
inline constexpr uint32_t kIndexTokens = 256;
constexpr size_t index_block_bytes(uint32_t head_dim) { return size_t(head_dim) * 8 + size_t(kIndexTokens) * head_dim / 4; }

struct AttnChunk {
  const float* const* q;         // [rows] pointers to queries as code_query() left them
  // [kChunkPages] the pages of the chunk; those with no visible token are not looked at. Pages that
  // follow each other in memory are read as one stream, which is what memory is fastest at.
  const uint8_t* const* keys;
  const uint8_t* const* values;
  const uint32_t* lo;            // [rows] first visible token, relative to the chunk
  const uint32_t* hi;            // [rows] one past the last; lo == hi: the row skips the chunk
  uint32_t rows, head_dim;
  float* scores;                 // scratch, [16][kChunkTokens]
  float* const* acc;             // [rows] -> head_dim floats: running sum of weights times V
  float* max;                    // [rows] running maximum (-inf at the start)
  float* sum;                    // [rows] running sum of weights
};

// Attention over pages of one type.
struct KvKernels {
  // Writes a key and a value, head_dim floats each, to place `slot` of their pages. What the type cannot
  // hold becomes the largest number it can: a weight of 0 times infinity would be NaN in later tokens.
  void (*append)(const float* key, const float* value, uint32_t head_dim, uint32_t slot, uint8_t* keys, uint8_t* values);
  // Prepares a query, head_dim floats in their place: rotated, times the attention scale and log2(e).
  void (*code_query)(float* q, uint32_t head_dim);
  void (*attend)(const AttnChunk& c);
};

// Attention of `rows` queries of one KV head to `count` records, at most kChunkTokens, anywhere in memory.
struct AttnRecords {
  const float* const* q;           // [rows] head_dim floats: rotated, times the attention scale and log2(e)
  const uint8_t* const* records;   // [count]
  uint32_t count, rows, head_dim;
  float* scores;                   // scratch, [16][kChunkTokens]
  float* const* acc;               // [rows] -> head_dim floats: sum of weights times V
  float* max;                      // [rows] maximum of the scores
  float* sum;                      // [rows] sum of weights
};

// Keys and values of one type in records.
struct RecordKernels {
  void (*append)(const float* key, const float* value, uint32_t head_dim, uint8_t* record);
  void (*attend)(const AttnRecords& r);
  // 16 records that follow each other as a page: the bits that KvKernels::append would have written.
  void (*to_page)(const uint8_t* records, uint32_t head_dim, uint8_t* keys, uint8_t* values);
  // The index of a block whose 16 tokens at `pages[i]` follow each other.
  void (*make_index)(const uint8_t* const* pages, uint32_t head_dim, uint8_t* index);
};

// How much the tokens of a block are worth to the `rows` queries of a group, by their index: eight times the
// logarithm to base 2 of the largest weight that a query would give them, where `level` is the logarithm
// of what it gives to all; in [-127, 127].
struct Scan {
  const uint8_t* index;
  const uint8_t* next;    // the index that is scanned after this one: asked for meanwhile
  const float* const* q;  // [rows] as for AttnRecords
  const float* level;     // [rows]
  uint32_t rows, head_dim;
  int8_t* worth;          // [kIndexTokens]
};
inline constexpr float kWorthSteps = 8;       // worth of a token that gets twice as much
inline constexpr int8_t kNever = -128;  // the worth of what pick() does not take

struct Kernels {
  Isa isa;
  uint32_t lanes;  // rows of a tile of PackedMatrix

  // y[i][row] = sum over k of weight[row][k] * x[i][k] for the rows of tiles [begin, end) and tokens
  // i < n; y points at the first row of tile `begin` and has room for whole tiles.
  void (*matmul)(const PackedMatrix& w, uint32_t begin, uint32_t end, const QuantActs& x, uint32_t n, float* y,
                 size_t y_stride);
  // The same for F32, F16 and BF16 weights with float activations [n][cols].
  void (*matmul_float)(const PackedMatrix& w, uint32_t begin, uint32_t end, const float* x, uint32_t n, float* y,
                       size_t y_stride);
  // Quantises one token's x[cols] (cols a multiple of 32) into `out`, a view of that token, in as
  // many parts as it has.
  void (*quantize)(const float* x, const QuantActs& out);
  // y = x / rms(x) * w; y may be x. n floats.
  void (*rmsnorm)(const float* x, const float* w, float eps, uint32_t n, float* y);
  void (*add)(float* x, const float* y, uint32_t n);                     // x += y
  void (*gate_silu)(const float* gate, const float* up, uint32_t n, float* y);  // silu(gate) * up
  void (*gate_gelu)(const float* gate, const float* up, uint32_t n, float* y);  // gelu_tanh(gate) * up
  KvKernels kv[2];          // by KvType
  RecordKernels records[2];  // by KvType
  void (*from_half)(const uint8_t* halves, uint32_t n, float* out);  // n floats, a multiple of 16
  void (*scan)(const Scan& s);
  // The places of the `count` largest of n values, in order; of equals the first. There are as many
  // that are not kNever.
  void (*pick)(const int8_t* worth, uint32_t n, uint32_t count, uint32_t* places);
  // Joins the running state (max, sum, acc) of a later chunk into that of the earlier ones.
  void (*merge)(float* max, float* sum, float* acc, float max2, float sum2, const float* acc2, uint32_t head_dim);
};

const Kernels& kernels_scalar();
const Kernels& kernels_avx2();
const Kernels& kernels_avx512();
const Kernels& kernels_neon();
// The table of a level that isa_available() names.
const Kernels& kernels_for(Isa isa);

}  // namespace edgert
