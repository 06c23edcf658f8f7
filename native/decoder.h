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
#include "retrieval.h"
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

// FlashHead (arXiv 2603.14591): the rows of the vocabulary head in clusters. Cheap scores say which rows
// are worth reading; those are scored exactly, in units of kUnit rows. The cheap scores come in one
// stage or in two:
//   routers   score of cluster c: routers[c] . h + bias[c]; the units of the best clusters go on
//   low rank  score of a unit: the maximum over its rows of low[i] . (projection . h); the best go on
struct FlashHead {
  static constexpr uint32_t kUnit = 16;
  static constexpr uint32_t kPadding = 0xffffffff;
  uint32_t clusters = 0, cluster_size = 0;  // cluster_size a multiple of kUnit; no head when 0
  std::vector<uint32_t> token;              // [clusters * cluster_size] token of each row, kPadding
  std::vector<uint32_t> row;                // [vocab] row of each token
  std::vector<uint32_t> special;            // units that are always scored
  PackedMatrix routers;         // [clusters][dim]; no rows without this stage
  const float* bias = nullptr;  // [clusters]
  PackedMatrix projection;      // [rank][dim]; no rows without this stage
  PackedMatrix low;             // [clusters * cluster_size][rank]
  size_t bytes = 0;             // of the tensors above
  size_t table_bytes() const { return sizeof(uint32_t) * (token.size() + row.size()); }
};

struct Weights {
  // The same matrix when the head is tied. With a FlashHead the head's rows lie cluster by cluster.
  PackedMatrix embedding, head;
  FlashHead flash;
  RetrievalHead retrieval;
  const float* output_norm = nullptr;
  const float* rope_factors = nullptr;  // [rope_dims / 2]
  std::vector<LayerWeights> layers;
  Arena arena;
  size_t body_bytes = 0, embedding_bytes = 0, head_bytes = 0;  // packed, head 0 when tied

  // Bytes one decode step reads with the dense head.
  size_t step_bytes() const { return body_bytes + (head_bytes ? head_bytes : embedding_bytes); }
  // Units of the head that Decoder::flash() scores at most, beside those asked for by `more`; and bytes
  // it reads.
  size_t flash_units(uint32_t probes, uint32_t keep) const;
  size_t flash_bytes(uint32_t probes, uint32_t keep) const;
};

// Files that parts of a model come from which edgert made of it; nullptr: without that part.
struct Sidecars {
  const GgufFile* flash = nullptr;      // a FlashHead
  const GgufFile* retrieval = nullptr;  // a RetrievalHead
};

// Shapes and sizes of what load_weights() would make, from the headers alone: its matrices have no
// data. `arena_bytes` is what their arena would hold. Throws as load_weights() does.
Weights plan_weights(const GgufFile& file, const ModelSpec& spec, const Sidecars& sidecars, uint32_t lanes,
                     size_t& arena_bytes);

// Reads and packs every tensor the spec names, and those of the sidecars. Throws
// ModelFileError, UnsupportedModelError, EngineError.
Weights load_weights(const GgufFile& file, const ModelSpec& spec, const Sidecars& sidecars, const Kernels& kernels,
                     Pool& pool);

// Throws UnsupportedModelError for heads the kernels are not made for.
void check_head_dim(const ModelSpec& spec);

struct Scratch;

class Decoder {
 public:
  // `threads` 0: one for each CPU this process may use.
  Decoder(const GgufFile& file, const ModelSpec& spec, uint32_t threads, const Sidecars& sidecars = {});
  ~Decoder();

  const ModelSpec& spec() const { return spec_; }
  const Weights& weights() const { return weights_; }
  uint32_t threads() const { return pool_.threads(); }
  Isa isa() const { return kernels_.isa; }
  size_t activation_bytes() const;

  // What a retrieval head says the pages of a cache with a tier will be worth to a step with `token`, [pages with an
  // index]; empty where it has nothing to say: without a head, while all pages may be read, and when the final
  // state of the token before is not known.
  std::vector<float> page_worth(KvCache& cache, int32_t token);

  enum class Want { None, Last, All, Hidden };
  // Appends n tokens to the cache. `out` receives vocab logits for the last token or for each, or the
  // head's input of each: dim floats of the final residual stream, in front of the last norm.
  // Any split of a sequence into calls gives the same bits, and so does any number of threads.
  // Throws EngineError for a token outside the vocabulary or a full cache; the cache is unchanged
  // then. Safe from several threads: calls of one decoder take turns.
  // A cache with a Selection is read in full for several tokens at once, or where `full` says so: these are
  // the bits of a cache without one. One token alone reads what is chosen.
  void forward(KvCache& cache, const int32_t* tokens, uint32_t n, Want want, float* out, bool full = false);
  // Logits of n rows of forward()'s hidden output, [n][vocab], by the whole head: the same bits as
  // forward() gives.
  void dense(const float* hidden, uint32_t n, float* logits);
  // The same as dense() in the order of the head's rows, [n][head rows], which costs less: row_tokens()
  // says whose they are, and what is nobody's is -inf.
  void dense_rows(const float* hidden, uint32_t n, float* logits);
  const std::vector<uint32_t>& row_tokens() const { return weights_.flash.token; }  // empty: ids in order
  // The likeliest token of each of n rows, the lowest id of equals: what dense() gives, without writing
  // the logits, and with half the arithmetic.
  void best(const float* hidden, uint32_t n, uint32_t* tokens);

  // Some tokens and their logits, the bits that dense() gives, in no order.
  struct Scored {
    std::vector<uint32_t> ids;
    std::vector<float> logits;
  };
  // One row's tokens in what is left of `probes` clusters (of all without routers) by the `keep` best units
  // (by all without low rank), and those beside the special tokens and beside `more` (token ids).
  // Throws EngineError without a FlashHead.
  void flash(const float* hidden, uint32_t probes, uint32_t keep, const std::vector<uint32_t>& more, Scored& out);
  // One row's logits of the tokens `ids`. Needs no FlashHead.
  void among(const float* hidden, const std::vector<uint32_t>& ids, Scored& out);

 private:
  struct Pass;
  struct Head;
  // What the pages of the cache's tier will be worth to a step with `token`, [pages with an index]; nullptr where nothing says.
  const float* predict(KvCache& cache, int32_t token);
  void score(const float* hidden, uint32_t n, float* logits);       // dense() with the lock held
  void score_rows(const float* hidden, uint32_t n, float* logits);  // dense_rows() of up to kHeadTokens
  void measure_rows();
  void check_ids(const std::vector<uint32_t>& ids) const;
  void reserve_units(size_t units);
  void take_scored(Scored& out) const;
  ModelSpec spec_;
  const Kernels& kernels_;
  Pool pool_;
  Weights weights_;
  std::unique_ptr<Scratch> scratch_;
  std::vector<float> row_norms_;  // by tile of the head: the largest norm of a row; made by the first best()
  std::mutex turn_;
};

}  // namespace edgert
