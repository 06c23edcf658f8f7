// The forward pass: Decoder::forward and the steps of one chunk as each thread runs them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "error.h"
#include "formats.h"
#include "scratch.h"
#include "sparse.h"

namespace edgert {
namespace {

constexpr size_t kFetchAhead = 65536;  // bytes asked for at a barrier; a part of any L2

bool quantised(const PackedMatrix& m) { return find_format(m.type) != nullptr; }

}  // namespace

// One forward pass over a chunk as one thread sees it.
struct Decoder::Pass {
  Decoder& d;
  KvCache& cache;
  Pool::Worker& w;
  const int32_t* tokens;
  uint32_t n, start;
  Want want;
  bool sparse;     // a token that reads of records what the index chooses
  uint32_t index;  // blocks that have one in this pass

  const ModelSpec& s = d.spec_;
  const Kernels& k = d.kernels_;
  const KvKernels& attn = k.kv[size_t(cache.type())];
  Scratch& sc = *d.scratch_;
  Scratch::Private& me = sc.threads[w.index()];
  // A single token that reads all records goes the way of many: only that one turns them into pages.
  bool one = n == 1 && (sparse || !cache.selection().budget);
  float* x = one ? me.x : sc.x;
  Input in = one ? me.in : sc.in;

  void set_cols(uint32_t cols, uint32_t parts = 1) {
    in.q.cols = cols;
    in.q.parts = parts;
  }

  // Calls f(token) for this thread's tokens; a single token is everybody's.
  template <class F>
  void for_tokens(F&& f) {
    if (one) return f(0);
    uint32_t b, e;
    while (w.claim(n, b, e))
      for (uint32_t i = b; i < e; ++i) f(i);
  }
  void meet() {
    if (!one) w.barrier();
  }

  // A decode step is a chain of short reads with a barrier behind each; memory should not stand still
  // while a thread waits there. These name what it reads behind the barrier.
  void barrier_before(const PackedMatrix& m) {
    if (!one) return w.barrier();
    const uint32_t lo = m.tiles() * w.index() / w.threads(), hi = m.tiles() * (w.index() + 1) / w.threads();
    w.barrier(m.tile(lo), std::min(kFetchAhead, size_t(hi - lo) * m.stride));
  }

  void matmul(const PackedMatrix& m, uint32_t begin, uint32_t end, uint32_t count, float* y, size_t stride) const {
    if (quantised(m))
      k.matmul(m, begin, end, in.q, count, y, stride);
    else
      k.matmul_float(m, begin, end, in.f, count, y, stride);
  }

  // Makes token i's input of `in.q.cols` values from src (which may be its place in in.f).
  void set_input(uint32_t i, const float* src, bool quant) const {
    const uint32_t cols = in.q.cols;
    float* dst = in.f + size_t(i) * cols;
    if (quant)
      k.quantize(src, in.q.token(i));
    else if (src != dst)
      std::memcpy(dst, src, cols * sizeof(float));
  }

  // Adds the last block's output to the residual stream and makes the next block's input.
  void enter(bool add, const float* post_norm, const float* norm, bool quant, uint32_t parts = 1) {
    set_cols(s.dim, parts);
    for_tokens([&](uint32_t i) {
      float* xi = x + size_t(i) * s.dim;
      if (add) {
        const float* y = sc.y + size_t(i) * padded(s.dim);
        if (post_norm) {
          k.rmsnorm(y, post_norm, s.norm_eps, s.dim, me.tmp);
          y = me.tmp;
        }
        k.add(xi, y, s.dim);
      }
      if (!norm) return;
      float* h = in.f + size_t(i) * s.dim;
      k.rmsnorm(xi, norm, s.norm_eps, s.dim, h);
      set_input(i, h, quant);
    });
    meet();
  }

  void embed() {
    for_tokens([&](uint32_t i) {
      float* xi = x + size_t(i) * s.dim;
      const std::vector<uint32_t>& row = d.weights_.flash.row;
      const bool moved = s.tied_head && !row.empty();
      unpack_row(d.weights_.embedding, moved ? row[size_t(tokens[i])] : uint32_t(tokens[i]), xi);
      if (s.embed_scale != 1.0f)
        for (uint32_t c = 0; c < s.dim; ++c) xi[c] *= s.embed_scale;
    });
    meet();
  }

