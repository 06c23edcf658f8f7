// The store of KV pages alone, for tests: the core uses it directly.
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <cstring>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "error.h"
#include "page_store.h"

namespace nb = nanobind;
using namespace nb::literals;
using edgert::PageStore;

namespace {

nb::bytes to_bytes(const uint8_t* data, size_t n) { return nb::bytes(reinterpret_cast<const char*>(data), n); }

void check_size(const PageStore& s, const nb::bytes& data) {
  if (data.size() != s.page_bytes())
    throw edgert::EngineError("expected a page of " + std::to_string(s.page_bytes()) + " bytes, found " +
                              std::to_string(data.size()));
}

template <class F>
auto unlocked(F&& f) {
  const nb::gil_scoped_release release;
  return f();
}

uint32_t add(PageStore& s, const nb::bytes& data) {
  check_size(s, data);
  std::memcpy(unlocked([&] { return s.add(); }), data.c_str(), data.size());
  return s.pages() - 1;
}

void rewrite(PageStore& s, uint32_t page, const nb::bytes& data) {
  check_size(s, data);
  std::memcpy(unlocked([&] { return s.reopen(page); }), data.c_str(), data.size());
}

std::vector<nb::bytes> read_sections(PageStore& s, const std::vector<std::pair<uint32_t, uint32_t>>& places) {
  const size_t bytes = s.section_bytes(0);  // as many as of the others
  std::vector<uint8_t> data(places.size() * bytes);
  std::vector<PageStore::SectionRead> reads;
  for (const auto& [page, section] : places) reads.push_back({page, section, data.data() + reads.size() * bytes});
  unlocked([&] { PageStore::SectionReads(s, reads.data(), reads.size()).wait(); });
  std::vector<nb::bytes> out;
  for (const PageStore::SectionRead& r : reads) out.push_back(to_bytes(r.dst, bytes));
  return out;
}

}  // namespace

nb::dict store_stats(const PageStore& s) {
  const PageStore::Stats of = s.stats();
  nb::dict d;
  d["bytes_read"] = of.bytes_read;
  d["bytes_written"] = of.bytes_written;
  d["pages_read"] = of.pages_read;
  d["sections_read"] = of.sections_read;
  d["evictions"] = of.evictions;
  d["damaged_reads"] = of.damaged_reads;
  d["read_seconds"] = of.read_seconds;
  d["waited_seconds"] = of.waited_seconds;
  return d;
}

void bind_store(nb::module_& m) {
  nb::class_<PageStore>(m, "PageStore", "Pages in memory and in a file; see native/page_store.h.")
      .def(
          "__init__",
          [](PageStore* self, const std::string& directory, size_t page_bytes, uint32_t sections, uint32_t slots,
             uint64_t disk_cap_bytes, uint32_t read_delay_us) {
            if (page_bytes == 0 || sections == 0 || page_bytes % sections != 0)
              throw edgert::EngineError("a page of " + std::to_string(page_bytes) + " bytes cannot be cut into " +
                                        std::to_string(sections) + " sections of equal size");
            const std::vector<size_t> section_bytes(sections, page_bytes / sections);
            new (self) PageStore(directory, {section_bytes, slots, disk_cap_bytes}, read_delay_us);
          },
          "directory"_a, nb::kw_only(), "page_bytes"_a, "sections"_a = 1, "slots"_a, "disk_cap_bytes"_a = UINT64_MAX,
          "read_delay_us"_a = 0)
      .def_prop_ro("pages", &PageStore::pages)
      .def_prop_ro("direct", [](const PageStore& s) { return s.file().direct(); },
                   "The file system's cache is left alone.")
      .def_prop_ro("in_memory", [](const PageStore& s) { return s.file().in_memory(); },
                   "The directory lies in memory (tmpfs), not on a disk.")
      .def_prop_ro("failed", &PageStore::failed, "Why nothing is written at present; empty otherwise.")
      .def("add", &add, "data"_a, "Appends a page, which stays open; returns its number.")
      .def("seal", &PageStore::seal, "page"_a, nb::call_guard<nb::gil_scoped_release>())
      .def("rewrite", &rewrite, "page"_a, "data"_a, "Changes a page, which is open then.")
      .def("want", [](PageStore& s, const std::vector<uint32_t>& pages) { s.want(pages.data(), pages.size()); },
           "pages"_a, nb::call_guard<nb::gil_scoped_release>(), "The set of the coming step.")
      .def("resident", [](const PageStore& s, uint32_t page) { return s.resident(page) != nullptr; }, "page"_a)
      .def("need",
           [](PageStore& s, uint32_t page) {
             return to_bytes(unlocked([&] { return s.need(page); }), s.page_bytes());
           },
           "page"_a, "The page, read if it is not in memory. Raises EngineError when it cannot be.")
      .def("refill",
           [](PageStore& s, uint32_t page, const nb::bytes& data) {
             check_size(s, data);
             uint8_t* const to = unlocked([&] { return s.refill(page); });
             if (to) std::memcpy(to, data.c_str(), data.size());
             return to != nullptr;
           },
           "page"_a, "data"_a, "Brings a page to memory whose content the caller has; False when it needs or finds no slot.")
      .def("read_sections", &read_sections, "places"_a, "The sections at (page, section), read past the slots.")
      .def("rewind", &PageStore::rewind, "count"_a, nb::call_guard<nb::gil_scoped_release>(),
           "Forgets the pages from `count` on.")
      .def("stats", &store_stats);
}
