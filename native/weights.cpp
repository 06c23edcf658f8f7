// Loading: file tensors into packed tiles.
#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstring>
#include <exception>
#include <mutex>

#include "decoder.h"
#include "error.h"
#include "formats.h"

namespace edgert {
namespace {

std::string shape_text(const std::vector<uint64_t>& dims) {
  std::string s = "[";
  for (size_t i = dims.size(); i-- > 0;) s += std::to_string(dims[i]) + (i ? ", " : "]");
  return s;
}

// Walks the tensors of the spec twice: first to size the arena, then to fill it.
class Loader {
 public:
  Loader(const GgufFile& file, const ModelSpec& spec, const Sidecars& sidecars, uint32_t lanes)
      : file_(file), spec_(spec), sidecar_(sidecars.flash), retrieval_(sidecars.retrieval), lanes_(lanes) {}

  Weights measure(size_t& arena_bytes) {
    Arena counts;
    Weights sizes;
    if (sidecar_) from(sidecar_, kDense, [&] { read_clusters(sizes.flash); });
    if (retrieval_) from(retrieval_, kNoHead, [&] { read_heads(sizes.retrieval); });
    walk(sizes, counts);
    arena_bytes = counts.used();
    return sizes;
  }

  // Calls f() with tensors and keys from a sidecar.
  template <class F>
  void from(const GgufFile* sidecar, const char* instead, F&& f) {
    from_ = sidecar;
    instead_ = instead;
    f();
    from_ = &file_;
  }

  Weights load(Pool& pool) {
    pool_ = &pool;
    size_t bytes;
    Weights w;
    Weights sizes = measure(bytes);
    w.flash = std::move(sizes.flash);
    w.retrieval = std::move(sizes.retrieval);
    w.arena = Arena(bytes, "the weights");
    walk(w, w.arena);
    return w;
  }

 private:
  const TensorInfo& tensor(const std::string& name, const std::vector<uint64_t>& dims) {
    const TensorInfo* t = from_->find(name);
    if (!t) throw ModelFileError(from_->path(), -1, name, from_->path() + ": tensor " + name + " of shape " + shape_text(dims) + " is missing");
    std::vector<uint64_t> found = t->dims;
    while (found.size() > dims.size() && found.back() == 1) found.pop_back();
    if (found != dims)
      throw ModelFileError(from_->path(), int64_t(t->offset), name,
                           from_->path() + ": tensor " + name + ": expected shape " + shape_text(dims) + ", found " + shape_text(t->dims));
    return *t;
  }

  const float* floats(const std::string& name, const std::vector<uint64_t>& dims, size_t& bytes) {
    const TensorInfo& t = tensor(name, dims);
    size_t n = 1;
    for (uint64_t d : dims) n *= d;
    bytes += n * sizeof(float);
    float* dst = arena_->take<float>(n);
    if (!dst) return nullptr;
    std::vector<uint8_t> raw(t.nbytes);
    from_->read(t, 0, raw.data(), raw.size());
    dequantize(t.type, raw.data(), dst, n);
    return dst;
  }

  const float* vec(const std::string& name, uint32_t n, size_t& bytes) { return floats(name, {n}, bytes); }

  PackedMatrix plan(const std::string& name, uint32_t rows, uint32_t cols) {
    const TensorInfo& t = tensor(name, {cols, rows});
    if (find_format(t.type) && cols % 32 != 0)
      throw UnsupportedModelError("tensor " + name + ": rows of " + std::to_string(cols) +
                                  " quantised weights are not a multiple of 32");
    PackedMatrix m;
    m.type = t.type;
    m.rows = rows;
    m.cols = cols;
    m.tile_rows = lanes_;
    m.stride = packed_tile_bytes(t.type, cols, lanes_);
    return m;
  }

  // Matrices that a step reads side by side lie tile by tile in turn, so that a thread's share of
  // both is one stretch of memory. All have the same rows and cols.
  // With an `order`, row i is that of the file's row order[i], or zeros for kPadding.
  void matrices(const std::vector<std::string>& names, uint32_t rows, uint32_t cols,
                const std::vector<PackedMatrix*>& out, size_t& bytes, const std::vector<uint32_t>& order = {}) {
    size_t stride = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      *out[i] = plan(names[i], rows, cols);
      if (!order.empty()) out[i]->rows = uint32_t(order.size());
      stride += out[i]->stride;
    }
    const uint32_t tiles = out[0]->tiles();
    const size_t size = stride * tiles;
    bytes += size;
    uint8_t* base = arena_->take<uint8_t>(size);
    if (!base) return;
    size_t at = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      const size_t tile = out[i]->stride;
      out[i]->data = base + at;
      out[i]->stride = stride;
      at += tile;
      pack(*from_->find(names[i]), rows, *out[i], order);
    }
  }