  // cos and sin of every pair at every position of the chunk.
  void rope_tables() {
    const uint32_t pairs = s.rope_dims / 2;
    if (one && w.index() != 0) return;
    for_tokens([&](uint32_t i) {
      for (size_t r = 0; r < sc.ropes.size(); ++r)
        for (uint32_t p = 0; p < pairs; ++p) {
          // In float, as the reference implementations have it: at position 8,000 a double angle
          // would differ from theirs by more than their own rounding.
          const float a = float(start + i) * sc.inv_freq[r][p];
          const size_t at = (r * kMaxChunk + i) * pairs + p;
          sc.cos[at] = float(std::cos(double(a)));
          sc.sin[at] = float(std::sin(double(a)));
        }
    });
    meet();
  }

  void rotate(float* h, uint32_t layer, uint32_t i) const {
    const uint32_t pairs = s.rope_dims / 2;
    const size_t at = (size_t(sc.rope_of[layer]) * kMaxChunk + i) * pairs;
    const float *c = sc.cos + at, *sn = sc.sin + at;
    for (uint32_t p = 0; p < pairs; ++p) {
      const uint32_t a = s.rope_interleaved ? 2 * p : p, b = s.rope_interleaved ? a + 1 : p + pairs;
      const float u = h[a], v = h[b];
      h[a] = u * c[p] - v * sn[p];
      h[b] = u * sn[p] + v * c[p];
    }
  }

  // Norm and rope of one query head of token i, in place, times the attention scale and log2(e), as the
  // type of the cache wants it.
  void make_query(uint32_t layer, uint32_t i, uint32_t head) const {
    float* q = sc.q + size_t(i) * sc.q_cols + size_t(head) * s.head_dim;
    if (const float* norm = d.weights_.layers[layer].q_norm) k.rmsnorm(q, norm, s.norm_eps, s.head_dim, q);
    rotate(q, layer, i);
    const float scale = s.attn_scale * 1.44269504088896341f;
    for (uint32_t c = 0; c < s.head_dim; ++c) q[c] *= scale;
    if (!sparse || !cache.records(layer)) attn.code_query(q, s.head_dim);
  }

  // Norm and rope of one key head of token i; key and value go to their page.
  void append(uint32_t layer, uint32_t i, uint32_t head) const {
    const uint32_t hd = s.head_dim, pos = start + i;
    const size_t at = size_t(i) * sc.kv_cols + size_t(head) * hd;
    float key[kMaxHeadDim];
    if (const float* norm = d.weights_.layers[layer].k_norm)
      k.rmsnorm(sc.k + at, norm, s.norm_eps, hd, key);
    else
      std::memcpy(key, sc.k + at, hd * sizeof(float));
    rotate(key, layer, i);
    if (cache.records(layer))
      return k.records[size_t(cache.type())].append(key, sc.v + at, hd, cache.record(layer, head, pos));
    const uint32_t page = pos / kPageTokens;
    attn.append(key, sc.v + at, hd, pos % kPageTokens, cache.keys(layer, head, page), cache.values(layer, head, page));
  }

  // Norm and rope of every head; keys and values go to their pages.
  void prepare_heads(uint32_t layer) {
    const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, each = s.n_heads + s.layers[layer].n_kv_heads;
    uint32_t b, e;
    while (w.claim(n * each, b, e))
      for (uint32_t item = b; item < e; ++item) {
        // A key head, then its query heads: the shares of the threads cost the same.
        const uint32_t i = item / each, head = item % each / (group + 1), g = item % each % (group + 1);
        if (g == 0)
          append(layer, i, head);
        else
          make_query(layer, i, head * group + g - 1);
      }
  }

  // Attention of `rows` queries (several heads of a group, several tokens) to one chunk.
  struct Rows {
    const float* q[kRowsAtOnce];
    float* acc[kRowsAtOnce];
    uint32_t position[kRowsAtOnce];
    float *max, *sum;
    uint32_t count;
  };

