#include "tier.h"

#include <algorithm>
#include <cstring>
#include <numeric>
#include <utility>

#include "error.h"
#include "kernels.h"

namespace edgert {
namespace {

// Pages that enter the set at a step: their reads should end before the layers begin that choose from them.
constexpr uint32_t kEntering = 8;
// What a step leaves of a page's worth. The largest of any head instead of the sum over heads, or a mean over steps
// instead of what is left of the largest, lose more (docs/kernel-log.md).
constexpr float kFade = 0.9f;
// Pages without an index: what is always read, a block that is not yet complete, and a pass.
constexpr uint32_t kTail = 50;

size_t largest(const std::vector<size_t>& sizes) { return *std::max_element(sizes.begin(), sizes.end()); }

}  // namespace

uint32_t Tier::least_slots(uint32_t budget) { return (budget + kPageTokens - 1) / kPageTokens + 2 * kEntering + kTail + 1; }

size_t Tier::bytes(const std::vector<size_t>& section_bytes, uint32_t slots, uint32_t pages) {
  const size_t page = std::accumulate(section_bytes.begin(), section_bytes.end(), size_t(0));
  const size_t table = section_bytes.size() * sizeof(uint64_t) + sizeof(float) + 1 + 2 * sizeof(uint32_t) + 64;
  return PageStore::slot_bytes(page, slots) + Buffer::rounded(2 * kBufferPages * largest(section_bytes)) +
         pages * table;
}

Tier::Tier(const TierShape& shape, const std::vector<size_t>& section_bytes, uint32_t budget)
    : section_bytes_(largest(section_bytes)),
      has_set_(shape.set),
      capacity_(shape.slots - std::min(shape.slots, kTail + 1)),
      store_(shape.directory, {section_bytes, shape.slots, shape.disk_bytes}, shape.read_delay_us),
      buffer_(2 * kBufferPages * section_bytes_, "pages on their way from the disk") {
  if (shape.slots < least_slots(budget))
    throw EngineError("a budget of " + std::to_string(budget) + " tokens needs memory for " +
                      std::to_string(least_slots(budget)) + " pages of keys and values, not " +
                      std::to_string(shape.slots) + ": allow more memory or choose a smaller budget");
  for (auto& reads : reads_) reads.reserve(kBufferPages);
}

void Tier::begin(uint32_t pages, bool sparse, const float* predicted) {
  if (sparse) {
    choose(stale_ ? UINT32_MAX : kEntering, predicted);
    for (uint32_t page = 0; page < sealed_; ++page)
      if (readable_[page]) store_.need(page);
    if (stale_) {
      for (const uint32_t page : entering_) store_.need(page);
      enter();
      stale_ = false;
    }
  }
  while (store_.pages() < pages) {
    store_.add();
    readable_.push_back(0);
    worth_.push_back(0);
  }
  all_resident_ = true;
  for (uint32_t page = 0; page < pages; ++page) all_resident_ &= store_.resident(page) != nullptr;
}

bool Tier::enter() {
  if (entering_.empty() || failure_) return false;
  try {
    for (const uint32_t page : entering_) store_.need(page);
    for (const uint32_t page : entering_) readable_[page] = 1;
    entering_.clear();
  } catch (...) {
    failure_ = std::current_exception();
  }
  return true;
}

void Tier::end(uint32_t indexed, bool sparse, const float* worth, uint32_t heads, uint32_t stride) {
  if (sparse) enter();  // what was read while this step ran, which the next may choose from
  for (uint32_t page = 0; page < sealed_; ++page) {
    float sum = 0;
    for (uint32_t head = 0; head < heads; ++head) sum += worth[size_t(head) * stride + page];
    worth_[page] = std::max(worth_[page] * kFade, sum);
  }
  seal(indexed);
  stale_ |= !sparse;
  if (!sparse || in_set_ > capacity_) choose(0, nullptr);  // slots for the pages of the next pass
}

// Pages that get an index enter the set, worth as much as others are on average until a step says more.
void Tier::seal(uint32_t indexed) {
  if (sealed_ >= indexed) return;
  float sum = 0;
  for (uint32_t page = 0; page < sealed_; ++page) sum += worth_[page];
  const float average = sealed_ ? sum / float(sealed_) : 0;
  for (; sealed_ < indexed; ++sealed_) {
    store_.seal(sealed_);
    worth_[sealed_] = average;
    readable_[sealed_] = 1;
    in_set_ += sealed_ > 0;
  }
}

// The set of the coming step: the pages worth most. At most `most` enter. Their reads start.
void Tier::choose(uint32_t most, const float* predicted) {
  if (!has_set_) return expect(nullptr, 0);
  value_.assign(worth_.begin(), worth_.begin() + sealed_);
  if (predicted)
    for (uint32_t page = 0; page < sealed_; ++page) value_[page] += predicted[page];
  const auto better = [&](uint32_t a, uint32_t b) { return value_[a] != value_[b] ? value_[a] > value_[b] : a > b; };
  const auto outside = [&](uint32_t page) { return !readable_[page]; };
  order_.clear();
  for (uint32_t page = 1; page < sealed_; ++page) order_.push_back(page);
  const auto end = order_.begin() + std::min<ptrdiff_t>(capacity_, ptrdiff_t(order_.size()));
  std::nth_element(order_.begin(), end, order_.end(), better);
  entering_.assign(order_.begin(), std::partition(order_.begin(), end, outside));
  std::sort(entering_.begin(), entering_.end(), better);
  const auto leaving = std::partition(end, order_.end(), outside);
  std::sort(leaving, order_.end(), better);
  auto worst = order_.end();
  const auto leave = [&] {
    readable_[*--worst] = 0;
    --in_set_;
  };
  while (in_set_ > capacity_) leave();
  uint32_t entered = 0;
  for (; entered < std::min<size_t>(most, entering_.size()); ++entered, ++in_set_)
    if (in_set_ == capacity_) {
      if (worst == leaving || value_[entering_[entered]] <= value_[*(worst - 1)]) break;
      leave();
    }
  entering_.resize(entered);
  wanted_ = entering_;
  for (uint32_t page = 0; page < sealed_; ++page)
    if (readable_[page]) wanted_.push_back(page);
  store_.want(wanted_.data(), wanted_.size());
}

void Tier::expect(const uint32_t* pages, size_t n) {
  wanted_.assign(pages, pages + n);
  if (store_.pages()) wanted_.push_back(0);
  store_.want(wanted_.data(), wanted_.size());
}

void Tier::rewind(uint32_t pages, uint32_t indexed) {
  in_set_ -= uint32_t(entering_.size());  // of a pass that failed before they were read
  entering_.clear();
  if (pages >= store_.pages() && indexed >= sealed_) return;
  if (indexed < sealed_) {
    // Of the set only the first page must stay: slots may be short until the last pages are gone.
    const uint32_t first = 0;
    store_.want(&first, 1);
    stale_ = true;
    uint32_t open = indexed;
    try {
      for (; open < std::min(sealed_, pages); ++open) store_.reopen(open);
    } catch (...) {
      while (open-- > indexed) store_.seal(open);
      throw;
    }
  }
  store_.rewind(pages);
  readable_.resize(pages);
  worth_.resize(pages);
  if (indexed >= sealed_) return;
  sealed_ = indexed;
  std::fill(readable_.begin() + sealed_, readable_.end(), 0);
  in_set_ = sealed_ ? uint32_t(std::count(readable_.begin() + 1, readable_.begin() + sealed_, 1)) : 0;
}

void Tier::stream(uint32_t half, uint32_t section, uint32_t first, uint32_t count) {
  batches_[half].reset();
  reads_[half].clear();
  if (failure_) return;
  uint8_t* const to = buffer_.data() + size_t(half) * kBufferPages * section_bytes_;
  for (uint32_t i = 0; i < count; ++i)
    if (!store_.resident(first + i)) reads_[half].push_back({first + i, section, to + i * section_bytes_});
  if (reads_[half].empty()) return;
  try {
    batches_[half].emplace(store_, reads_[half].data(), reads_[half].size());
  } catch (...) {
    failure_ = std::current_exception();
  }
}

void Tier::arrive(uint32_t half) {
  if (!batches_[half]) return;
  try {
    batches_[half]->wait();
  } catch (...) {
    failure_ = std::current_exception();
  }
  batches_[half].reset();
}

void Tier::check() {
  if (failure_) std::rethrow_exception(std::exchange(failure_, nullptr));
}

void Tier::copy(uint32_t page, uint8_t* dst) {
  if (const uint8_t* slot = store_.resident(page)) {
    std::memcpy(dst, slot, store_.page_bytes());
    return;
  }
  std::vector<PageStore::SectionRead> reads;
  for (uint32_t i = 0; i < store_.sections(); ++i) reads.push_back({page, i, dst + store_.begin_of(i)});
  PageStore::SectionReads(store_, reads.data(), reads.size()).wait();
}

std::string Tier::save(uint32_t pages) const {
  std::string out(saved_bytes(pages), char(stale_));
  std::memcpy(out.data(), worth_.data(), pages * sizeof(float));
  std::memcpy(out.data() + pages * sizeof(float), readable_.data(), pages);
  return out;
}

uint8_t* Tier::append() {
  begin(store_.pages() + 1, false, nullptr);
  return store_.resident(store_.pages() - 1);
}

void Tier::appended(bool indexed) {
  if (!indexed) return;
  seal(store_.pages());
  choose(0, nullptr);
  stale_ = true;
}

void Tier::restore(const std::string& state) {
  const size_t pages = store_.pages();
  if (state.size() != saved_bytes(pages))
    throw EngineError("the saved session says of other pages than its own which were in memory");
  std::memcpy(worth_.data(), state.data(), pages * sizeof(float));
  const char* const in_set = state.data() + pages * sizeof(float);
  in_set_ = 0;
  for (uint32_t page = 0; page < sealed_; ++page) {
    readable_[page] = in_set[page] != 0;
    in_set_ += page > 0 && in_set[page] != 0;
  }
  // A set of other capacity is chosen anew.
  stale_ = state.back() != 0 || in_set_ != std::min(capacity_, sealed_ - std::min(sealed_, 1u));
  choose(0, nullptr);
}

}  // namespace edgert
