#include "sparse.h"

#include <algorithm>
#include <cmath>

namespace edgert {
namespace {

constexpr uint32_t kStretch = 128;       // tokens of a part,
constexpr uint32_t kShortStretch = 32;   // or of one of few
constexpr uint32_t kMaxGroup = KvCache::kMaxGroup;

// What worth is the logarithm of.
struct TokenWeights {
  float of[256];
  TokenWeights() {
    for (int worth = -128; worth < 128; ++worth) of[worth + 128] = std::exp2(float(worth) / kWorthSteps);
  }
};
const TokenWeights kWeights;

}  // namespace

void page_weights(const int8_t* worth, float* pages) {
  for (uint32_t p = 0; p < kBlockPages; ++p)
    pages[p] = kWeights.of[*std::max_element(worth + p * kPageTokens, worth + (p + 1) * kPageTokens) + 128];
}

// Where the weights of all other tokens are small, they are small against what the first and the last get.
void measure_level(const Kernels& k, const KvCache& cache, uint32_t layer, uint32_t head, uint32_t end, const float* const* queries,
                   uint32_t group, uint32_t head_dim, float* scores, float* tmp, float* level) {
  const uint8_t* records[2 * kLevelTokens];
  for (uint32_t i = 0; i < kLevelTokens; ++i) {
    records[i] = cache.record(layer, head, i);
    records[kLevelTokens + i] = cache.record(layer, head, end - 1 - i);
  }
  float *acc[kMaxGroup], max[kMaxGroup], sum[kMaxGroup];
  for (uint32_t g = 0; g < group; ++g) acc[g] = tmp + size_t(g) * head_dim;
  k.records[size_t(cache.type())].attend({queries, records, 2 * kLevelTokens, group, head_dim, scores, acc, max, sum});
  for (uint32_t g = 0; g < group; ++g) level[g] = max[g] + std::log2(sum[g]);
}

void add_shares(const float* weight, uint32_t pages, float* worth) {
  float sum = 1;
  for (uint32_t p = 0; p < pages; ++p) sum += weight[p];
  for (uint32_t p = 0; p < pages; ++p) worth[p] += weight[p] / sum;
}

SparseCut::SparseCut(const KvCache& cache, uint32_t position) {
  const Selection& choice = cache.selection();
  const uint32_t total = position + 1, end = cache.blocks_at(total) * kIndexTokens;
  const uint32_t between = end - std::min(end, choice.sinks);
  const bool all = between <= choice.budget;
  sinks = all ? 0 : choice.sinks;
  recent = all ? 0 : end;
  always = total - recent + sinks;
  blocks = all ? 0 : end / kIndexTokens;
  chosen = all ? 0 : choice.budget;
  stretch = always + chosen > 4 * kStretch ? kStretch : kShortStretch;
}

uint32_t SparseCut::most_parts(const Selection& choice, uint32_t length) {
  const uint32_t always = choice.sinks + choice.recent + kIndexTokens;
  const uint32_t most = std::min(always + std::min(choice.budget, length), length);
  // What is always read and what is chosen may each end in a part that is not full.
  return std::max(4 * kStretch / kShortStretch + 1, most / kStretch + 2);
}

void SparseStep::attend_part(uint32_t layer, uint32_t head, uint32_t part) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, hd = s.head_dim;
  const uint8_t* records[kStretch];
  uint32_t count;
  if (part < cut.always_parts()) {
    const uint32_t first = part * cut.stretch;
    count = std::min(cut.stretch, cut.always - first);
    for (uint32_t i = 0; i < count; ++i) {
      const uint32_t n = first + i;
      records[i] = cache.record(layer, head, n < cut.sinks ? n : cut.recent + n - cut.sinks);
    }
  } else {
    if (picked != head) pick(head);
    const uint32_t first = (part - cut.always_parts()) * cut.stretch;
    count = std::min(cut.stretch, cut.chosen - first);
    for (uint32_t i = 0; i < count; ++i) records[i] = cache.record(layer, head, me.places[first + i]);
  }
  const float* q[kMaxGroup];
  float *acc[kMaxGroup], max[kMaxGroup], sum[kMaxGroup];
  for (uint32_t g = 0; g < group; ++g) {
    q[g] = sc.q + size_t(head * group + g) * hd;
    acc[g] = sc.partial.data() + (size_t(part) * s.n_heads + head * group + g) * (hd + 2);
  }
  k.records[size_t(cache.type())].attend({q, records, count, group, hd, me.scores, acc, max, sum});
  for (uint32_t g = 0; g < group; ++g) acc[g][hd] = max[g], acc[g][hd + 1] = sum[g];
}

void SparseStep::measure_level(uint32_t layer, uint32_t head) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, end = cut.recent + cut.always - cut.sinks;
  edgert::measure_level(k, cache, layer, head, end, query, group, s.head_dim, me.scores, me.tmp, level);
}

