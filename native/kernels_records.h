// Attention to records, a part of kernels_impl.h. A decode step reads them here and there, so what costs is
// waiting for memory: all lines of a record are asked for some records ahead, into L2: what L1 can have in flight
// is too little (docs/kernel-log.md). A type of records has scores() and values() of a list for N rows.

constexpr int kGroupRows = 4;  // query rows that share a read of a record
constexpr int C16 = 16 / L;    // vectors of 16 channels

// The sum over 16 lanes, in the same order whatever L.
inline float sum16(const VF* a) { return vf_hsum(C16 == 2 ? vf_add(a[0], a[C16 - 1]) : a[0]); }

// Columns for rows, of 4 by 4 halves.
inline void transpose_halves(uint64_t* r) {
  constexpr uint64_t even = 0x0000ffff0000ffff, low = 0x00000000ffffffff;
  const uint64_t a = (r[0] & even) | (r[1] & even) << 16, b = (r[0] >> 16 & even) | (r[1] & ~even);
  const uint64_t c = (r[2] & even) | (r[3] & even) << 16, d = (r[2] >> 16 & even) | (r[3] & ~even);
  r[0] = (a & low) | c << 32;
  r[1] = (b & low) | d << 32;
  r[2] = a >> 32 | (c & ~low);
  r[3] = b >> 32 | (d & ~low);
}

// Asks for records `lines_ahead` cache lines ahead of their turn.
struct Fetch {
  const AttnRecords& c;
  uint32_t lines, ahead;

  Fetch(const AttnRecords& c, KvType type, uint32_t lines_ahead)
      : c(c), lines(uint32_t((kv_record_bytes(type, c.head_dim) + 63) / 64)), ahead(std::max(2u, lines_ahead / lines)) {
    for (uint32_t t = 0; t < std::min(ahead, c.count); ++t) record(t);
  }
  void behind(uint32_t t) const {
    if (t + ahead < c.count) record(t + ahead);
  }

 private:
  void record(uint32_t t) const {
    for (uint32_t i = 0; i < lines; ++i) __builtin_prefetch(c.records[t] + 64 * i, 0, 2);
  }
};

struct F16Records {
  static constexpr KvType kType = KvType::F16;
  static constexpr uint32_t kLinesAhead = 80;
  struct Scratch {};  // what Q8 keeps from one group of rows to the next

  static void append(const float* key, const float* value, uint32_t head_dim, uint8_t* record) {
    uint16_t half[2 * kMaxHeadDim];
    to_half(key, head_dim, half);
    to_half(value, head_dim, half + head_dim);
    std::memcpy(record, half, 4 * size_t(head_dim));
  }

  static VF key(const uint8_t* record, uint32_t, uint32_t d) { return vf_from_f16(record + 2 * d); }

  // The scores of rows r to r + N with all records, c.scores [N][kChunkTokens]; the first rows fetch.
  template <int N>
  static void scores(const AttnRecords& c, uint32_t r, const Fetch& fetch, Scratch&) {
    const float* q[N];
    std::copy_n(c.q + r, N, q);
    for (uint32_t t = 0; t < c.count; ++t) {
      if (r == 0) fetch.behind(t);
      VF acc[N][C16];
      unroll<N>([&](auto n) { unroll<C16>([&](auto k) { acc[n][k] = vf_zero(); }); });
      for (uint32_t d = 0; d < c.head_dim; d += 16)
        unroll<C16>([&](auto k) {
          const VF x = key(c.records[t], c.head_dim, d + k * L);
          unroll<N>([&](auto n) { acc[n][k] = vf_fma(x, vf_load(q[n] + d + k * L), acc[n][k]); });
        });
      unroll<N>([&](auto n) { c.scores[n * kChunkTokens + t] = sum16(acc[n]); });
    }
  }

  // The sums of values by the weights that stand in place of the scores.
  template <int N>
  static void values(const AttnRecords& c, uint32_t r, Scratch&) {
    in_steps<stretches(N)>(0, c.head_dim / 16, [&]<int S>(uint32_t step) {
      constexpr int C = S * C16;
      const uint32_t d = step * 16;
      VF a[N][C];
      unroll<N>([&](auto n) { unroll<C>([&](auto k) { a[n][k] = vf_zero(); }); });
      for (uint32_t t = 0; t < c.count; ++t) {
        VF w[N];
        unroll<N>([&](auto n) { w[n] = vf_set1(c.scores[n * kChunkTokens + t]); });
        unroll<C>([&](auto k) {
          const VF v = vf_from_f16(c.records[t] + 2 * (c.head_dim + d + k * L));
          unroll<N>([&](auto n) { a[n][k] = vf_fma(v, w[n], a[n][k]); });
        });
      }
      unroll<N>([&](auto n) { unroll<C>([&](auto k) { vf_store(c.acc[r + n] + d + k * L, a[n][k]); }); });
    });
  }

  static void to_page(const uint8_t* records, uint32_t head_dim, uint8_t* keys, uint8_t* values) {
    const size_t stride = kv_record_bytes(kType, head_dim);
    for (uint32_t t = 0; t < kPageTokens; t += 4)
      for (uint32_t c = 0; c < head_dim; c += 4) {
        uint64_t r[4];
        for (int i = 0; i < 4; ++i) std::memcpy(r + i, records + (t + i) * stride + 2 * c, 8);
        transpose_halves(r);
        for (int i = 0; i < 4; ++i) std::memcpy(keys + 2 * ((c + i) * kPageTokens + t), r + i, 8);
      }
    for (uint32_t t = 0; t < kPageTokens; ++t)
      std::memcpy(values + t * 2 * size_t(head_dim), records + t * stride + 2 * size_t(head_dim), 2 * size_t(head_dim));
  }
};

void from_half(const uint8_t* halves, uint32_t n, float* out) {
  for (uint32_t i = 0; i < n; i += L) vf_store(out + i, vf_from_f16(halves + 2 * i));
}

#include "kernels_records_q8.h"

template <class R>
void attend_records(const AttnRecords& c) {
  const Fetch fetch(c, R::kType, R::kLinesAhead);
  typename R::Scratch scratch;
  const uint32_t padded = (c.count + L - 1) / L * L;
  in_rows<kGroupRows>(0, c.rows, [&]<int N>(uint32_t r) {
    R::template scores<N>(c, r, fetch, scratch);
    for (int n = 0; n < N; ++n) {
      float* s = c.scores + n * kChunkTokens;
      for (uint32_t t = c.count; t < padded; ++t) s[t] = -INFINITY;
      VF m = vf_set1(-INFINITY);
      for (uint32_t t = 0; t < padded; t += L) m = vf_max(m, vf_load(s + t));
      c.max[r + n] = vf_hmax(m);
      const VF top = vf_set1(c.max[r + n]);
      VF total = vf_zero();
      for (uint32_t t = 0; t < padded; t += L) {
        const VF e = vf_exp2(vf_sub(vf_load(s + t), top));
        vf_store(s + t, e);
        total = vf_add(total, e);
      }
      c.sum[r + n] = vf_hsum(total);
    }
    R::template values<N>(c, r, scratch);
  });
}
