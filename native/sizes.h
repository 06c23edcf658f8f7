// What a model will take in memory, from the headers of its files alone. These are the sums that the
// decoder's own allocations are made of: plan_weights(), Scratch and KvCache answer both.
#pragma once
#include <cstddef>
#include <cstdint>

#include "decoder.h"

namespace edgert {

class Sizes {
 public:
  // `lanes`: rows of a tile at the ISA level meant, which need not be one that runs here. Throws what
  // Decoder does.
  Sizes(const GgufFile& file, const ModelSpec& spec, uint32_t threads, const Sidecars& sidecars, uint32_t lanes);

  const Weights& weights() const { return weights_; }  // shapes and sizes, no data
  size_t arena_bytes() const { return arena_bytes_; }  // of the buffer that holds all packed tensors
  size_t padding_bytes() const;                        // of it that are no tensor
  // Buffers of a forward pass and of the head after `length` positions.
  enum class Head { Dense, Flash, Exact };
  size_t activations(const KvCache& cache, uint32_t length, Head head, uint32_t probes, uint32_t keep) const;
  // An empty KV cache of at most `context` positions: it says what it will take.
  KvCache kv(uint32_t context, KvType type, const Selection& selection) const { return {spec_, context, type, selection}; }

 private:
  ModelSpec spec_;
  Weights weights_;
  uint32_t threads_;
  size_t arena_bytes_ = 0;
};

}  // namespace edgert
