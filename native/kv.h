// The KV cache of one sequence.
//
// A page is 16 tokens of one layer and KV head: K [head_dim][16] and V [16][head_dim], keys after rope,
// f16 or int8 with scales (kernels.h: KvType). K is stored channel by channel so that a vector holds one
// channel (in int8 four) of several tokens: no horizontal sums, and a score is summed in the same order
// whatever the vector width.
//
// The 16 pages of a chunk (256 positions) of one layer and KV head lie together: all K, then all V.
// So attention reads two long stretches of memory, which a core's prefetcher can follow; single
// pages in turn gave half the speed. The chunks of all layers whose pages live and die together are
// one piece of memory; pieces are allocated as the sequence grows.
//
// Layers with a window share a ring of pieces that holds the window, one pass and some slack for
// rewinding. Convolution layers keep the last inputs of each channel in a ring.
//
// A cache with a Selection keeps the layers that see everything in records: key and value of a token lie
// together, since a decode step reads tokens here and there, and 16 tokens of all those layers are one
// piece of memory. An index (kernels.h: IndexKernels) behind them says in two bits a channel which tokens are
// worth reading. With a tier (tier.h) those pieces are its pages, of which some are on the disk.
//
// A Selection may name a class for each KV head of those layers. Only indexed heads are in records then. Full heads
// keep pages as if they were a layer of their own, so do streaming heads, in a ring like a window's, and their first
// page apart.
#pragma once
#include <cstdint>
#include <memory>
#include <string>
#include <vector>

#include "kernels.h"
#include "memory.h"
#include "retrieval.h"
#include "spec.h"
#include "tier.h"

namespace edgert {

enum class HeadClass : uint8_t {
  Indexed,    // keeps everything; a step reads what its index chooses
  Full,       // keeps and reads everything
  Streaming,  // keeps and reads the first kPageTokens tokens and the last `window` (StreamingLLM, arXiv 2309.17453)
};

// Which past tokens a decode step reads in layers that see everything: the first `sinks`, at least the last
// `recent`, and the `budget` most promising of those between, chosen for each KV head. 0: all of them.
struct Selection {
  uint32_t budget = 0;
  uint32_t sinks = 16;
  uint32_t recent = 128;
  uint32_t window = 0;                         // of streaming heads, at least kPageTokens
  std::vector<std::vector<HeadClass>> heads{};  // by layer and KV head, none where a layer has a window; empty: all Indexed
};

inline constexpr uint32_t kMaxChunk = 256;   // tokens of one forward pass
inline constexpr uint32_t kConvRing = 64;    // inputs a convolution remembers

class KvCache {
 public:
  static constexpr uint32_t kMaxGroup = 64;  // query heads to a KV head, in records

  // At most `context` positions. A tier needs a selection. Throws EngineError, also for classes of another model's heads.
  KvCache(const ModelSpec& spec, uint32_t context, KvType type = KvType::F16, const Selection& selection = {},
          const TierShape& tier = {});

  KvType type() const { return type_; }
  const Selection& selection() const { return selection_; }
  size_t page_bytes() const { return page_; }  // of a page's K, and of its V

  uint32_t length() const { return length_; }
  uint32_t context() const { return context_; }
  size_t bytes() const;
  // What bytes() will be with room for `length` positions, by layers, or heads of layers, that live and die together;
  // `window` is 0 for those that keep everything. `heads` have a class, none: they are whole layers.
  struct Share {
    uint32_t window;
    size_t bytes;
    HeadClass cls;
    uint32_t heads;
  };
  std::vector<Share> shares_at(uint32_t length) const;
  size_t index_bytes_at(uint32_t length) const;  // the same of the index
  // The same of records when a tier of `slots` pages holds them, and the fewest slots it may have.
  size_t tier_bytes_at(uint32_t length, uint32_t slots) const;
  uint32_t least_slots() const { return Tier::least_slots(selection_.budget); }
  size_t conv_bytes() const { return conv_buffer_.bytes(); }