  // The pages of a chunk up to position `end`.
  struct Pages {
    const uint8_t *keys[kChunkPages], *values[kChunkPages];
  };
  void find_pages(uint32_t layer, uint32_t kv_head, uint32_t chunk, uint32_t end, Pages& found) const {
    const uint32_t first = chunk * kChunkPages, last = std::min(first + kChunkPages, (end + kPageTokens - 1) / kPageTokens);
    const bool records = cache.records(layer);
    for (uint32_t p = first; p < last; ++p) {
      if (records) {
        uint8_t *keys = me.keys.data() + (p - first) * cache.page_bytes(), *values = me.values.data() + (p - first) * cache.page_bytes();
        k.records[size_t(cache.type())].to_page(cache.record(layer, kv_head, p * kPageTokens), s.head_dim, keys, values);
        found.keys[p - first] = keys;
        found.values[p - first] = values;
      } else {
        found.keys[p - first] = cache.keys(layer, kv_head, p);
        found.values[p - first] = cache.values(layer, kv_head, p);
      }
    }
  }

  void attend_chunk(uint32_t layer, uint32_t chunk, const Pages& pages, const Rows& r) const {
    const uint32_t window = s.layers[layer].window, base = chunk * kChunkTokens;
    uint32_t lo[kRowsAtOnce], hi[kRowsAtOnce];
    uint32_t first = kChunkTokens, last = 0;
    for (uint32_t i = 0; i < r.count; ++i) {
      const uint32_t end = r.position[i] + 1, begin = window && end > window ? end - window : 0;
      lo[i] = std::min(std::max(begin, base) - base, kChunkTokens);
      hi[i] = std::min(std::max(end, base) - base, kChunkTokens);
      if (lo[i] < hi[i]) first = std::min(first, lo[i]), last = std::max(last, hi[i]);
    }
    if (first >= last) return;
    attn.attend({r.q, pages.keys, pages.values, lo, hi, r.count, s.head_dim, me.scores, r.acc, r.max, r.sum});
  }

  void finish_rows(const Rows& r) const {
    for (uint32_t i = 0; i < r.count; ++i) {
      const float f = 1.0f / r.sum[i];
      for (uint32_t c = 0; c < s.head_dim; ++c) r.acc[i][c] *= f;
    }
  }

  // Prefill: an item is one KV head and a few tokens; their rows share every page read. What it costs to make
  // pages of records is shared by several batches of rows.
  void attend_many(uint32_t layer) {
    const uint32_t kv = s.layers[layer].n_kv_heads, group = s.n_heads / kv, hd = s.head_dim;
    // The input of q, k and v has been read: its place takes the output.
    const uint32_t batch = std::max(1u, kRowsAtOnce / group), block = cache.records(layer) ? kRecordBatches * batch : batch;
    const uint32_t blocks = (n + block - 1) / block, window = s.layers[layer].window;
    uint32_t b, e;
    while (w.claim(blocks * kv, b, e))
      for (uint32_t item = b; item < e; ++item) {
        const uint32_t head = item % kv, first = item / kv * block, count = std::min(block, n - first);
        const uint32_t end = start + first + count, seen = start + first + 1;
        const uint32_t begin = window && seen > window ? seen - window : 0;
        std::fill_n(me.sum, count * group, 0.0f);
        // Calls f(rows) for `batch` tokens at a time, in more than one round when a group is huge.
        const auto for_rows = [&](auto&& f) {
          for (uint32_t i0 = 0; i0 < count; i0 += batch)
            for (uint32_t g0 = 0; g0 < group; g0 += kRowsAtOnce) {
              const uint32_t gs = std::min(group - g0, kRowsAtOnce);
              Rows r{};
              r.count = std::min(batch, count - i0) * gs;
              r.max = me.max + i0 * group + g0, r.sum = me.sum + i0 * group + g0;
              for (uint32_t row = 0; row < r.count; ++row) {
                const uint32_t i = first + i0 + row / gs;
                const size_t at = size_t(i) * sc.q_cols + size_t(head * group + g0 + row % gs) * hd;
                r.q[row] = sc.q + at;
                r.acc[row] = in.f + at;
                r.position[row] = start + i;
              }
              f(r);
            }
        };
        for (uint32_t c = begin / kChunkTokens; c * kChunkTokens < end; ++c) {
          Pages pages;
          find_pages(layer, head, c, end, pages);
          for_rows([&](const Rows& r) { attend_chunk(layer, c, pages, r); });
        }
        for_rows([&](const Rows& r) { finish_rows(r); });
      }
    w.barrier();
    set_cols(sc.q_cols);
    for_tokens([&](uint32_t i) {
      set_input(i, in.f + size_t(i) * sc.q_cols, quantised(d.weights_.layers[layer].output));
    });
    w.barrier();
  }

