#include "probe.h"

#include <sys/mman.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstring>
#include <string>

#include "error.h"
#include "probe_threads.h"

namespace edgert {
namespace {

constexpr size_t kHugePage = size_t{2} << 20;
constexpr size_t kChunk = size_t{1} << 20;  // read between two looks at the clock

// Anonymous zeroed memory on huge pages where the OS grants them; 4 KiB pages would measure the TLB.
class Buffer {
 public:
  explicit Buffer(size_t bytes) : bytes_(bytes) {
    data_ = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
    if (data_ == MAP_FAILED)
      throw EngineError("the bandwidth probe needs " + std::to_string(bytes >> 20) +
                        " MiB of memory and could not get them; free some memory and try again");
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes, MADV_HUGEPAGE);
#endif
  }
  ~Buffer() { munmap(data_, bytes_); }
  Buffer(const Buffer&) = delete;
  Buffer& operator=(const Buffer&) = delete;
  char* data() const { return static_cast<char*>(data_); }

 private:
  void* data_;
  size_t bytes_;
};

size_t buffer_bytes() {
  size_t bytes = size_t{256} << 20;
  const long pages = sysconf(_SC_AVPHYS_PAGES), page = sysconf(_SC_PAGESIZE);
  if (pages > 0 && page > 0)
    bytes = std::min(bytes, static_cast<size_t>(pages) * static_cast<size_t>(page) / 4);
  return std::max(bytes / kHugePage, size_t{16}) * kHugePage;
}

// Sum of `n` bytes as 64-bit words. Sixteen vectors of 16 bytes in eight independent accumulators keep
// enough loads in flight; every x86-64 and AArch64 has 16-byte vectors, so no ISA flag is needed, and a
// core's share of memory bandwidth is below what these loads can ask for.
uint64_t read_sum(const char* p, size_t n) {
  typedef uint64_t Vec __attribute__((vector_size(16)));
  Vec acc[8] = {};
  for (size_t i = 0; i < n; i += 256)
    for (int v = 0; v < 16; ++v) {
      Vec x;
      std::memcpy(&x, p + i + static_cast<size_t>(v) * 16, 16);
      acc[v & 7] += x;
    }
  Vec total = acc[0];
  for (int v = 1; v < 8; ++v) total += acc[v];
  return total[0] + total[1];
}

}  // namespace

double probe_read_bandwidth(int threads, double seconds) {
  check_probe("bandwidth", threads, seconds);
  const size_t bytes = buffer_bytes();
  Buffer buffer(bytes);
  const size_t slice = bytes / static_cast<size_t>(threads) / kChunk * kChunk;
  if (slice == 0)
    throw EngineError("the bandwidth probe has " + std::to_string(bytes >> 20) + " MiB to read, too few for " +
                      std::to_string(threads) + " threads");

  std::atomic<uint64_t> sink{0};  // or the compiler would read nothing
  return work_rate(threads, seconds, [&](int index) {
    char* const begin = buffer.data() + static_cast<size_t>(index) * slice;
    std::memset(begin, index + 1, slice);  // every page is real and local to this thread's node
    return [begin, slice, at = size_t{0}, &sink]() mutable {
      sink.fetch_add(read_sum(begin + at, kChunk), std::memory_order_relaxed);
      at = at + kChunk == slice ? 0 : at + kChunk;
      return static_cast<double>(kChunk);
    };
  });
}

}  // namespace edgert