  // Makes room for positions up to `length`. Throws EngineError past the context or out of memory;
  // the cache is unchanged then.
  void reserve(uint32_t length);
  // Before a pass up to `length` for which there is room, and after it, when the blocks below `blocks` have an index.
  // `sparse`: it reads what is chosen, in the layers from the one on before which enter() was called also of the pages that
  // are new in the set of a tier. `predicted` and `worth` are what its tokens will and would give to the tokens of a page,
  // [pages] or nullptr and [heads][stride].
  // begin() throws EngineError when pages cannot be had, end() when they could not be read; what the cache held before
  // the pass is unchanged then.
  void begin(uint32_t length, bool sparse, const float* predicted = nullptr);
  void enter();
  void end(uint32_t length, bool sparse, uint32_t blocks, const float* worth, uint32_t heads, uint32_t stride);
  Tier* tier() const { return tier_.get(); }
  // Makes the records of the first and of the last tokens readable between two passes. Throws EngineError.
  void open_ends();
  LastStates& states() { return *states_; }  // of a cache with a tier
  // Keeps positions below `length`; returns the length really kept, 0 when a window or a
  // convolution has already forgotten what lies before. Throws EngineError when a page cannot be read; the
  // cache is unchanged then.
  uint32_t rewind(uint32_t length);

  // Whether a layer sees everything and a selection says what of that a step reads.
  bool selects(uint32_t layer) const { return layers_[layer].selects; }
  // KV heads of an attention layer whose keys and values are pages, and those where they are records.
  const std::vector<uint32_t>& paged(uint32_t layer) const { return layers_[layer].paged; }
  const std::vector<uint32_t>& recorded(uint32_t layer) const { return layers_[layer].recorded; }
  bool records(uint32_t layer, uint32_t kv_head) const { return class_of(layer, kv_head).tokens == kPageTokens; }
  // Positions such a head sees, itself included; 0: all.
  uint32_t window(uint32_t layer, uint32_t kv_head) const { return class_of(layer, kv_head).window; }

  // Page `index` (position / 16) of a head in pages.
  uint8_t* keys(uint32_t layer, uint32_t kv_head, uint32_t index) const {
    const Place& p = place(layer, kv_head);
    const Class& c = classes_[p.cls];
    const uint32_t chunk = index / kChunkPages;
    return c.pieces[c.ring ? chunk % c.ring : chunk] + p.offset + index % kChunkPages * page_;
  }
  uint8_t* values(uint32_t layer, uint32_t kv_head, uint32_t index) const {
    return keys(layer, kv_head, index) + half_;
  }
  // The first page of a streaming head, which sees it forever: its keys, page_bytes() before its values. nullptr for others.
  uint8_t* sinks(uint32_t layer, uint32_t kv_head) const {
    const Class& c = class_of(layer, kv_head);
    return c.sink_bytes ? c.sinks.data() + place(layer, kv_head).index : nullptr;
  }
  // The record of a token of a head in records.
  uint8_t* record(uint32_t layer, uint32_t kv_head, uint32_t position) const {
    const Place& p = place(layer, kv_head);
    return classes_[p.cls].pieces[position / kPageTokens] + p.offset + position % kPageTokens * record_;
  }
  // The index of block `block` (position / kIndexTokens) of such a head.
  uint8_t* index(uint32_t layer, uint32_t kv_head, uint32_t block) const {
    return index_.pieces[block] + place(layer, kv_head).index;
  }
  // Whether a step may choose tokens of a page.
  bool readable(uint32_t page) const { return !tier_ || tier_->readable(page); }
  // The records of a page's tokens, of which a tier may have made a copy for this pass (tier.h: stream()).
  const uint8_t* records_of(uint32_t layer, uint32_t kv_head, uint32_t page) const {
    if (!tier_) return record(layer, kv_head, page * kPageTokens);
    return tier_->section(page, section(layer)) + place(layer, kv_head).offset - place(layer, recorded(layer)[0]).offset;
  }
  uint32_t section(uint32_t layer) const { return layers_[layer].section; }
  uint32_t indexed() const { return indexed_; }  // blocks with an index
  // Blocks that a step at `length` looks up in the index, when all have one: what lies behind is read. 0 where no head
  // has an index.
  uint32_t blocks_at(uint32_t length) const {
    return index_.piece_bytes && length > selection_.recent ? (length - selection_.recent) / kIndexTokens : 0;
  }

