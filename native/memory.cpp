#include "memory.h"

#include <sys/mman.h>

#include <mutex>
#include <string>

#include "error.h"

namespace edgert {
namespace {

constexpr size_t kHuge = size_t(2) << 20;

// Small buffers stay on small pages: rounding them up to 2 MiB would be memory nobody asked for.
size_t alignment(size_t bytes) { return bytes >= kHuge ? kHuge : 4096; }

std::mutex& ledger_guard() {
  static std::mutex m;
  return m;
}
std::map<std::string, size_t>& ledger() {
  static std::map<std::string, size_t> m;
  return m;
}

}  // namespace

std::map<std::string, size_t> allocated() {
  const std::lock_guard lock(ledger_guard());
  return ledger();
}

size_t Buffer::rounded(size_t bytes) {
  const size_t align = alignment(bytes);
  return (bytes + align - 1) / align * align;
}

Buffer::Buffer(size_t bytes, const char* what) : bytes_(rounded(bytes)), what_(what) {
  if (bytes_ == 0) return;
  const size_t spare = alignment(bytes) == kHuge ? kHuge : 0;  // to cut an aligned piece out of
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
  const std::lock_guard lock(ledger_guard());
  ledger()[what] += bytes_;
}

Buffer::~Buffer() {
  if (!data_) return;
  munmap(data_, bytes_);
  const std::lock_guard lock(ledger_guard());
  const auto entry = ledger().find(what_);
  if ((entry->second -= bytes_) == 0) ledger().erase(entry);
}

}  // namespace edgert