  // How one token's attention is cut into items. A row is one query head and one chunk of the context;
  // rows are counted by KV head, chunk, query head, and those of one KV head and chunk that meet in a
  // thread share the read of its pages. An item is all of these or, when there are few, one row. The
  // cut never changes a bit: rows are independent.
  struct Cut {
    uint32_t first, chunks;  // chunks of the context
    uint32_t rows, items;    // rows of an item
    uint32_t least;          // items to claim at once: few of them are cut in equal shares
  };
  Cut cut(uint32_t layer) const {
    const uint32_t kv = s.layers[layer].n_kv_heads, group = s.n_heads / kv, window = s.layers[layer].window;
    const uint32_t end = start + 1, first = (window && end > window ? end - window : 0) / kChunkTokens;
    const uint32_t chunks = (end + kChunkTokens - 1) / kChunkTokens - first;
    if (chunks * kv < 4 * w.threads()) return {first, chunks, 1, s.n_heads * chunks, s.n_heads * chunks};
    return {first, chunks, group, kv * chunks, 1};
  }

  void barrier_before_attention(uint32_t layer) {
    if (!one || cache.records(layer)) return w.barrier();
    const Cut c = cut(layer);
    const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, window = s.layers[layer].window, end = start + 1;
    const uint32_t stretch = c.items * w.index() / w.threads() * c.rows / group;
    const uint32_t low = window && end > window ? end - window : 0;
    const uint32_t page = std::max(low, (c.first + stretch % c.chunks) * kChunkTokens) / kPageTokens;
    const size_t pages = std::min(kChunkPages - page % kChunkPages, (end - 1) / kPageTokens + 1 - page);
    w.barrier(cache.keys(layer, stretch / c.chunks, page), std::min(kFetchAhead, pages * cache.page_bytes()));
  }

  void attend_one(uint32_t layer) {
    const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, hd = s.head_dim;
    const Cut cut = this->cut(layer);
    const size_t size = hd + 2;
    uint32_t b, e;
    while (w.claim(cut.items, b, e, cut.least))
      for (uint32_t row = b * cut.rows; row < e * cut.rows;) {
        const uint32_t chunk = row / group % cut.chunks, kv_head = row / group / cut.chunks, first = row % group;
        Rows r{};
        r.max = me.max, r.sum = me.sum, r.count = std::min({group - first, e * cut.rows - row, kRowsAtOnce});
        row += r.count;
        for (uint32_t i = 0; i < r.count; ++i) {
          const uint32_t head = kv_head * group + first + i;
          r.q[i] = sc.q + size_t(head) * hd;
          r.acc[i] = sc.partial.data() + (size_t(chunk) * s.n_heads + head) * size;
          r.position[i] = start;
          r.sum[i] = 0;
        }
        Pages pages;
        find_pages(layer, kv_head, cut.first + chunk, start + 1, pages);
        attend_chunk(layer, cut.first + chunk, pages, r);
        for (uint32_t i = 0; i < r.count; ++i) r.acc[i][hd] = r.max[i], r.acc[i][hd + 1] = r.sum[i];
      }
    join_parts(layer, cut.chunks);
  }

  void attend_sparse(uint32_t layer) {
    SparseStep step{s, k, cache, w, sc, me, SparseCut(cache, start)};
    step.attend(layer);
    join_parts(layer, step.cut.parts());
  }

  // Makes the output of one token's attention of partial results.
  void join_parts(uint32_t layer, uint32_t parts) {
    const uint32_t hd = s.head_dim;
    const size_t size = hd + 2;
    barrier_before(d.weights_.layers[layer].output);
    set_cols(sc.q_cols);
    for (uint32_t h = 0; h < s.n_heads; ++h) {
      float* out = in.f + size_t(h) * hd;
      const float* p = sc.partial.data() + size_t(h) * size;
      std::memcpy(out, p, hd * sizeof(float));
      float max = p[hd], sum = p[hd + 1];
      for (uint32_t c = 1; c < parts; ++c) {
        p += s.n_heads * size;
        k.merge(&max, &sum, out, p[hd], p[hd + 1], p, hd);
      }
      const float f = 1.0f / sum;
      for (uint32_t i = 0; i < hd; ++i) out[i] *= f;
    }
    set_input(0, in.f, quantised(d.weights_.layers[layer].output));
  }

