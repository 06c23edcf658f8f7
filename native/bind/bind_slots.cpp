// The store behind the slots of a graph for ONNX Runtime.
#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/vector.h>

#include <memory>
#include <optional>
#include <string>
#include <utility>
#include <vector>

#include "bind.h"
#include "error.h"
#include "slot_store.h"

namespace nb = nanobind;
using namespace nb::literals;
using namespace edgert;

namespace {

using Cache = nb::ndarray<nb::shape<1, -1, -1, -1>, nb::c_contig, nb::device::cpu>;
using Queries = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Pages = std::vector<uint32_t>;
using Votes = nb::ndarray<nb::numpy, float, nb::ndim<1>>;

struct Slots {
  std::vector<Cache> kept;
  SlotArrays arrays;
};

void make_slots(Slots* self, const SlotStore& store, std::vector<Cache> keys, std::vector<Cache> values) {
  const ModelSpec& spec = store.spec();
  const size_t layers = spec.layers.size();
  if (keys.size() != layers || values.size() != layers)
    throw EngineError("expected caches of " + std::to_string(layers) + " layers, found " + std::to_string(keys.size()) +
                      " of keys and " + std::to_string(values.size()) + " of values");
  new (self) Slots;
  self->arrays.slots = uint32_t(keys[0].shape(2));
  const nb::dlpack::dtype floats = nb::dtype<float>(), halves = {uint8_t(nb::dlpack::dtype_code::Float), 16, 1};
  self->arrays.half = keys[0].dtype() == halves;
  const auto take = [&](const Cache& c, size_t layer) {
    if (c.dtype() != (self->arrays.half ? halves : floats)) {
      self->~Slots();
      throw EngineError("expected caches that are all of float32 or all of float16");
    }
    if (c.shape(1) != spec.layers[layer].n_kv_heads || c.shape(2) != self->arrays.slots || c.shape(3) != spec.head_dim) {
      const std::string found = std::to_string(c.shape(1)) + ", " + std::to_string(c.shape(2)) + ", " + std::to_string(c.shape(3));
      const std::string expected = std::to_string(spec.layers[layer].n_kv_heads) + ", " + std::to_string(self->arrays.slots) + ", " +
                                   std::to_string(spec.head_dim);
      self->~Slots();
      throw EngineError("expected a cache of [1, " + expected + "], found [1, " + found + "]");
    }
    return static_cast<uint8_t*>(c.data());
  };
  for (size_t i = 0; i < layers; ++i) {
    self->arrays.keys.push_back(take(keys[i], i));
    self->arrays.values.push_back(take(values[i], i));
  }
  self->kept = std::move(keys);
  self->kept.insert(self->kept.end(), std::make_move_iterator(values.begin()), std::make_move_iterator(values.end()));
}

Votes append(SlotStore& s, const Slots& from, uint32_t first, uint32_t n, std::optional<Queries> queries) {
  const uint32_t rows = queries ? uint32_t(queries->shape(0)) : 0;
  const size_t expected = s.spec().layers.size() * size_t(s.spec().n_heads) * s.spec().head_dim;
  if (queries && queries->shape(1) != expected)
    throw EngineError("expected queries of " + std::to_string(expected) + " floats, found " + std::to_string(queries->shape(1)));
  auto out = std::make_unique<std::vector<float>>();
  {
    const nb::gil_scoped_release release;
    *out = s.append(from.arrays, first, n, queries ? queries->data() : nullptr, rows);
  }
  std::vector<float>* p = out.release();
  nb::capsule owner(p, [](void* q) noexcept { delete static_cast<std::vector<float>*>(q); });
  return Votes(p->data(), {p->size()}, owner);
}

}  // namespace

