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
  uint32_t lanes = m.tile_rows;
  QuantActs acts = me.head;

  // The head's input: normed, in float (me.tmp) and in two int8 parts. In decode the second part is free,
  // since the head waits for memory, and it takes the activation noise out of the logits.
  void take(const float* hidden, uint32_t n) {
    acts.cols = s.dim;
    for (uint32_t i = 0; i < n; ++i) {
      float* h = input(i);
      k.rmsnorm(hidden + size_t(i) * s.dim, d.weights_.output_norm, s.norm_eps, s.dim, h);
      if (s.dim % 32 == 0) k.quantize(h, acts.token(i));
    }
  }
  float* input(uint32_t i) const { return me.tmp + size_t(i) * s.dim; }

  void multiply(const PackedMatrix& by, uint32_t tile, const QuantActs& q, const float* x, uint32_t n, float* y,
                size_t stride) const {
    if (find_format(by.type))
      k.matmul(by, tile, tile + 1, q, n, y, stride);
    else
      k.matmul_float(by, tile, tile + 1, x, n, y, stride);
  }

  // Logits of the rows of one tile of the head to y[n][lanes].
  void tile(uint32_t t, uint32_t n) const { multiply(m, t, acts, me.tmp, n, me.tile, lanes); }

  uint32_t token_of(uint32_t row) const { return f.token.empty() ? row : f.token[row]; }

  // Logits in the order of rows, [n][rows].
  void rows(const float* hidden, uint32_t n, float* logits) {
    take(hidden, n);
    uint32_t b, e;
    while (w.claim(m.tiles(), b, e))
      for (uint32_t t = b; t < e; ++t) {
        tile(t, n);
        const uint32_t first = t * lanes, count = std::min(lanes, m.rows - first);
        for (uint32_t r = 0; r < count; ++r)
          if (token_of(first + r) == FlashHead::kPadding)
            for (uint32_t i = 0; i < n; ++i) me.tile[size_t(i) * lanes + r] = -INFINITY;
        for (uint32_t i = 0; i < n; ++i)
          std::memcpy(logits + size_t(i) * m.rows + first, me.tile + size_t(i) * lanes, count * sizeof(float));
      }
  }

  // Logits in the order of tokens from those in the order of rows. Written one by one by rows(), each
  // would drag in a cache line of its own; here the rows fit a cache.
  void gather(const float* by_row, uint32_t n, float* logits) {
    constexpr uint32_t kStretch = 4096;
    const uint32_t stretches = (s.vocab_size + kStretch - 1) / kStretch;
    uint32_t b, e;
    while (w.claim(n * stretches, b, e))
      for (uint32_t item = b; item < e; ++item) {
        const uint32_t i = item / stretches, lo = item % stretches * kStretch, hi = std::min(lo + kStretch, s.vocab_size);
        const float* y = by_row + size_t(i) * m.rows;
        float* out = logits + size_t(i) * s.vocab_size;
        for (uint32_t id = lo; id < hi; ++id) out[id] = y[f.row[id]];
      }
  }

  // The largest norm of a row of each tile.
  void norms(float* out) {
    float* row = me.tmp;
    uint32_t b, e;
    while (w.claim(m.tiles(), b, e))
      for (uint32_t t = b; t < e; ++t) {
        float largest = 0;
        for (uint32_t r = t * lanes; r < std::min((t + 1) * lanes, m.rows); ++r) {
          unpack_row(m, r, row);
          double sum = 0;
          for (uint32_t c = 0; c < m.cols; ++c) sum += double(row[c]) * row[c];
          largest = std::max(largest, float(sum));
        }
        out[t] = std::sqrt(largest) * 1.0001f;  // room for its rounding
      }
  }

  // By how much a logit of a row of norm 1 may differ between one int8 part and two: the norm of what the
  // second part codes, and room for the rounding of either sum.
  float slack(uint32_t i) const {
    const QuantActs one = me.coarse.token(i), two = acts.token(i);
    const QuantActs rest = two.row(1);
    double difference = 0, whole = 0;
    for (uint32_t c = 0; c < s.dim; ++c) {
      const double x = double(two.scale[c / 32]) * two.q[c] + double(rest.scale[c / 32]) * rest.q[c];
      const double delta = x - double(one.scale[c / 32]) * one.q[c];
      difference += delta * delta;
      whole += x * x;
    }
    return float(std::sqrt(difference) * 1.0001 + std::sqrt(whole) * 1e-5);
  }

  // The likeliest token of each row among this thread's tiles, to me.likeliest. A first product with one
  // int8 part says of most tiles that nothing in them can win.
  void best(const float* hidden, uint32_t n) {
    take(hidden, n);
    const bool screen = !d.row_norms_.empty();
    float slack[kHeadTokens];
    me.coarse.cols = s.dim;
    for (uint32_t i = 0; screen && i < n; ++i) {
      k.quantize(input(i), me.coarse.token(i));
      slack[i] = this->slack(i);
    }
    uint32_t b, e;
    while (w.claim(m.tiles(), b, e))
      for (uint32_t t = b; t < e; ++t) {
        if (!screen) {
          tile(t, n);
          for (uint32_t i = 0; i < n; ++i) take_likeliest(t, me.tile + size_t(i) * lanes, me.likeliest[i]);
          continue;
        }
        k.matmul(m, t, t + 1, me.coarse, n, me.tile, lanes);
        for (uint32_t i = 0; i < n; ++i) {
          const float* y = me.tile + size_t(i) * lanes;
          float highest = y[0];
          for (uint32_t r = 1; r < lanes; ++r) highest = std::max(highest, y[r]);
          if (highest + slack[i] * d.row_norms_[t] < me.likeliest[i].logit) continue;
          float exact[16];
          k.matmul(m, t, t + 1, acts.token(i), 1, exact, lanes);
          take_likeliest(t, exact, me.likeliest[i]);
        }
      }
  }

  void take_likeliest(uint32_t t, const float* y, Scratch::Likely& best) const {
    const uint32_t first = t * lanes, count = std::min(lanes, m.rows - first);
    for (uint32_t r = 0; r < count; ++r) {
      const uint32_t id = token_of(first + r);
      if (id != FlashHead::kPadding && (y[r] > best.logit || (y[r] == best.logit && id < best.token))) best = {y[r], id};
    }
  }

  // Scores of all clusters into sc.cluster, and the input's low-rank image into sc.low.
  void score_clusters() {
    const QuantActs q = coarse();
    const uint32_t routers = f.routers.rows ? f.routers.tiles() : 0, images = f.projection.rows ? f.projection.tiles() : 0;
    uint32_t b, e;
    while (w.claim(routers + images, b, e))
      for (uint32_t i = b; i < e; ++i) {
        if (i >= routers) {
          multiply(f.projection, i - routers, q, me.tmp, 1, sc.low + size_t(i - routers) * lanes, lanes);
          continue;
        }
        const uint32_t first = i * lanes, count = std::min(lanes, f.clusters - first);
        multiply(f.routers, i, q, me.tmp, 1, me.tile, lanes);
        for (uint32_t r = 0; r < count; ++r) sc.cluster[first + r] = me.tile[r] + f.bias[first + r];
      }
    w.barrier();
  }

  // The input in its first int8 part.
  QuantActs coarse() const {
    QuantActs q = acts.row(0);
    q.parts = 1;
    return q;
  }

  // Units of the chosen clusters, or all, to me.units. Every thread chooses for itself: the same in the
  // same order.
  void choose_clusters(uint32_t probes) {
    me.units.clear();
    me.chosen.clear();
    const uint32_t per = f.cluster_size / FlashHead::kUnit;
    if (f.routers.rows) {
      choose_highest(sc.cluster, f.clusters, std::min(probes, f.clusters), me.chosen);
    } else {
      for (uint32_t c = 0; c < f.clusters; ++c) me.chosen.push_back(c);
    }
    for (uint32_t c : me.chosen)
      for (uint32_t u = c * per; u < (c + 1) * per; ++u) me.units.push_back(u);
  }

  // Leaves the `keep` best of me.units by their low-rank scores.
  void choose_units(uint32_t keep) {
    QuantActs q = me.coarse.row(0);
    q.cols = f.projection.rows;
    k.quantize(sc.low, q);
    const uint32_t per = FlashHead::kUnit / lanes, candidates = uint32_t(me.units.size());
    uint32_t b, e;
    while (w.claim(candidates, b, e))
      for (uint32_t i = b; i < e; ++i) {
        if (i + 1 < e) prefetch(f.low.tile(me.units[i + 1] * per));
        float best = -INFINITY;
        for (uint32_t t = me.units[i] * per; t < (me.units[i] + 1) * per; ++t) {
          multiply(f.low, t, q, sc.low, 1, me.tile, lanes);
          for (uint32_t r = 0; r < lanes; ++r)
            if (f.token[size_t(t) * lanes + r] != FlashHead::kPadding) best = std::max(best, me.tile[r]);
        }
        sc.unit[i] = best;
      }
    w.barrier();
    me.chosen.clear();
    if (candidates) choose_highest(sc.unit, candidates, std::min(keep, candidates), me.chosen);
    // In place: chosen[i] >= i once it is in order.
    std::sort(me.chosen.begin(), me.chosen.end());
    for (size_t i = 0; i < me.chosen.size(); ++i) me.units[i] = me.units[me.chosen[i]];
    me.units.resize(me.chosen.size());
  }

  void add_units(const std::vector<uint32_t>& special, const std::vector<uint32_t>& ids) {
    for (uint32_t u : me.units) me.taken[u] = 1;
    const auto add = [&](uint32_t u) {
      if (!me.taken[u]) me.units.push_back(u);
      me.taken[u] = 1;
    };
    for (uint32_t u : special) add(u);
    for (uint32_t id : ids) add((f.row.empty() ? id : f.row[id]) / FlashHead::kUnit);
    for (uint32_t u : me.units) me.taken[u] = 0;
  }

  void flash(const float* hidden, uint32_t probes, uint32_t keep, const std::vector<uint32_t>& more) {
    take(hidden, 1);
    score_clusters();
    choose_clusters(probes);
    if (f.low.rows) choose_units(keep);
    add_units(f.special, more);
    score_units();
  }

  void among(const float* hidden, const std::vector<uint32_t>& ids) {
    take(hidden, 1);
    me.units.clear();
    add_units({}, ids);
    score_units();
  }

  // Units lie anywhere: the first lines of the next are on their way while one is read.
  static void prefetch(const uint8_t* next) {
    for (size_t at = 0; at < 2048; at += 64) __builtin_prefetch(next + at, 0, 2);
  }

  // Tokens and logits of me.units to sc.ids and sc.logits.
  void score_units() {
    const uint32_t per = FlashHead::kUnit / lanes;
    uint32_t b, e;
    while (w.claim(uint32_t(me.units.size()), b, e))
      for (uint32_t i = b; i < e; ++i) {
        if (i + 1 < e) prefetch(m.tile(me.units[i + 1] * per));
        for (uint32_t j = 0; j < per; ++j) {
          const uint32_t t = me.units[i] * per + j, first = t * lanes;
          const size_t to = size_t(i) * FlashHead::kUnit + j * lanes;
          if (t < m.tiles()) multiply(m, t, acts, me.tmp, 1, sc.logits.data() + to, lanes);
          for (uint32_t r = 0; r < lanes; ++r) sc.ids[to + r] = first + r < m.rows ? token_of(first + r) : FlashHead::kPadding;
        }
      }
  }
};

