#include "slot_store.h"

#include <algorithm>
#include <cstring>

#include "error.h"
#include "sparse.h"

namespace edgert {
namespace {

constexpr float kLog2e = 1.44269504088896341f;

// A step of the graph reads what is in its slots: of the selection only the first and the recent tokens count here.
const Selection kSelection{.budget = 1};

constexpr size_t kAtOnce = 8;  // pages that are asked for at once; twice as many have slots beside the recent ones

TierShape without_set(TierShape tier) {
  tier.set = false;
  return tier;
}

uint32_t all_heads(const ModelSpec& spec) {
  uint32_t n = 0;
  for (const LayerSpec& l : spec.layers) {
    if (l.conv || l.window) throw EngineError("slots are for layers that see everything");
    n += l.n_kv_heads;
  }
  if (!n) throw EngineError("the model has no layers that see everything: use attention=\"full\"");
  return n;
}

}  // namespace

SlotStore::SlotStore(const ModelSpec& layers, uint32_t context, uint32_t threads, const TierShape& tier)
    : spec_(layers),
      kernels_(kernels_for(isa_select())),
      pool_(threads),
      cache_(layers, context, KvType::F16, kSelection, without_set(tier)),
      heads_(all_heads(layers)),
      threads_(pool_.threads()) {
  for (Private& p : threads_) {
    p.scores.resize(16 * kChunkTokens);
    p.tmp.resize(size_t(KvCache::kMaxGroup) * spec_.head_dim);
    p.worth.resize(kIndexTokens);
  }
}

size_t SlotStore::bytes() const {
  size_t n = cache_.bytes() + page_.capacity() + (queries_.capacity() + weight_.capacity() + votes_.capacity()) * sizeof(float);
  for (const Private& p : threads_) n += (p.scores.capacity() + p.tmp.capacity()) * sizeof(float) + p.worth.capacity();
  return n;
}

void SlotStore::check(const SlotArrays& arrays, uint32_t first, uint32_t n) const {
  if (arrays.keys.size() != spec_.layers.size())
    throw EngineError("the store has " + std::to_string(spec_.layers.size()) + " layers, the slots are of " +
                      std::to_string(arrays.keys.size()));
  if (first > arrays.slots || n > arrays.slots - first)
    throw EngineError("there are " + std::to_string(arrays.slots) + " slots, " + std::to_string(n) + " from " +
                      std::to_string(first) + " on were named");
}

const std::vector<float>& SlotStore::append(const SlotArrays& from, uint32_t first, uint32_t n, const float* queries, uint32_t rows) {
  check(from, first, n);
  if (n == 0 || rows > n) throw EngineError("queries must be of tokens that are appended, and these at least one");
  // What a pass appends at once is limited (tier.h); the last piece must have all rows.
  const uint32_t last = std::max(rows, (n - 1) % kMaxChunk + 1);
  if (last > kMaxChunk) throw EngineError("at most " + std::to_string(kMaxChunk) + " tokens can vote at once");
  votes_.clear();
  for (uint32_t done = 0; done < n;) {
    const uint32_t count = n - done <= last ? n - done : std::min(kMaxChunk, n - last - done);
    const bool end = done + count == n;
    append_piece(from, first + done, count, queries, end ? rows : 0);
    done += count;
  }
  return votes_;
}

void SlotStore::append_piece(const SlotArrays& from, uint32_t first, uint32_t n, const float* queries, uint32_t rows) {
  const uint32_t start = cache_.length(), length = start + n, hd = spec_.head_dim;
  cache_.reserve(length);
  // Never as a step: what that reads is in slots.
  cache_.begin(length, false);
  const uint32_t blocks = cache_.blocks_at(length), pages = blocks * kBlockPages;
  const size_t of_row = spec_.layers.size() * size_t(spec_.n_heads) * hd;
  queries_.resize(rows * of_row);
  const float scale = spec_.attn_scale * kLog2e;
  for (size_t i = 0; i < queries_.size(); ++i) queries_[i] = queries[i] * scale;
  weight_.resize(size_t(rows) * heads_ * pages);
  votes_.assign(pages, 0.0f);
  pool_.run([&](Pool::Worker& w) {
    float* const tmp = threads_[w.index()].tmp.data();
    uint32_t b, e;
    while (w.claim(n, b, e))
      for (uint32_t i = b; i < e; ++i)
        for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer)
          for (uint32_t head = 0; head < spec_.layers[layer].n_kv_heads; ++head) {
            const size_t at = (size_t(head) * from.slots + first + i) * hd * from.item();
            const float* key = reinterpret_cast<const float*>(from.keys[layer] + at);
            const float* value = reinterpret_cast<const float*>(from.values[layer] + at);
            if (from.half) {  // the record gets the very halves again
              kernels_.from_half(from.keys[layer] + at, hd, tmp);
              kernels_.from_half(from.values[layer] + at, hd, tmp + hd);
              key = tmp;
              value = tmp + hd;
            }
            kernels_.records[size_t(KvType::F16)].append(key, value, hd, cache_.record(layer, head, start + i));
          }
    w.barrier();
    if (blocks > cache_.indexed()) make_index(spec_, kernels_, cache_, w, blocks);
    if (blocks == 0) return;
    for (uint32_t row = 0; row < rows; ++row) vote(w, length - rows + row, blocks, queries_.data() + row * of_row, row);
  });
  // In the order of rows and heads, whoever computed them.
  for (size_t i = 0; blocks && i < size_t(rows) * heads_; ++i) add_shares(weight_.data() + i * pages, pages, votes_.data());
  cache_.end(length, false, blocks, votes_.data(), rows ? 1 : 0, pages);
}

