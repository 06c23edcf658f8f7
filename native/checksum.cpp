#include "checksum.h"

#include <bit>
#include <cstring>

namespace edgert {
namespace {

// 8 lanes hide the latency of a multiplication. The constants are odd and without a pattern (pi and e).
constexpr size_t kLanes = 8;
constexpr uint64_t kFactor = 0x243F6A8885A308D3, kStart = 0xB7E151628AED2A6B;

// One to one in either argument while the other is fixed. The rotation brings the high bits down, where a
// multiplication spreads them again.
inline uint64_t mix(uint64_t state, uint64_t word) { return std::rotl((state ^ word) * kFactor, 29); }

inline void mix_block(uint64_t (&lanes)[kLanes], const uint8_t* data) {
  uint64_t words[kLanes];
  std::memcpy(words, data, sizeof(words));
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = mix(lanes[i], words[i]);
}

}  // namespace

uint64_t checksum(const uint8_t* data, size_t n) {
  uint64_t lanes[kLanes];
  for (size_t i = 0; i < kLanes; ++i) lanes[i] = kStart * (i + 1);
  size_t at = 0;
  for (; at + sizeof(lanes) <= n; at += sizeof(lanes)) mix_block(lanes, data + at);
  if (at < n) {
    uint8_t rest[sizeof(lanes)] = {};
    std::memcpy(rest, data + at, n - at);
    mix_block(lanes, rest);
  }
  uint64_t sum = n;
  for (const uint64_t lane : lanes) sum = mix(sum, lane);
  return sum ^ (sum >> 32);
}

}  // namespace edgert
