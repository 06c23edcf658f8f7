#include "memory.h"

#include <sys/mman.h>

#include <string>

#include "error.h"

namespace edgert {

Buffer::Buffer(size_t bytes, const char* what) {
  constexpr size_t kHuge = size_t(2) << 20;
  // Small buffers stay on small pages: rounding them up to 2 MiB would be memory nobody asked for.
  const size_t align = bytes >= 2 * kHuge ? kHuge : 4096;
  bytes_ = (bytes + align - 1) / align * align;
  if (bytes_ == 0) return;
  const size_t spare = align == kHuge ? kHuge : 0;  // to cut an aligned piece out of
  void* p = mmap(nullptr, bytes_ + spare, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS, -1, 0);
  if (p == MAP_FAILED)
    throw EngineError("cannot allocate " + std::to_string(bytes_ >> 20) + " MiB for " + what +
                      ": free memory, choose a smaller model, or a shorter context");
  data_ = static_cast<uint8_t*>(p);
  if (spare) {
    const size_t head = (kHuge - reinterpret_cast<uintptr_t>(p) % kHuge) % kHuge;
    if (head) munmap(data_, head);
    data_ += head;
    if (spare > head) munmap(data_ + bytes_, spare - head);
#ifdef MADV_HUGEPAGE
    madvise(data_, bytes_, MADV_HUGEPAGE);
#endif
  }
}

Buffer::~Buffer() {
  if (data_) munmap(data_, bytes_);
}

}  // namespace edgert