  void add_bias(float* y, size_t stride, const float* bias, uint32_t begin, uint32_t end) const {
    if (!bias) return;
    for (uint32_t i = 0; i < n; ++i)
      for (uint32_t r = begin; r < end; ++r) y[i * stride + r] += bias[r];
  }

  void attention(uint32_t layer) {
    const LayerWeights& l = d.weights_.layers[layer];
    // q, k and v are one run of tiles.
    struct Part {
      const PackedMatrix* m;
      float* y;
      const float* bias;
      size_t stride;
    };
    const Part parts[] = {{&l.q, sc.q, l.q_bias, sc.q_cols},
                          {&l.k, sc.k, l.k_bias, sc.kv_cols},
                          {&l.v, sc.v, l.v_bias, sc.kv_cols}};
    uint32_t b, e;
    while (w.claim(l.q.tiles() + l.k.tiles() + l.v.tiles(), b, e)) {
      uint32_t at = 0;  // first tile of the part in the run
      for (const Part& p : parts) {
        const uint32_t lo = std::max(b, at), hi = std::min(e, at + p.m->tiles());
        if (lo < hi) {
          const uint32_t row = (lo - at) * p.m->tile_rows, end = std::min((hi - at) * p.m->tile_rows, p.m->rows);
          matmul(*p.m, lo - at, hi - at, n, p.y + row, p.stride);
          add_bias(p.y, p.stride, p.bias, row, end);
        }
        at += p.m->tiles();
      }
    }
    w.barrier();
    prepare_heads(layer);
    barrier_before_attention(layer);
    if (!one)
      attend_many(layer);
    else if (cache.records(layer))
      attend_sparse(layer);
    else
      attend_one(layer);
    project(l.output, l.gate);
  }

  // y = m * in; `next` is the matrix read after it.
  void project(const PackedMatrix& m, const PackedMatrix& next) {
    uint32_t b, e;
    while (w.claim(m.tiles(), b, e)) matmul(m, b, e, n, sc.y + size_t(b) * m.tile_rows, padded(s.dim));
    barrier_before(next);
  }

  // LFM2: y = out(C * conv(B * x)) with (B, C, x) = in(h); causal, depthwise, conv_kernel taps.
  void convolution(uint32_t layer) {
    const LayerWeights& l = d.weights_.layers[layer];
    const uint32_t dim = s.dim, taps = s.conv_kernel;
    const size_t stride = padded(3 * dim);
    float* bcx = sc.gate;  // wide enough: checked at load
    uint32_t b, e;
    while (w.claim(l.q.tiles(), b, e)) matmul(l.q, b, e, n, bcx + size_t(b) * l.q.tile_rows, stride);
    w.barrier();
    constexpr uint32_t kChannels = 32;
    while (w.claim((dim + kChannels - 1) / kChannels, b, e)) {
      const uint32_t lo = b * kChannels, hi = std::min(dim, e * kChannels);
      for (uint32_t i = 0; i < n; ++i)
        for (uint32_t c = lo; c < hi; ++c) bcx[i * stride + c] *= bcx[i * stride + 2 * dim + c];
      for (uint32_t i = 0; i < n; ++i)
        for (uint32_t c = lo; c < hi; ++c) {
          float sum = 0;
          for (uint32_t t = 0; t < taps; ++t) {
            const uint32_t back = taps - 1 - t;
            float input = 0;
            if (back <= i)
              input = bcx[(i - back) * stride + c];
            else if (start + i >= back)
              input = cache.conv_input(layer, start + i - back)[c];
            sum += l.conv[size_t(c) * taps + t] * input;
          }
          sc.conv[i * size_t(dim) + c] = sum * bcx[i * stride + dim + c];
        }
      for (uint32_t i = n > kConvRing ? n - kConvRing : 0; i < n; ++i)
        std::memcpy(cache.conv_input(layer, start + i) + lo, bcx + i * stride + lo, (hi - lo) * sizeof(float));
    }
    w.barrier();
    set_cols(dim);
    for_tokens([&](uint32_t i) { set_input(i, sc.conv + size_t(i) * dim, quantised(l.output)); });
    meet();
    project(l.output, l.gate);
  }

