#include "sizes.h"

#include "formats.h"
#include "memory.h"
#include "scratch.h"

namespace edgert {

Sizes::Sizes(const GgufFile& file, const ModelSpec& spec, uint32_t threads, const Sidecars& sidecars, uint32_t lanes)
    : spec_(spec), threads_(threads) {
  check_head_dim(spec);
  weights_ = plan_weights(file, spec, sidecars, lanes, arena_bytes_);
  arena_bytes_ = Buffer::rounded(arena_bytes_);
}

size_t Sizes::padding_bytes() const {
  return arena_bytes_ - weights_.body_bytes - weights_.embedding_bytes - weights_.head_bytes - weights_.flash.bytes -
         weights_.retrieval.bytes;
}

size_t Sizes::activations(const KvCache& cache, uint32_t length, Head head, uint32_t probes, uint32_t keep) const {
  Scratch s(spec_, weights_, threads_);
  size_t n = Buffer::rounded(s.arena_bytes(spec_, weights_)) + s.list_bytes(weights_) +
             Scratch::reserved_bytes(spec_, weights_, cache, length, threads_);
  if (!weights_.flash.token.empty()) n += weights_.head.rows * sizeof(float);  // a prompt's last logits are dense
  if (head != Head::Dense)
    n += weights_.flash_units(probes, keep) * FlashHead::kUnit * (sizeof(float) + sizeof(uint32_t));
  if (head == Head::Exact && find_format(weights_.head.type)) n += weights_.head.tiles() * sizeof(float);
  return n;
}

}  // namespace edgert
