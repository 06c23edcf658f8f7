// Pages of one size, numbered from 0: as many as there are slots lie in memory, the rest in a file (page_file.h).
//
// A page is added at the end, filled by the caller, and sealed. Sealed pages are written behind by a thread,
// from the moment when free slots run short: what fits into memory never touches the disk. A page whose copy is
// written may give its slot to another. want() names the pages of the coming step: those that are not in memory are
// read in the background, several at once, into the slots of the pages outside that set which were wanted
// longest ago (the lowest number first among equals). need() gives a page or waits for it, so what a caller
// computes depends on the pages it asks for and never on which of them arrived in time.
//
// A page is cut into sections, each with a checksum that stays in memory: so a page from the disk is
// found to be damaged, stale or another one, and a section can be read alone. The table is the truth; the file has
// no header and means nothing to any other process.
//
// Pages that cannot be written (the disk is full, the cap is reached) keep their slots, and nothing is lost until
// add() or need() finds no slot at all and throws.
//
// Threads: need(), resident() and SectionReads may be used by several at once. Everything else belongs to the
// one that owns the sequence and excludes all of these.
#pragma once
#include <atomic>
#include <chrono>
#include <condition_variable>
#include <cstddef>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "memory.h"
#include "page_file.h"

namespace edgert {

class PageStore {
 public:
  struct Shape {
    std::vector<size_t> section_bytes;  // of the sections of a page
    uint32_t slots;           // pages in memory
    uint64_t disk_cap_bytes;  // the most that the file may take
  };
  struct Stats {
    uint64_t bytes_read = 0, bytes_written = 0, pages_read = 0, sections_read = 0, evictions = 0;
    uint64_t damaged_reads = 0;  // that failed or had a wrong checksum, whether or not another try succeeded
    double read_seconds = 0;     // during which at least one read was in flight
    double waited_seconds = 0;   // of these and others, in which at least one caller waited
  };

  // What is wrong with a read: 0, an errno, PageFile::kEndsEarly or kDamaged.
  struct Fault {
    static constexpr int kDamaged = -2;
    int error = 0;
    uint32_t section = 0;
    uint64_t expected = 0, found = 0;
  };

  // Makes the file. `read_delay_us` makes every read slower, for tests. Throws EngineError.
  PageStore(const std::string& directory, const Shape& shape, uint32_t read_delay_us = 0);
  // Waits for the reads and writes in flight and forgets the others.
  ~PageStore();
  PageStore(const PageStore&) = delete;
  PageStore& operator=(const PageStore&) = delete;

  const Shape& shape() const { return shape_; }
  const PageFile& file() const { return file_; }
  uint32_t sections() const { return static_cast<uint32_t>(begins_.size() - 1); }
  size_t begin_of(uint32_t section) const { return begins_[section]; }  // in a page; that of sections() is its end
  size_t section_bytes(uint32_t section) const { return begins_[section + 1] - begins_[section]; }
  size_t page_bytes() const { return begins_.back(); }
  uint32_t pages() const { return static_cast<uint32_t>(pages_.size()); }
  // What slots take of memory when all are in use; the table takes 8 bytes more for each section of each page.
  size_t bytes() const { return slots_.bytes(); }
  static size_t slot_bytes(size_t page_bytes, uint32_t slots);  // what bytes() will be

  // Memory of page number pages(), now the last; what is in it is undefined. May wait for a page to be written.
  // It is open and in the present set. Throws EngineError when no slot can be freed; nothing has changed then.
  uint8_t* add();
  // The page is complete: it will not be changed without reopen().
  void seal(uint32_t page);
  // The page will be changed: it is brought to memory, and stays there until it is sealed again.
  uint8_t* reopen(uint32_t page);
  // The set of the coming step. Never waits for the disk. Pointers of earlier sets end here, but for open pages.
  // What is in the set, or needed after this call, keeps its slot until the next one.
  void want(const uint32_t* pages, size_t n);
  // nullptr when the page is not in memory (yet).
  uint8_t* resident(uint32_t page) const { return at(page).ready.load(std::memory_order_acquire); }
  // Throws EngineError when the page cannot be read, is damaged (after a second try), or when a set with
  // it needs more slots than there are.
  uint8_t* need(uint32_t page);
  // A slot of a sealed page that is not in memory, for a caller who has what the page holds and fills it at once, to the
  // same bytes; nullptr when the page is in memory or on its way, or no slot can be freed. It counts as wanted lately, and
  // may give its slot to another before the next want().
  uint8_t* refill(uint32_t page);
  // Forgets the pages from `count` on.
  void rewind(uint32_t count);

