// The retrieval head: which pages of a tier (tier.h) the coming step will want, before its first layer runs.
//
// The idea is that of SpeContext (arXiv 2512.00722): a small head, distilled from the model, looks before the
// model does. Here it predicts queries alone. Those of the attention heads that matter most for the choice follow
// linearly, through `rank` numbers, from what is known before a step: the embedding of its token and the final
// state, normed, behind which that token was chosen. Rotated to the token's position they scan the index of
// keys that a sparse step scans with the true queries anyway (sparse.h), so the head has no keys of its own.
// What a page is worth is the sum over those heads of the share they would give its best token, times `worth`.
#pragma once
#include <cstdint>
#include <vector>

#include "packed.h"

namespace edgert {

struct RetrievalHead {
  struct Head {
    uint32_t layer, head;  // of keys and values
    float worth;           // a page that gets all of it is worth this
  };
  uint32_t rank = 0;  // 0: there is none
  std::vector<Head> heads;
  PackedMatrix down;            // [rank][2 * dim] of embedding and state
  PackedMatrix up;              // [heads * group * head_dim][rank], queries in front of their rotation
  const float* bias = nullptr;  // [heads * group * head_dim]
  size_t bytes = 0;             // of the tensors
};

// The final states, in front of the last norm, of the last positions of a sequence, as far as they are known.
class LastStates {
 public:
  explicit LastStates(uint32_t dim) : dim_(dim), position_(kKept, kNone), states_(size_t(kKept) * dim) {}
  static size_t bytes(uint32_t dim) { return kKept * (dim * sizeof(float) + sizeof(uint32_t)); }

  void put(uint32_t position, const float* state);
  const float* at(uint32_t position) const;  // nullptr when it is not known
  void rewind(uint32_t length);              // forgets those from `length` on

 private:
  static constexpr uint32_t kKept = 32;  // a block of drafts that goes back is shorter
  static constexpr uint32_t kNone = UINT32_MAX;
  uint32_t dim_;
  std::vector<uint32_t> position_;  // [kKept]
  std::vector<float> states_;       // [kKept][dim]
};

}  // namespace edgert
