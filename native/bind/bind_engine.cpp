#include <nanobind/ndarray.h>
#include <nanobind/stl/optional.h>
#include <nanobind/stl/pair.h>
#include <nanobind/stl/string.h>
#include <nanobind/stl/tuple.h>
#include <nanobind/stl/vector.h>

#include <cmath>
#include <memory>
#include <optional>

#include "bind.h"
#include "decoder.h"
#include "error.h"
#include "sizes.h"

namespace nb = nanobind;
using namespace edgert;

namespace {

using Tokens = nb::ndarray<const int32_t, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Hidden = nb::ndarray<const float, nb::ndim<2>, nb::c_contig, nb::device::cpu>;
using Row = nb::ndarray<const float, nb::ndim<1>, nb::c_contig, nb::device::cpu>;
using Logits = nb::ndarray<nb::numpy, float>;

Logits to_array(std::unique_ptr<float[]> data, std::initializer_list<size_t> shape) {
  float* p = data.release();
  nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<float*>(q); });
  return Logits(p, shape, owner);
}

Logits forward(Decoder& d, KvCache& cache, Tokens tokens, bool all, bool full) {
  const uint32_t n = uint32_t(tokens.shape(0));
  const size_t vocab = d.spec().vocab_size, rows = all ? n : 1;
  auto out = std::make_unique<float[]>(rows * vocab);
  {
    nb::gil_scoped_release release;
    d.forward(cache, tokens.data(), n, all ? Decoder::Want::All : Decoder::Want::Last, out.get(), full);
  }
  if (all) return to_array(std::move(out), {rows, vocab});
  return to_array(std::move(out), {vocab});
}

Logits hidden(Decoder& d, KvCache& cache, Tokens tokens, bool full) {
  const size_t n = tokens.shape(0), dim = d.spec().dim;
  auto out = std::make_unique<float[]>(n * dim);
  {
    nb::gil_scoped_release release;
    d.forward(cache, tokens.data(), uint32_t(n), Decoder::Want::Hidden, out.get(), full);
  }
  return to_array(std::move(out), {n, dim});
}

void check_dim(const Decoder& d, size_t dim) {
  if (dim != d.spec().dim)
    throw EngineError("expected rows of " + std::to_string(d.spec().dim) + " floats, found " + std::to_string(dim));
}

Logits dense(Decoder& d, Hidden h) {
  check_dim(d, h.shape(1));
  const size_t n = h.shape(0), vocab = d.spec().vocab_size;
  auto out = std::make_unique<float[]>(n * vocab);
  {
    nb::gil_scoped_release release;
    d.dense(h.data(), uint32_t(n), out.get());
  }
  return to_array(std::move(out), {n, vocab});
}

Logits dense_rows(Decoder& d, Hidden h) {
  check_dim(d, h.shape(1));
  const size_t n = h.shape(0), rows = d.weights().head.rows;
  auto out = std::make_unique<float[]>(n * rows);
  {
    nb::gil_scoped_release release;
    d.dense_rows(h.data(), uint32_t(n), out.get());
  }
  return to_array(std::move(out), {n, rows});
}

using Ids = nb::ndarray<nb::numpy, uint32_t>;

Ids best(Decoder& d, Hidden h) {
  check_dim(d, h.shape(1));
  const size_t n = h.shape(0);
  auto out = std::make_unique<uint32_t[]>(n);
  {
    nb::gil_scoped_release release;
    d.best(h.data(), uint32_t(n), out.get());
  }
  uint32_t* p = out.release();
  nb::capsule owner(p, [](void* q) noexcept { delete[] static_cast<uint32_t*>(q); });
  return {p, {n}, owner};
}

using ScoredArrays = nb::typed<nb::tuple, Ids, Logits>;

// (ids [n], logits [n]) that live as long as either array.
ScoredArrays to_arrays(std::unique_ptr<Decoder::Scored> scored) {
  Decoder::Scored* p = scored.release();
  nb::capsule owner(p, [](void* q) noexcept { delete static_cast<Decoder::Scored*>(q); });
  return ScoredArrays(nb::make_tuple(Ids(p->ids.data(), {p->ids.size()}, owner), Logits(p->logits.data(), {p->logits.size()}, owner)));
}

