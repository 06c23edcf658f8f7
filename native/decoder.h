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

struct Weights {
  PackedMatrix embedding, head;  // the same matrix when the head is tied
  const float* output_norm = nullptr;
  const float* rope_factors = nullptr;  // [rope_dims / 2]
  std::vector<LayerWeights> layers;
  Arena arena;
  size_t body_bytes = 0, embedding_bytes = 0, head_bytes = 0;  // packed, head 0 when tied
};

// Reads and packs every tensor the spec names. Throws ModelFileError, UnsupportedModelError,
// EngineError.
Weights load_weights(const GgufFile& file, const ModelSpec& spec, const Kernels& kernels, Pool& pool);

struct Scratch;

class Decoder {
 public:
  // `threads` 0: one for each CPU this process may use.
  Decoder(const GgufFile& file, const ModelSpec& spec, uint32_t threads);
  ~Decoder();

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return weights_; }
  uint32_t threads() const { return pool_.threads(); }
  Isa isa() const { return kernels_.isa; }
  size_t activation_bytes() const;
  // Bytes of weights one decode step reads.
  size_t step_weight_bytes() const;

  enum class Want { None, Last, All };
  // Appends n tokens to the cache. `logits` receives vocab floats for the last token or for each.
  // Any split of a sequence into calls gives the same bits, and so does any number of threads.
  // Throws EngineError for a token outside the vocabulary or a full cache; the cache is unchanged
  // then. Safe from several threads: calls of one decoder take turns.
  void forward(KvCache& cache, const int32_t* tokens, uint32_t n, Want want, float* logits);

 private:
  struct Pass;
  ModelSpec spec_;
  const Kernels& kernels_;
  Pool pool_;
  Weights weights_;
  std::unique_ptr<Scratch> scratch_;
  std::mutex turn_;
};

}  // namespace edgert
