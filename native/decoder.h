// The decoder: packed weights of one model and the forward pass over them. One generic loop driven
// by ModelSpec; a family that needs no new operator needs no code here.
#pragma once
#include <cstdint>
#include <functional>
#include <memory>
#include <mutex>
#include <string>
#include <vector>

#include "gguf.h"
#include "kernels.h"
#include "kv.h"
#include "memory.h"
#include "pool.h"
#include "spec.h"

namespace edgert {

struct LayerWeights {
  // Attention: q, k, v, output. Convolution: q is the input projection, output the output projection.
  PackedMatrix q, k, v, output, gate, up, down;
  const float *attn_norm = nullptr, *ffn_norm = nullptr;
  const float *post_attn_norm = nullptr, *post_ffn_norm = nullptr;  // nullptr without post_norms
  const float *q_norm = nullptr, *k_norm = nullptr;                 // nullptr without qk_norm
  const float *q_bias = nullptr, *k_bias = nullptr, *v_bias = nullptr;
  const float* conv = nullptr;  // [dim][conv_kernel]
};

// FlashHead (arXiv 2603.14591): the rows of the vocabulary head in clusters. A cheap score of each
// cluster says which are worth reading; the rows of those are scored exactly.
struct FlashHead {
  uint32_t clusters = 0, cluster_size = 0;  // cluster_size a multiple of 16; no head when 0
  std::vector<uint32_t> token;              // [clusters * cluster_size] token of each row, kPadding
  std::vector<uint32_t> row;                // [vocab] row of each token
  std::vector<uint32_t> special;            // clusters that are always scored
  // The score of cluster c is routers[c] . h + bias[c] or, with low-rank rows, the maximum over its
  // rows of rows[i] . (projection . h).
  PackedMatrix routers;      // [clusters][dim], or rows [clusters * cluster_size][rank]
  PackedMatrix projection;   // [rank][dim]; no rows without low rank
  const float* bias = nullptr;  // [clusters]; nullptr with low rank
  size_t router_bytes = 0;   // read for every token
  static constexpr uint32_t kPadding = 0xffffffff;

  bool low_rank() const { return projection.rows != 0; }
};

struct Weights {
  // The same matrix when the head is tied. With a FlashHead the head's rows lie cluster by cluster.
  PackedMatrix embedding, head;
  FlashHead flash;
  const float* output_norm = nullptr;
  const float* rope_factors = nullptr;  // [rope_dims / 2]
  std::vector<LayerWeights> layers;
  Arena arena;
  size_t body_bytes = 0, embedding_bytes = 0, head_bytes = 0;  // packed, head 0 when tied
};

// Reads and packs every tensor the spec names, and those of the sidecar if there is one. Throws
// ModelFileError, UnsupportedModelError, EngineError.
Weights load_weights(const GgufFile& file, const ModelSpec& spec, const GgufFile* sidecar, const Kernels& kernels,
                     Pool& pool);

struct Scratch;

class Decoder {
 public:
  // `threads` 0: one for each CPU this process may use. `sidecar`, nullptr for none, brings a
  // FlashHead.
  Decoder(const GgufFile& file, const ModelSpec& spec, uint32_t threads, const GgufFile* sidecar = nullptr);
  ~Decoder();

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return weights_; }
  uint32_t threads() const { return pool_.threads(); }
  Isa isa() const { return kernels_.isa; }
  size_t activation_bytes() const;
  // Bytes of weights one decode step reads with the dense head, and without any head.
  size_t step_weight_bytes() const;
  size_t step_body_bytes() const { return weights_.body_bytes; }
  // Bytes that flash() reads for so many clusters.
  size_t flash_bytes(uint32_t probes) const;

  enum class Want { None, Last, All, Hidden };
  // Appends n tokens to the cache. `out` receives vocab logits for the last token or for each, or the
  // head's input of each: dim floats of the final residual stream, in front of the last norm.
  // Any split of a sequence into calls gives the same bits, and so does any number of threads.
  // Throws EngineError for a token outside the vocabulary or a full cache; the cache is unchanged
  // then. Safe from several threads: calls of one decoder take turns.
  void forward(KvCache& cache, const int32_t* tokens, uint32_t n, Want want, float* out);
  // Logits of n rows of forward()'s hidden output, [n][vocab], by the whole head: the same bits as
  // forward() gives.
  void dense(const float* hidden, uint32_t n, float* logits);
  // The likeliest token of each of n rows, the lowest id of equals: what dense() gives, without writing
  // the logits.
  void best(const float* hidden, uint32_t n, uint32_t* tokens);
  // Logits of one row by the `probes` best clusters, those of the special tokens and those of `more`
  // (token ids): the same bits as dense() gives for the tokens scored. They are appended to `scored`;
  // `logits` [vocab] is left alone elsewhere. Throws EngineError without a FlashHead.
  void flash(const float* hidden, uint32_t probes, const std::vector<uint32_t>& more, float* logits,
             std::vector<uint32_t>& scored);

 private:
  struct Pass;
  struct Head;
  void score(const float* hidden, uint32_t n, float* logits);  // dense() with the lock held
  ModelSpec spec_;
  const Kernels& kernels_;
  Pool pool_;
  Weights weights_;
  std::unique_ptr<Scratch> scratch_;
  std::mutex turn_;
};

}  // namespace edgert