void SparseStep::pick(uint32_t head) {
  k.pick(sc.worth.data() + size_t(head) * sc.worth_stride, cut.blocks * kIndexTokens, cut.chosen, me.places.data());
  picked = head;
}

// What tokens of a block are worth, and their pages.
void SparseStep::scan(uint32_t layer, uint32_t head, uint32_t block, int8_t* worth) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads;
  const uint8_t* next = cache.index(layer, head, std::min(block + 1, cut.blocks - 1));
  k.scan({cache.index(layer, head, block), next, query, level, group, s.head_dim, worth});
  if (cache.tier()) page_weights(worth, sc.page_weight.data() + size_t(head) * sc.page_stride + block * kBlockPages);
}

// Adds what a head would give to each page, as a share of what it gives to all of them and to what is always read.
void SparseStep::add_shares(uint32_t layer, uint32_t blocks) {
  const std::vector<uint32_t>& heads = cache.recorded(layer);
  for (uint32_t i = w.index(); i < heads.size(); i += w.threads()) {
    const uint32_t head = heads[i];
    edgert::add_shares(sc.page_weight.data() + size_t(head) * sc.page_stride, blocks * kBlockPages,
                       sc.page_worth.data() + size_t(head) * sc.page_stride);
  }
}

void SparseStep::vote(uint32_t layer, const float* queries, uint32_t blocks) {
  const std::vector<uint32_t>& heads = cache.recorded(layer);
  blocks = std::min(blocks, cut.blocks);
  uint32_t b, e;
  int8_t worth[kIndexTokens];
  while (w.claim(uint32_t(heads.size()) * blocks, b, e))
    for (uint32_t item = b; item < e; ++item) {
      take_queries(layer, heads[item / blocks], queries);
      scan(layer, heads[item / blocks], item % blocks, worth);
    }
  w.barrier();
  add_shares(layer, blocks);
  w.barrier();
}

// The queries of a head, of all that are [n_heads][head_dim], and their level.
void SparseStep::take_queries(uint32_t layer, uint32_t head, const float* queries) {
  if (leveled == head) return;
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads;
  for (uint32_t g = 0; g < group; ++g) query[g] = queries + size_t(head * group + g) * s.head_dim;
  measure_level(layer, head);
  leveled = head;
}

void SparseStep::attend(uint32_t layer, uint32_t item) {
  const uint32_t always = cut.always_parts(), each = always + cut.blocks;
  const uint32_t head = cache.recorded(layer)[item / each], part = item % each;
  if (part < always) return attend_part(layer, head, part);
  take_queries(layer, head, sc.q);
  const uint32_t block = part - always;
  int8_t* worth = sc.worth.data() + size_t(head) * sc.worth_stride + size_t(block) * kIndexTokens;
  scan(layer, head, block, worth);
  if (block == 0) std::fill(worth, worth + cut.sinks, kNever);
  if (!cache.tier()) return;
  for (uint32_t p = 0; p < kBlockPages; ++p)
    if (!cache.readable(block * kBlockPages + p)) std::fill_n(worth + p * kPageTokens, kPageTokens, kNever);
}

void SparseStep::choose(uint32_t layer) {
  const std::vector<uint32_t>& heads = cache.recorded(layer);
  if (cache.tier()) add_shares(layer, cut.blocks);
  const uint32_t always = cut.always_parts(), chosen = cut.parts() - always;
  uint32_t b, e;
  while (w.claim(uint32_t(heads.size()) * chosen, b, e))
    for (uint32_t item = b; item < e; ++item) attend_part(layer, heads[item / chosen], always + item % chosen);
}

uint32_t index_reach(const KvCache& cache, uint32_t n) {
  return std::min(cache.blocks_at(cache.length() + n), cache.length() / kIndexTokens);
}

void make_index(const ModelSpec& s, const Kernels& k, const KvCache& cache, Pool::Worker& w, uint32_t blocks) {
  const uint32_t first = cache.indexed();
  for (uint32_t layer = 0; layer < s.layers.size(); ++layer) {
    const std::vector<uint32_t>& heads = cache.recorded(layer);
    if (heads.empty()) continue;
    const uint32_t n = uint32_t(heads.size());
    uint32_t b, e;
    while (w.claim(n * (blocks - first), b, e))
      for (uint32_t item = b; item < e; ++item) {
        const uint32_t head = heads[item % n], block = first + item / n;
        const uint8_t* pages[kIndexTokens / kPageTokens];
        for (uint32_t p = 0; p < kIndexTokens / kPageTokens; ++p)
          pages[p] = cache.record(layer, head, block * kIndexTokens + p * kPageTokens);
        k.records[size_t(cache.type())].make_index(pages, s.head_dim, cache.index(layer, head, block));
      }
    w.barrier();
  }
}

}  // namespace edgert
