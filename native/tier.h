// The pages of a KvCache that need not fit into memory, and which of them a decode step may read.
//
// One set of pages serves all layers and heads of a step, so that a page is one large read. Inside the set
// the index chooses for each KV head (sparse.h). What a page is worth is the sum over all heads and
// layers of the share they would give its best token, as the scan of the index, itself in memory for all pages,
// says at every step; it fades with time. With a retrieval head (retrieval.h) it is also what the queries of the coming
// step, as predicted, would give. The set is chosen before a step runs. Pages that enter are read while its first
// layers run, which may not choose from them; the later ones may. So what a layer may read depends on the tokens alone,
// never on the speed of a disk.
//
// Where what a step sees is chosen elsewhere (slot_store.h) there is no set: pages come when they are asked for, and those
// that were asked for longest ago leave.
//
// Always in memory are the first page and those behind the index. A pass over several tokens reads every page, layer
// by layer: those that are not in memory go through two buffers.
#pragma once
#include <cstdint>
#include <exception>
#include <optional>
#include <string>
#include <vector>

#include "memory.h"
#include "page_store.h"

namespace edgert {

struct TierShape {
  uint32_t slots = 0;  // pages in memory; 0: all are, and there is no file
  std::string directory;
  uint64_t disk_bytes = UINT64_MAX;  // the most that the file may take
  uint32_t read_delay_us = 0;        // for tests
  bool set = true;  // false: what a step sees is chosen elsewhere, and in memory is what was asked for last
};

class Tier {
 public:
  static constexpr uint32_t kBufferPages = 64;

  // Pages of layers of `section_bytes` each. Throws EngineError when the slots are fewer than
  // least_slots(), and what PageStore throws.
  Tier(const TierShape& shape, const std::vector<size_t>& section_bytes, uint32_t budget);

  // The fewest pages in memory with which a step can choose `budget` tokens.
  static uint32_t least_slots(uint32_t budget);
  // Bytes of memory for `slots` pages of which there are `pages` in all.
  static size_t bytes(const std::vector<size_t>& section_bytes, uint32_t slots, uint32_t pages);
  size_t bytes() const { return bytes(store_.shape().section_bytes, store_.shape().slots, store_.pages()); }

  // Before a pass that ends with `pages` pages; `sparse`: it reads of the set alone, which is chosen now.
  // `predicted`: what pages with an index will be worth to the pass, or nullptr. What is resident() stays it
  // until end() or rewind(). Throws EngineError; the pages that were there are unchanged then.
  void begin(uint32_t pages, bool sparse, const float* predicted);
  // Waits for the pages that begin() let enter the set; from now on they are readable(). Returns whether
  // there were any. From one thread, in a pass. What goes wrong is kept for check().
  bool enter();
  // After it, when `indexed` pages have an index. `worth` is what each was to a KV head, [heads][stride].
  void end(uint32_t indexed, bool sparse, const float* worth, uint32_t heads, uint32_t stride);
  // Keeps `pages` pages, of which `indexed` have an index. Throws EngineError, nothing has changed then.
  void rewind(uint32_t pages, uint32_t indexed);

  void need_first() { store_.need(0); }  // the first page, between two passes. Throws EngineError
  uint8_t* resident(uint32_t page) const { return store_.resident(page); }
  bool readable(uint32_t page) const { return readable_[page]; }  // by a step, of those with an index
  bool all_resident() const { return all_resident_; }             // in the present pass
  bool chooses() const { return sealed_ > capacity_ + 1; }        // not all pages with an index may be in the set

  // Starts to read layer `section` of the pages [first, first + count) that are not in memory into buffer
  // `half` (0 or 1), and waits for it. From one thread. What goes wrong is kept for check().
  void stream(uint32_t half, uint32_t section, uint32_t first, uint32_t count);
  void arrive(uint32_t half);
  void check();  // throws it
  const uint8_t* section(uint32_t page, uint32_t section) const {
    if (const uint8_t* slot = store_.resident(page)) return slot + store_.begin_of(section);
    return buffer_.data() + (page / kBufferPages % 2 * kBufferPages + page % kBufferPages) * section_bytes_;
  }

  // For a tier without a set: between two passes, the pages that come next, of which those that are not in memory
  // are read from now on; and refill() as in page_store.h. Throw EngineError.
  void expect(const uint32_t* pages, size_t n);
  uint8_t* need(uint32_t page) { return store_.need(page); }
  uint8_t* refill(uint32_t page) { return store_.refill(page); }

  // For a saved cache. copy() gives all of a page, wherever it lies; save() the choice among the first `pages`.
  void copy(uint32_t page, uint8_t* dst);
  std::string save(uint32_t pages) const;
  static size_t saved_bytes(size_t pages) { return pages * (sizeof(float) + 1) + 1; }
  // And back, into an empty one: append() is the place of the next page; appended() says that it is complete, and whether
  // it has an index; restore() takes the choice, or nothing. All of these throw EngineError.
  uint8_t* append();
  void appended(bool indexed);
  void restore(const std::string& state);

  const PageStore& store() const { return store_; }
  uint32_t capacity() const { return capacity_; }

 private:
  void seal(uint32_t indexed);
  void choose(uint32_t most, const float* predicted);

  const size_t section_bytes_;  // of the largest
  const bool has_set_;
  const uint32_t capacity_;     // pages beside the first that the set may have
  PageStore store_;
  Buffer buffer_;  // [2][kBufferPages] sections
  std::vector<PageStore::SectionRead> reads_[2];
  std::optional<PageStore::SectionReads> batches_[2];
  std::exception_ptr failure_;
  std::vector<uint8_t> readable_;  // by page: in the set
  std::vector<float> worth_;       // by page: the largest vote, faded
  std::vector<float> value_;       // by page: what the choice goes by
  std::vector<uint32_t> entering_, order_, wanted_;
  uint32_t sealed_ = 0;  // pages with an index
  uint32_t in_set_ = 0;  // pages in the set or about to enter, beside the first
  bool stale_ = false;   // the last pass read everything: any number of pages may enter
  bool all_resident_ = true;
};

}  // namespace edgert
