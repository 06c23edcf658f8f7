// The attention of a pass: queries and keys made ready, the cache read, the output joined.
#include <algorithm>
#include <cstring>

#include "pass.h"
#include "sparse.h"

namespace edgert {

void Decoder::Pass::rotate(float* h, uint32_t layer, uint32_t i) const {
  const uint32_t pairs = s.rope_dims / 2;
  const size_t at = (size_t(sc.rope_of[layer]) * kMaxChunk + i) * pairs;
  const float *c = sc.cos + at, *sn = sc.sin + at;
  for (uint32_t p = 0; p < pairs; ++p) {
    const uint32_t a = s.rope_interleaved ? 2 * p : p, b = s.rope_interleaved ? a + 1 : p + pairs;
    const float u = h[a], v = h[b];
    h[a] = u * c[p] - v * sn[p];
    h[b] = u * sn[p] + v * c[p];
  }
}

void Decoder::Pass::make_query(uint32_t layer, uint32_t i, uint32_t head) const {
  float* q = sc.q + size_t(i) * sc.q_cols + size_t(head) * s.head_dim;
  if (const float* norm = d.weights_.layers[layer].q_norm) k.rmsnorm(q, norm, s.norm_eps, s.head_dim, q);
  rotate(q, layer, i);
  const float scale = s.attn_scale * 1.44269504088896341f;
  for (uint32_t c = 0; c < s.head_dim; ++c) q[c] *= scale;
  if (!sparse && cache.tier() && i + kVoters >= n)
    std::memcpy(sc.voters + size_t(i + kVoters - n) * sc.q_cols + size_t(head) * s.head_dim, q, s.head_dim * sizeof(float));
  if (!sparse || !cache.records(layer, head / (s.n_heads / s.layers[layer].n_kv_heads))) attn.code_query(q, s.head_dim);
}

void Decoder::Pass::append(uint32_t layer, uint32_t i, uint32_t head) const {
  const uint32_t hd = s.head_dim, pos = start + i;
  const size_t at = size_t(i) * sc.kv_cols + size_t(head) * hd;
  float key[kMaxHeadDim];
  if (const float* norm = d.weights_.layers[layer].k_norm)
    k.rmsnorm(sc.k + at, norm, s.norm_eps, hd, key);
  else
    std::memcpy(key, sc.k + at, hd * sizeof(float));
  rotate(key, layer, i);
  if (cache.records(layer, head))
    return k.records[size_t(cache.type())].append(key, sc.v + at, hd, cache.record(layer, head, pos));
  const uint32_t page = pos / kPageTokens;
  attn.append(key, sc.v + at, hd, pos % kPageTokens, cache.keys(layer, head, page), cache.values(layer, head, page));
  uint8_t* const sinks = page == 0 ? cache.sinks(layer, head) : nullptr;
  if (sinks) attn.append(key, sc.v + at, hd, pos, sinks, sinks + cache.page_bytes());
}

void Decoder::Pass::prepare_heads(uint32_t layer) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, each = s.n_heads + s.layers[layer].n_kv_heads;
  uint32_t b, e;
  while (w.claim(n * each, b, e))
    for (uint32_t item = b; item < e; ++item) {
      // A key head, then its query heads: the shares of the threads cost the same.
      const uint32_t i = item / each, head = item % each / (group + 1), g = item % each % (group + 1);
      if (g == 0)
        append(layer, i, head);
      else
        make_query(layer, i, head * group + g - 1);
    }
}

void Decoder::Pass::find_pages(uint32_t layer, uint32_t kv_head, uint32_t chunk, uint32_t end, Pages& found) const {
  const uint32_t first = chunk * kChunkPages, last = std::min(first + kChunkPages, (end + kPageTokens - 1) / kPageTokens);
  const bool records = cache.records(layer, kv_head);
  for (uint32_t p = first; p < last; ++p) {
    if (records) {
      uint8_t *keys = me.keys.data() + (p - first) * cache.page_bytes(), *values = me.values.data() + (p - first) * cache.page_bytes();
      k.records[size_t(cache.type())].to_page(cache.records_of(layer, kv_head, p), s.head_dim, keys, values);
      found.keys[p - first] = keys;
      found.values[p - first] = values;
    } else {
      found.keys[p - first] = cache.keys(layer, kv_head, p);
      found.values[p - first] = cache.values(layer, kv_head, p);
    }
  }
}

