// The vocabulary head: whole, or by the clusters of a FlashHead.
#include <algorithm>
#include <cmath>
#include <cstring>

#include "decoder.h"
#include "error.h"
#include "formats.h"
#include "scratch.h"

namespace edgert {
namespace {

// The indices of the `count` highest of x[n] go to `out`; equal values: the lower index first. A
// histogram between the extremes finds the value to cut at, so nothing but one bin is sorted.
void choose_highest(const float* x, uint32_t n, uint32_t count, std::vector<uint32_t>& out) {
  constexpr uint32_t kBins = 1024;
  const auto [low, high] = std::minmax_element(x, x + n);
  const float base = *low, scale = *high > *low ? float(kBins - 1) / (*high - *low) : 0.0f;
  const auto bin = [=](float v) {
    const float b = (v - base) * scale;
    return b > 0 ? uint32_t(std::min(b, float(kBins - 1))) : 0;  // 0 for NaN too
  };
  uint32_t size[kBins] = {};
  for (uint32_t i = 0; i < n; ++i) ++size[bin(x[i])];
  uint32_t cut = kBins, above = 0;  // bins from `cut` on are taken whole
  while (cut > 0 && above + size[cut - 1] <= count) above += size[--cut];
  const size_t begin = out.size();
  for (uint32_t i = 0; i < n; ++i)
    if (bin(x[i]) >= cut) out.push_back(i);
  if (cut == 0 || above == count) return;
  const size_t rest = out.size();
  for (uint32_t i = 0; i < n; ++i)
    if (bin(x[i]) == cut - 1) out.push_back(i);
  const auto better = [=](uint32_t a, uint32_t b) { return x[a] != x[b] ? x[a] > x[b] : a < b; };
  std::nth_element(out.begin() + ptrdiff_t(rest), out.begin() + ptrdiff_t(begin + count), out.end(), better);
  out.resize(begin + count);
}

}  // namespace

// A job on the head as one thread sees it.
struct Decoder::Head {
  Decoder& d;
  Pool::Worker& w;

  const ModelSpec& s = d.spec_;
  const Kernels& k = d.kernels_;
  const FlashHead& f = d.weights_.flash;
  const PackedMatrix& m = d.weights_.head;
  Scratch& sc = *d.scratch_;
  Scratch::Private& me = sc.threads[w.index()];
  bool quant = find_format(m.type) != nullptr;
  QuantActs acts = me.head;

  // The head's input: normed, in float (me.tmp) and in two int8 parts. In decode the second part is free,
  // since the head waits for memory, and it takes the activation noise out of the logits.
  void take(const float* hidden, uint32_t n) {
    acts.cols = s.dim;
    for (uint32_t i = 0; i < n; ++i) {
      float* h = me.tmp + size_t(i) * s.dim;
      k.rmsnorm(hidden + size_t(i) * s.dim, d.weights_.output_norm, s.norm_eps, s.dim, h);
      if (s.dim % 32 == 0) k.quantize(h, acts.token(i));
    }
  }

  void multiply(const PackedMatrix& by, uint32_t tile, const QuantActs& q, const float* x, uint32_t n, float* y,
                size_t stride) const {
    if (find_format(by.type))
      k.matmul(by, tile, tile + 1, q, n, y, stride);
    else
      k.matmul_float(by, tile, tile + 1, x, n, y, stride);
  }

  // Logits of the rows of one tile of the head to y[n][lanes].
  void tile(uint32_t t, uint32_t n) const { multiply(m, t, acts, me.tmp, n, me.tile, m.tile_rows); }