  struct SectionRead {
    uint32_t page, section;
    uint8_t* dst;  // section_bytes(section) bytes
  };
  // Sections read past the slots, many in flight, from pages that are not open. `reads` outlives it. Started at once.
  class SectionReads {
   public:
    SectionReads(PageStore& store, const SectionRead* reads, size_t n);
    ~SectionReads();
    SectionReads(const SectionReads&) = delete;
    SectionReads& operator=(const SectionReads&) = delete;
    void wait();  // until all are in place. Throws EngineError for the first that cannot be read or is damaged

   private:
    friend class PageStore;
    PageStore& store_;
    const SectionRead* reads_;
    size_t n_, next_ = 0, busy_ = 0;
    uint32_t bad_page_ = 0;
    Fault fault_;
  };

  Stats stats() const;
  // Why pages are not written at present; empty when they are. Tried again when add() or need() wants a slot.
  std::string failed() const;

 private:
  using Lock = std::unique_lock<std::mutex>;
  using Clock = std::chrono::steady_clock;
  static constexpr uint32_t kNone = UINT32_MAX;
  enum class Place : uint8_t { Disk, Queued, Reading, Memory };
  enum class Copy : uint8_t { Open, Sealed, Writing, Written };  // how far the page is on its way to the file
  struct Page {
    std::atomic<uint8_t*> ready{nullptr};  // its slot while Memory
    std::atomic<uint64_t> wanted{0};       // the step that wanted, needed or added it last
    uint32_t slot = kNone;                 // unless Disk
    Place place = Place::Memory;
    Copy copy = Copy::Open;
    std::unique_ptr<uint64_t[]> sums;  // [sections] of what is written. While a page is Reading or Writing that
  };                                   // thread alone touches them and the slot, without the lock
  struct Meter {                       // time during which anyone is in it
    uint32_t active = 0;
    double seconds = 0;
    Clock::time_point since;
    void enter() {
      if (active++ == 0) since = Clock::now();
    }
    void leave() {
      if (--active == 0) seconds += std::chrono::duration<double>(Clock::now() - since).count();
    }
  };
  struct Waiting {
    explicit Waiting(Meter& meter) : meter(meter) { meter.enter(); }
    ~Waiting() { meter.leave(); }
    Meter& meter;
  };

  Page& at(uint32_t page);
  const Page& at(uint32_t page) const { return const_cast<PageStore*>(this)->at(page); }
  uint8_t* slot_data(uint32_t slot) const { return slots_.data() + size_t(slot) * stride_; }
  bool evictable(uint32_t page) const;
  bool may_write() const {
    return !writes_.empty() && !writing_ && write_error_ == 0 && free_.size() < ahead_;
  }
  void give(uint32_t page, uint32_t slot);
  void take_back(uint32_t page, Place place);
  uint32_t free_slot();
  uint32_t wait_slot(Lock& lock, uint32_t page);
  std::string why_full(uint32_t page) const;
  std::string why_bad(uint32_t page, const Fault& fault) const;

  bool wake(size_t jobs, size_t most);
  void serve(uint8_t* scratch);
  Fault fetch(const Page& p, uint32_t page, uint32_t first, uint32_t last, uint8_t* dst) const;
  Fault read_page(uint32_t page, Lock& lock);
  void read_section(SectionReads& batch, uint8_t* scratch, Lock& lock);
  void write_page(Lock& lock);

  const Shape shape_;
  const uint32_t read_delay_us_;
  const std::vector<size_t> begins_;     // [sections + 1]
  const size_t stride_;                  // from page to page, in memory and in the file
  const uint64_t cap_pages_;             // that fit into the file
  const uint32_t ahead_;                 // free slots below which pages are written
  PageFile file_;
  Buffer slots_;

  mutable std::mutex mutex_;  // of everything below
  std::condition_variable work_, changed_;
  std::deque<Page> pages_;  // references stay valid while pages are added
  std::vector<uint32_t> owner_;    // slot -> its page
  std::vector<uint32_t> free_;     // slots
  std::vector<uint32_t> victims_;  // pages that were evictable, the next one last
  std::vector<uint32_t> reads_;    // Queued, in order
  std::vector<uint32_t> writes_;   // Sealed and below the cap, in order
  std::vector<SectionReads*> batches_;  // with sections not yet begun
  uint64_t step_ = 1;
  bool writing_ = false, stop_ = false;
  int write_error_ = 0;
  Meter reading_, waiting_;
  Stats stats_;
  std::vector<std::thread> threads_;  // started with the first work for them
};

}  // namespace edgert
