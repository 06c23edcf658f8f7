// Loading: file tensors into packed tiles.
#include <algorithm>
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
  Loader(const GgufFile& file, const ModelSpec& spec, const Kernels& kernels, Pool& pool)
      : file_(file), spec_(spec), lanes_(kernels.lanes), pool_(pool) {}

  Weights load() {
    Arena measure;
    Weights sizes;
    walk(sizes, measure);
    Weights w;
    w.arena = Arena(measure.used(), "the weights");
    walk(w, w.arena);
    return w;
  }

 private:
  const TensorInfo& tensor(const std::string& name, const std::vector<uint64_t>& dims) {
    const TensorInfo* t = file_.find(name);
    if (!t) throw ModelFileError(file_.path(), -1, name, "tensor " + name + " of shape " + shape_text(dims) + " is missing");
    std::vector<uint64_t> found = t->dims;
    while (found.size() > dims.size() && found.back() == 1) found.pop_back();
    if (found != dims)
      throw ModelFileError(file_.path(), int64_t(t->offset), name,
                           "tensor " + name + ": expected shape " + shape_text(dims) + ", found " + shape_text(t->dims));
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
    file_.read(t, 0, raw.data(), raw.size());
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
  void matrices(const std::vector<std::string>& names, uint32_t rows, uint32_t cols,
                const std::vector<PackedMatrix*>& out, size_t& bytes) {
    size_t stride = 0;
    for (size_t i = 0; i < names.size(); ++i) {
      *out[i] = plan(names[i], rows, cols);
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
      pack(*file_.find(names[i]), *out[i]);
    }
  }

  void matrix(const std::string& name, uint32_t rows, uint32_t cols, PackedMatrix& out, size_t& bytes) {
    matrices({name}, rows, cols, {&out}, bytes);
  }

  void pack(const TensorInfo& t, const PackedMatrix& m) {
    const size_t row_bytes = t.nbytes / m.rows;
    // The file is read in pieces of about 256 KiB, whole tiles each.
    const uint32_t per = uint32_t(std::max<size_t>(1, (size_t(256) << 10) / (row_bytes * m.tile_rows)));
    const uint32_t pieces = (m.tiles() + per - 1) / per;
    std::exception_ptr error;
    std::mutex guard;
    pool_.run([&](Pool::Worker& w) {
      std::vector<uint8_t> raw;
      uint32_t begin, end;
      while (w.claim(pieces, begin, end)) try {
          for (uint32_t piece = begin; piece < end; ++piece) {
            const uint32_t first = piece * per * m.tile_rows;
            const uint32_t rows = std::min(per * m.tile_rows, m.rows - first);
            raw.resize(rows * row_bytes);
            file_.read(t, first * row_bytes, raw.data(), raw.size());
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
    matrix("token_embd.weight", spec_.vocab_size, d, w.embedding, w.embedding_bytes);
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
      matrix("output.weight", spec_.vocab_size, d, w.head, w.head_bytes);
  }

  const GgufFile& file_;
  const ModelSpec& spec_;
  uint32_t lanes_;
  Pool& pool_;
  Arena* arena_ = nullptr;
};

}  // namespace

Weights load_weights(const GgufFile& file, const ModelSpec& spec, const Kernels& kernels, Pool& pool) {
  return Loader(file, spec, kernels, pool).load();
}

}  // namespace edgert