  void dense(const float* hidden, uint32_t n, float* logits) {
    take(hidden, n);
    const uint32_t lanes = m.tile_rows;
    uint32_t b, e;
    while (w.claim(m.tiles(), b, e))
      for (uint32_t t = b; t < e; ++t) {
        tile(t, n);
        const uint32_t first = t * lanes, rows = std::min(lanes, m.rows - first);
        float* to = f.token.empty() ? logits : sc.by_row.data();
        for (uint32_t i = 0; i < n; ++i)
          std::memcpy(to + size_t(i) * m.rows + first, me.tile + size_t(i) * lanes, rows * sizeof(float));
      }
    if (f.token.empty()) return;
    // Rows in the order of clusters: written to logits one by one, each would drag in a cache line of its
    // own. They are gathered from rows that fit a cache instead.
    w.barrier();
    constexpr uint32_t kStretch = 4096;
    const uint32_t stretches = (s.vocab_size + kStretch - 1) / kStretch;
    while (w.claim(n * stretches, b, e))
      for (uint32_t item = b; item < e; ++item) {
        const uint32_t i = item / stretches, lo = item % stretches * kStretch, hi = std::min(lo + kStretch, s.vocab_size);
        const float* y = sc.by_row.data() + size_t(i) * m.rows;
        float* out = logits + size_t(i) * s.vocab_size;
        for (uint32_t id = lo; id < hi; ++id) out[id] = y[f.row[id]];
      }
  }

  // The likeliest token of each row among this thread's tiles, to me.likeliest.
  void best(const float* hidden, uint32_t n) {
    take(hidden, n);
    uint32_t b, e;
    while (w.claim(m.tiles(), b, e))
      for (uint32_t t = b; t < e; ++t) {
        tile(t, n);
        const uint32_t first = t * m.tile_rows, rows = std::min(m.tile_rows, m.rows - first);
        for (uint32_t i = 0; i < n; ++i) {
          const float* y = me.tile + size_t(i) * m.tile_rows;
          Scratch::Likely& best = me.likeliest[i];
          float highest = y[0];
          for (uint32_t r = 1; r < rows; ++r) highest = std::max(highest, y[r]);
          if (highest < best.logit) continue;
          for (uint32_t r = 0; r < rows; ++r) {
            const uint32_t id = token_of(first + r);
            if (id != FlashHead::kPadding && (y[r] > best.logit || (y[r] == best.logit && id < best.token))) best = {y[r], id};
          }
        }
      }
  }

  uint32_t token_of(uint32_t row) const { return f.token.empty() ? row : f.token[row]; }

  // Scores of all clusters into sc.cluster.
  void score_clusters() {
    const uint32_t lanes = m.tile_rows;
    uint32_t b, e;
    QuantActs q = acts.row(0);
    q.parts = 1;
    if (f.low_rank()) {
      while (w.claim(f.projection.tiles(), b, e))
        for (uint32_t t = b; t < e; ++t) multiply(f.projection, t, q, me.tmp, 1, sc.low + size_t(t) * lanes, lanes);
      w.barrier();
      q = acts.row(2);  // behind the input
      q.cols = f.projection.rows;
      q.parts = 1;
      k.quantize(sc.low, q);
    }
    const uint32_t per = f.low_rank() ? f.cluster_size / lanes : 1;
    const uint32_t items = f.low_rank() ? f.clusters : f.routers.tiles();
    while (w.claim(items, b, e))
      for (uint32_t i = b; i < e; ++i) {
        if (!f.low_rank()) {
          const uint32_t first = i * lanes, rows = std::min(lanes, f.clusters - first);
          multiply(f.routers, i, q, me.tmp, 1, me.tile, lanes);
          for (uint32_t r = 0; r < rows; ++r) sc.cluster[first + r] = me.tile[r] + f.bias[first + r];
          continue;
        }
        float best = -INFINITY;
        for (uint32_t t = i * per; t < (i + 1) * per; ++t) {
          multiply(f.routers, t, q, sc.low, 1, me.tile, lanes);
          for (uint32_t r = 0; r < lanes; ++r)
            if (f.token[size_t(t) * lanes + r] != FlashHead::kPadding) best = std::max(best, me.tile[r]);
        }
        sc.cluster[i] = best;
      }
    w.barrier();
  }

  // Every thread chooses for itself: the same clusters in the same order.
  void choose(uint32_t probes, const std::vector<uint32_t>& more) {
    me.chosen.clear();
    choose_highest(sc.cluster, f.clusters, std::min(probes, f.clusters), me.chosen);
    for (uint32_t c : me.chosen) me.taken[c] = 1;
    const auto add = [&](uint32_t c) {
      if (!me.taken[c]) me.chosen.push_back(c);
      me.taken[c] = 1;
    };
    for (uint32_t c : f.special) add(c);
    for (uint32_t id : more) add(f.row[id] / f.cluster_size);
    for (uint32_t c : me.chosen) me.taken[c] = 0;
  }

