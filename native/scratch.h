// The activations of a decoder: every buffer of a forward pass, allocated once at load.
#pragma once
#include <cstdint>
#include <vector>

#include "decoder.h"
#include "kernels.h"
#include "kv.h"
#include "memory.h"
#include "spec.h"

namespace edgert {

inline constexpr uint32_t kHeadTokens = 16;  // most tokens whose logits are computed on one way through the head
inline constexpr uint32_t kRowsAtOnce = 48;  // query rows of one prefill attention item
inline constexpr uint32_t kRecordBatches = 4;  // times as many where keys and values are records
inline constexpr uint32_t kVoters = 8;       // tokens of a prompt's pass that say which pages of a tier they would read
inline constexpr uint32_t kMaxHeadDim = 256;

// At least n elements, and no spare ones: what a model takes is known before it is taken.
template <class T>
void grow(std::vector<T>& v, size_t n) {
  if (v.size() >= n) return;
  v.reserve(n);
  v.resize(n);
}

// Row strides are whole tiles of any ISA level.
inline uint32_t padded(uint32_t n) { return (n + 15) / 16 * 16; }

// The input of a matrix: floats, and the same quantised for quantised weights, in one part or two.
struct Input {
  float* f = nullptr;  // [n][cols]
  QuantActs q{};
};

// "Shared" buffers hold all tokens of a chunk. Each thread also has a private set for one token: a
// decode step repeats the cheap parts on every thread instead of meeting at a barrier for them.
struct Scratch {
  // Shapes only; allocate() makes the buffers.
  Scratch(const ModelSpec& spec, const Weights& weights, uint32_t threads);
  void allocate(const ModelSpec& spec, const Weights& weights);
  // What allocate() would take, in `arena` and in the vectors of the threads.
  size_t arena_bytes(const ModelSpec& spec, const Weights& weights);
  size_t list_bytes(const Weights& weights) const;
  // Makes room for passes over `cache` up to `length`.
  void reserve(const ModelSpec& spec, const Weights& weights, const KvCache& cache, uint32_t length);
  // What reserve() takes in all.
  static size_t reserved_bytes(const ModelSpec& spec, const Weights& weights, const KvCache& cache, uint32_t length, uint32_t threads);

  struct Likely {
    float logit;
    uint32_t token;
  };
  struct Private {
    float* x;          // [dim] residual stream
    Input in;          // [widest], or [dim] in two parts
    float* tmp;        // [max(widest, kHeadTokens * dim)]
    QuantActs head;    // [kHeadTokens][dim] in two parts
    QuantActs coarse;  // [kHeadTokens][dim] in one
    float* tile;       // [kHeadTokens][16]
    float* scores;     // [16][kChunkTokens]
    float *max, *sum;  // [kRowsAtOnce]
    std::vector<uint8_t> keys, values;  // [kChunkPages] pages made of records
    std::vector<uint32_t> places;       // tokens picked for a KV head
    Likely likeliest[kHeadTokens];
    std::vector<uint32_t> chosen;  // clusters or units that the last stage of a FlashHead chose
    std::vector<uint32_t> units;   // units of the head's rows that are looked at
    std::vector<uint8_t> taken;    // [units of the head] 1: in `units`
  };

  uint32_t q_cols, kv_cols;  // row strides of q and of k, v
  uint32_t widest;           // most columns of any matrix input
  uint32_t ffn;              // row stride of gate and up; a convolution's input projection fits too
  bool conv_layers = false;

  float *x, *y;         // [kMaxChunk][dim], [kMaxChunk][padded(dim)] residual stream, block output
  float *q, *k, *v;     // [kMaxChunk][q_cols], [kMaxChunk][kv_cols]
  float *gate, *up;     // [kMaxChunk][ffn]
  float* conv;          // [kMaxChunk][dim] output of the convolution, if the model has any
  float *row_max, *row_sum;  // [KV heads][kMaxChunk][group] of the rows of attend_many()
  float* voters;        // [kVoters][q_cols] queries of a pass's last tokens, floats whatever the type of the cache
  Input in;             // [kMaxChunk][widest], or [kMaxChunk][dim] in two parts
  float* cluster;       // [clusters], padded: scores of a FlashHead's clusters
  float* unit;          // [units] low-rank scores of units
  float* low;           // [rank] low-rank image of the head's input
  float* retrieval_low;      // [rank] of a retrieval head
  float* retrieval_queries;  // [heads * group * head_dim] that it predicts
  float *cos, *sin;     // [rope kinds][kMaxChunk][rope_dims / 2]
  std::vector<Private> threads;

  std::vector<LayerSpec> ropes;              // distinct (base, scale)
  std::vector<uint32_t> rope_of;             // by layer: which of them
  std::vector<std::vector<float>> inv_freq;  // [rope kinds][rope_dims / 2], filled by the decoder

  // Attention of one token: (sum of weighted values, maximum, sum of weights) by chunk and head,
  // [chunks][n_heads][head_dim + 2]. Grows with the context, before a pass.
  std::vector<float> partial;

  // What the tokens before the recent ones are worth, [KV heads][worth_stride] (kernels.h: Scan).
  std::vector<int8_t> worth;
  uint32_t worth_stride = 0;
  // For a tier (tier.h): the weight of a page's best token as a multiple of that of all that is always read, of one layer, and
  // the shares that pages have of such weights, summed over layers; both [KV heads][page_stride].
  std::vector<float> page_weight, page_worth;
  uint32_t page_stride = 0, worth_heads = 0;
  // The same of a retrieval head: the weight of a page's best token, then its share, [heads][page_stride], and what pages are
  // worth, [page_stride].
  std::vector<float> retrieval_weight, retrieval_worth;

  // Logits of the whole head in the order of a FlashHead's rows, [kHeadTokens][rows]; grows with use.
  std::vector<float> by_row;
  // Tokens of the units scored last and their logits, [units][kUnit]; grows with use.
  std::vector<uint32_t> ids;
  std::vector<float> logits;

  size_t bytes() const {
    size_t n = (partial.capacity() + by_row.capacity() + ids.capacity() + logits.capacity()) * sizeof(float);
    n += worth.capacity() + (page_weight.capacity() + page_worth.capacity() + retrieval_weight.capacity() + retrieval_worth.capacity()) * sizeof(float);
    for (const Private& p : threads) {
      n += p.taken.capacity() + (p.chosen.capacity() + p.units.capacity()) * sizeof(uint32_t);
      n += p.keys.capacity() + p.values.capacity() + p.places.capacity() * sizeof(uint32_t);
    }
    return arena_.bytes() + n;
  }

 private:
  void lay_out(Arena& a, const ModelSpec& spec, const Weights& weights);
  Arena arena_;
};

}  // namespace edgert
