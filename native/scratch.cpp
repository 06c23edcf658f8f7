#include "scratch.h"

#include <algorithm>

#include "sparse.h"

namespace edgert {
namespace {

QuantActs take_quant(Arena& a, size_t values) {
  QuantActs q{};
  q.parts = 1;
  q.q = a.take<int8_t>(values);
  q.scale = a.take<float>(values / 32 + 1);
  q.sum32 = a.take<int32_t>(values / 32 + 1);
  q.fsum32 = a.take<float>(values / 32 + 1);
  q.sum16 = a.take<int32_t>(values / 16 + 1);
  q.fsum16 = a.take<float>(values / 16 + 1);
  return q;
}

size_t head_units(const Weights& weights) { return (weights.head.rows + FlashHead::kUnit - 1) / FlashHead::kUnit; }

}  // namespace

Scratch::Scratch(const ModelSpec& spec, const Weights& weights, uint32_t thread_count) {
  uint32_t kv = 0;
  for (const LayerSpec& l : spec.layers) {
    kv = std::max(kv, l.n_kv_heads * spec.head_dim);
    conv_layers |= l.conv;
    uint32_t r = 0;
    if (!l.conv) {
      while (r < ropes.size() && (ropes[r].rope_base != l.rope_base || ropes[r].rope_scale != l.rope_scale)) ++r;
      if (r == ropes.size()) ropes.push_back(l);
    }
    rope_of.push_back(r);
  }
  q_cols = spec.n_heads * spec.head_dim;
  kv_cols = padded(kv);
  ffn = padded(std::max(spec.ffn_dim, conv_layers ? 3 * spec.dim : 0));
  widest = padded(std::max({spec.dim, q_cols, spec.ffn_dim}));
  threads.resize(thread_count);
}

size_t Scratch::arena_bytes(const ModelSpec& spec, const Weights& weights) {
  Arena measure;
  lay_out(measure, spec, weights);
  return measure.used();
}

size_t Scratch::list_bytes(const Weights& weights) const {
  return threads.size() * head_units(weights) * (sizeof(uint8_t) + 2 * sizeof(uint32_t));
}

namespace {

// Elements of the lists that passes over a cache need.
struct Lists {
  size_t partial, worth, page_worth, page, places, retrieval;
};

Lists lists(const ModelSpec& spec, const Weights& weights, const KvCache& cache, uint32_t length) {
  size_t parts = (length + kChunkTokens - 1) / kChunkTokens;
  Lists l{};
  if (const uint32_t budget = cache.selection().budget) {
    parts = std::max<size_t>(parts + 1, SparseCut::most_parts(cache.selection(), length));  // a streaming head's first page
    uint32_t kv = 0;
    for (const LayerSpec& layer : spec.layers) kv = std::max(kv, layer.conv || layer.window ? 0 : layer.n_kv_heads);
    l.worth = size_t(kv) * (length / kIndexTokens * kIndexTokens);
    l.page_worth = l.worth / kPageTokens;
    if (weights.retrieval.rank) l.retrieval = length / kIndexTokens * kBlockPages;
    l.page = kChunkPages * cache.page_bytes();
    l.places = std::min(budget, length);
  }
  l.partial = parts * spec.n_heads * (spec.head_dim + 2);
  return l;
}

}  // namespace

void Scratch::reserve(const ModelSpec& spec, const Weights& weights, const KvCache& cache, uint32_t length) {
  const Lists l = lists(spec, weights, cache, length);
  grow(partial, l.partial);
  grow(worth, l.worth);
  grow(page_weight, l.page_worth);
  grow(page_worth, l.page_worth);
  grow(retrieval_weight, l.retrieval * weights.retrieval.heads.size());
  grow(retrieval_worth, l.retrieval);
  worth_stride = length / kIndexTokens * kIndexTokens;
  page_stride = worth_stride / kPageTokens;
  worth_heads = page_stride ? uint32_t(l.page_worth / page_stride) : 0;
  for (Private& p : threads) {
    grow(p.keys, l.page);
    grow(p.values, l.page);
    grow(p.places, l.places);
  }
}

size_t Scratch::reserved_bytes(const ModelSpec& spec, const Weights& weights, const KvCache& cache, uint32_t length, uint32_t threads) {
  const Lists l = lists(spec, weights, cache, length);
  return (l.partial + l.retrieval * (weights.retrieval.heads.size() + 1)) * sizeof(float) + l.worth + 2 * l.page_worth * sizeof(float) + threads * (2 * l.page + l.places * sizeof(uint32_t));
}

void Scratch::allocate(const ModelSpec& spec, const Weights& weights) {
  arena_ = Arena(arena_bytes(spec, weights), "the activations");
  lay_out(arena_, spec, weights);
  for (Private& p : threads) {
    p.taken.resize(head_units(weights));
    p.chosen.reserve(p.taken.size());
    p.units.reserve(p.taken.size());
  }
}

void Scratch::lay_out(Arena& a, const ModelSpec& spec, const Weights& weights) {
  const FlashHead& flash = weights.flash;
  const size_t n = kMaxChunk, dim = spec.dim, codes = std::max<size_t>(widest, 2 * dim), rope = ropes.size() * n * (spec.rope_dims / 2);
  x = a.take<float>(n * dim);
  y = a.take<float>(n * padded(spec.dim));
  q = a.take<float>(n * q_cols);
  k = a.take<float>(n * kv_cols);
  v = a.take<float>(n * kv_cols);
  gate = a.take<float>(n * ffn);
  up = a.take<float>(n * ffn);
  conv = a.take<float>(conv_layers ? n * dim : 0);
  row_max = a.take<float>(n * spec.n_heads);
  row_sum = a.take<float>(n * spec.n_heads);
  voters = a.take<float>(kVoters * q_cols);
  in.f = a.take<float>(n * widest);
  in.q = take_quant(a, n * codes);
  cluster = a.take<float>(padded(flash.clusters));
  unit = a.take<float>(flash.low.rows / FlashHead::kUnit);
  low = a.take<float>(padded(flash.projection.rows));
  retrieval_low = a.take<float>(padded(weights.retrieval.rank));
  retrieval_queries = a.take<float>(padded(weights.retrieval.up.rows));
  cos = a.take<float>(rope);
  sin = a.take<float>(rope);
  for (Private& p : threads) {
    p.x = a.take<float>(dim);
    p.in.f = a.take<float>(widest);
    p.in.q = take_quant(a, codes);
    p.tmp = a.take<float>(std::max<size_t>(widest, kHeadTokens * dim));
    p.head = take_quant(a, 2 * kHeadTokens * dim);
    p.head.parts = 2;
    p.coarse = take_quant(a, kHeadTokens * dim);
    p.tile = a.take<float>(kHeadTokens * 16);
    p.scores = a.take<float>(16 * kChunkTokens);
    p.max = a.take<float>(kRowsAtOnce);
    p.sum = a.take<float>(kRowsAtOnce);
  }
}

}  // namespace edgert