void Decoder::Pass::attend_chunk(uint32_t window, uint32_t chunk, const Pages& pages, const Rows& r) const {
  const uint32_t base = chunk * kChunkTokens;
  uint32_t lo[kRowsAtOnce], hi[kRowsAtOnce];
  uint32_t first = kChunkTokens, last = 0;
  for (uint32_t i = 0; i < r.count; ++i) {
    const uint32_t end = r.position[i] + 1, begin = window && end > window ? end - window : 0;
    lo[i] = std::min(std::max(begin, base) - base, kChunkTokens);
    hi[i] = std::min(std::max(end, base) - base, kChunkTokens);
    if (lo[i] < hi[i]) first = std::min(first, lo[i]), last = std::max(last, hi[i]);
  }
  if (first >= last) return;
  attn.attend({r.q, pages.keys, pages.values, lo, hi, r.count, s.head_dim, me.scores, r.acc, r.max, r.sum});
}

void Decoder::Pass::attend_sinks(uint32_t layer, uint32_t kv_head, const Rows& r) const {
  const uint32_t window = cache.window(layer, kv_head);
  const uint8_t *keys = cache.sinks(layer, kv_head), *values = keys + cache.page_bytes();
  const uint32_t lo[kRowsAtOnce] = {};
  uint32_t hi[kRowsAtOnce];
  for (uint32_t i = 0; i < r.count; ++i) {
    const uint32_t end = r.position[i] + 1;
    hi[i] = std::min(end > window ? end - window : 0, kPageTokens);
  }
  attn.attend({r.q, &keys, &values, lo, hi, r.count, s.head_dim, me.scores, r.acc, r.max, r.sum});
}

uint32_t Decoder::Pass::first_chunk(uint32_t layer, uint32_t kv_head, uint32_t position) const {
  const uint32_t window = cache.window(layer, kv_head), end = position + 1;
  return (window && end > window ? end - window : 0) / kChunkTokens;
}

void Decoder::Pass::attend_many(uint32_t layer) {
  const uint32_t end = start + n, chunks = (end + kChunkTokens - 1) / kChunkTokens;
  uint32_t first = chunks;
  for (uint32_t head = 0; head < s.layers[layer].n_kv_heads; ++head) first = std::min(first, first_chunk(layer, head, start));
  Tier* const tier = cache.recorded(layer).empty() ? nullptr : cache.tier();
  if (!tier || tier->all_resident()) {
    attend_chunks(layer, first, first, chunks);
    w.barrier();
  } else {
    // Pages that are not in memory are read by one thread, a buffer ahead of those that are attended to.
    constexpr uint32_t kChunks = Tier::kBufferPages / kChunkPages;
    const uint32_t pages = (end + kPageTokens - 1) / kPageTokens;
    const auto read = [&](uint32_t buffer) {
      const uint32_t from = buffer * Tier::kBufferPages;
      if (from < pages) tier->stream(buffer % 2, cache.section(layer), from, std::min(Tier::kBufferPages, pages - from));
    };
    if (w.index() == 0) read(0);
    for (uint32_t c = 0; c < chunks; c += kChunks) {
      if (w.index() == 0) {
        read(c / kChunks + 1);
        tier->arrive(c / kChunks % 2);
      }
      w.barrier();
      attend_chunks(layer, 0, c, std::min(c + kChunks, chunks));
      w.barrier();
    }
  }
  if (tier) vote(layer);
  set_cols(sc.q_cols);
  for_tokens([&](uint32_t i) {
    finish_rows(layer, i);
    set_input(i, in.f + size_t(i) * sc.q_cols, quantised(d.weights_.layers[layer].output));
  });
  w.barrier();
}

