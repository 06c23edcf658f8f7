// How fast this machine reads memory: the ceiling that decode speed is compared with.
#pragma once

namespace edgert {

// Bytes per second that `threads` threads read together from a buffer much larger than the last-level
// cache, summed over about `seconds` of wall time. Allocates 256 MiB (less when the machine has less
// than 1 GiB of memory left) and frees it. Throws EngineError for threads < 1 or > 1024, for seconds
// not in (0, 60], or when the buffer cannot be had.
double probe_read_bandwidth(int threads, double seconds);

}  // namespace edgert
