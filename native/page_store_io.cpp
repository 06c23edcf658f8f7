// The threads of a PageStore. They throw nothing and allocate nothing: what goes wrong is a number, which the
// caller's thread turns into a message.
#include <algorithm>
#include <cstring>
#include <exception>

#include "checksum.h"
#include "error.h"
#include "page_store.h"

namespace edgert {
namespace {

// A request of a whole page keeps the disk busy alone; for sections of 12 KiB, 16 in flight were four times as
// fast as one.
constexpr size_t kMostThreads = 16;

}  // namespace

// Sees to it that threads work on `jobs` jobs, `most` at a time; false when there is no thread at all.
bool PageStore::wake(size_t jobs, size_t most) {
  const size_t target = std::min({jobs, most, kMostThreads});
  try {
    threads_.reserve(kMostThreads);
    const size_t largest = *std::max_element(shape_.section_bytes.begin(), shape_.section_bytes.end());
    while (threads_.size() < target)
      threads_.emplace_back([this, scratch = Buffer(largest + 2 * PageFile::kAlign, "reads of the KV cache")] {
        serve(scratch.data());
      });
  } catch (const std::exception&) {  // the system refuses: those that run do the work
  }
  for (size_t i = 0; i < target; ++i) work_.notify_one();
  return !threads_.empty();
}

void PageStore::serve(uint8_t* scratch) {
  Lock lock(mutex_);
  for (;;) {
    work_.wait(lock, [&] { return stop_ || !reads_.empty() || !batches_.empty() || may_write(); });
    if (stop_) return;
    if (!reads_.empty()) {
      const uint32_t page = reads_.front();
      reads_.erase(reads_.begin());
      read_page(page, lock);
    } else if (!batches_.empty()) {
      read_section(*batches_.front(), scratch, lock);
    } else {
      write_page(lock);
    }
  }
}

// Sections [first, last) of a page, and what the file's blocks hold around them, to `dst`; checked.
PageStore::Fault PageStore::fetch(const Page& p, uint32_t page, uint32_t first, uint32_t last, uint8_t* dst) const {
  if (read_delay_us_ > 0) std::this_thread::sleep_for(std::chrono::microseconds(read_delay_us_));
  constexpr size_t align = PageFile::kAlign;
  const size_t begin = begins_[first] / align * align;
  const size_t end = (begins_[last] + align - 1) / align * align;
  Fault fault;
  fault.error = file_.read(dst, end - begin, uint64_t(page) * stride_ + begin);
  for (uint32_t s = first; s < last && fault.error == 0; ++s) {
    const uint64_t found = checksum(dst + (begins_[s] - begin), section_bytes(s));
    if (found != p.sums[s]) fault = {Fault::kDamaged, s, p.sums[s], found};
  }
  return fault;
}

// A page that has a slot. When it cannot be read it is on the disk as before, and its slot is free.
PageStore::Fault PageStore::read_page(uint32_t page, Lock& lock) {
  Page& p = pages_[page];
  p.place = Place::Reading;
  uint8_t* const data = slot_data(p.slot);
  reading_.enter();
  lock.unlock();
  const Fault fault = fetch(p, page, 0, sections(), data);
  lock.lock();
  reading_.leave();
  stats_.bytes_read += stride_;
  ++stats_.pages_read;
  if (fault.error == 0) {
    p.place = Place::Memory;
    p.ready.store(data, std::memory_order_release);
  } else {
    ++stats_.damaged_reads;
    take_back(page, Place::Disk);
  }
  changed_.notify_all();
  return fault;
}

void PageStore::read_section(SectionReads& batch, uint8_t* scratch, Lock& lock) {
  const SectionRead& read = batch.reads_[batch.next_++];
  if (batch.next_ == batch.n_) std::erase(batches_, &batch);
  const size_t begin = begins_[read.section], bytes = section_bytes(read.section);
  const Page& p = pages_[read.page];
  if (const uint8_t* const data = p.ready.load(std::memory_order_relaxed)) {
    std::memcpy(read.dst, data + begin, bytes);  // under the lock: nobody evicts it meanwhile
    ++stats_.sections_read;
    if (batch.next_ == batch.n_ && batch.busy_ == 0) changed_.notify_all();
    return;
  }
  ++batch.busy_;
  reading_.enter();
  lock.unlock();
  Fault fault = fetch(p, read.page, read.section, read.section + 1, scratch);
  const bool again = fault.error != 0;
  if (again) fault = fetch(p, read.page, read.section, read.section + 1, scratch);
  if (fault.error == 0) std::memcpy(read.dst, scratch + begin % PageFile::kAlign, bytes);
  lock.lock();
  reading_.leave();
  --batch.busy_;
  stats_.bytes_read += bytes;
  ++stats_.sections_read;
  stats_.damaged_reads += again;
  if (fault.error != 0 && batch.fault_.error == 0) {
    batch.fault_ = fault;
    batch.bad_page_ = read.page;
  }
  if (batch.busy_ == 0) changed_.notify_all();
}

// The page sealed longest ago. When it cannot be written it stays in memory, and nothing more is written.
void PageStore::write_page(Lock& lock) {
  const uint32_t page = writes_.front();
  writes_.erase(writes_.begin());
  Page& p = pages_[page];
  p.copy = Copy::Writing;
  const uint8_t* const data = slot_data(p.slot);
  writing_ = true;
  lock.unlock();
  for (uint32_t s = 0; s < sections(); ++s) p.sums[s] = checksum(data + begins_[s], section_bytes(s));
  const int error = file_.write(data, stride_, uint64_t(page) * stride_);
  lock.lock();
  writing_ = false;
  if (error == 0) {
    p.copy = Copy::Written;
    stats_.bytes_written += stride_;
  } else {
    p.copy = Copy::Sealed;
    write_error_ = error;
    writes_.insert(writes_.begin(), page);
  }
  changed_.notify_all();
}

PageStore::SectionReads::SectionReads(PageStore& store, const SectionRead* reads, size_t n)
    : store_(store), reads_(reads), n_(n) {
  const Lock lock(store.mutex_);
  for (size_t i = 0; i < n; ++i) {
    store.at(reads[i].page);
    if (reads[i].section >= store.sections())
      throw EngineError("section " + std::to_string(reads[i].section) + " does not exist: a page has " +
                        std::to_string(store.sections()));
  }
  if (n == 0) return;
  if (!store.wake(n, kMostThreads))
    throw EngineError("the operating system refused to start a thread; end other processes");
  store.batches_.push_back(this);
}

PageStore::SectionReads::~SectionReads() {
  Lock lock(store_.mutex_);
  if (next_ < n_) std::erase(store_.batches_, this);
  next_ = n_;
  store_.changed_.wait(lock, [&] { return busy_ == 0; });
}

void PageStore::SectionReads::wait() {
  Lock lock(store_.mutex_);
  if (next_ < n_ || busy_ > 0) {
    const Waiting waiting(store_.waiting_);
    store_.changed_.wait(lock, [&] { return next_ == n_ && busy_ == 0; });
  }
  if (fault_.error != 0) throw EngineError(store_.why_bad(bad_page_, fault_));
}

}  // namespace edgert