// The part of attend_many() that reads the chunks [begin, end) of those from `first` on.
void Decoder::Pass::attend_chunks(uint32_t layer, uint32_t first, uint32_t begin, uint32_t end) {
  const uint32_t kv = s.layers[layer].n_kv_heads, group = s.n_heads / kv, hd = s.head_dim;
  // The input of q, k and v has been read: its place takes the output.
  const uint32_t batch = std::max(1u, kRowsAtOnce / group), block = cache.recorded(layer).empty() ? batch : kRecordBatches * batch;
  const uint32_t blocks = (n + block - 1) / block;
  uint32_t b, e;
  while (w.claim(blocks * kv, b, e))
    for (uint32_t item = b; item < e; ++item) {
      const uint32_t head = item % kv, token = item / kv * block, count = std::min(block, n - token);
      const uint32_t last = start + token + count, low = first_chunk(layer, head, start + token);
      const size_t row0 = (size_t(head) * kMaxChunk + token) * group;
      // Calls f(rows) for `batch` tokens at a time, in more than one round when a group is huge.
      const auto for_rows = [&](auto&& f) {
        for (uint32_t i0 = 0; i0 < count; i0 += batch)
          for (uint32_t g0 = 0; g0 < group; g0 += kRowsAtOnce) {
            const uint32_t gs = std::min(group - g0, kRowsAtOnce);
            Rows r{};
            r.count = std::min(batch, count - i0) * gs;
            r.max = sc.row_max + row0 + i0 * group + g0, r.sum = sc.row_sum + row0 + i0 * group + g0;
            for (uint32_t row = 0; row < r.count; ++row) {
              const uint32_t i = token + i0 + row / gs;
              const size_t at = size_t(i) * sc.q_cols + size_t(head * group + g0 + row % gs) * hd;
              r.q[row] = sc.q + at;
              r.acc[row] = in.f + at;
              r.position[row] = start + i;
            }
            f(r);
          }
      };
      if (begin == first) {
        std::fill_n(sc.row_sum + row0, count * group, 0.0f);
        if (cache.sinks(layer, head)) for_rows([&](const Rows& r) { attend_sinks(layer, head, r); });
      }
      for (uint32_t c = std::max(begin, low); c < end && c * kChunkTokens < last; ++c) {
        Pages pages;
        find_pages(layer, head, c, last, pages);
        for_rows([&](const Rows& r) { attend_chunk(cache.window(layer, head), c, pages, r); });
      }
    }
}

void Decoder::Pass::finish_rows(uint32_t layer, uint32_t i) const {
  const uint32_t kv = s.layers[layer].n_kv_heads, group = s.n_heads / kv, hd = s.head_dim;
  for (uint32_t h = 0; h < s.n_heads; ++h) {
    const float f = 1.0f / sc.row_sum[(size_t(h / group) * kMaxChunk + i) * group + h % group];
    float* acc = in.f + size_t(i) * sc.q_cols + size_t(h) * hd;
    for (uint32_t c = 0; c < hd; ++c) acc[c] *= f;
  }
}

void Decoder::Pass::vote(uint32_t layer) {
  const uint32_t voters = std::min(n, kVoters);
  for (uint32_t i = 0; i < voters; ++i) {
    const uint32_t position = start + n - voters + i;
    SparseStep step{s, k, cache, w, sc, me, SparseCut(cache, position)};
    step.vote(layer, sc.voters + size_t(kVoters - voters + i) * sc.q_cols, index);
  }
}

Decoder::Pass::Cut Decoder::Pass::cut(uint32_t layer) const {
  const uint32_t kv = s.layers[layer].n_kv_heads, group = s.n_heads / kv, window = s.layers[layer].window;
  const uint32_t end = start + 1, first = (window && end > window ? end - window : 0) / kChunkTokens;
  const uint32_t chunks = (end + kChunkTokens - 1) / kChunkTokens - first;
  if (chunks * kv < 4 * w.threads()) return {first, chunks, 1, s.n_heads * chunks, s.n_heads * chunks};
  return {first, chunks, group, kv * chunks, 1};
}

void Decoder::Pass::barrier_before_attention(uint32_t layer) {
  if (!one || cache.selects(layer)) return w.barrier();
  const Cut c = cut(layer);
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, window = s.layers[layer].window, end = start + 1;
  const uint32_t stretch = c.items * w.index() / w.threads() * c.rows / group;
  const uint32_t low = window && end > window ? end - window : 0;
  const uint32_t page = std::max(low, (c.first + stretch % c.chunks) * kChunkTokens) / kPageTokens;
  const size_t pages = std::min(kChunkPages - page % kChunkPages, (end - 1) / kPageTokens + 1 - page);
  w.barrier(cache.keys(layer, stretch / c.chunks, page), std::min(kFetchAhead, pages * cache.page_bytes()));
}