  void matrix(const std::string& name, uint32_t rows, uint32_t cols, PackedMatrix& out, size_t& bytes,
              const std::vector<uint32_t>& order = {}) {
    matrices({name}, rows, cols, {&out}, bytes, order);
  }

  void pack(const TensorInfo& t, uint32_t file_rows, const PackedMatrix& m, const std::vector<uint32_t>& order) {
    const size_t row_bytes = t.nbytes / file_rows;
    // The file is read in pieces of about 256 KiB, whole tiles each.
    const uint32_t per = uint32_t(std::max<size_t>(1, (size_t(256) << 10) / (row_bytes * m.tile_rows)));
    const uint32_t pieces = (m.tiles() + per - 1) / per;
    std::exception_ptr error;
    std::mutex guard;
    pool_->run([&](Pool::Worker& w) {
      std::vector<uint8_t> raw;
      uint32_t begin, end;
      while (w.claim(pieces, begin, end)) try {
          for (uint32_t piece = begin; piece < end; ++piece) {
            const uint32_t first = piece * per * m.tile_rows;
            const uint32_t rows = std::min(per * m.tile_rows, m.rows - first);
            raw.resize(rows * row_bytes);
            if (order.empty()) from_->read(t, first * row_bytes, raw.data(), raw.size());
            for (uint32_t r = 0; r < rows && !order.empty(); ++r) {
              uint8_t* dst = raw.data() + r * row_bytes;
              if (const uint32_t row = order[first + r]; row != FlashHead::kPadding)
                from_->read(t, row * row_bytes, dst, row_bytes);
              else
                std::memset(dst, 0, row_bytes);  // zeros in every type
            }
            for (uint32_t r = 0; r < rows; r += m.tile_rows)
              pack_tile(m.type, raw.data() + r * row_bytes, std::min(m.tile_rows, rows - r), m.cols, m.tile_rows,
                        const_cast<uint8_t*>(m.tile((first + r) / m.tile_rows)));
          }
        } catch (...) {
          const std::lock_guard lock(guard);
          error = std::current_exception();
        }
    });
    if (error) std::rethrow_exception(error);
  }

  void walk(Weights& w, Arena& arena) {
    arena_ = &arena;
    const uint32_t d = spec_.dim, hd = spec_.head_dim, f = spec_.ffn_dim;
    const std::vector<uint32_t> in_order, &head_order = w.flash.token;
    matrix("token_embd.weight", spec_.vocab_size, d, w.embedding, w.embedding_bytes, spec_.tied_head ? head_order : in_order);
    w.output_norm = vec(spec_.output_norm, d, w.body_bytes);
    if (spec_.rope_factors) w.rope_factors = vec("rope_freqs.weight", spec_.rope_dims / 2, w.body_bytes);
    w.layers.assign(spec_.layers.size(), {});
    for (size_t i = 0; i < spec_.layers.size(); ++i) {
      const std::string b = "blk." + std::to_string(i) + ".";
      LayerWeights& l = w.layers[i];
      const auto norm = [&](const char* name, uint32_t n) { return vec(b + name, n, w.body_bytes); };
      l.attn_norm = norm("attn_norm.weight", d);
      if (spec_.layers[i].conv) {
        matrix(b + "shortconv.in_proj.weight", 3 * d, d, l.q, w.body_bytes);
        l.conv = floats(b + "shortconv.conv.weight", {spec_.conv_kernel, d}, w.body_bytes);
        matrix(b + "shortconv.out_proj.weight", d, d, l.output, w.body_bytes);
      } else {
        const uint32_t q = spec_.n_heads * hd, kv = spec_.layers[i].n_kv_heads * hd;
        matrix(b + "attn_q.weight", q, d, l.q, w.body_bytes);
        matrix(b + "attn_k.weight", kv, d, l.k, w.body_bytes);
        matrix(b + "attn_v.weight", kv, d, l.v, w.body_bytes);
        matrix(b + "attn_output.weight", d, q, l.output, w.body_bytes);
        if (spec_.qkv_bias) {
          l.q_bias = norm("attn_q.bias", q);
          l.k_bias = norm("attn_k.bias", kv);
          l.v_bias = norm("attn_v.bias", kv);
        }
        if (spec_.qk_norm) {
          l.q_norm = norm("attn_q_norm.weight", hd);
          l.k_norm = norm("attn_k_norm.weight", hd);
        }
      }
      if (spec_.post_norms) {
        l.post_attn_norm = norm("post_attention_norm.weight", d);
        l.post_ffn_norm = norm("post_ffw_norm.weight", d);
      }
      l.ffn_norm = norm("ffn_norm.weight", d);
      matrices({b + "ffn_gate.weight", b + "ffn_up.weight"}, f, d, {&l.gate, &l.up}, w.body_bytes);
      matrix(b + "ffn_down.weight", d, f, l.down, w.body_bytes);
    }
    if (spec_.tied_head)
      w.head = w.embedding;
    else
      matrix("output.weight", spec_.vocab_size, d, w.head, w.head_bytes, head_order);
    if (sidecar_) from(sidecar_, kDense, [&] { routers(w.flash); });
    if (retrieval_) from(retrieval_, kNoHead, [&] { queries(w.retrieval); });
  }

