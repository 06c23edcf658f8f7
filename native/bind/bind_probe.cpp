#include <string>
#include <vector>

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
