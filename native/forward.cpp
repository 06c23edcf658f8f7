// The forward pass: Decoder::forward and the layers of one chunk as each thread runs them.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "error.h"
#include "pass.h"
#include "sparse.h"

namespace edgert {

void Decoder::Pass::enter(bool add, const float* post_norm, const float* norm, bool quant, uint32_t parts) {
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

void Decoder::Pass::embed() {
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

void Decoder::Pass::rope_tables() {
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

void Decoder::Pass::add_bias(float* y, size_t stride, const float* bias, uint32_t begin, uint32_t end) const {
  if (!bias) return;
  for (uint32_t i = 0; i < n; ++i)
    for (uint32_t r = begin; r < end; ++r) y[i * stride + r] += bias[r];
}

void Decoder::Pass::attention(uint32_t layer) {
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
  if (sparse && layer == entered && w.index() == 0) cache.enter();
  prepare_heads(layer);
  barrier_before_attention(layer);
  if (!one)
    attend_many(layer);
  else if (cache.selects(layer))
    attend_sparse(layer);
  else
    attend_one(layer);
  project(l.output, l.gate);
}

void Decoder::Pass::project(const PackedMatrix& m, const PackedMatrix& next) {
  uint32_t b, e;
  while (w.claim(m.tiles(), b, e)) matmul(m, b, e, n, sc.y + size_t(b) * m.tile_rows, padded(s.dim));
  barrier_before(next);
}

void Decoder::Pass::convolution(uint32_t layer) {
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

void Decoder::Pass::ffn(uint32_t layer) {
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

void Decoder::Pass::run() {
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
  scratch_->reserve(spec_, weights_, cache, cache.length() + n);
  Scratch& sc = *scratch_;
  // Pages that enter the set of a tier are read while the first third of the layers runs, which a step can spare best: what
  // they do not find, later layers may (docs/kernel-log.md).
  uint32_t entered = uint32_t(spec_.layers.size()) / 3;
  while (entered < spec_.layers.size() && cache.recorded(entered).empty()) ++entered;
  for (uint32_t done = 0; done < n;) {
    const uint32_t count = std::min(n - done, kMaxChunk), start = cache.length();
    const Want now = want == Want::Last && done + count < n ? Want::None : want;
    const bool sparse = cache.selection().budget && n == 1 && !full;
    const uint32_t index = cache.selection().budget ? index_reach(cache, count) : 0;
    std::fill(sc.page_worth.begin(), sc.page_worth.end(), 0.0f);
    cache.begin(start + count, sparse, sparse ? predict(cache, tokens[done]) : nullptr);
    pool_.run([&](Pool::Worker& w) { Pass{*this, cache, w, tokens + done, count, start, now, sparse, index, entered}.run(); });
    cache.end(start + count, sparse, index, sc.page_worth.data(), sc.worth_heads, sc.page_stride);
    if (cache.tier() && now != Want::None)
      for (uint32_t i = 0; i < count; ++i) cache.states().put(start + i, sc.x + size_t(i) * spec_.dim);
    if (now == Want::Last) score(scratch_->x + size_t(count - 1) * spec_.dim, 1, out);
    if (now == Want::All) score(scratch_->x, count, out + size_t(done) * spec_.vocab_size);
    if (now == Want::Hidden) std::memcpy(out + size_t(done) * spec_.dim, scratch_->x, size_t(count) * spec_.dim * sizeof(float));
    done += count;
  }
}

}  // namespace edgert
