#include "retrieval.h"

#include <algorithm>
#include <cstring>

#include "pass.h"
#include "sparse.h"

namespace edgert {

void LastStates::put(uint32_t position, const float* state) {
  position_[position % kKept] = position;
  std::copy_n(state, dim_, states_.begin() + size_t(position % kKept) * dim_);
}

const float* LastStates::at(uint32_t position) const {
  return position_[position % kKept] == position ? states_.data() + size_t(position % kKept) * dim_ : nullptr;
}

void LastStates::rewind(uint32_t length) {
  for (uint32_t& position : position_)
    if (position >= length) position = kNone;
}

void Decoder::Pass::predict(const float* state) {
  const RetrievalHead& head = d.weights_.retrieval;
  const uint32_t hd = s.head_dim, heads = uint32_t(head.heads.size()), rows = head.up.rows / heads, group = rows / hd;
  uint32_t b, e;
  embed();
  rope_tables();
  float* const input = me.tmp;
  std::memcpy(input, x, s.dim * sizeof(float));
  k.rmsnorm(state, d.weights_.output_norm, s.norm_eps, s.dim, input + s.dim);
  set_cols(2 * s.dim);
  k.quantize(input, in.q.token(0));
  while (w.claim(head.down.tiles(), b, e))
    k.matmul(head.down, b, e, in.q, 1, sc.retrieval_low + size_t(b) * head.down.tile_rows, padded(head.rank));
  w.barrier();
  set_cols(head.rank);
  k.quantize(sc.retrieval_low, in.q.token(0));
  float* const queries = sc.retrieval_queries;
  while (w.claim(head.up.tiles(), b, e)) {
    const uint32_t row = b * head.up.tile_rows, end = std::min(e * head.up.tile_rows, head.up.rows);
    k.matmul(head.up, b, e, in.q, 1, queries + row, padded(head.up.rows));
    for (uint32_t r = row; r < end; ++r) queries[r] += head.bias[r];
  }
  w.barrier();
  const float scale = s.attn_scale * 1.44269504088896341f;
  while (w.claim(heads * group, b, e))
    for (uint32_t i = b; i < e; ++i) {
      float* const q = queries + size_t(i) * hd;
      rotate(q, head.heads[i / group].layer, 0);
      for (uint32_t c = 0; c < hd; ++c) q[c] *= scale;
    }
  w.barrier();

  SparseStep step{s, k, cache, w, sc, me, SparseCut(cache, start - 1)};
  const uint32_t blocks = cache.indexed(), pages = blocks * kBlockPages;
  int8_t worth[kIndexTokens];
  while (w.claim(heads * blocks, b, e))
    for (uint32_t item = b; item < e; ++item) {
      const uint32_t i = item / blocks, block = item % blocks;
      const RetrievalHead::Head& h = head.heads[i];
      float* const weights = sc.retrieval_weight.data() + size_t(i) * sc.page_stride + block * kBlockPages;
      if (!cache.records(h.layer, h.head)) {  // it chooses nothing
        std::fill_n(weights, kBlockPages, 0.0f);
        continue;
      }
      if (step.leveled != i) {
        for (uint32_t g = 0; g < group; ++g) step.query[g] = queries + size_t(i * group + g) * hd;
        step.measure_level(h.layer, h.head);
        step.leveled = i;
      }
      const uint8_t* const next = cache.index(h.layer, h.head, std::min(block + 1, blocks - 1));
      k.scan({cache.index(h.layer, h.head, block), next, step.query, step.level, group, hd, worth});
      page_weights(worth, weights);
    }
  w.barrier();
  while (w.claim(heads, b, e))
    for (uint32_t i = b; i < e; ++i) {
      float* const weight = sc.retrieval_weight.data() + size_t(i) * sc.page_stride;
      float sum = 1;
      for (uint32_t p = 0; p < pages; ++p) sum += weight[p];
      for (uint32_t p = 0; p < pages; ++p) weight[p] *= head.heads[i].worth / sum;
    }
  w.barrier();
  while (w.claim(blocks, b, e))
    for (uint32_t p = b * kBlockPages; p < e * kBlockPages; ++p) {
      float sum = 0;
      for (uint32_t i = 0; i < heads; ++i) sum += sc.retrieval_weight[size_t(i) * sc.page_stride + p];
      sc.retrieval_worth[p] = sum;
    }
}

const float* Decoder::predict(KvCache& cache, int32_t token) {
  const Tier* const tier = cache.tier();
  if (!weights_.retrieval.rank || !tier || !tier->chooses() || !cache.indexed()) return nullptr;
  const float* const state = cache.length() ? cache.states().at(cache.length() - 1) : nullptr;
  if (!state) return nullptr;
  cache.open_ends();
  pool_.run([&](Pool::Worker& w) {
    Pass{*this, cache, w, &token, 1, cache.length(), Want::None, true, 0}.predict(state);
  });
  return scratch_->retrieval_worth.data();
}

std::vector<float> Decoder::page_worth(KvCache& cache, int32_t token) {
  check_ids({uint32_t(token)});
  const std::lock_guard lock(turn_);
  scratch_->reserve(spec_, weights_, cache, cache.length() + 1);
  const float* const worth = predict(cache, token);
  return worth ? std::vector<float>(worth, worth + cache.indexed() * kBlockPages) : std::vector<float>();
}

}  // namespace edgert
