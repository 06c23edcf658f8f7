// A PageStore under several threads that need pages at once, in random steps; for -fsanitize=thread too. Prints
// one line; exits 1 at the first page that is not what was put into it.
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <random>
#include <thread>
#include <vector>

#include "error.h"
#include "page_store.h"

using namespace edgert;

namespace {

constexpr uint32_t kSections = 5, kSectionBytes = 1640, kPageBytes = kSections * kSectionBytes;
constexpr uint32_t kThreads = 3, kSteps = 300;

uint8_t byte_of(uint32_t page, uint32_t version, uint32_t section) {
  return static_cast<uint8_t>(page * 131 + version * 29 + section * 7 + 1);
}

void fill(uint8_t* data, uint32_t page, uint32_t version) {
  for (uint32_t s = 0; s < kSections; ++s) std::memset(data + s * kSectionBytes, byte_of(page, version, s), kSectionBytes);
}

void check(const uint8_t* data, uint32_t page, uint32_t version, uint32_t section) {
  for (uint32_t i = 0; i < kSectionBytes; ++i)
    if (data[i] != byte_of(page, version, section)) {
      std::fprintf(stderr, "page %u, section %u, byte %u: expected %u, found %u\n", page, section, i,
                   byte_of(page, version, section), data[i]);
      std::exit(1);
    }
}

// Returns the evictions, which show that the slots were too few.
uint64_t stress(const char* directory, uint32_t slots, uint32_t delay_us) {
  PageStore store(directory, {std::vector<size_t>(kSections, kPageBytes / kSections), slots, UINT64_MAX}, delay_us);
  std::mt19937 rng(slots);
  std::vector<uint32_t> versions;
  const auto add = [&] {
    const auto page = static_cast<uint32_t>(versions.size());
    versions.push_back(rng() % 200);
    fill(store.add(), page, versions.back());
    store.seal(page);
  };
  for (uint32_t step = 0; step < kSteps; ++step) {
    std::vector<uint32_t> set;  // with what add() and reopen() bring, fewer than there are slots
    for (uint32_t i = 0; !versions.empty() && i < rng() % (slots - 2); ++i) set.push_back(rng() % versions.size());
    store.want(set.data(), set.size() / 2);  // the other half was not foreseen
    add();
    const uint32_t known = rng() % versions.size();
    if (uint8_t* const to = store.refill(known)) fill(to, known, versions[known]);
    std::vector<uint8_t> out(set.size() * kSectionBytes);
    std::vector<PageStore::SectionRead> reads;
    for (size_t i = 0; i < set.size(); ++i)
      reads.push_back({set[i], step % kSections, out.data() + i * kSectionBytes});
    PageStore::SectionReads sections(store, reads.data(), reads.size());
    std::vector<std::thread> threads;
    for (uint32_t t = 0; t < kThreads; ++t)
      threads.emplace_back([&, t] {
        for (size_t i = 0; i < set.size(); ++i) {
          const uint32_t page = set[(i + t) % set.size()];
          const uint8_t* const data = store.need(page);
          for (uint32_t s = 0; s < kSections; ++s) check(data + s * kSectionBytes, page, versions[page], s);
        }
      });
    sections.wait();
    for (const auto& r : reads) check(r.dst, r.page, versions[r.page], r.section);
    for (std::thread& t : threads) t.join();
    if (step % 7 == 0) {
      const uint32_t page = rng() % versions.size();
      store.want(&page, 1);
      fill(store.reopen(page), page, ++versions[page]);
      store.seal(page);
    }
    if (step % 50 == 49) {
      versions.resize(versions.size() - rng() % 20);
      store.rewind(static_cast<uint32_t>(versions.size()));
    }
  }
  return store.stats().evictions;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) {
    std::fprintf(stderr, "expected one argument, a directory on a disk\n");
    return 2;
  }
  uint64_t evictions = 0;
  for (uint32_t slots : {4u, 9u, 40u})
    for (uint32_t delay_us : {0u, 300u}) evictions += stress(argv[1], slots, delay_us);
  if (evictions < 1000) {
    std::fprintf(stderr, "expected at least 1000 evictions, found %llu\n", static_cast<unsigned long long>(evictions));
    return 1;
  }
  std::printf("%llu evictions, every page as it was written\n", static_cast<unsigned long long>(evictions));
  return 0;
}