  void ffn(uint32_t layer) {
    const LayerWeights& l = d.weights_.layers[layer];
    const auto gated = s.gelu ? k.gate_gelu : k.gate_silu;
    const size_t stride = padded(s.ffn_dim);
    uint32_t b, e;
    while (w.claim(l.gate.tiles(), b, e)) {
      const uint32_t row = b * l.gate.tile_rows, rows = std::min(e * l.gate.tile_rows, s.ffn_dim) - row;
      for (uint32_t t = b; t < e; ++t) {
        matmul(l.gate, t, t + 1, n, sc.gate + size_t(t) * l.gate.tile_rows, stride);
        matmul(l.up, t, t + 1, n, sc.up + size_t(t) * l.up.tile_rows, stride);
      }
      for (uint32_t i = 0; i < n; ++i) gated(sc.gate + i * stride + row, sc.up + i * stride + row, rows, sc.up + i * stride + row);
    }
    barrier_before(l.down);
    set_cols(s.ffn_dim);
    for_tokens([&](uint32_t i) { set_input(i, sc.up + i * stride, quantised(l.down)); });
    meet();
    project(l.down, layer + 1 < s.layers.size() ? d.weights_.layers[layer + 1].q : d.weights_.head);
  }

  void run() {
    if (index > cache.indexed()) make_index(s, k, cache, w, index);
    embed();
    rope_tables();
    const float* post = nullptr;
    for (uint32_t i = 0; i < s.layers.size(); ++i) {
      const LayerWeights& l = d.weights_.layers[i];
      const bool conv = s.layers[i].conv;
      // Attention's input in two parts: of all roundings of activations those in front of the softmax cost
      // the distribution of the next token most (docs/kernel-log.md), and q, k and v are small matrices.
      enter(i > 0, post, l.attn_norm, quantised(l.q) || (!conv && (quantised(l.k) || quantised(l.v))), conv ? 1 : 2);
      if (conv)
        convolution(i);
      else
        attention(i);
      enter(true, l.post_attn_norm, l.ffn_norm, quantised(l.gate) || quantised(l.up));
      ffn(i);
      post = l.post_ffn_norm;
    }
    if (want == Want::None) return;
    enter(true, post, nullptr, false);
    if (one && w.index() == 0) std::memcpy(sc.x, x, s.dim * sizeof(float));
  }
};

void Decoder::forward(KvCache& cache, const int32_t* tokens, uint32_t n, Want want, float* out, bool full) {
  for (uint32_t i = 0; i < n; ++i)
    if (tokens[i] < 0 || uint32_t(tokens[i]) >= spec_.vocab_size)
      throw EngineError("token id " + std::to_string(tokens[i]) + " is outside the vocabulary of " +
                        std::to_string(spec_.vocab_size));
  const std::lock_guard lock(turn_);
  if (n > cache.context() - cache.length() || n == 0)
    throw EngineError(n == 0 ? "no tokens to append"
                             : "the sequence would be " + std::to_string(size_t(cache.length()) + n) +
                                   " tokens, the context holds " + std::to_string(cache.context()) +
                                   ": shorten the prompt or load with a larger context");
  cache.reserve(cache.length() + n);
  scratch_->reserve(spec_, cache, cache.length() + n);
  for (uint32_t done = 0; done < n;) {
    const uint32_t count = std::min(n - done, kMaxChunk), start = cache.length();
    const Want now = want == Want::Last && done + count < n ? Want::None : want;
    const bool sparse = cache.selection().budget && n == 1 && !full;
    const uint32_t index = cache.selection().budget ? index_reach(cache, count) : 0;
    pool_.run([&](Pool::Worker& w) { Pass{*this, cache, w, tokens + done, count, start, now, sparse, index}.run(); });
    cache.set_indexed(index);
    if (now == Want::Last) score(scratch_->x + size_t(count - 1) * spec_.dim, 1, out);
    if (now == Want::All) score(scratch_->x, count, out + size_t(done) * spec_.vocab_size);
    if (now == Want::Hidden) std::memcpy(out + size_t(done) * spec_.dim, scratch_->x, size_t(count) * spec_.dim * sizeof(float));
    cache.set_length(start + count);
    done += count;
  }
}

}  // namespace edgert