void Decoder::score_rows(const float* hidden, uint32_t n, float* logits) {
  pool_.run([&](Pool::Worker& w) { Head{*this, w}.rows(hidden, n, logits); });
}

void Decoder::score(const float* hidden, uint32_t n, float* logits) {
  const size_t rows = weights_.head.rows, vocab = spec_.vocab_size;
  const bool in_order = weights_.flash.token.empty();
  std::vector<float>& by_row = scratch_->by_row;
  if (!in_order) grow(by_row, std::min(n, kHeadTokens) * rows);
  for (uint32_t i = 0; i < n; i += kHeadTokens) {
    const uint32_t count = std::min(kHeadTokens, n - i);
    float* out = logits + i * vocab;
    score_rows(hidden + size_t(i) * spec_.dim, count, in_order ? out : by_row.data());
    if (!in_order) pool_.run([&](Pool::Worker& w) { Head{*this, w}.gather(by_row.data(), count, out); });
  }
}

void Decoder::dense(const float* hidden, uint32_t n, float* logits) {
  const std::lock_guard lock(turn_);
  score(hidden, n, logits);
}

void Decoder::dense_rows(const float* hidden, uint32_t n, float* logits) {
  const std::lock_guard lock(turn_);
  for (uint32_t i = 0; i < n; i += kHeadTokens)
    score_rows(hidden + size_t(i) * spec_.dim, std::min(kHeadTokens, n - i), logits + size_t(i) * weights_.head.rows);
}

