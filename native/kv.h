// The KV cache of one sequence.
//
// A page is 16 tokens of one layer and KV head: K [head_dim][16], then V [16][head_dim], f16, keys
// after rope. K is stored channel by channel so that a vector holds one channel of several tokens:
// the score of each token is then summed in channel order, without horizontal sums, whatever the
// vector width. The pages of one 16-token stretch of all layers lie together (a group), so that the
// stretch can be moved in one piece. Groups are allocated as the sequence grows.
//
// Layers with a window share a ring of groups that holds the window, one prefill chunk and a little
// slack for rewinding. Convolution layers keep the last inputs of each channel in a ring.
#pragma once
#include <cstdint>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "spec.h"

namespace edgert {

inline constexpr uint32_t kMaxChunk = 256;   // tokens of one forward pass
inline constexpr uint32_t kConvRing = 64;    // inputs a convolution remembers

class KvCache {
 public:
  // At most `context` positions. Throws EngineError.
  KvCache(const ModelSpec& spec, uint32_t context);

  uint32_t length() const { return length_; }
  uint32_t context() const { return context_; }
  size_t bytes() const;

  // Makes room for positions up to `length`. Throws EngineError past the context or out of memory;
  // the cache is unchanged then.
  void reserve(uint32_t length);
  // Declares positions up to `length` written.
  void set_length(uint32_t length);
  // Keeps positions below `length`; returns the length really kept, 0 when a window or a
  // convolution has already forgotten what lies before.
  uint32_t rewind(uint32_t length);

  // Page `index` (position / 16) of an attention layer's KV head.
  uint16_t* page(uint32_t layer, uint32_t kv_head, uint32_t index) const {
    const Place& p = places_[layer];
    const Class& c = classes_[p.cls];
    const uint32_t slot = c.ring ? index % c.ring : index;
    return reinterpret_cast<uint16_t*>(c.groups[slot] + p.offset + kv_head * page_bytes_);
  }
  // Inputs of convolution layer `layer` at `position`: dim floats.
  float* conv_input(uint32_t layer, uint32_t position) const {
    return conv_ + (size_t(places_[layer].offset) * kConvRing + position % kConvRing) * dim_;
  }

  // Bytes of keys and values a decode step at the present length reads.
  size_t step_bytes() const;

  std::string save() const;             // checked by load()
  void load(const std::string& state);  // throws EngineError when it is not this cache's shape

 private:
  struct Class {  // layers whose pages live and die together
    uint32_t window = 0;
    uint32_t ring = 0;  // groups in the ring; 0: one group for every 16 positions
    size_t group_bytes = 0;
    std::vector<uint8_t*> groups;
    std::vector<Buffer> slabs;
    size_t slab_used = 0;
  };
  struct Place {
    uint32_t cls = 0;
    size_t offset = 0;  // in the group; for a convolution its number
    bool conv = false;
    uint32_t kv_heads = 0;
  };
  void grow(Class& c, size_t groups);
  size_t groups_needed(const Class& c, uint32_t length) const;

  uint32_t context_, dim_, conv_reach_ = 0;
  size_t page_bytes_;
  uint32_t length_ = 0;
  uint32_t high_ = 0;  // one past the highest position written since the cache was empty
  std::vector<Class> classes_;
  std::vector<Place> places_;
  Buffer conv_buffer_;
  float* conv_ = nullptr;
};

}  // namespace edgert
