// Reads the header of a GGUF file in large chunks, checks every length against the file before
// anything is allocated for it, and knows the name of what is being read when it must complain.
#pragma once
#include <algorithm>
#include <cstdint>
#include <cstring>
#include <limits>
#include <string>
#include <string_view>
#include <vector>

#include "disk_file.h"

namespace edgert {

class GgufReader {
 public:
  explicit GgufReader(const DiskFile& file);

  const std::string& path() const { return file_.path(); }
  uint64_t offset() const { return base_ + pos_; }
  uint64_t remaining() const { return limit_ - offset(); }

  // What is being read, for errors: `subject` is a key or tensor, `part` a detail of it.
  std::string subject;
  const char* part = "";
  static constexpr uint64_t kNoIndex = std::numeric_limits<uint64_t>::max();
  uint64_t index = kNoIndex;  // position in an array

  // The next `n` bytes, n <= kChunk, valid until the next call.
  const uint8_t* take(size_t n) {
    if (len_ - pos_ < n) refill(n);
    const uint8_t* p = buf_.data() + pos_;
    pos_ += n;
    return p;
  }
  template <class T>
  T number() {
    T v;
    std::memcpy(&v, take(sizeof v), sizeof v);
    return v;
  }
  // A length and that many bytes.
  std::string string();
  // Throws unless `count` items of at least `size` bytes can follow.
  void expect(uint64_t count, uint64_t size);

  [[noreturn]] void fail(const std::string& what) const { fail_at(offset(), what); }
  [[noreturn]] void fail_at(uint64_t offset, const std::string& what) const;

  static constexpr size_t kChunk = size_t{256} << 10;

 private:
  void refill(size_t n);
  [[noreturn]] void fail_short(uint64_t needed, bool at_least) const;
  std::string field() const;

  const DiskFile& file_;
  uint64_t limit_;      // first byte that may not belong to the header
  uint64_t base_ = 0;   // offset in the file of buf_[0]
  size_t pos_ = 0, len_ = 0;
  std::vector<uint8_t> buf_;
};

}  // namespace edgert
