// What this machine can do, measured: the ceilings that a model's speed is compared with and planned by.
// All throw EngineError for threads < 1 or > 1024, for seconds not in (0, 60], and when memory or threads
// cannot be had. Each takes about `seconds` of wall time and leaves nothing behind.
#pragma once
#include "kernels.h"

#include <cstdint>
#include <string>

namespace edgert {

// Bytes per second that `threads` threads read together from a buffer much larger than the last-level
// cache. Allocates 256 MiB (less when the machine has less than 1 GiB of memory left).
double probe_read_bandwidth(int threads, double seconds);

// Weights per second that `threads` threads together multiply with `tokens` tokens (1 to 256) at once by
// the kernel of the selected ISA level. Each thread has a matrix of about 128 KiB of its own, which stays
// in its core's L2. `type` is that of a GGUF tensor, as "Q4_0".
double probe_matmul(const std::string& type, int tokens, int threads, double seconds);

// Query heads times positions per second that `threads` threads together attend to, one token in a full
// chunk of keys and values of `type` that `group` (1 to 64) query heads of `head_dim` share.
double probe_attend(KvType type, int head_dim, int group, int threads, double seconds);

struct DiskRate {
  double bytes_per_second;
  bool direct;  // read past the page cache; else each read had its pages dropped before
};

// Random reads of `request_bytes` (a multiple of 4096 up to 16 MiB), `depth` (1 to 64) of them in flight,
// from the file at `path`. Throws EngineError as well for a file that cannot be read, that holds less than a
// request, or that lies in memory.
DiskRate probe_disk(const std::string& path, int64_t request_bytes, int depth, double seconds);

}  // namespace edgert