void Decoder::Pass::attend_one(uint32_t layer) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads;
  const Cut cut = this->cut(layer);
  uint32_t b, e;
  while (w.claim(cut.items, b, e, cut.least))
    for (uint32_t row = b * cut.rows; row < e * cut.rows;) {
      const uint32_t chunk = row / group % cut.chunks, kv_head = row / group / cut.chunks, first = row % group;
      const uint32_t count = std::min({group - first, e * cut.rows - row, kRowsAtOnce});
      attend_rows(layer, kv_head, first, count, cut.first + chunk, chunk);
      row += count;
    }
  join_parts(layer, [&](uint32_t) { return cut.chunks; });
}

void Decoder::Pass::attend_rows(uint32_t layer, uint32_t kv_head, uint32_t first, uint32_t count, uint32_t chunk, uint32_t part) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads, hd = s.head_dim;
  Rows r{};
  r.max = me.max, r.sum = me.sum, r.count = count;
  for (uint32_t i = 0; i < count; ++i) {
    const uint32_t head = kv_head * group + first + i;
    r.q[i] = sc.q + size_t(head) * hd;
    r.acc[i] = sc.partial.data() + (size_t(part) * s.n_heads + head) * (hd + 2);
    r.position[i] = start;
    r.sum[i] = 0;
  }
  if (chunk == kSinks) {
    attend_sinks(layer, kv_head, r);
  } else {
    Pages pages;
    find_pages(layer, kv_head, chunk, start + 1, pages);
    attend_chunk(cache.window(layer, kv_head), chunk, pages, r);
  }
  for (uint32_t i = 0; i < count; ++i) r.acc[i][hd] = r.max[i], r.acc[i][hd + 1] = r.sum[i];
}

void Decoder::Pass::attend_sparse(uint32_t layer) {
  const uint32_t group = s.n_heads / s.layers[layer].n_kv_heads;
  SparseStep step{s, k, cache, w, sc, me, SparseCut(cache, start)};
  uint32_t pages = 0, b, e;
  for (const uint32_t head : cache.paged(layer)) pages += parts_of(layer, head);
  while (w.claim(pages + step.items(layer), b, e))
    for (uint32_t item = b; item < e; ++item) {
      if (item >= pages) {
        step.attend(layer, item - pages);
        continue;
      }
      uint32_t part = item;
      auto head = cache.paged(layer).begin();
      while (part >= parts_of(layer, *head)) part -= parts_of(layer, *head++);
      const uint32_t sinks = has_sinks(layer, *head), chunk = part < sinks ? kSinks : first_chunk(layer, *head, start) + part - sinks;
      for (uint32_t g = 0; g < group; g += kRowsAtOnce)
        attend_rows(layer, *head, g, std::min(group - g, kRowsAtOnce), chunk, part);
    }
  if (step.cut.chosen && !cache.recorded(layer).empty()) {
    w.barrier();
    step.choose(layer);
  }
  join_parts(layer, [&](uint32_t head) { return cache.records(layer, head) ? step.cut.parts() : parts_of(layer, head); });
}

uint32_t Decoder::Pass::has_sinks(uint32_t layer, uint32_t kv_head) const {
  return cache.sinks(layer, kv_head) && start + 1 > cache.window(layer, kv_head);
}

uint32_t Decoder::Pass::parts_of(uint32_t layer, uint32_t kv_head) const {
  return has_sinks(layer, kv_head) + start / kChunkTokens + 1 - first_chunk(layer, kv_head, start);
}

template <class F>
void Decoder::Pass::join_parts(uint32_t layer, F&& parts) {
  const uint32_t hd = s.head_dim, group = s.n_heads / s.layers[layer].n_kv_heads;
  const size_t size = hd + 2;
  barrier_before(d.weights_.layers[layer].output);
  set_cols(sc.q_cols);
  for (uint32_t h = 0; h < s.n_heads; ++h) {
    float* out = in.f + size_t(h) * hd;
    const float* p = sc.partial.data() + size_t(h) * size;
    std::memcpy(out, p, hd * sizeof(float));
    float max = p[hd], sum = p[hd + 1];
    for (uint32_t c = 1, count = parts(h / group); c < count; ++c) {
      p += s.n_heads * size;
      k.merge(&max, &sum, out, p[hd], p[hd + 1], p, hd);
    }
    const float f = 1.0f / sum;
    for (uint32_t i = 0; i < hd; ++i) out[i] *= f;
  }
  set_input(0, in.f, quantised(d.weights_.layers[layer].output));
}

}  // namespace edgert