  [[noreturn]] void refuse(const std::string& key, const std::string& what) const {
    throw ModelFileError(from_->path(), -1, key, from_->path() + ": " + key + ": " + what + "; export the sidecar again, or " + instead_);
  }

  const std::vector<int32_t>& integers(const std::string& key) const {
    const MetaValue* value = from_->get(key);
    const auto* found = value ? std::get_if<std::vector<int32_t>>(&value->v) : nullptr;
    if (!found) refuse(key, "expected an array of int32, found " + std::string(value ? "something else" : "nothing"));
    return *found;
  }

  uint32_t unit_of(const FlashHead& f, int32_t id, const std::string& key) const {
    if (id < 0 || uint32_t(id) >= spec_.vocab_size)
      refuse(key, "expected token ids below " + std::to_string(spec_.vocab_size) + ", found " + std::to_string(id));
    return f.row[size_t(id)] / FlashHead::kUnit;
  }

  // Which token each row of the head belongs to.
  void read_clusters(FlashHead& f) const {
    const std::string size_key = "edgert.head.cluster_size", key = "edgert.head.tokens";
    const MetaValue* size = from_->get(size_key);
    const auto* value = size ? std::get_if<uint64_t>(&size->v) : nullptr;
    if (!value || *value == 0 || *value % FlashHead::kUnit != 0 || *value > 4096)
      refuse(size_key, "expected a multiple of 16 up to 4096");
    f.cluster_size = uint32_t(*value);
    const std::vector<int32_t>& tokens = integers(key);
    if (tokens.empty() || tokens.size() % f.cluster_size != 0 || tokens.size() > size_t(spec_.vocab_size) + 1024 * size_t(f.cluster_size))
      refuse(key, "expected whole clusters of " + std::to_string(f.cluster_size) + " for a vocabulary of " +
                      std::to_string(spec_.vocab_size) + ", found " + std::to_string(tokens.size()) + " rows");
    f.clusters = uint32_t(tokens.size() / f.cluster_size);
    f.row.assign(spec_.vocab_size, FlashHead::kPadding);
    for (size_t i = 0; i < tokens.size(); ++i) {
      const int32_t id = tokens[i];
      f.token.push_back(id == -1 ? FlashHead::kPadding : uint32_t(id));
      if (id == -1) continue;
      if (id < 0 || uint32_t(id) >= spec_.vocab_size || f.row[size_t(id)] != FlashHead::kPadding)
        refuse(key, "row " + std::to_string(i) + " names token " + std::to_string(id) + ", which is outside the vocabulary or there twice");
      f.row[size_t(id)] = uint32_t(i);
    }
    for (uint32_t id = 0; id < spec_.vocab_size; ++id)
      if (f.row[id] == FlashHead::kPadding) refuse(key, "token " + std::to_string(id) + " has no row");
    for (int32_t id : integers("edgert.head.special")) {
      const uint32_t unit = unit_of(f, id, "edgert.head.special");
      if (std::find(f.special.begin(), f.special.end(), unit) == f.special.end()) f.special.push_back(unit);
    }
  }

  // The tensors that score clusters and units.
  void routers(FlashHead& f) {
    f.bytes = 0;
    const TensorInfo* projection = from_->find("head.projection");
    if (!projection || from_->find("head.routers")) {
      finite_matrix("head.routers", f.clusters, spec_.dim, f.routers, f.bytes);
      f.bias = finite_vector("head.bias", f.clusters, f.bytes);
    }
    if (!projection) return;
    const uint64_t rank = projection->dims.size() == 2 ? projection->dims[1] : 0;
    if (rank == 0 || rank % 32 != 0 || rank > spec_.dim) refuse("head.projection", "expected a rank that is a multiple of 32");
    finite_matrix("head.projection", uint32_t(rank), spec_.dim, f.projection, f.bytes);
    finite_matrix("head.rows", uint32_t(f.token.size()), uint32_t(rank), f.low, f.bytes);
  }

