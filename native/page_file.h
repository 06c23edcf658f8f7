// The file of a PageStore: it has no name.
//
// It is created in the directory, locked to its user (0600), and unlinked before anything is written to it. So
// the system frees it when the process ends, however it ends; nobody can delete, open or confuse it by
// name; and two stores share a directory without knowing of each other. What a process that is killed
// between the two calls leaves is an empty file, which the next store of the same user in that directory removes:
// nothing that holds a byte is ever deleted.
//
// Reads and writes go past the system's page cache: what was evicted from memory must not fill it again.
#pragma once
#include <cstddef>
#include <cstdint>
#include <string>

namespace edgert {

class PageFile {
 public:
  static constexpr size_t kAlign = 4096;  // of memory, place and size of every read and write
  static constexpr int kEndsEarly = -1;

  // Makes the directory when it is missing. Throws EngineError.
  explicit PageFile(const std::string& directory);
  ~PageFile();
  PageFile(const PageFile&) = delete;
  PageFile& operator=(const PageFile&) = delete;

  const std::string& directory() const { return directory_; }
  bool direct() const { return direct_; }  // false: the file system has no O_DIRECT
  bool in_memory() const;                  // the directory lies on no disk (tmpfs)

  // From any thread. 0 or the errno; read() gives kEndsEarly where the file is too short.
  int write(const uint8_t* src, size_t n, uint64_t at) const;
  int read(uint8_t* dst, size_t n, uint64_t at) const;
  void clear() const;  // gives the space back to the disk

 private:
  std::string directory_;
  int fd_ = -1;
  bool direct_ = false;
};

}  // namespace edgert