// What best() screens with; nothing where the head or its input is not in int8.
void Decoder::measure_rows() {
  if (!row_norms_.empty() || !find_format(weights_.head.type)) return;
  row_norms_.resize(weights_.head.tiles());
  pool_.run([&](Pool::Worker& w) { Head{*this, w}.norms(row_norms_.data()); });
}

void Decoder::best(const float* hidden, uint32_t n, uint32_t* tokens) {
  const std::lock_guard lock(turn_);
  measure_rows();
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

void Decoder::check_ids(const std::vector<uint32_t>& ids) const {
  for (uint32_t id : ids)
    if (id >= spec_.vocab_size)
      throw EngineError("token id " + std::to_string(id) + " is outside the vocabulary of " + std::to_string(spec_.vocab_size));
}

void Decoder::flash(const float* hidden, uint32_t probes, uint32_t keep, const std::vector<uint32_t>& more, Scored& out) {
  const FlashHead& f = weights_.flash;
  if (f.clusters == 0) throw EngineError("this model was loaded without a FlashHead: export one, or use the dense head");
  if (f.routers.rows ? probes == 0 : keep == 0) throw EngineError("a FlashHead scores at least 1 cluster, not 0");
  if (f.low.rows && keep == 0) throw EngineError("a FlashHead keeps at least 1 unit, not 0");
  check_ids(more);
  const std::lock_guard lock(turn_);
  reserve_units(std::min(f.token.size() / FlashHead::kUnit, weights_.flash_units(probes, keep) + more.size()));
  pool_.run([&](Pool::Worker& w) { Head{*this, w}.flash(hidden, probes, keep, more); });
  take_scored(out);
}

void Decoder::among(const float* hidden, const std::vector<uint32_t>& ids, Scored& out) {
  check_ids(ids);
  const std::lock_guard lock(turn_);
  reserve_units(std::min<size_t>(ids.size(), scratch_->threads[0].taken.size()));
  pool_.run([&](Pool::Worker& w) { Head{*this, w}.among(hidden, ids); });
  Scored all;
  take_scored(all);
  // The rows beside the tokens asked for came along.
  out.ids.clear();
  out.logits.clear();
  std::vector<uint32_t> wanted = ids;
  std::sort(wanted.begin(), wanted.end());
  for (size_t i = 0; i < all.ids.size(); ++i)
    if (std::binary_search(wanted.begin(), wanted.end(), all.ids[i])) {
      out.ids.push_back(all.ids[i]);
      out.logits.push_back(all.logits[i]);
    }
}

void Decoder::reserve_units(size_t units) {
  const size_t rows = units * FlashHead::kUnit;
  grow(scratch_->ids, rows);
  grow(scratch_->logits, rows);
}

void Decoder::take_scored(Scored& out) const {
  const size_t rows = scratch_->threads[0].units.size() * FlashHead::kUnit;
  out.ids.resize(rows);
  out.logits.resize(rows);
  size_t n = 0;
  for (size_t i = 0; i < rows; ++i) {
    out.ids[n] = scratch_->ids[i];
    out.logits[n] = scratch_->logits[i];
    n += scratch_->ids[i] != FlashHead::kPadding;
  }
  out.ids.resize(n);
  out.logits.resize(n);
}

}  // namespace edgert
