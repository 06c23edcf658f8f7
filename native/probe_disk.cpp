#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <random>
#include <string>

#ifdef __linux__
#include <linux/magic.h>
#include <sys/vfs.h>
#endif

#include "memory.h"
#include "probe.h"
#include "probe_threads.h"

namespace edgert {
namespace {

[[noreturn]] void fail(const std::string& path, const std::string& what) {
  throw EngineError("the disk probe cannot read " + path + ": " + what);
}

// The file without the page cache where the file system can do that.
class File {
 public:
  explicit File(const std::string& path) : path_(path) {
#ifdef O_DIRECT
    fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC | O_DIRECT);
    direct_ = fd_ >= 0;
#endif
    if (fd_ < 0) fd_ = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    if (fd_ < 0) fail(path, std::strerror(errno));
#ifdef F_NOCACHE
    direct_ = fcntl(fd_, F_NOCACHE, 1) == 0;
#endif
#ifdef POSIX_FADV_RANDOM
    posix_fadvise(fd_, 0, 0, POSIX_FADV_RANDOM);  // no reading ahead
#endif
  }
  ~File() { close(fd_); }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  bool direct() const { return direct_; }

  bool in_memory() const {
#ifdef __linux__
    struct statfs system;
    return fstatfs(fd_, &system) == 0 && (system.f_type == TMPFS_MAGIC || system.f_type == RAMFS_MAGIC);
#else
    return false;
#endif
  }

  int64_t size() const {
    struct stat status;
    return fstat(fd_, &status) == 0 ? int64_t{status.st_size} : 0;
  }

  void read(void* into, size_t n, int64_t at) const {
#ifdef POSIX_FADV_DONTNEED
    if (!direct_) posix_fadvise(fd_, at, static_cast<off_t>(n), POSIX_FADV_DONTNEED);
#endif
    const ssize_t got = pread(fd_, into, n, at);
    if (got < 0) fail(path_, std::strerror(errno));
    if (static_cast<size_t>(got) != n) fail(path_, "it ends early");
  }

 private:
  std::string path_;
  int fd_ = -1;
  bool direct_ = false;
};

}  // namespace

DiskRate probe_disk(const std::string& path, int64_t request_bytes, int depth, double seconds) {
  check_probe("disk", 1, seconds);
  if (request_bytes < 4096 || request_bytes % 4096 != 0 || request_bytes > (int64_t{16} << 20))
    throw EngineError("a request of the disk probe must be a multiple of 4096 bytes up to 16 MiB, not " +
                      std::to_string(request_bytes));
  if (depth < 1 || depth > 64)
    throw EngineError("the disk probe takes 1 to 64 requests in flight, not " + std::to_string(depth));
  const File file(path);
  if (file.in_memory()) fail(path, "it lies in memory (tmpfs), not on a disk");
  const int64_t places = file.size() / request_bytes;
  if (places == 0) fail(path, "it holds less than one request of " + std::to_string(request_bytes) + " bytes");

  const double rate = work_rate(depth, seconds, [&](int index) {
    const auto n = static_cast<size_t>(request_bytes);
    return [&file, n, buffer = Buffer(n, "the disk probe"), rng = std::mt19937(static_cast<uint32_t>(index)),
            place = std::uniform_int_distribution<int64_t>(0, places - 1)]() mutable {
      file.read(buffer.data(), n, place(rng) * static_cast<int64_t>(n));
      return static_cast<double>(n);
    };
  });
  return {rate, file.direct()};
}

}  // namespace edgert
