#include "page_store.h"

#include <algorithm>
#include <cstdio>
#include <system_error>

#include "error.h"

namespace edgert {
namespace {

// Two passes of 256 tokens may fill slots while the thread that writes starts up.
constexpr uint32_t kAhead = 32;

size_t round_up(size_t n) { return (n + PageFile::kAlign - 1) / PageFile::kAlign * PageFile::kAlign; }

PageStore::Shape checked(const PageStore::Shape& s) {
  if (s.section_bytes.empty() || std::count(s.section_bytes.begin(), s.section_bytes.end(), size_t(0)))
    throw EngineError("a page of the KV cache is cut into sections of at least 1 byte");
  if (s.slots == 0) throw EngineError("the KV cache needs memory for at least 1 page, not 0");
  return s;
}

std::vector<size_t> begins(const std::vector<size_t>& bytes) {
  std::vector<size_t> at{0};
  for (const size_t n : bytes) at.push_back(at.back() + n);
  return at;
}

std::string mib(uint64_t bytes) { return std::to_string(bytes >> 20) + " MiB"; }

}  // namespace

PageStore::PageStore(const std::string& directory, const Shape& shape, uint32_t read_delay_us)
    : shape_(checked(shape)),
      read_delay_us_(read_delay_us),
      begins_(begins(shape.section_bytes)),
      stride_(round_up(begins_.back())),
      cap_pages_(shape.disk_cap_bytes / stride_),
      ahead_(std::min(shape.slots, std::max(kAhead, shape.slots / 8))),
      file_(directory),
      slots_(shape.slots * stride_, "pages of keys and values"),
      owner_(shape.slots, kNone) {
  free_.resize(shape.slots);
  for (uint32_t i = 0; i < shape.slots; ++i) free_[i] = shape.slots - 1 - i;
  for (auto* list : {&victims_, &reads_, &writes_}) list->reserve(shape.slots);
}

size_t PageStore::slot_bytes(size_t page_bytes, uint32_t slots) { return Buffer::rounded(slots * round_up(page_bytes)); }

PageStore::~PageStore() {
  {
    const std::lock_guard lock(mutex_);
    stop_ = true;
    work_.notify_all();
  }
  for (std::thread& t : threads_) t.join();
}

PageStore::Page& PageStore::at(uint32_t page) {
  if (page < pages_.size()) return pages_[page];
  throw EngineError("page " + std::to_string(page) + " does not exist: there are " + std::to_string(pages_.size()));
}

uint8_t* PageStore::add() {
  auto sums = std::make_unique<uint64_t[]>(sections());
  Lock lock(mutex_);
  const uint32_t page = pages();
  const uint32_t slot = wait_slot(lock, page);
  Page& p = pages_.emplace_back();
  p.sums = std::move(sums);
  p.wanted.store(step_, std::memory_order_relaxed);
  give(page, slot);
  p.ready.store(slot_data(slot), std::memory_order_release);
  if (may_write()) wake(1, 1);
  return slot_data(slot);
}

void PageStore::seal(uint32_t page) {
  const Lock lock(mutex_);
  Page& p = at(page);
  if (p.copy != Copy::Open) return;
  p.copy = Copy::Sealed;
  if (page >= cap_pages_) return;
  writes_.push_back(page);
  if (may_write()) wake(1, 1);
}

uint8_t* PageStore::reopen(uint32_t page) {
  uint8_t* const data = need(page);
  Lock lock(mutex_);
  Page& p = at(page);
  changed_.wait(lock, [&] { return p.copy != Copy::Writing; });
  std::erase(writes_, page);
  p.copy = Copy::Open;
  return data;
}

void PageStore::want(const uint32_t* pages, size_t n) {
  const Lock lock(mutex_);
  for (size_t i = 0; i < n; ++i) at(pages[i]);
  ++step_;
  victims_.clear();
  for (size_t i = 0; i < n; ++i) pages_[pages[i]].wanted.store(step_, std::memory_order_relaxed);
  std::erase_if(reads_, [&](uint32_t page) {
    if (pages_[page].wanted.load(std::memory_order_relaxed) == step_) return false;
    take_back(page, Place::Disk);
    return true;
  });
  for (size_t i = 0; i < n; ++i) {
    Page& p = pages_[pages[i]];
    if (p.place != Place::Disk) continue;
    const uint32_t slot = free_slot();
    if (slot == kNone) break;  // need() will wait for one
    give(pages[i], slot);
    p.place = Place::Queued;
    reads_.push_back(pages[i]);
  }
  if (!reads_.empty()) wake(reads_.size() + 1, 4);  // one more: a thread may be writing
}

uint8_t* PageStore::need(uint32_t page) {
  Page& p = at(page);
  // A page of the present set is not evicted before the next want(), so this needs no lock.
  if (p.wanted.load(std::memory_order_relaxed) == step_)
    if (uint8_t* const data = p.ready.load(std::memory_order_acquire)) return data;
  Lock lock(mutex_);
  p.wanted.store(step_, std::memory_order_relaxed);
  if (p.place == Place::Memory) return slot_data(p.slot);
  const Waiting waiting(waiting_);
  for (int tries = 2;;) {
    if (p.place == Place::Memory) return slot_data(p.slot);
    if (p.place == Place::Reading) {
      changed_.wait(lock);
      continue;
    }
    if (p.place == Place::Queued) {
      std::erase(reads_, page);
    } else {
      const uint32_t slot = wait_slot(lock, page);
      if (p.place != Place::Disk) {  // another caller was faster
        free_.push_back(slot);
        changed_.notify_all();
        continue;
      }
      give(page, slot);
    }
    const Fault fault = read_page(page, lock);
    if (fault.error != 0 && --tries == 0) throw EngineError(why_bad(page, fault));
  }
}

uint8_t* PageStore::refill(uint32_t page) {
  const Lock lock(mutex_);
  Page& p = at(page);
  // Not as of this step: what it wants and has not got yet comes first.
  p.wanted.store(std::max(p.wanted.load(std::memory_order_relaxed), step_ - 1), std::memory_order_relaxed);
  if (p.place != Place::Disk) return nullptr;
  const uint32_t slot = free_slot();
  if (slot == kNone) return nullptr;
  give(page, slot);
  p.place = Place::Memory;
  p.ready.store(slot_data(slot), std::memory_order_release);
  return slot_data(slot);
}

void PageStore::rewind(uint32_t count) {
  Lock lock(mutex_);
  if (count >= pages_.size()) return;
  std::erase_if(reads_, [&](uint32_t page) {
    if (page >= count) take_back(page, Place::Disk);
    return page >= count;
  });
  victims_.clear();
  while (pages_.size() > count) {
    Page& p = pages_.back();
    changed_.wait(lock, [&] { return p.place != Place::Reading && p.copy != Copy::Writing; });
    if (p.place == Place::Memory) take_back(pages() - 1, Place::Disk);
    std::erase(writes_, pages() - 1);
    pages_.pop_back();
  }
  if (count == 0) file_.clear();
}

bool PageStore::evictable(uint32_t page) const {
  const Page& p = pages_[page];
  return p.place == Place::Memory && p.copy == Copy::Written && p.wanted.load(std::memory_order_relaxed) != step_;
}

void PageStore::give(uint32_t page, uint32_t slot) {
  owner_[slot] = page;
  pages_[page].slot = slot;
}

// Frees the slot of a page, which then is in `place`.
void PageStore::take_back(uint32_t page, Place place) {
  Page& p = pages_[page];
  p.ready.store(nullptr, std::memory_order_relaxed);
  p.place = place;
  owner_[p.slot] = kNone;
  free_.push_back(p.slot);
  p.slot = kNone;
}

// kNone when all slots are taken by the present set or by pages that are not written.
uint32_t PageStore::free_slot() {
  for (bool gathered = false;; gathered = true) {
    while (free_.empty() && !victims_.empty()) {
      const uint32_t page = victims_.back();
      victims_.pop_back();
      if (!evictable(page)) continue;
      take_back(page, Place::Disk);
      ++stats_.evictions;
    }
    if (!free_.empty()) {
      const uint32_t slot = free_.back();
      free_.pop_back();
      return slot;
    }
    if (gathered) return kNone;
    for (const uint32_t page : owner_)
      if (page != kNone && evictable(page)) victims_.push_back(page);
    std::sort(victims_.begin(), victims_.end(), [&](uint32_t a, uint32_t b) {
      const uint64_t of_a = pages_[a].wanted.load(std::memory_order_relaxed),
                     of_b = pages_[b].wanted.load(std::memory_order_relaxed);
      return of_a != of_b ? of_a > of_b : a > b;
    });
  }
}

// A slot for `page`, when a read or write in flight has to end for it too. Throws EngineError.
uint32_t PageStore::wait_slot(Lock& lock, uint32_t page) {
  for (bool retried = false;;) {
    const uint32_t slot = free_slot();
    if (slot != kNone) return slot;
    const bool pending = writing_ || !reads_.empty() || reading_.active > 0;
    if (!pending && !writes_.empty() && write_error_ != 0 && !retried) {
      retried = true;  // there may be room on the disk again
      write_error_ = 0;
    }
    if (!pending && (writes_.empty() || write_error_ != 0)) throw EngineError(why_full(page));
    if (!wake(1, 1)) throw EngineError("the operating system refused to start a thread; end other processes");
    const Waiting waiting(waiting_);
    changed_.wait(lock);
  }
}

std::string PageStore::why_full(uint32_t page) const {
  const std::string text = "no memory is left for page " + std::to_string(page) + " of the KV cache: ";
  const std::string of = "all " + std::to_string(shape_.slots) + " that memory holds ";
  if (write_error_ != 0)
    return text + of + "are taken, and the file in " + file_.directory() + " cannot be written: " +
           std::generic_category().message(write_error_) +
           "; free space there, choose another directory, or allow more memory";
  const bool capped = std::any_of(owner_.begin(), owner_.end(), [&](uint32_t p) {
    return p != kNone && p >= cap_pages_ && pages_[p].copy == Copy::Sealed;
  });
  if (capped)
    return text + of + "are taken, and the file in " + file_.directory() + " may not outgrow " +
           mib(shape_.disk_cap_bytes) + "; raise that limit, allow more memory, or shorten the context";
  return text + of + "belong to the set of this step; choose fewer pages, or allow more memory";
}

std::string PageStore::why_bad(uint32_t page, const Fault& fault) const {
  std::string text = "page " + std::to_string(page) + " of the KV cache cannot be read from its file in " +
                     file_.directory() + ": ";
  if (fault.error == Fault::kDamaged) {
    char sums[96];
    std::snprintf(sums, sizeof(sums), "expected checksum %016llx, found %016llx",
                  static_cast<unsigned long long>(fault.expected), static_cast<unsigned long long>(fault.found));
    text += "section " + std::to_string(fault.section) + " is damaged, " + sums;
  } else if (fault.error == PageFile::kEndsEarly) {
    text += "the file was cut short";
  } else {
    text += std::generic_category().message(fault.error);
  }
  return text + "; check the disk, choose a directory on another one, or allow more memory";
}

PageStore::Stats PageStore::stats() const {
  const Lock lock(mutex_);
  Stats s = stats_;
  s.read_seconds = reading_.seconds;
  s.waited_seconds = waiting_.seconds;
  return s;
}

std::string PageStore::failed() const {
  const Lock lock(mutex_);
  return write_error_ == 0 ? "" : "the KV cache's file in " + file_.directory() + " cannot be written: " +
                                      std::generic_category().message(write_error_);
}

}  // namespace edgert
