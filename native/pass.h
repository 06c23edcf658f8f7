// A forward pass over a chunk of tokens, step by step: forward.cpp has the layers, attention.cpp what lies between
// the matrices of q, k, v and the output projection.
#pragma once
#include <algorithm>
#include <cstring>

#include "decoder.h"
#include "formats.h"
#include "scratch.h"

namespace edgert {

inline constexpr size_t kFetchAhead = 65536;  // bytes asked for at a barrier; a part of any L2

inline bool quantised(const PackedMatrix& m) { return find_format(m.type) != nullptr; }

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
  uint32_t entered = 0;  // the layer from which on a step may read pages that are new in the set of a tier

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
  void enter(bool add, const float* post_norm, const float* norm, bool quant, uint32_t parts = 1);

  void embed();
  // cos and sin of every pair at every position of the chunk.
  void rope_tables();
  void rotate(float* h, uint32_t layer, uint32_t i) const;

  // Norm and rope of one query head of token i, in place, times the attention scale and log2(e), as the
  // type of the cache wants it.
  void make_query(uint32_t layer, uint32_t i, uint32_t head) const;
  // Norm and rope of one key head of token i; key and value go to their page.
  void append(uint32_t layer, uint32_t i, uint32_t head) const;
  // Norm and rope of every head; keys and values go to their pages.
  void prepare_heads(uint32_t layer);

  // Attention of `rows` queries (several heads of a group, several tokens) to one chunk.
  struct Rows {
    const float* q[kRowsAtOnce];
    float* acc[kRowsAtOnce];
    uint32_t position[kRowsAtOnce];
    float *max, *sum;
    uint32_t count;
  };

  // The pages of a chunk of a KV head up to position `end`.
  struct Pages {
    const uint8_t *keys[kChunkPages], *values[kChunkPages];
  };
  void find_pages(uint32_t layer, uint32_t kv_head, uint32_t chunk, uint32_t end, Pages& found) const;
  // The queries see `window` positions (0: all).
  void attend_chunk(uint32_t window, uint32_t chunk, const Pages& pages, const Rows& r) const;
  // Those of a streaming head to its first page, of which they see what lies before the window.
  void attend_sinks(uint32_t layer, uint32_t kv_head, const Rows& r) const;

  // Prefill: an item is one KV head and a few tokens; their rows share every page read. What it costs to make
  // pages of records is shared by several batches of rows.
  void attend_many(uint32_t layer);
  void attend_chunks(uint32_t layer, uint32_t first, uint32_t begin, uint32_t end);
  void finish_rows(uint32_t layer, uint32_t i) const;
  // What the last tokens would read of the pages of a tier.
  void vote(uint32_t layer);

  // The first chunk that the token at `position` sees of a KV head.
  uint32_t first_chunk(uint32_t layer, uint32_t kv_head, uint32_t position) const;

  // How one token's attention is cut into items. A row is one query head and one chunk of the context;
  // rows are counted by KV head, chunk, query head, and those of one KV head and chunk that meet in a
  // thread share the read of its pages. An item is all of these or, when there are few, one row. The
  // cut never changes a bit: rows are independent.
  struct Cut {
    uint32_t first, chunks;  // chunks of the context
    uint32_t rows, items;    // rows of an item
    uint32_t least;          // items to claim at once: few of them are cut in equal shares
  };
  Cut cut(uint32_t layer) const;
  void barrier_before_attention(uint32_t layer);
  void attend_one(uint32_t layer);
  // `count` query heads from `first` of a KV head's group to a chunk, or kSinks: a part of one token's attention.
  static constexpr uint32_t kSinks = UINT32_MAX;
  void attend_rows(uint32_t layer, uint32_t kv_head, uint32_t first, uint32_t count, uint32_t chunk, uint32_t part);
  // A layer with heads that choose what they read, and where heads have classes also those that do not: the parts of these
  // are their first page, when they are streaming and the window begins behind its first token, and then chunks.
  void attend_sparse(uint32_t layer);
  uint32_t parts_of(uint32_t layer, uint32_t kv_head) const;
  uint32_t has_sinks(uint32_t layer, uint32_t kv_head) const;  // 1 or 0 such parts
  // Makes the output of one token's attention of partial results, `parts(KV head)` of each.
  template <class F>
  void join_parts(uint32_t layer, F&& parts);

  void add_bias(float* y, size_t stride, const float* bias, uint32_t begin, uint32_t end) const;
  void attention(uint32_t layer);

  // y = m * in; `next` is the matrix read after it.
  void project(const PackedMatrix& m, const PackedMatrix& next);

  // LFM2: y = out(C * conv(B * x)) with (B, C, x) = in(h); causal, depthwise, conv_kernel taps.
  void convolution(uint32_t layer);

  void ffn(uint32_t layer);
  void run();

  // What the pages of a tier will be worth to this token, into sc.retrieval_worth (retrieval.h). `state`: the
  // final state of the token before.
  void predict(const float* state);
};

}  // namespace edgert
