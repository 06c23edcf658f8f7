// A file opened for reading at any position from any thread. Reading uses pread and not a mapping:
// a file that shrinks under a mapping kills the process with SIGBUS, here it is an exception.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace edgert {

class DiskFile {
 public:
  // Throws ModelFileError unless `path` is a regular file that can be read.
  explicit DiskFile(const std::string& path);
  ~DiskFile();
  DiskFile(const DiskFile&) = delete;
  DiskFile& operator=(const DiskFile&) = delete;

  const std::string& path() const { return path_; }
  uint64_t size() const { return size_; }  // bytes, when it was opened

  // Reads all `n` bytes from `offset` on or throws ModelFileError; `field` is named in the error.
  void read(uint64_t offset, void* dst, size_t n, const std::string& field) const;
  // Asks the OS to bring a range into its cache in the background.
  void prefetch(uint64_t offset, uint64_t n) const;

 private:
  std::string path_;
  uint64_t size_ = 0;
  int fd_ = -1;
};

}  // namespace edgert
