#include "sampler.h"

#include <algorithm>
#include <bit>
#include <cmath>
#include <string>

#include "error.h"

namespace edgert {
namespace {

constexpr uint32_t kBlock = 256;
constexpr uint64_t kGamma = 0x9e3779b97f4a7c15;  // SplitMix64's increment: 2^64 / golden ratio, odd
constexpr float kInf = std::numeric_limits<float>::infinity();

// SplitMix64's output function.
inline uint64_t mix(uint64_t z) {
  z = (z ^ (z >> 30)) * 0xbf58476d1ce4e5b9;
  z = (z ^ (z >> 27)) * 0x94d049bb133111eb;
  return z ^ (z >> 31);
}

// 52 bits of noise for an id; (noise + 0.5) / 2^52 is exact in a double and strictly in (0, 1).
inline uint64_t noise(uint64_t state, uint32_t id) { return mix(state + (id + uint64_t{1}) * kGamma) >> 12; }

inline double gumbel(uint64_t noise) { return -std::log(-std::log1p(-((double)noise + 0.5) * 0x1p-52)); }

// Signed integers in the order of the floats. As integers min and max vectorise, and every NaN
// lies above +inf or below -inf.
inline int32_t order_key(float x) {
  const int32_t b = std::bit_cast<int32_t>(x);
  return b ^ ((b >> 31) & 0x7fffffff);
}
inline float from_order_key(int32_t k) { return std::bit_cast<float>(k ^ ((k >> 31) & 0x7fffffff)); }

// e^x for x <= 0 to a relative 2e-7 (below -87: 1.6e-38). Plain arithmetic, so that loops over it
// vectorise: x = k ln 2 + r, the Taylor polynomial for e^r, k into the exponent.
inline float exp_negative(float x) {
  constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it leaves the nearest integer in the low bits
  // The larger a negative float, the smaller its bits: a clamp without a branch.
  x = std::bit_cast<float>(std::min(std::bit_cast<uint32_t>(x), std::bit_cast<uint32_t>(-87.0f)));
  const float t = x * 1.44269504f + kRound;
  const float k = t - kRound;
  const float r = (x - k * 0.693359375f) + k * 2.12194440e-4f;  // ln 2 in two parts
  const float p =
      1.0f + r * (1.0f + r * (0.5f + r * (1.0f / 6 + r * (1.0f / 24 + r * (1.0f / 120 + r * (1.0f / 720))))));
  return p * std::bit_cast<float>((std::bit_cast<int32_t>(t) << 23) + 0x3f800000);
}

void require(bool ok, const char* what) {
  if (!ok) throw EngineError(std::string("sampler: ") + what);
}

inline uint32_t id_of(const LogitsView& v, uint32_t i) { return v.ids ? v.ids[i] : i; }
inline uint32_t blocks(const LogitsView& v) { return (v.n + kBlock - 1) / kBlock; }

[[noreturn]] void bad_logits(const LogitsView& v) {
  for (uint32_t i = 0; i < v.n; i++)
    if (std::isnan(v.logits[i]) || v.logits[i] == kInf)
      throw EngineError("logit of token " + std::to_string(id_of(v, i)) + " is " + (std::isnan(v.logits[i]) ? "NaN" : "+inf") +
                        ": expected finite logits; the model file is damaged or numerically unstable");
  throw EngineError("all " + std::to_string(v.n) + " logits are -inf: no token can follow; remove a logit bias");
}

}  // namespace

Sampler::Sampler(uint32_t vocab_size, SamplerOptions options) : n_(vocab_size), opt_(std::move(options)) {
  const SamplerOptions& o = opt_;
  require(n_ > 0 && n_ <= (1u << 28), "vocab_size must be 1 to 2^28");
  require(o.temperature == 0.0 || (o.temperature >= 0.01 && o.temperature <= 100.0),
          "temperature must be 0 or 0.01 to 100");
  require(o.top_p > 0.0 && o.top_p <= 1.0, "top_p must be above 0 and at most 1");
  require(o.min_p >= 0.0 && o.min_p <= 1.0, "min_p must be 0 to 1");
  require(o.repetition_penalty > 0.0 && o.repetition_penalty <= 100.0,
          "repetition_penalty must be above 0 and at most 100");
  require(std::abs(o.presence_penalty) <= 100.0, "presence_penalty must be -100 to 100");
  require(std::abs(o.frequency_penalty) <= 100.0, "frequency_penalty must be -100 to 100");
  for (const auto& [id, value] : o.bias) {
    require(id < n_, "a biased id is outside the vocabulary");
    require(!std::isnan(value) && value != kInf, "a bias must be a number or -inf");
  }
  penalties_ = o.repetition_penalty != 1.0 || o.presence_penalty != 0.0 || o.frequency_penalty != 0.0;
  if (opt_.top_k >= n_) opt_.top_k = 0;
  if (penalties_) {
    known_.resize(n_);
    count_.resize(n_);
    touched_.reserve(n_);
  }
  if (!o.bias.empty()) {
    bias_.resize(n_);
    for (const auto& [id, value] : o.bias) bias_[id] += value;
  }
  if (adjusts()) scratch_.resize(n_);
  block_max_.resize((n_ + kBlock - 1) / kBlock);
}

void Sampler::observe(const uint32_t* tokens, size_t n) {
  for (size_t i = 0; i < n; i++) require(tokens[i] < n_, "a token is outside the vocabulary");
  if (!penalties_) return;
  for (size_t i = 0; i < n; i++) {
    if (!known_[tokens[i]]) touched_.push_back(tokens[i]);
    known_[tokens[i]] = 1;
  }
}

void Sampler::accept(uint32_t token) {
  const size_t before = touched_.size();
  observe(&token, 1);
  accepted_.emplace_back(token, touched_.size() > before);
  if (penalties_) count_[token]++;
}

void Sampler::retract() {
  require(!accepted_.empty(), "no token is left to take back");
  const auto [token, fresh] = accepted_.back();
  accepted_.pop_back();
  if (!penalties_) return;
  count_[token]--;
  if (!fresh) return;
  known_[token] = 0;
  touched_.pop_back();
}

void Sampler::penalise(float& logit, uint32_t id) const {
  double l = logit;
  l = l > 0 ? l / opt_.repetition_penalty : l * opt_.repetition_penalty;
  l -= opt_.frequency_penalty * count_[id] + (count_[id] ? opt_.presence_penalty : 0.0);
  logit = (float)l;
}

LogitsView Sampler::adjust(const LogitsView& view) {
  if (!adjusts()) return view;
  if (scratch_.size() < view.n) scratch_.resize(view.n);
  std::copy(view.logits, view.logits + view.n, scratch_.begin());
  if (!view.ids) {
    for (uint32_t id : touched_) penalise(scratch_[id], id);
    for (const auto& [id, value] : opt_.bias) scratch_[id] += value;
  }
  for (uint32_t i = 0; view.ids && i < view.n; i++) {
    const uint32_t id = view.ids[i];
    if (id == kNoToken) continue;
    if (penalties_ && known_[id]) penalise(scratch_[i], id);
    if (!bias_.empty()) scratch_[i] += bias_[id];
  }
  return {scratch_.data(), view.ids, view.n};
}

// Maximum of each block and of all; refuses NaN and +inf.
void Sampler::scan(const LogitsView& v) {
  const int32_t lowest = order_key(-kInf), highest = order_key(kInf);
  int32_t all_hi = std::numeric_limits<int32_t>::min(), all_lo = std::numeric_limits<int32_t>::max();
  if (block_max_.size() < blocks(v)) block_max_.resize(blocks(v));
  for (uint32_t b = 0; b < blocks(v); b++) {
    const uint32_t end = std::min(v.n, (b + 1) * kBlock);
    int32_t hi = std::numeric_limits<int32_t>::min(), lo = std::numeric_limits<int32_t>::max();
    for (uint32_t i = b * kBlock; i < end; i++) {
      const int32_t k = order_key(v.logits[i]);
      hi = std::max(hi, k);
      lo = std::min(lo, k);
    }
    block_max_[b] = from_order_key(hi);
    all_hi = std::max(all_hi, hi);
    all_lo = std::min(all_lo, lo);
  }
  if (all_hi >= highest || all_lo < lowest || all_hi <= lowest) bad_logits(v);
  max_ = from_order_key(all_hi);
}

uint32_t Sampler::argmax(const LogitsView& v) const {
  uint32_t best = kNoToken;
  for (uint32_t b = 0; b < blocks(v); b++) {
    if (block_max_[b] != max_) continue;
    const uint32_t end = std::min(v.n, (b + 1) * kBlock);
    for (uint32_t i = b * kBlock; i < end; i++)
      if (v.logits[i] == max_) best = std::min(best, id_of(v, i));
    if (!v.ids) return best;
  }
  return best;
}

// Sum of exp((x - max) / temperature), to about 1e-6 of it. Ids below e^-45 of the best add less
// than 1e-11 together, for any vocabulary this accepts, and their blocks are left out.
double Sampler::mass(const LogitsView& v, double temperature) const {
  const float scale = (float)(1.0 / temperature), max = max_;
  const double floor = max_ - 45.0 * temperature;
  float e[kBlock] = {};
  double sum[4] = {};
  for (uint32_t b = 0; b < blocks(v); b++) {
    if (block_max_[b] < floor) continue;
    const uint32_t begin = b * kBlock, m = std::min(v.n - begin, kBlock);
    for (uint32_t i = 0; i < m; i++) e[i] = exp_negative((v.logits[begin + i] - max) * scale);
    std::fill(e + m, e + kBlock, 0.0f);
    for (uint32_t i = 0; i < kBlock; i += 4)
      for (uint32_t lane = 0; lane < 4; lane++) sum[lane] += e[i + lane];
  }
  return (sum[0] + sum[1]) + (sum[2] + sum[3]);
}

// The k best ids above -inf into candidates_, in no order.
void Sampler::collect_top(const LogitsView& v, uint32_t k) {
  candidates_.clear();
  if (k == 0) return;
  candidates_.reserve(std::min<size_t>(2 * (size_t)k, v.n));
  float floor = -kInf;
  // In the order of ids, what equals the k-th best so far loses to it.
  const auto below = [&](float x) { return x == -kInf || (v.ids ? x < floor : x <= floor); };
  const auto keep_k = [&] {
    std::nth_element(candidates_.begin(), candidates_.begin() + (k - 1), candidates_.end(), better);
    candidates_.resize(k);
    floor = candidates_[k - 1].logit;
  };
  for (uint32_t b = 0; b < blocks(v); b++) {
    if (below(block_max_[b])) continue;
    const uint32_t end = std::min(v.n, (b + 1) * kBlock);
    for (uint32_t i = b * kBlock; i < end; i++) {
      if (below(v.logits[i])) continue;
      candidates_.push_back({v.logits[i], id_of(v, i)});
      if (candidates_.size() == 2 * (size_t)k) keep_k();
    }
  }
  if (candidates_.size() > k) keep_k();
}

void Sampler::collect_above(const LogitsView& v, double floor) {
  candidates_.clear();
  candidates_.reserve(v.n);
  for (uint32_t b = 0; b < blocks(v); b++) {
    if (block_max_[b] < floor) continue;
    const uint32_t end = std::min(v.n, (b + 1) * kBlock);
    for (uint32_t i = b * kBlock; i < end; i++)
      if (v.logits[i] >= floor) candidates_.push_back({v.logits[i], id_of(v, i)});
  }
}

// The shortest prefix of the sorted candidates whose mass is at least top_p of `total`, found by
// halving: each round partitions the half in which the prefix ends.
Sampler::Cutoff Sampler::nucleus(double total) {
  const auto weight = [&](const Candidate& c) { return std::exp(((double)c.logit - max_) / opt_.temperature); };
  auto first = candidates_.begin(), last = candidates_.end();
  double need = opt_.top_p * total;  // mass the prefix must find in [first, last)
  while (last - first > 32) {
    const auto mid = first + (last - first) / 2;
    std::nth_element(first, mid, last, better);
    double half = 0.0;
    for (auto c = first; c != mid; ++c) half += weight(*c);
    if (half >= need) {
      last = mid;
    } else {
      need -= half;
      first = mid;
    }
  }
  std::sort(first, last, better);
  auto c = first;
  while (c + 1 != last && (need -= weight(*c)) > 0.0) ++c;
  return {c->logit, c->id};
}

Sampler::Cutoff Sampler::filter(const LogitsView& v) {
  Cutoff cut;
  if (opt_.top_k) {
    collect_top(v, opt_.top_k);
    const auto worst = std::max_element(candidates_.begin(), candidates_.end(), better);
    cut = {worst->logit, worst->id};
  }
  if (opt_.top_p < 1.0) {
    double total = 0.0;
    if (opt_.top_k) {
      for (const Candidate& c : candidates_) total += std::exp(((double)c.logit - max_) / opt_.temperature);
    } else {
      total = mass(v, opt_.temperature);
      // All ids with less than (1 - p) / n of the mass have less than 1 - p together and come last
      // in the order, so the prefix ends before them. The factor gives rounding its room.
      collect_above(v, max_ + opt_.temperature * std::log(0.999 * (1.0 - opt_.top_p) * total / v.n));
    }
    cut = nucleus(total);
  }
  if (opt_.min_p > 0.0) {
    const double floor = max_ + opt_.temperature * std::log(opt_.min_p);
    // The lowest float that is not below the floor.
    float f = (float)floor;
    if (f < floor) f = std::nextafter(f, kInf);
    if (f > cut.logit) cut = {std::min(f, max_), std::numeric_limits<uint32_t>::max()};
  }
  return cut;
}

uint32_t Sampler::draw(const LogitsView& v, const Cutoff& cut, uint64_t position) const {
  const uint64_t state = mix(mix(opt_.seed + kGamma) + position * kGamma);
  const double temperature = opt_.temperature;
  uint32_t winner = argmax(v);
  double best = max_ / temperature + gumbel(noise(state, winner));
  for (uint32_t b = 0; b < blocks(v); b++) {
    if (block_max_[b] < cut.logit) continue;
    // -log1p(-v) >= v, so an id beats `best` only if v < exp(x / temperature - best): most ids are
    // dismissed on their integer noise, without a logarithm. The factor gives rounding its room.
    const double limit = std::exp(block_max_[b] / temperature - best) * (0x1p52 * (1 + 1e-9));
    if (limit < 0.5) continue;
    const uint64_t ceiling = limit >= 0x1p52 ? uint64_t{1} << 52 : (uint64_t)limit + 1;
    const uint32_t end = std::min(v.n, (b + 1) * kBlock);
    for (uint32_t i = b * kBlock; i < end; i++) {
      const uint32_t id = id_of(v, i);
      const uint64_t own = noise(state, id);
      const float x = v.logits[i];
      if (own >= ceiling || x < cut.logit || (x == cut.logit && id > cut.id)) continue;
      const double score = x / temperature + gumbel(own);
      if (score > best || (score == best && id < winner)) {
        best = score;
        winner = id;
      }
    }
  }
  return winner;
}

uint32_t Sampler::sample(const LogitsView& view, uint64_t position) {
  require(view.ids || view.n == n_, "the logits are not those of the whole vocabulary");
  const LogitsView v = adjust(view);
  scan(v);
  if (opt_.temperature == 0.0) return argmax(v);
  return draw(v, filter(v), position);
}

double Sampler::logprobs(const float* logits, uint32_t token, uint32_t top) {
  require(token < n_, "a token is outside the vocabulary");
  const LogitsView v{logits, nullptr, n_};
  scan(v);
  const double log_total = max_ + std::log(mass(v, 1.0));
  collect_top(v, std::min(top, n_));
  std::sort(candidates_.begin(), candidates_.end(), better);
  best_.clear();
  for (const Candidate& c : candidates_) best_.push_back({c.id, c.logit - log_total});
  return logits[token] - log_total;
}

}  // namespace edgert
