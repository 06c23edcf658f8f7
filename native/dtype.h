// Tensor element types of GGUF files: names, block sizes and the scalar dequantisation that is
// the oracle for every packed kernel.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace edgert {

// Values are the type ids written in GGUF files.
enum class DType : uint32_t {
  F32 = 0, F16 = 1, Q4_0 = 2, Q4_1 = 3, Q5_0 = 6, Q5_1 = 7, Q8_0 = 8, Q2_K = 10, Q3_K = 11,
  Q4_K = 12, Q5_K = 13, Q6_K = 14, IQ4_NL = 20, IQ4_XS = 23, BF16 = 30, MXFP4 = 39,
};

struct DTypeInfo {
  DType type;
  const char* name;
  uint32_t block;  // elements in a block
  uint32_t bytes;  // bytes in a block
};

// Row of the type table, or nullptr for a type the core does not know.
const DTypeInfo* dtype_info(uint32_t type_id);
inline const DTypeInfo& dtype_info(DType t) { return *dtype_info(static_cast<uint32_t>(t)); }

// "F32, F16, Q4_0, ...", for messages.
std::string dtype_names();

// Dequantise `n` elements (a multiple of the block size) from `src` into `dst`. Bit for bit what
// the `gguf` Python package computes. `src` needs no alignment.
void dequantize(DType type, const void* src, float* dst, size_t n);

}  // namespace edgert