  void flash(const float* hidden, uint32_t probes, const std::vector<uint32_t>& more, float* logits) {
    take(hidden, 1);
    score_clusters();
    choose(probes, more);
    const uint32_t per = f.cluster_size / m.tile_rows;
    uint32_t b, e;
    while (w.claim(uint32_t(me.chosen.size()), b, e))
      for (uint32_t i = b; i < e; ++i) {
        // Clusters lie anywhere: the first lines of the next are on their way while this one is read.
        if (i + 1 < e) {
          const uint8_t* next = m.tile(me.chosen[i + 1] * per);
          for (size_t at = 0; at < 1024; at += 64) __builtin_prefetch(next + at, 0, 2);
        }
        for (uint32_t t = me.chosen[i] * per; t < (me.chosen[i] + 1) * per; ++t) {
          tile(t, 1);
          for (uint32_t r = 0; r < m.tile_rows; ++r)
            if (const uint32_t id = f.token[t * m.tile_rows + r]; id != FlashHead::kPadding) logits[id] = me.tile[r];
        }
      }
  }
};

void Decoder::score(const float* hidden, uint32_t n, float* logits) {
  const size_t rows = weights_.flash.token.empty() ? 0 : size_t(std::min(n, kHeadTokens)) * weights_.head.rows;
  if (scratch_->by_row.size() < rows) scratch_->by_row.resize(rows);
  for (uint32_t i = 0; i < n; i += kHeadTokens)
    pool_.run([&](Pool::Worker& w) {
      Head{*this, w}.dense(hidden + size_t(i) * spec_.dim, std::min(kHeadTokens, n - i),
                           logits + size_t(i) * spec_.vocab_size);
    });
}

void Decoder::dense(const float* hidden, uint32_t n, float* logits) {
  const std::lock_guard lock(turn_);
  score(hidden, n, logits);
}

void Decoder::best(const float* hidden, uint32_t n, uint32_t* tokens) {
  const std::lock_guard lock(turn_);
  for (uint32_t at = 0; at < n; at += kHeadTokens) {
    const uint32_t count = std::min(kHeadTokens, n - at);
    // A thread that does not run this job has no say.
    for (Scratch::Private& p : scratch_->threads) std::fill_n(p.likeliest, count, Scratch::Likely{-INFINITY, FlashHead::kPadding});
    pool_.run([&](Pool::Worker& w) { Head{*this, w}.best(hidden + size_t(at) * spec_.dim, count); });
    for (uint32_t i = 0; i < count; ++i) {
      Scratch::Likely best = scratch_->threads[0].likeliest[i];
      for (const Scratch::Private& p : scratch_->threads) {
        const Scratch::Likely& other = p.likeliest[i];
        if (other.logit > best.logit || (other.logit == best.logit && other.token < best.token)) best = other;
      }
      if (best.token == FlashHead::kPadding)
        throw EngineError("no logit is a number: the model file is damaged or numerically unstable");
      tokens[at + i] = best.token;
    }
  }
}

void Decoder::flash(const float* hidden, uint32_t probes, const std::vector<uint32_t>& more, float* logits,
                    std::vector<uint32_t>& scored) {
  const FlashHead& f = weights_.flash;
  if (f.clusters == 0) throw EngineError("this model was loaded without a FlashHead: export one, or use the dense head");
  if (probes == 0) throw EngineError("a FlashHead scores at least 1 cluster, not 0");
  for (uint32_t id : more)
    if (id >= spec_.vocab_size)
      throw EngineError("token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(spec_.vocab_size));
  const std::lock_guard lock(turn_);
  pool_.run([&](Pool::Worker& w) { Head{*this, w}.flash(hidden, probes, more, logits); });
  for (uint32_t c : scratch_->threads[0].chosen)
    for (uint32_t r = c * f.cluster_size; r < (c + 1) * f.cluster_size; ++r)
      if (f.token[r] != FlashHead::kPadding) scored.push_back(f.token[r]);
}

}  // namespace edgert
