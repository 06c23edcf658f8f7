#include <string>
#include <utility>
#include <vector>

#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include "bind.h"
#include "isa.h"
#include "probe.h"

namespace nb = nanobind;

void bind_probe(nb::module_& m) {
  m.def("probe_read_bandwidth", &edgert::probe_read_bandwidth, nb::arg("threads"), nb::arg("seconds"),
        nb::call_guard<nb::gil_scoped_release>(),
        "Bytes per second that `threads` threads read together from memory, over about `seconds`.");
  m.def("probe_matmul", &edgert::probe_matmul, nb::arg("type"), nb::arg("tokens"), nb::arg("threads"),
        nb::arg("seconds"), nb::call_guard<nb::gil_scoped_release>(),
        "Weights per second that `threads` threads together multiply with `tokens` tokens at once, in cache.");
  m.def(
      "probe_attend",
      [](const std::string& kv, int head_dim, int group, int threads, double seconds) {
        const edgert::KvType type = to_kv_type(kv);
        nb::gil_scoped_release release;
        return edgert::probe_attend(type, head_dim, group, threads, seconds);
      },
      nb::arg("kv"), nb::arg("head_dim"), nb::arg("group"), nb::arg("threads"), nb::arg("seconds"),
        "Query heads x positions per second that `threads` threads together attend to, in cache.");
  m.def(
      "probe_disk",
      [](const std::string& path, int64_t request_bytes, int depth, double seconds) {
        const edgert::DiskRate found = edgert::probe_disk(path, request_bytes, depth, seconds);
        return std::pair(found.bytes_per_second, found.direct);
      },
      nb::arg("path"), nb::arg("request_bytes"), nb::arg("depth"), nb::arg("seconds"),
      nb::call_guard<nb::gil_scoped_release>(),
      "(bytes per second of random reads with `depth` in flight, whether they went past the page cache).");
  m.def(
      "isa_levels",
      [] {
        std::vector<std::string> names;
        for (edgert::Isa isa : edgert::isa_available()) names.emplace_back(edgert::isa_name(isa));
        return names;
      },
      "Instruction-set levels this CPU and OS offer, best first.");
  m.def(
      "isa_selected", [] { return std::string(edgert::isa_name(edgert::isa_select())); },
      "The level in use: EDGERT_ISA when set, else the best. Raises EngineError for a bad EDGERT_ISA.");
}
