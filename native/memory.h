// Large buffers straight from the OS: zeroed, page aligned, huge pages asked for. They grow the
// process only where they are touched and go back to the OS when freed.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <string>
#include <utility>

namespace edgert {

class Buffer {
 public:
  Buffer() = default;
  // Throws EngineError naming `what` when the OS refuses.
  Buffer(size_t bytes, const char* what);
  // What a buffer of `bytes` takes from the OS.
  static size_t rounded(size_t bytes);
  ~Buffer();
  Buffer(Buffer&& o) noexcept
      : data_(std::exchange(o.data_, nullptr)), bytes_(std::exchange(o.bytes_, 0)), what_(o.what_) {}
  Buffer& operator=(Buffer&& o) noexcept {
    std::swap(data_, o.data_);
    std::swap(bytes_, o.bytes_);
    std::swap(what_, o.what_);
    return *this;
  }
  uint8_t* data() const { return data_; }
  size_t bytes() const { return bytes_; }

 private:
  uint8_t* data_ = nullptr;
  size_t bytes_ = 0;
  const char* what_ = "";
};

// Bytes of all living buffers by what they are for.
std::map<std::string, size_t> allocated();

// Hands out 64-byte aligned parts of one Buffer. A default-made Arena hands out nothing and counts:
// the same code first measures and then takes.
class Arena {
 public:
  Arena() = default;
  Arena(size_t bytes, const char* what) : buffer_(bytes, what) {}
  template <class T>
  T* take(size_t count) {
    T* p = buffer_.data() ? reinterpret_cast<T*>(buffer_.data() + used_) : nullptr;
    used_ += (count * sizeof(T) + 63) / 64 * 64;
    return p;
  }
  size_t used() const { return used_; }
  size_t bytes() const { return buffer_.bytes(); }

 private:
  Buffer buffer_;
  size_t used_ = 0;
};

}  // namespace edgert