// What the token at `position` gives to the best token of each page, by head of all layers.
void SlotStore::vote(Pool::Worker& w, uint32_t position, uint32_t blocks, const float* queries, uint32_t row) {
  Private& me = threads_[w.index()];
  const uint32_t pages = blocks * kBlockPages, hd = spec_.head_dim;
  std::fill(me.worth.begin(), me.worth.end(), int8_t(0));
  uint32_t b, e;
  while (w.claim(heads_, b, e))
    for (uint32_t item = b; item < e; ++item) {
      uint32_t layer = 0, head = item;
      while (head >= spec_.layers[layer].n_kv_heads) head -= spec_.layers[layer++].n_kv_heads;
      const uint32_t group = spec_.n_heads / spec_.layers[layer].n_kv_heads;
      const float* q[KvCache::kMaxGroup];
      float level[KvCache::kMaxGroup];
      for (uint32_t g = 0; g < group; ++g) q[g] = queries + (size_t(layer) * spec_.n_heads + head * group + g) * hd;
      measure_level(kernels_, cache_, layer, head, position + 1, q, group, hd, me.scores.data(), me.tmp.data(), level);
      float* weight = weight_.data() + (size_t(row) * heads_ + item) * pages;
      for (uint32_t block = 0; block < blocks; ++block) {
        const uint8_t* next = cache_.index(layer, head, std::min(block + 1, blocks - 1));
        kernels_.scan({cache_.index(layer, head, block), next, q, level, group, hd, me.worth.data()});
        page_weights(me.worth.data(), weight + block * kBlockPages);
      }
    }
  w.barrier();
}

void SlotStore::check(const std::vector<uint32_t>& pages, const SlotArrays& arrays, const std::vector<uint32_t>& places) const {
  if (pages.size() != places.size())
    throw EngineError(std::to_string(pages.size()) + " pages cannot be in " + std::to_string(places.size()) + " places");
  const uint32_t length = cache_.length();
  for (const uint32_t page : pages)
    if (page >= (length + kPageTokens - 1) / kPageTokens)
      throw EngineError("page " + std::to_string(page) + " lies behind the " + std::to_string(length) + " tokens of the store");
  for (const uint32_t place : places) check(arrays, place * kPageTokens, kPageTokens);
}

// f(layer, KV head), in the order in which they lie in a page.
template <class F>
void SlotStore::for_heads(F&& f) const {
  for (uint32_t layer = 0; layer < spec_.layers.size(); ++layer)
    for (uint32_t head = 0; head < spec_.layers[layer].n_kv_heads; ++head) f(layer, head);
}

uint8_t* SlotStore::in_memory(uint32_t page) const {
  return cache_.tier() ? cache_.tier()->resident(page) : cache_.record(0, 0, page * kPageTokens);
}

void SlotStore::expect(const std::vector<uint32_t>& pages) {
  if (Tier* const tier = cache_.tier()) tier->expect(pages.data(), pages.size());
}