  // The attention heads whose queries a retrieval head predicts.
  void read_heads(RetrievalHead& r) const {
    const std::string layer_key = "edgert.retrieval.layers", head_key = "edgert.retrieval.heads";
    const std::vector<int32_t>&layers = integers(layer_key), &heads = integers(head_key);
    if (heads.empty() || layers.size() != heads.size()) refuse(head_key, "expected a head for each of the layers, and one at least");
    for (size_t i = 0; i < heads.size(); ++i) {
      const int32_t layer = layers[i], head = heads[i];
      if (layer < 0 || size_t(layer) >= spec_.layers.size() || spec_.layers[size_t(layer)].conv || spec_.layers[size_t(layer)].window)
        refuse(layer_key, "layer " + std::to_string(layer) + " is none that sees everything");
      const LayerSpec& l = spec_.layers[size_t(layer)];
      if (head < 0 || uint32_t(head) >= l.n_kv_heads || l.n_kv_heads != spec_.layers[size_t(layers[0])].n_kv_heads)
        refuse(head_key, "layer " + std::to_string(layer) + " has no such head of keys as " + std::to_string(head));
      r.heads.push_back({uint32_t(layer), uint32_t(head), 0});
    }
    const TensorInfo* down = from_->find("retrieval.down");
    const uint64_t rank = down && down->dims.size() == 2 ? down->dims[1] : 0;
    if (rank == 0 || rank % 32 != 0 || rank > 2 * spec_.dim) refuse("retrieval.down", "expected a rank that is a multiple of 32");
    r.rank = uint32_t(rank);
  }

  void queries(RetrievalHead& r) {
    r.bytes = 0;
    const uint32_t n = uint32_t(r.heads.size());
    const uint32_t rows = n * (spec_.n_heads / spec_.layers[r.heads[0].layer].n_kv_heads) * spec_.head_dim;
    finite_matrix("retrieval.down", r.rank, 2 * spec_.dim, r.down, r.bytes);
    finite_matrix("retrieval.up", rows, r.rank, r.up, r.bytes);
    for (const PackedMatrix* m : {&r.down, &r.up})
      if (!find_format(m->type)) refuse(m == &r.down ? "retrieval.down" : "retrieval.up", "expected quantised numbers");
    r.bias = finite_vector("retrieval.bias", rows, r.bytes);
    const float* const worth = finite_vector("retrieval.worth", n, r.bytes);
    for (uint32_t i = 0; worth && i < n; ++i) r.heads[i].worth = worth[i];
  }

  const float* finite_vector(const std::string& name, uint32_t n, size_t& bytes) {
    const float* const x = vec(name, n, bytes);
    if (x && !std::all_of(x, x + n, [](float v) { return std::isfinite(v); })) refuse(name, "expected numbers, found NaN or infinity");
    return x;
  }

  void finite_matrix(const std::string& name, uint32_t rows, uint32_t cols, PackedMatrix& out, size_t& bytes) {
    matrix(name, rows, cols, out, bytes);
    if (!out.data) return;
    std::atomic<uint32_t> bad{rows};  // the first row that is no good
    pool_->run([&](Pool::Worker& w) {
      std::vector<float> row(cols);
      uint32_t b, e;
      while (w.claim(rows, b, e))
        for (uint32_t r = b; r < e && r < bad; ++r) {
          unpack_row(out, r, row.data());
          if (std::all_of(row.begin(), row.end(), [](float x) { return std::isfinite(x); })) continue;
          uint32_t first = bad;
          while (r < first && !bad.compare_exchange_weak(first, r)) {
          }
        }
    });
    if (bad < rows) refuse(name, "row " + std::to_string(bad) + ": expected numbers, found NaN or infinity");
  }

  const GgufFile& file_;
  const ModelSpec& spec_;
  const GgufFile* sidecar_;
  const GgufFile* retrieval_;
  const GgufFile* from_ = &file_;  // where tensors are looked for
  static constexpr const char* kDense = "use the dense head (--head dense)";
  static constexpr const char* kNoHead = "remove it";
  const char* instead_ = "";  // what to do without it
  uint32_t lanes_;
  Pool* pool_ = nullptr;
  Arena* arena_ = nullptr;
};

}  // namespace

Weights load_weights(const GgufFile& file, const ModelSpec& spec, const Sidecars& sidecars, const Kernels& kernels,
                     Pool& pool) {
  return Loader(file, spec, sidecars, kernels.lanes).load(pool);
}

Weights plan_weights(const GgufFile& file, const ModelSpec& spec, const Sidecars& sidecars, uint32_t lanes,
                     size_t& arena_bytes) {
  return Loader(file, spec, sidecars, lanes).measure(arena_bytes);
}

}  // namespace edgert
