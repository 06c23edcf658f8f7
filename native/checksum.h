// A fast 64-bit checksum against damage, not against intent.
#pragma once
#include <cstddef>
#include <cstdint>

namespace edgert {

// Of any `n` bytes. A change within 8 aligned bytes is always seen, any other with odds of 2^64 to 1.
uint64_t checksum(const uint8_t* data, size_t n);

}  // namespace edgert