ScoredArrays flash(Decoder& d, Row hidden, uint32_t probes, uint32_t keep, const std::vector<uint32_t>& more) {
  check_dim(d, hidden.shape(0));
  auto out = std::make_unique<Decoder::Scored>();
  {
    nb::gil_scoped_release release;
    d.flash(hidden.data(), probes, keep, more, *out);
  }
  return to_arrays(std::move(out));
}

ScoredArrays among(Decoder& d, Row hidden, const std::vector<uint32_t>& ids) {
  check_dim(d, hidden.shape(0));
  auto out = std::make_unique<Decoder::Scored>();
  {
    nb::gil_scoped_release release;
    d.among(hidden.data(), ids, *out);
  }
  return to_arrays(std::move(out));
}

using Bytes = nb::typed<nb::dict, nb::str, nb::int_>;

Bytes weight_parts(const Weights& w) {
  nb::dict m;
  m["body"] = w.body_bytes;
  m["embedding"] = w.embedding_bytes;
  m["head"] = w.head_bytes;
  m["flash_head"] = w.flash.bytes + w.flash.table_bytes();
  m["retrieval_head"] = w.retrieval.bytes;
  return m;
}

Bytes memory(const Decoder& d) {
  Bytes m = weight_parts(d.weights());
  m["activations"] = d.activation_bytes();
  return m;
}

Sizes::Head head_named(const std::string& name) {
  if (name == "flash") return Sizes::Head::Flash;
  return name == "exact" ? Sizes::Head::Exact : Sizes::Head::Dense;
}

// (window of streaming heads, class of each KV head by layer; empty: all are indexed)
using Heads = std::pair<uint32_t, std::vector<std::vector<uint32_t>>>;

Selection to_selection(uint32_t budget, const Heads& heads) {
  Selection s{.budget = budget, .window = heads.first};
  for (const auto& layer : heads.second) {
    s.heads.emplace_back();
    for (const uint32_t c : layer) {
      if (c > uint32_t(HeadClass::Streaming)) throw EngineError("unknown class of a KV head: " + std::to_string(c));
      s.heads.back().push_back(HeadClass(c));
    }
  }
  return s;
}

}  // namespace

ModelSpec to_spec(nb::dict d) {
  const auto u32 = [&](const char* key) { return nb::cast<uint32_t>(d[key]); };
  const auto flag = [&](const char* key) { return nb::cast<bool>(d[key]); };
  const auto real = [](nb::handle h) { return float(nb::cast<double>(h)); };
  ModelSpec s;
  s.dim = u32("dim");
  s.n_heads = u32("n_heads");
  s.head_dim = u32("head_dim");
  s.ffn_dim = u32("ffn_dim");
  s.vocab_size = u32("vocab_size");
  s.context_length = u32("context_length");
  s.norm_eps = real(d["norm_eps"]);
  s.rope_dims = u32("rope_dims");
  s.rope_interleaved = nb::cast<std::string>(d["rope_style"]) == "interleaved";
  s.gelu = nb::cast<std::string>(d["activation"]) == "gelu_tanh";
  s.attn_scale = real(d["attn_scale"]);
  s.embed_scale = real(d["embed_scale"]);
  s.qk_norm = flag("qk_norm");
  s.qkv_bias = flag("qkv_bias");
  s.post_norms = flag("post_norms");
  s.rope_factors = flag("rope_factors");
  s.tied_head = flag("tied_head");
  s.conv_kernel = u32("conv_kernel");
  s.output_norm = nb::cast<std::string>(d["output_norm"]);
  for (nb::handle h : nb::cast<nb::list>(d["layers"])) {
    const nb::dict l = nb::cast<nb::dict>(h);
    LayerSpec layer;
    layer.conv = nb::cast<std::string>(l["kind"]) == "conv";
    layer.n_kv_heads = nb::cast<uint32_t>(l["n_kv_heads"]);
    layer.window = nb::cast<uint32_t>(l["window"]);
    layer.rope_base = real(l["rope_base"]);
    layer.rope_scale = real(l["rope_scale"]);
    s.layers.push_back(layer);
  }
  return s;
}

