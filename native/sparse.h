// Attention of one token to the tokens that the index chooses (KvCache with a Selection), layer by layer.
//
// First every thread takes its part of two things: attention to what is always read, and the scan of
// the index, which says how much each token in between is worth to a KV head. Behind a barrier the
// best are picked and read. Both give partial results, a part for each stretch of tokens, which are joined in
// the order of the parts: the same bits with any number of threads.
#pragma once
#include <cstdint>

#include "kernels.h"
#include "kv.h"
#include "pool.h"
#include "scratch.h"
#include "spec.h"

namespace edgert {

inline constexpr uint32_t kBlockPages = kIndexTokens / kPageTokens;  // of the index

// How one token's attention to records is cut.
struct SparseCut {
  SparseCut(const KvCache& cache, uint32_t position);

  uint32_t sinks;   // tokens below are always read,
  uint32_t recent;  // and those from here on; the same as `sinks` when everything is read
  uint32_t always;  // how many these are
  uint32_t blocks;  // of the index that are scanned
  uint32_t chosen;  // tokens that are picked of those between
  uint32_t stretch; // tokens of a part
  uint32_t always_parts() const { return (always + stretch - 1) / stretch; }
  static uint32_t most_parts(const Selection& choice, uint32_t length);  // of any step up to `length`
  uint32_t parts() const { return always_parts() + (chosen + stretch - 1) / stretch; }
};

struct SparseStep {
  const ModelSpec& s;
  const Kernels& k;
  KvCache& cache;
  Pool::Worker& w;
  Scratch& sc;
  Scratch::Private& me;
  SparseCut cut;
  static constexpr uint32_t kNone = 0xffffffff;
  uint32_t picked = kNone;   // the KV head whose choice is in me.places
  uint32_t leveled = kNone;  // and that whose queries and level are in the following
  const float* query[KvCache::kMaxGroup] = {};
  float level[KvCache::kMaxGroup] = {};

  // A layer's heads in records: each has parts that are always read and blocks that are scanned, its items. Behind a
  // barrier choose() reads what the scans chose, if anything is. Partial results are left in sc.partial,
  // [parts][n_heads][head_dim + 2], when every thread has returned.
  uint32_t items(uint32_t layer) const { return uint32_t(cache.recorded(layer).size()) * (cut.always_parts() + cut.blocks); }
  void attend(uint32_t layer, uint32_t item);
  void choose(uint32_t layer);

  // What the queries q [n_heads][head_dim] of the token that `cut` is of would give to pages with an index, of the
  // first `blocks`: into sc.page_worth.
  void vote(uint32_t layer, const float* queries, uint32_t blocks);

  void take_queries(uint32_t layer, uint32_t head, const float* queries);
  void scan(uint32_t layer, uint32_t head, uint32_t block, int8_t* worth);
  void add_shares(uint32_t layer, uint32_t blocks);
  void attend_part(uint32_t layer, uint32_t head, uint32_t part);
  void measure_level(uint32_t layer, uint32_t head);  // of `query`
  void pick(uint32_t head);
};

// The logarithm of what each of a group's queries, [head_dim] each, gives to the first and to the last kLevelTokens of `end`
// tokens together: what the queries of a group are compared by. `scores` and `tmp` are scratch, [16][kChunkTokens]
// and [group][head_dim].
inline constexpr uint32_t kLevelTokens = 16;
void measure_level(const Kernels& k, const KvCache& cache, uint32_t layer, uint32_t head, uint32_t end, const float* const* queries,
                   uint32_t group, uint32_t head_dim, float* scores, float* tmp, float* level);

// Adds to `worth` the shares that pages have of the weights of all pages and of what is always read, which has weight 1.
void add_shares(const float* weight, uint32_t pages, float* worth);

// The weights of the best tokens of a block's pages, [kBlockPages], of what its tokens are worth (kernels.h: Scan).
void page_weights(const int8_t* worth, float* pages);

// Makes the index of blocks that have become old enough, before a pass that appends n tokens. Called by
// all threads.
void make_index(const ModelSpec& s, const Kernels& k, const KvCache& cache, Pool::Worker& w, uint32_t blocks);
// How far the index of a cache reaches in such a pass.
uint32_t index_reach(const KvCache& cache, uint32_t n);

}  // namespace edgert