  // Inputs of convolution layer `layer` at `position`: dim floats.
  float* conv_input(uint32_t layer, uint32_t position) const {
    return conv_ + (size_t(layers_[layer].first) * kConvRing + position % kConvRing) * dim_;
  }

  // Bytes of keys and values a decode step reads at the present length, and at `length`.
  size_t step_bytes() const { return step_bytes_at(length_); }
  size_t step_bytes_at(uint32_t length) const;

  std::string save() const;             // checked by load()
  void load(const std::string& state);  // throws EngineError when it is not this cache's shape

 private:
  struct Class {  // heads whose pages live and die together
    HeadClass kind = HeadClass::Indexed;
    uint32_t window = 0;
    uint32_t tokens = kChunkTokens;  // of a piece; kPageTokens: in records
    uint32_t ring = 0;               // pieces in the ring; 0: none is used twice
    uint32_t heads = 0;
    size_t piece_bytes = 0, sink_bytes = 0;
    std::vector<uint8_t*> pieces;
    std::vector<Buffer> slabs;
    size_t slab_used = 0;
    Buffer sinks;  // [heads] first pages, of streaming heads
  };
  struct Place {  // of a KV head
    uint32_t cls = 0;
    size_t offset = 0;  // in the piece
    size_t index = 0;   // in the index of a block, or in the first pages
  };
  struct Layer {
    uint32_t first = 0;  // of its places; for a convolution its number
    bool selects = false;
    std::vector<uint32_t> paged, recorded;
    uint32_t section = 0;  // of a tier's page
  };
  const Place& place(uint32_t layer, uint32_t kv_head) const { return places_[layers_[layer].first + kv_head]; }
  const Class& class_of(uint32_t layer, uint32_t kv_head) const { return classes_[place(layer, kv_head).cls]; }
  uint32_t class_for(const LayerSpec& layer, HeadClass kind);
  void add_head(const LayerSpec& layer, HeadClass kind);
  void check_heads(const ModelSpec& spec) const;
  uint64_t pattern() const;      // of the classes, 0 without
  const Class* records() const;  // nullptr when there is none
  void find_pieces();
  bool tiered(const Class& c) const { return tier_ && c.tokens == kPageTokens; }
  static size_t pieces_of_slab(const Class& c);
  void grow(Class& c, size_t pieces);
  size_t pieces_needed(const Class& c, uint32_t length) const;
  // Calls f(pointer, bytes) for the used parts of the class's pieces when `length` is the highest position.
  template <class F>
  void for_used(const Class& c, uint32_t length, F&& f) const;

  KvType type_;
  Selection selection_;
  uint32_t context_, dim_, head_dim_, conv_reach_ = 0;
  size_t page_, record_;
  size_t half_;  // bytes of a chunk's K, and of its V
  uint32_t length_ = 0;
  uint32_t high_ = 0;  // one past the highest position written since the cache was empty
  uint32_t indexed_ = 0;
  std::vector<Class> classes_;
  Class index_;  // of all heads in records, a piece for each block
  std::vector<size_t> sections_;  // bytes of a tier's page by layer in records
  std::unique_ptr<Tier> tier_;
  std::optional<LastStates> states_;  // with a tier
  std::vector<Layer> layers_;
  std::vector<Place> places_;
  Buffer conv_buffer_;
  float* conv_ = nullptr;
};

}  // namespace edgert