std::optional<nb::dict> tier_stats(const KvCache& c) {
  if (!c.tier()) return std::nullopt;
  const PageStore& store = c.tier()->store();
  nb::dict m = store_stats(store);
  m["slots"] = store.shape().slots;
  m["set"] = c.tier()->capacity();
  m["pages"] = store.pages();
  m["in_memory"] = store.file().in_memory();
  return m;
}

KvType to_kv_type(const std::string& name) {
  if (name == "f16") return KvType::F16;
  if (name == "q8") return KvType::Q8;
  throw EngineError("unknown type of keys and values: " + name);
}

void bind_engine(nb::module_& m) {
  nb::class_<Decoder>(m, "Model", "Packed weights of one model and the forward pass over them.")
      .def(
          "__init__",
          [](Decoder* self, const GgufFile& file, nb::typed<nb::dict, nb::str, nb::any> spec, uint32_t threads,
             const GgufFile* sidecar, const GgufFile* retrieval) {
            const ModelSpec s = to_spec(spec);
            nb::gil_scoped_release release;
            new (self) Decoder(file, s, threads, {sidecar, retrieval});
          },
          nb::arg("file"), nb::arg("spec"), nb::arg("threads") = 0, nb::arg("sidecar").none() = nb::none(),
          nb::arg("retrieval").none() = nb::none(), "`sidecar`: the file of a FlashHead; `retrieval`: that of a retrieval head.")
      .def_prop_ro("threads", &Decoder::threads)
      .def_prop_ro("isa", [](const Decoder& d) { return isa_name(d.isa()); })
      .def_prop_ro("vocab_size", [](const Decoder& d) { return d.spec().vocab_size; })
      .def_prop_ro("step_weight_bytes", [](const Decoder& d) { return d.weights().step_bytes(); },
                   "Bytes of weights one decode step reads with the dense head.")
      .def_prop_ro("step_body_bytes", [](const Decoder& d) { return d.weights().body_bytes; }, "The same without any head.")
      .def("flash_bytes", [](const Decoder& d, uint32_t probes, uint32_t keep) { return d.weights().flash_bytes(probes, keep); },
           nb::arg("probes"), nb::arg("keep"), "Bytes that flash() reads.")
      .def("memory", &memory, "Resident bytes by part.")
      .def("forward", &forward, nb::arg("cache"), nb::arg("tokens").noconvert(), nb::arg("all_logits") = false,
           nb::arg("full") = false,
           "Appends int32 tokens; returns float32 logits after the last, [vocab], or after each, [n, vocab].\n"
           "One token alone reads of a cache with a budget what is chosen, unless `full`; several read it all.")
      .def("hidden", &hidden, nb::arg("cache"), nb::arg("tokens").noconvert(), nb::arg("full") = false,
           "Appends int32 tokens; returns the final residual of each, in front of the last norm, [n, dim].")
      .def("dense", &dense, nb::arg("hidden").noconvert(),
           "Logits of rows of hidden(), [n, vocab], by the whole head: the bits that forward() gives.")
      .def("dense_rows", &dense_rows, nb::arg("hidden").noconvert(),
           "The logits of dense() in the order of the head's rows, [n, rows]: see row_tokens.")
      .def_prop_ro("row_tokens", [](nb::handle_t<Decoder> self) -> std::optional<Ids> {
        const std::vector<uint32_t>& t = nb::cast<Decoder&>(self).row_tokens();
        if (t.empty()) return std::nullopt;
        return Ids(const_cast<uint32_t*>(t.data()), {t.size()}, self);
      }, "Token of each row of the head, 2**32 - 1 for padding; None: in the order of ids. Read only.")
      .def("best", &best, nb::arg("hidden").noconvert(),
           "The likeliest token of rows of hidden(), [n]: the arg max of dense(), the lowest id of equals.")
      .def("flash", &flash, nb::arg("hidden").noconvert(), nb::arg("probes"), nb::arg("keep"), nb::arg("more"),
           "(ids, logits) of one row of hidden(), [dim], by a FlashHead; see Decoder::flash.")
      .def(
          "page_worth",
          [](Decoder& d, KvCache& cache, int32_t token) {
            const std::vector<float> worth = d.page_worth(cache, token);
            auto out = std::make_unique<float[]>(worth.size());
            std::copy(worth.begin(), worth.end(), out.get());
            return to_array(std::move(out), {worth.size()});
          },
          nb::arg("cache"), nb::arg("token"),
          "What a retrieval head says the pages with an index will be worth to a step with `token`, [pages];\n"
          "empty where it says nothing.")
      .def("among", &among, nb::arg("hidden").noconvert(), nb::arg("ids"),
           "(ids, logits) of the tokens `ids` alone, in no order: the bits of dense().");

  nb::class_<Sizes>(m, "Sizes", "What a model will take in memory, from the headers of its files alone.")
      .def(
          "__init__",
          [](Sizes* self, const GgufFile& file, nb::typed<nb::dict, nb::str, nb::any> spec, uint32_t threads,
             const GgufFile* sidecar, uint32_t lanes, const GgufFile* retrieval) {
            new (self) Sizes(file, to_spec(spec), threads, {sidecar, retrieval}, lanes ? lanes : kernels_for(isa_select()).lanes);
          },
          nb::arg("file"), nb::arg("spec"), nb::arg("threads"), nb::arg("sidecar").none() = nb::none(), nb::arg("lanes") = 0,
          nb::arg("retrieval").none() = nb::none(),
          "`lanes`: floats of a vector at the ISA level meant, 8 or 16; 0: the one that would run here.")
      .def("weights", [](const Sizes& s) { return weight_parts(s.weights()); }, "Bytes of packed weights by part.")
      .def_prop_ro("arena_bytes", &Sizes::arena_bytes, "Bytes of the buffer that holds them all.")
      .def_prop_ro("padding_bytes", &Sizes::padding_bytes, "Bytes of it that are no tensor.")
      .def_prop_ro("step_weight_bytes", [](const Sizes& s) { return s.weights().step_bytes(); })
      .def_prop_ro("step_body_bytes", [](const Sizes& s) { return s.weights().body_bytes; })
      .def("flash_bytes", [](const Sizes& s, uint32_t probes, uint32_t keep) { return s.weights().flash_bytes(probes, keep); },
           nb::arg("probes"), nb::arg("keep"))
      .def(
          "activations",
          [](const Sizes& s, uint32_t length, const std::string& head, uint32_t probes, uint32_t keep, const std::string& kv,
             uint32_t budget, const Heads& heads) {
            return s.activations(s.kv(length, to_kv_type(kv), to_selection(budget, heads)), length, head_named(head), probes, keep);
          },
          nb::arg("length"), nb::arg("head"), nb::arg("probes"), nb::arg("keep"), nb::arg("kv"), nb::arg("budget"),
          nb::arg("heads") = Heads(),
          "Bytes of the buffers of a pass and of the head (dense, flash or exact) after `length` positions.")
      .def(
          "kv",
          [](const Sizes& s, uint32_t context, uint32_t length, const std::string& kv, uint32_t budget, const Heads& heads) {
            const KvCache cache = s.kv(context, to_kv_type(kv), to_selection(budget, heads));
            std::vector<std::tuple<uint32_t, size_t, uint32_t, uint32_t>> shares;
            for (const KvCache::Share& share : cache.shares_at(length))
              shares.emplace_back(share.window, share.bytes, uint32_t(share.cls), share.heads);
            return std::make_tuple(shares, cache.index_bytes_at(length), cache.conv_bytes());
          },
          nb::arg("context"), nb::arg("length"), nb::arg("kv"), nb::arg("budget"), nb::arg("heads") = Heads(),
          "Bytes of a cache of at most `context` positions that holds `length`:\n(window, bytes, class, heads) of the layers "
          "that share a window (0: none), where heads\nhave classes of the heads that share one (heads 0: whole layers); those "
          "of the index;\nand those of the convolutions.")
      .def(
          "tier",
          [](const Sizes& s, uint32_t length, const std::string& kv, uint32_t budget, uint32_t slots, const Heads& heads) {
            const KvCache cache = s.kv(length, to_kv_type(kv), to_selection(budget, heads));
            return std::make_pair(cache.tier_bytes_at(length, slots), cache.least_slots());
          },
          nb::arg("length"), nb::arg("kv"), nb::arg("budget"), nb::arg("slots"), nb::arg("heads") = Heads(),
          "Bytes that `slots` pages of a tier take at `length` positions, and the fewest there may be.")
      .def(
          "kv_step",
          [](const Sizes& s, uint32_t context, uint32_t length, const std::string& kv, uint32_t budget, const Heads& heads) {
            return s.kv(context, to_kv_type(kv), to_selection(budget, heads)).step_bytes_at(length);
          },
          nb::arg("context"), nb::arg("length"), nb::arg("kv"), nb::arg("budget"), nb::arg("heads") = Heads(), "Bytes that a step reads of it.");

  m.def(
      "allocated",
      [] {
        Bytes m = nb::dict();
        for (const auto& [what, bytes] : allocated()) m[what.c_str()] = bytes;
        return m;
      },
      "Bytes of the core's large buffers in this process, by what they are for.");

  nb::class_<KvCache>(m, "Cache", "KV cache of one sequence.")
      .def(
          "__init__",
          [](KvCache* self, const Decoder& d, uint32_t context, const std::string& kv, uint32_t budget, uint32_t slots,
             const std::string& directory, uint64_t disk_bytes, uint32_t read_delay_us, const Heads& heads) {
            new (self) KvCache(d.spec(), context, to_kv_type(kv), to_selection(budget, heads),
                               {slots, directory, disk_bytes, read_delay_us});
          },
          nb::arg("model"), nb::arg("context"), nb::arg("kv") = "f16", nb::arg("budget") = 0, nb::arg("slots") = 0,
          nb::arg("directory") = "", nb::arg("disk_bytes") = UINT64_MAX, nb::arg("read_delay_us") = 0, nb::arg("heads") = Heads(),
          "`budget`: tokens that a step chooses for each KV head, in layers that see everything; 0: it reads all.\n"
          "`slots`: pages of these layers in memory, the others in a file in `directory`; 0: all are.\n"
          "`heads`: the window of streaming heads, and by layer a class for each KV head that sees everything:\n0 indexed, 1 full, "
          "2 streaming; empty: all are indexed.")
      .def_prop_ro("tier", &tier_stats,
         "Of the pages: how many there are, how many fit into memory and into the set of a step;\n"
         "what was read, written and waited for; whether the directory lies in memory. None without a tier.")
      .def_prop_ro("page_set", [](const KvCache& c) {
        std::vector<uint32_t> pages;
        for (uint32_t page = 0; c.tier() && page < c.tier()->store().pages(); ++page)
          if (c.readable(page)) pages.push_back(page);
        return pages;
      }, "The pages with an index that the last step of a tier could choose from.")
      .def_prop_ro("length", &KvCache::length)
      .def_prop_ro("context", &KvCache::context)
      .def_prop_ro("nbytes", &KvCache::bytes)
      .def_prop_ro("step_bytes", &KvCache::step_bytes, "Bytes of keys and values a step at this length reads.")
      .def("rewind", &KvCache::rewind, nb::arg("length"))
      .def("save",
           [](const KvCache& c) {
             const std::string s = c.save();
             return nb::bytes(s.data(), s.size());
           })
      .def("load", [](KvCache& c, nb::bytes b) { c.load(std::string(b.c_str(), b.size())); }, nb::arg("state"));
}