void bind_slots(nb::module_& m) {
  nb::class_<SlotStore>(m, "SlotStore", "Keys and values behind the slots of a graph; see native/slot_store.h.")
      .def(
          "__init__",
          [](SlotStore* self, nb::typed<nb::dict, nb::str, nb::any> layers, uint32_t context, uint32_t threads, uint32_t slots,
             const std::string& directory, uint64_t disk_bytes, uint32_t read_delay_us) {
            new (self) SlotStore(to_spec(layers), context, threads, {slots, directory, disk_bytes, read_delay_us});
          },
          "layers"_a, "context"_a, "threads"_a, "slots"_a = 0, "directory"_a = "", "disk_bytes"_a = UINT64_MAX, "read_delay_us"_a = 0,
          "`layers`: ModelSpec.as_dict() with those layers alone that see everything.\n"
          "`slots`: pages in memory, the others in a file in `directory`; 0: all are.")
      .def_prop_ro("length", [](const SlotStore& s) { return s.cache().length(); })
      .def_prop_ro("indexed_pages", &SlotStore::indexed_pages, "Pages with an index; those behind it are recent.")
      .def_prop_ro("nbytes", &SlotStore::bytes)
      .def_prop_ro("tier", [](const SlotStore& s) -> std::optional<nb::dict> { return tier_stats(s.cache()); },
                   "As Cache.tier; None when all pages are in memory.")
      .def("append", &append, "slots"_a, "first"_a, "n"_a, "queries"_a.noconvert().none() = nb::none(),
           "Appends the tokens in `n` slots from `first` on. `queries`: of the last of them, after rope, [rows,\n"
           "layers * heads * head dim]. Returns what they give to the pages with an index, [pages]: the sum over\n"
           "rows, layers and KV heads of the share that a page's best token gets, of all pages and of what is\n"
           "always read.")
      .def("expect", &SlotStore::expect, "pages"_a, nb::call_guard<nb::gil_scoped_release>(),
           "What read() will be asked for next: pages on the disk are read from now on.")
      .def(
          "keep",
          [](SlotStore& s, const Pages& pages, const Slots& from, const Pages& places) { s.keep(pages, from.arrays, places); },
          "pages"_a, "slots"_a, "places"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Pages that are about to leave their slots, from 16 * each of `places` on: those that are not in memory\n"
          "get a place there if there is one.")
      .def(
          "read", [](SlotStore& s, const Pages& pages, const Slots& to, const Pages& places) { s.read(pages, to.arrays, places); },
          "pages"_a, "slots"_a, "places"_a, nb::call_guard<nb::gil_scoped_release>(),
          "Copies each of `pages` to the slots from 16 * its place on. Raises EngineError when one cannot be\n"
          "read.")
      .def(
          "move", [](SlotStore& s, const Slots& of, uint32_t place, uint32_t to) { s.move(of.arrays, place, to); }, "slots"_a,
          "place"_a, "to"_a, nb::call_guard<nb::gil_scoped_release>(), "Copies the 16 slots of a place to another.")
      .def("rewind", &SlotStore::rewind, "length"_a)
      .def("save",
           [](const SlotStore& s) {
             const std::string state = s.save();
             return nb::bytes(state.data(), state.size());
           })
      .def("load", [](SlotStore& s, nb::bytes b) { s.load(std::string(b.c_str(), b.size())); }, "state"_a);

  nb::class_<Slots>(m, "Slots", "Caches of a graph, float32 or float16 [1, KV heads, slots, head dim], by layer of a store.")
      .def("__init__", &make_slots, "store"_a, "keys"_a, "values"_a, "The arrays' own memory is used, and kept alive.");

  m.def(
      "slot_store_bytes",
      [](nb::typed<nb::dict, nb::str, nb::any> layers, uint32_t length, uint32_t pages) {
        return slot_store_bytes(to_spec(layers), length, pages);
      },
      "layers"_a, "length"_a, "pages"_a,
      "Bytes that a SlotStore takes at `length` tokens with `pages` pages in memory (0: all), and the\nfewest there may be.");
}
