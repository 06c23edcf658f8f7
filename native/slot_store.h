// Keys and values of one sequence for a graph that holds only some of them (export/onnx_model.py): everything is here, the
// graph's caches are slots that a part of it is copied to. After SpeContext (arXiv 2512.00722).
//
// A KvCache of the layers that see everything, in records of f16, all in memory or with a tier. The graph's queries say what
// its pages are worth, as in sparse.h and tier.h: one number a page for all layers and heads. Which pages are in
// slots is decided outside (edgert/engines/onnx_sparse.py).
//
// With a tier, in memory are the pages that entered or left slots last. A page is read from the disk in one request, several
// at once. One that leaves slots without being in memory is copied back from them: so it need not be read when it returns.
#pragma once
#include <cstdint>
#include <string>
#include <utility>
#include <vector>

#include "kernels.h"
#include "kv.h"
#include "pool.h"
#include "spec.h"

namespace edgert {

// Caches of a graph: by layer, keys and values [n_kv_heads][slots][head_dim], floats or all of them halves.
struct SlotArrays {
  std::vector<uint8_t*> keys, values;
  uint32_t slots = 0;
  bool half = false;

  size_t item() const { return half ? 2 : 4; }  // bytes
};

class SlotStore {
 public:
  // `layers`: a model of which all layers see everything; at most `context` positions. Throws EngineError.
  SlotStore(const ModelSpec& layers, uint32_t context, uint32_t threads, const TierShape& tier);

  const KvCache& cache() const { return cache_; }
  const ModelSpec& spec() const { return spec_; }
  uint32_t indexed_pages() const { return cache_.indexed() * (kIndexTokens / kPageTokens); }
  size_t bytes() const;

  // Appends the n tokens in the slots from `first` on. `queries`: of the last `rows` of them, rotated, [rows][layers][n_heads]
  // [head_dim]. Returns the votes of these for the pages with an index, [indexed_pages()]: by page the sum over rows, layers
  // and KV heads of the share that its best token gets. Throws EngineError; what could be read before can be then.
  const std::vector<float>& append(const SlotArrays& from, uint32_t first, uint32_t n, const float* queries, uint32_t rows);
  // The pages that the next read() will be of: those on the disk are read from now on. Throws EngineError.
  void expect(const std::vector<uint32_t>& pages);
  // Pages in slots, each from 16 * place on, that something else comes to: those that are not in memory get a place there
  // if there is one.
  void keep(const std::vector<uint32_t>& pages, const SlotArrays& from, const std::vector<uint32_t>& places);
  // Copies pages to slots. Throws EngineError when one cannot be read; slots of all may have changed then.
  void read(const std::vector<uint32_t>& pages, const SlotArrays& to, const std::vector<uint32_t>& places);
  // Copies 16 slots to others.
  void move(const SlotArrays& arrays, uint32_t place, uint32_t to) const;

  uint32_t rewind(uint32_t length) { return cache_.rewind(length); }
  std::string save() const { return cache_.save(); }
  void load(const std::string& state) { cache_.load(state); }

 private:
  struct Private {  // of a thread
    std::vector<float> scores, tmp;
    std::vector<int8_t> worth;
  };
  void check(const SlotArrays& arrays, uint32_t first, uint32_t n) const;
  void append_piece(const SlotArrays& from, uint32_t first, uint32_t n, const float* queries, uint32_t rows);
  void check(const std::vector<uint32_t>& pages, const SlotArrays& arrays, const std::vector<uint32_t>& places) const;
  template <class F>
  void for_heads(F&& f) const;
  uint8_t* in_memory(uint32_t page) const;  // nullptr: it lies on the disk
  const uint8_t* fetch(uint32_t page);      // until the next one
  void to_slots(uint32_t page, const uint8_t* from, const SlotArrays& to, uint32_t place) const;
  void copy_halves(const uint8_t* from, uint8_t* to, bool half) const;
  void vote(Pool::Worker& w, uint32_t position, uint32_t blocks, const float* queries, uint32_t row);

  const ModelSpec spec_;
  const Kernels& kernels_;
  Pool pool_;
  KvCache cache_;
  const uint32_t heads_;  // KV heads of all layers together
  std::vector<Private> threads_;
  std::vector<float> queries_;  // as scan() takes them
  std::vector<float> weight_;   // [rows][heads_][pages with an index]
  std::vector<float> votes_;
  std::vector<uint8_t> page_;   // of fetch()
};

// What bytes() of a store will be with `length` tokens and `pages` of its pages in memory (0: all), but for the buffers of
// votes; and the fewest pages there may be.
std::pair<size_t, uint32_t> slot_store_bytes(const ModelSpec& layers, uint32_t length, uint32_t pages);

}  // namespace edgert