void SlotStore::keep(const std::vector<uint32_t>& pages, const SlotArrays& from, const std::vector<uint32_t>& places) {
  check(pages, from, places);
  const size_t record = kv_record_bytes(KvType::F16, spec_.head_dim), row = spec_.head_dim * from.item();
  for (size_t i = 0; cache_.tier() && i < pages.size(); ++i) {
    uint8_t* to = cache_.tier()->refill(pages[i]);
    if (!to) continue;
    // What is in slots are the records' halves, or the floats that these were made of.
    for_heads([&](uint32_t layer, uint32_t head) {
      const size_t at = (size_t(head) * from.slots + places[i] * kPageTokens) * row;
      for (uint32_t t = 0; t < kPageTokens; ++t, to += record) {
        const uint8_t *const key = from.keys[layer] + at + t * row, *const value = from.values[layer] + at + t * row;
        if (from.half) {
          std::memcpy(to, key, row);
          std::memcpy(to + record / 2, value, row);
        } else {
          kernels_.records[size_t(KvType::F16)].append(reinterpret_cast<const float*>(key), reinterpret_cast<const float*>(value),
                                                       spec_.head_dim, to);
        }
      }
    });
  }
}

// A page of the tier. Where memory is full of pages that cannot be written it has no place there.
const uint8_t* SlotStore::fetch(uint32_t page) {
  try {
    return cache_.tier()->need(page);
  } catch (const EngineError&) {
    page_.resize(cache_.tier()->store().page_bytes());
    cache_.tier()->copy(page, page_.data());
    return page_.data();
  }
}

void SlotStore::read(const std::vector<uint32_t>& pages, const SlotArrays& to, const std::vector<uint32_t>& places) {
  check(pages, to, places);
  std::vector<uint32_t> away, places_away;
  for (size_t i = 0; i < pages.size(); ++i) {
    if (const uint8_t* const from = in_memory(pages[i])) {
      to_slots(pages[i], from, to, places[i]);
    } else {
      away.push_back(pages[i]);
      places_away.push_back(places[i]);
    }
  }
  for (size_t i = 0; i < away.size(); ++i) {
    // Of a long list some are on their way while others are copied.
    if (i % kAtOnce == 0) cache_.tier()->expect(away.data() + i, std::min(away.size() - i, 2 * kAtOnce));
    to_slots(away[i], fetch(away[i]), to, places_away[i]);
  }
}

void SlotStore::to_slots(uint32_t page, const uint8_t* from, const SlotArrays& to, uint32_t place) const {
  const uint32_t hd = spec_.head_dim, tokens = std::min(kPageTokens, cache_.length() - page * kPageTokens);
  const size_t record = kv_record_bytes(KvType::F16, hd), row = hd * to.item();
  for_heads([&](uint32_t layer, uint32_t head) {
    const size_t at = (size_t(head) * to.slots + place * kPageTokens) * row;
    for (uint32_t t = 0; t < tokens; ++t) {
      copy_halves(from + t * record, to.keys[layer] + at + t * row, to.half);
      copy_halves(from + t * record + record / 2, to.values[layer] + at + t * row, to.half);
    }
    from += kPageTokens * record;
  });
}

// A row of a head, to a slot of halves or of floats.
void SlotStore::copy_halves(const uint8_t* from, uint8_t* to, bool half) const {
  if (half)
    std::memcpy(to, from, size_t(spec_.head_dim) * 2);
  else
    kernels_.from_half(from, spec_.head_dim, reinterpret_cast<float*>(to));
}

void SlotStore::move(const SlotArrays& arrays, uint32_t place, uint32_t to) const {
  check(arrays, place * kPageTokens, kPageTokens);
  check(arrays, to * kPageTokens, kPageTokens);
  const size_t row = spec_.head_dim * arrays.item(), n = kPageTokens * row;
  for_heads([&](uint32_t layer, uint32_t head) {
    for (uint8_t* const cache : {arrays.keys[layer], arrays.values[layer]}) {
      uint8_t* const of_head = cache + head * arrays.slots * row;
      std::memmove(of_head + to * n, of_head + place * n, n);
    }
  });
}

std::pair<size_t, uint32_t> slot_store_bytes(const ModelSpec& layers, uint32_t length, uint32_t pages) {
  all_heads(layers);
  const KvCache cache(layers, length, KvType::F16, kSelection);
  size_t n = cache.index_bytes_at(length);
  if (pages)
    n += cache.tier_bytes_at(length, pages);
  else
    for (const KvCache::Share& share : cache.shares_at(length)) n += share.bytes;
  return {n, cache.least_slots()};
}

}  // namespace edgert
