#include "disk_file.h"

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <system_error>

#include "error.h"

namespace edgert {
namespace {

static_assert(sizeof(off_t) == 8, "model files are larger than 2 GiB");

std::string reason(int error) { return std::generic_category().message(error); }

}  // namespace

DiskFile::DiskFile(const std::string& path) : path_(path) {
  const auto fail = [&](const std::string& what) { throw ModelFileError(path, -1, "file", path + ": " + what); };
  // O_NONBLOCK: opening a named pipe must not wait for a writer.
  fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
  if (fd_ < 0) {
    const int error = errno;
    if (error == ENOENT) fail("no such file; check the path");
    fail("cannot be opened: " + reason(error));
  }
  struct stat st;
  const int error = ::fstat(fd_, &st) != 0 ? errno : 0;
  if (error == 0 && S_ISREG(st.st_mode)) {
    size_ = static_cast<uint64_t>(st.st_size);
    return;
  }
  ::close(fd_);  // the destructor does not run for an object whose constructor throws
  if (error != 0) fail("cannot be examined: " + reason(error));
  fail(S_ISDIR(st.st_mode) ? "is a directory; expected the path of a .gguf file in it"
                           : "is not a regular file; expected a .gguf file");
}

DiskFile::~DiskFile() { ::close(fd_); }

void DiskFile::read(uint64_t offset, void* dst, size_t n, const std::string& field) const {
  constexpr size_t kMost = size_t{1} << 30;  // Linux moves less than 2 GiB in a call
  auto* out = static_cast<char*>(dst);
  while (n > 0) {
    const ssize_t got = ::pread(fd_, out, std::min(n, kMost), static_cast<off_t>(offset));
    if (got < 0) {
      if (errno == EINTR) continue;
      throw ModelFileError(path_, static_cast<int64_t>(offset), field,
                           path_ + ": reading " + field + " at byte " + std::to_string(offset) +
                               " failed: " + reason(errno));
    }
    if (got == 0)
      throw ModelFileError(path_, static_cast<int64_t>(offset), field,
                           path_ + ": the file became shorter while in use: it had " + std::to_string(size_) +
                               " bytes when it was opened and now ends at byte " + std::to_string(offset) +
                               ", inside " + field);
    out += got;
    offset += static_cast<uint64_t>(got);
    n -= static_cast<size_t>(got);
  }
}

void DiskFile::prefetch(uint64_t offset, uint64_t n) const {
#ifdef POSIX_FADV_WILLNEED
  ::posix_fadvise(fd_, static_cast<off_t>(offset), static_cast<off_t>(n), POSIX_FADV_WILLNEED);
#else
  static_cast<void>(offset), static_cast<void>(n);
#endif
}

}  // namespace edgert
