#include "kv.h"

#include <algorithm>
#include <cstring>

#include "checksum.h"
#include "error.h"

namespace edgert {
namespace {

constexpr size_t kSlab = size_t(4) << 20;
constexpr uint64_t kMagic = 0x354b4545;  // "EEK5"

// What a saved cache begins with.
uint64_t magic(KvType type) { return kMagic | uint64_t(type) << 32; }

constexpr uint32_t kBlockPages = kIndexTokens / kPageTokens;

uint32_t pages_at(uint32_t length) { return (length + kPageTokens - 1) / kPageTokens; }

uint32_t chunks(uint32_t tokens) { return (tokens + kChunkTokens - 1) / kChunkTokens; }

size_t slabs(size_t pieces, size_t of_slab) { return (pieces + of_slab - 1) / of_slab; }

}  // namespace

KvCache::KvCache(const ModelSpec& spec, uint32_t context, KvType type, const Selection& selection, const TierShape& tier)
    : type_(type),
      selection_(selection),
      context_(context),
      dim_(spec.dim),
      head_dim_(spec.head_dim),
      page_(kv_page_bytes(type, spec.head_dim)),
      record_(kv_record_bytes(type, spec.head_dim)),
      half_(kChunkPages * page_) {
  if (type == KvType::Q8 && spec.head_dim % 32 != 0)
    throw EngineError("keys and values in q8 need heads of a multiple of 32 channels, not " + std::to_string(spec.head_dim) +
                      ": use kv=\"f16\"");
  if (selection.budget)
    for (const LayerSpec& l : spec.layers)
      if (!l.conv && spec.n_heads / l.n_kv_heads > kMaxGroup)
        throw EngineError("sparse attention takes at most " + std::to_string(kMaxGroup) +
                          " query heads to a KV head: use attention=\"full\"");
  if (context == 0) throw EngineError("a session needs a context of at least 1 token");
  check_heads(spec);
  uint32_t convs = 0;
  for (uint32_t i = 0; i < spec.layers.size(); ++i) {
    const LayerSpec& l = spec.layers[i];
    layers_.emplace_back();
    if (l.conv) {
      layers_[i].first = convs++;
      conv_reach_ = spec.conv_kernel - 1;
      continue;
    }
    layers_[i].first = uint32_t(places_.size());
    layers_[i].selects = selection.budget && !l.window;
    layers_[i].section = uint32_t(sections_.size());
    const bool classes = layers_[i].selects && !selection.heads.empty();
    for (uint32_t head = 0; head < l.n_kv_heads; ++head)
      add_head(l, classes ? selection.heads[i][head] : HeadClass::Indexed);
    if (const size_t n = layers_[i].recorded.size()) sections_.push_back(n * kPageTokens * record_);
  }
  conv_buffer_ = Buffer(size_t(convs) * kConvRing * dim_ * sizeof(float), "the convolution state");
  conv_ = reinterpret_cast<float*>(conv_buffer_.data());
  if (!tier.slots) return;
  if (!records()) throw EngineError("only sparse attention keeps keys and values on a disk, and of heads that choose what they read");
  tier_ = std::make_unique<Tier>(tier, sections_, selection.budget);
  states_.emplace(dim_);
}

void KvCache::check_heads(const ModelSpec& spec) const {
  const auto& heads = selection_.heads;
  if (heads.empty()) return;
  if (!selection_.budget) throw EngineError("classes of heads are for sparse attention");
  if (heads.size() != spec.layers.size())
    throw EngineError("classes of heads are of " + std::to_string(heads.size()) + " layers, the model has " +
                      std::to_string(spec.layers.size()));
  if (selection_.window < kPageTokens)
    throw EngineError("streaming heads see at least the last " + std::to_string(kPageTokens) + " tokens, not " +
                      std::to_string(selection_.window));
  for (uint32_t i = 0; i < heads.size(); ++i) {
    const LayerSpec& l = spec.layers[i];
    const size_t expected = l.conv || l.window ? 0 : l.n_kv_heads;
    if (heads[i].size() != expected)
      throw EngineError("layer " + std::to_string(i) + " has " + std::to_string(expected) +
                        " KV heads that see everything, classes are given of " + std::to_string(heads[i].size()));
  }
}

// The class of a head, which is made when there is none.
uint32_t KvCache::class_for(const LayerSpec& layer, HeadClass kind) {
  const bool streaming = kind == HeadClass::Streaming;
  const uint32_t window = streaming ? selection_.window : layer.window;
  uint32_t i = 0;
  while (i < classes_.size() && (classes_[i].window != window || classes_[i].kind != kind)) ++i;
  if (i < classes_.size()) return i;
  Class& c = classes_.emplace_back();
  c.kind = kind;
  c.window = window;
  if (selection_.budget && !window && kind == HeadClass::Indexed) c.tokens = kPageTokens;
  if (window && window < context_) c.ring = chunks(window + kMaxChunk) + 1;
  return i;
}

void KvCache::add_head(const LayerSpec& layer, HeadClass kind) {
  Layer& to = layers_.back();
  const uint32_t head = uint32_t(places_.size()) - to.first;
  Place& p = places_.emplace_back();
  p.cls = class_for(layer, kind);
  Class& c = classes_[p.cls];
  ++c.heads;
  p.offset = c.piece_bytes;
  if (c.tokens == kPageTokens) {
    to.recorded.push_back(head);
    c.piece_bytes += kPageTokens * record_;
    p.index = index_.piece_bytes;
    index_.piece_bytes += index_block_bytes(head_dim_);
    return;
  }
  to.paged.push_back(head);
  c.piece_bytes += 2 * half_;
  if (kind != HeadClass::Streaming) return;
  p.index = c.sink_bytes;
  c.sink_bytes += 2 * page_;
}

uint64_t KvCache::pattern() const {
  if (selection_.heads.empty()) return 0;
  std::string all = std::to_string(selection_.window);
  for (const auto& layer : selection_.heads) {
    all += '/';
    for (const HeadClass c : layer) all += char(c);
  }
  return checksum(reinterpret_cast<const uint8_t*>(all.data()), all.size());
}

const KvCache::Class* KvCache::records() const {
  for (const Class& c : classes_)
    if (c.tokens == kPageTokens) return &c;
  return nullptr;
}

size_t KvCache::tier_bytes_at(uint32_t length, uint32_t slots) const {
  const Class* const c = records();
  return c ? Tier::bytes(sections_, slots, uint32_t(pieces_needed(*c, length))) + LastStates::bytes(dim_) : 0;
}

size_t KvCache::bytes() const {
  size_t n = conv_buffer_.bytes();
  if (tier_) n += tier_->bytes() + LastStates::bytes(dim_);
  for (const Class& c : classes_) {
    n += c.sinks.bytes();
    for (const Buffer& b : c.slabs) n += b.bytes();
  }
  for (const Buffer& b : index_.slabs) n += b.bytes();
  return n;
}

std::vector<KvCache::Share> KvCache::shares_at(uint32_t length) const {
  std::vector<Share> shares;
  for (const Class& c : classes_) {
    const size_t of_slab = pieces_of_slab(c), pieces = pieces_needed(c, length);
    const size_t bytes = slabs(pieces, of_slab) * Buffer::rounded(of_slab * c.piece_bytes);
    const bool layers = selection_.heads.empty() || (c.window && c.kind != HeadClass::Streaming);
    shares.push_back({c.window, bytes + (pieces && c.sink_bytes ? Buffer::rounded(c.sink_bytes) : 0), c.kind, layers ? 0 : c.heads});
  }
  return shares;
}

size_t KvCache::index_bytes_at(uint32_t length) const {
  if (!index_.piece_bytes) return 0;
  const size_t of_slab = pieces_of_slab(index_);
  return slabs(length / kIndexTokens, of_slab) * Buffer::rounded(of_slab * index_.piece_bytes);
}

size_t KvCache::pieces_of_slab(const Class& c) { return std::max<size_t>(1, kSlab / c.piece_bytes); }

size_t KvCache::pieces_needed(const Class& c, uint32_t length) const {
  const uint32_t pieces = (length + c.tokens - 1) / c.tokens;
  return c.ring ? std::min(pieces, c.ring) : pieces;
}

void KvCache::grow(Class& c, size_t pieces) {
  if (pieces && c.sink_bytes && !c.sinks.data()) c.sinks = Buffer(c.sink_bytes, "the KV cache");
  while (c.pieces.size() < pieces) {
    if (c.slabs.empty() || c.slab_used + c.piece_bytes > c.slabs.back().bytes()) {
      c.slabs.emplace_back(pieces_of_slab(c) * c.piece_bytes, "the KV cache");
      c.slab_used = 0;
    }
    c.pieces.push_back(c.slabs.back().data() + c.slab_used);
    c.slab_used += c.piece_bytes;
  }
}

void KvCache::reserve(uint32_t length) {
  if (length > context_)
    throw EngineError("the sequence would be " + std::to_string(length) + " tokens, the context holds " +
                      std::to_string(context_) + ": shorten the prompt or load with a larger context");
  for (Class& c : classes_)
    if (!tiered(c)) grow(c, pieces_needed(c, length));
  if (index_.piece_bytes) grow(index_, length / kIndexTokens);
}

void KvCache::begin(uint32_t length, bool sparse, const float* predicted) {
  if (!tier_) return;
  tier_->rewind(pages_at(length_), indexed_ * kBlockPages);  // what a pass left that failed
  tier_->begin(pages_at(length), sparse, predicted);
  find_pieces();
}

void KvCache::enter() {
  if (tier_ && tier_->enter()) find_pieces();
}

void KvCache::open_ends() {
  if (!tier_ || !length_) return;
  tier_->need_first();
  find_pieces();
}

void KvCache::find_pieces() {
  for (Class& c : classes_) {
    if (!tiered(c)) continue;
    c.pieces.resize(tier_->store().pages());
    for (uint32_t page = 0; page < c.pieces.size(); ++page)
      // During a pass other threads read the places of pages that were there before: those are not written.
      if (uint8_t* const piece = tier_->resident(page); c.pieces[page] != piece) c.pieces[page] = piece;
  }
}

void KvCache::end(uint32_t length, bool sparse, uint32_t blocks, const float* worth, uint32_t heads, uint32_t stride) {
  if (tier_) {
    if (sparse) tier_->enter();  // where no layer was left to wait for it
    tier_->check();
    tier_->end(blocks * kBlockPages, sparse, worth, heads, stride);
  }
  indexed_ = blocks;
  length_ = length;
  high_ = std::max(high_, length);
}

uint32_t KvCache::rewind(uint32_t length) {
  if (length >= length_) return length_;
  bool lost = false;
  for (const Class& c : classes_) {
    if (!c.ring) continue;
    // The ring's oldest piece may be partly overwritten by the newest.
    const uint32_t oldest = chunks(high_) > c.ring ? (chunks(high_) - c.ring) * kChunkTokens : 0;
    const uint32_t needed = length >= c.window ? length - c.window + 1 : 0;
    lost |= needed < oldest;
  }
  if (conv_reach_ && high_ > kConvRing) lost |= length < high_ - kConvRing + conv_reach_;
  if (lost) length = 0;
  // A step at this length reads what lies behind: a tier must have it in memory.
  const uint32_t blocks = std::min(indexed_, blocks_at(length));
  if (tier_) tier_->rewind(pages_at(length), blocks * kBlockPages);
  if (states_) states_->rewind(length);
  length_ = length;
  indexed_ = blocks;
  if (length_ == 0) high_ = 0;
  return length_;
}

size_t KvCache::step_bytes_at(uint32_t length) const {
  size_t n = 0;
  for (const Class& c : classes_) {
    uint32_t seen = c.window ? std::min(c.window, length) : length;
    if (c.kind == HeadClass::Streaming) seen = std::min(c.window + kPageTokens, length);
    if (c.tokens == kPageTokens) {
      const uint32_t indexed = blocks_at(length) * kIndexTokens, between = indexed - std::min(indexed, selection_.sinks);
      if (between > selection_.budget) {
        seen -= between - selection_.budget;
        n += index_.piece_bytes * blocks_at(length);
      }
    }
    n += c.piece_bytes / c.tokens * seen;
  }
  return n;
}

template <class F>
void KvCache::for_used(const Class& c, uint32_t length, F&& f) const {
  const size_t n = pieces_needed(c, length);
  for (size_t i = 0; i < n; ++i) {
    if (c.tokens == kPageTokens) {
      f(c.pieces[i], c.piece_bytes);
      continue;
    }
    const size_t left = (length - i * kChunkTokens + kPageTokens - 1) / kPageTokens;
    const size_t used = std::min<size_t>(left, kChunkPages) * page_;
    for (size_t at = 0; at < c.piece_bytes; at += half_) f(c.pieces[i] + at, used);
  }
  if (n && c.sink_bytes) f(c.sinks.data(), c.sink_bytes);
}

std::string KvCache::save() const {
  std::string out;
  const auto put = [&](const void* p, size_t n) { out.append(static_cast<const char*>(p), n); };
  std::string choice = tier_ ? tier_->save(pages_at(length_)) : "";
  if (const float* state = states_ && length_ ? states_->at(length_ - 1) : nullptr)
    choice.append(reinterpret_cast<const char*>(state), dim_ * sizeof(float));
  const uint64_t head[] = {magic(type_), length_, high_, indexed_, classes_.size(), page_, conv_buffer_.bytes(), choice.size(), pattern()};
  put(head, sizeof head);
  for (const Class& c : classes_) {
    // Records are used up to the length, rings and what grows like them up to the highest position.
    const uint32_t used = c.tokens == kPageTokens ? length_ : high_;
    const uint64_t pieces = pieces_needed(c, used);
    const uint64_t shape[] = {c.window, c.tokens, c.ring, c.piece_bytes, pieces};
    put(shape, sizeof shape);
    if (!tiered(c)) {
      for_used(c, used, put);
      continue;
    }
    std::vector<uint8_t> page(c.piece_bytes);
    for (uint32_t i = 0; i < pieces; ++i) {
      tier_->copy(i, page.data());
      put(page.data(), page.size());
    }
  }
  for (uint32_t block = 0; block < indexed_; ++block) put(index_.pieces[block], index_.piece_bytes);
  put(choice.data(), choice.size());
  if (conv_) put(conv_, conv_buffer_.bytes());
  return out;
}

void KvCache::load(const std::string& state) {
  size_t at = 0;
  const auto get = [&](void* p, size_t n) {
    if (state.size() - at < n) throw EngineError("the saved session is shorter than it says");
    std::memcpy(p, state.data() + at, n);
    at += n;
  };
  uint64_t head[9];
  get(head, sizeof(uint64_t));
  if (uint32_t(head[0]) != kMagic) throw EngineError("it was not saved by this version of the native engine: read the prompt again");
  if (head[0] != magic(type_))
    throw EngineError("the saved session has keys and values of another type than this one: load the model with the kv it had");
  get(head + 1, sizeof head - sizeof(uint64_t));
  const auto [kind, length, high, indexed, classes, page, conv, choice, heads] = head;
  if (heads != pattern())
    throw EngineError("the saved session has other classes of heads than this one: load the model with those it had");
  if (classes != classes_.size() || page != page_ || conv != conv_buffer_.bytes()) throw EngineError("the saved session is of another model");
  if (length > high || high > context_)
    throw EngineError("the saved session holds " + std::to_string(high) + " tokens, the context " +
                      std::to_string(context_) + ": open the session with a larger context");
  if (indexed > length / kIndexTokens || (indexed && !index_.piece_bytes)) throw EngineError("the saved session has an index of no use");
  length_ = high_ = indexed_ = 0;
  if (tier_) tier_->rewind(0, 0);
  if (index_.piece_bytes) grow(index_, high / kIndexTokens);
  for (Class& c : classes_) {
    uint64_t shape[5];
    get(shape, sizeof shape);
    const uint32_t used = uint32_t(c.tokens == kPageTokens ? length : high);
    const uint64_t pieces = pieces_needed(c, used);
    if (shape[0] != c.window || shape[1] != c.tokens || shape[2] != c.ring || shape[3] != c.piece_bytes || shape[4] != pieces)
      throw EngineError("the saved session is of another model, of another context length or of another kind of attention");
    if (!tiered(c)) {
      grow(c, pieces);
      for_used(c, used, get);
      continue;
    }
    for (uint64_t i = 0; i < pieces; ++i) {
      get(tier_->append(), c.piece_bytes);
      tier_->appended(i < indexed * kBlockPages);
    }
  }
  for (uint32_t block = 0; block < indexed; ++block) get(index_.pieces[block], index_.piece_bytes);
  std::string choices(std::min(choice, state.size() - at), '\0');
  get(choices.data(), choices.size());
  if (tier_ && !choices.empty()) {
    const size_t of_tier = Tier::saved_bytes(tier_->store().pages()), of_state = dim_ * sizeof(float);
    if (choices.size() == of_tier + of_state) {
      std::vector<float> state(dim_);
      std::memcpy(state.data(), choices.data() + of_tier, of_state);
      states_->put(uint32_t(length) - 1, state.data());
      choices.resize(of_tier);
    }
    tier_->restore(choices);
  }
  if (conv_) get(conv_, conv_buffer_.bytes());
  if (at != state.size()) throw EngineError("the saved session is longer than it says");
  length_ = uint32_t(length);
  high_ = uint32_t(high);
  indexed_ = uint32_t(indexed);
}

}  // namespace edgert
