// Attention to records, a part of kernels_impl.h. A decode step reads them here and there, so what costs is
// waiting for memory: all lines of a record are asked for some records ahead, into L2: what L1 can have in flight
// is too little (docs/kernel-log.md).

constexpr int kGroupRows = 4;  // query rows that share a read of a record
constexpr int C16 = 16 / L;    // vectors of 16 channels

// The sum over 16 lanes, in the same order whatever L.
inline float sum16(const VF* a) { return vf_hsum(C16 == 2 ? vf_add(a[0], a[C16 - 1]) : a[0]); }

struct F16Records {
  static constexpr KvType kType = KvType::F16;
  static constexpr int kTogether = 4;  // stretches of 16 values that may be weighted at once
  using Pages = F16Pages;

  static void append(const float* key, const float* value, uint32_t head_dim, uint8_t* record) {
    uint16_t half[2 * kMaxHeadDim];
    to_half(key, head_dim, half);
    to_half(value, head_dim, half + head_dim);
    std::memcpy(record, half, 4 * size_t(head_dim));
  }

  static VF key(const uint8_t* record, uint32_t, uint32_t d) { return vf_from_f16(record + 2 * d); }

  template <int N>
  static void dot(const uint8_t* record, const float* const* q, uint32_t head_dim, float* out) {
    VF acc[N][C16];
    unroll<N>([&](auto n) { unroll<C16>([&](auto c) { acc[n][c] = vf_zero(); }); });
    for (uint32_t d = 0; d < head_dim; d += 16)
      unroll<C16>([&](auto c) {
        const VF k = vf_from_f16(record + 2 * (d + c * L));
        unroll<N>([&](auto n) { acc[n][c] = vf_fma(k, vf_load(q[n] + d + c * L), acc[n][c]); });
      });
    unroll<N>([&](auto n) { out[n * kChunkTokens] = sum16(acc[n]); });
  }

  // What a value must be multiplied with; Q8 has scales there.
  struct Scales {
    void read(const uint8_t*, uint32_t, uint32_t) {}
    float of(uint32_t, uint32_t, float weight) const { return weight; }
  };
  static VF value(const uint8_t* record, uint32_t head_dim, uint32_t d) { return vf_from_f16(record + 2 * (head_dim + d)); }

  // A 4 by 4 block of halves at a time, with its columns in the words of its rows.
  static void to_page(const uint8_t* records, uint32_t head_dim, uint8_t* keys, uint8_t* values) {
    constexpr uint64_t even = 0x0000ffff0000ffff, low = 0x00000000ffffffff;
    const size_t stride = kv_record_bytes(kType, head_dim);
    for (uint32_t t = 0; t < kPageTokens; t += 4)
      for (uint32_t c = 0; c < head_dim; c += 4) {
        uint64_t r[4];
        for (int i = 0; i < 4; ++i) std::memcpy(r + i, records + (t + i) * stride + 2 * c, 8);
        const uint64_t a = (r[0] & even) | (r[1] & even) << 16, b = (r[0] >> 16 & even) | (r[1] & ~even);
        const uint64_t e = (r[2] & even) | (r[3] & even) << 16, f = (r[2] >> 16 & even) | (r[3] & ~even);
        const uint64_t columns[4] = {(a & low) | e << 32, (b & low) | f << 32, a >> 32 | (e & ~low), b >> 32 | (f & ~low)};
        for (int i = 0; i < 4; ++i) std::memcpy(keys + 2 * ((c + i) * kPageTokens + t), columns + i, 8);
      }
    for (uint32_t t = 0; t < kPageTokens; ++t)
      std::memcpy(values + t * 2 * size_t(head_dim), records + t * stride + 2 * size_t(head_dim), 2 * size_t(head_dim));
  }
};

void from_half(const uint8_t* halves, uint32_t n, float* out) {
  for (uint32_t i = 0; i < n; i += L) vf_store(out + i, vf_from_f16(halves + 2 * i));
}

// The scales come first: a vector of them is read at once, which must not end behind the record.
struct Q8Records {
  static constexpr KvType kType = KvType::Q8;
  static constexpr int kTogether = 2;  // those of a scale
  using Pages = Q8Pages;

  static uint32_t scales_bytes(uint32_t head_dim) { return head_dim / 8; }

  static void append(const float* key, const float* value, uint32_t head_dim, uint8_t* record) {
    uint16_t scales[2 * kMaxHeadDim / 32];
    int8_t codes[2 * kMaxHeadDim];
    Q8Pages::encode(key, head_dim, codes, scales, 1);
    Q8Pages::encode(value, head_dim, codes + head_dim, scales + head_dim / 32, 1);
    std::memcpy(record, scales, scales_bytes(head_dim));
    std::memcpy(record + scales_bytes(head_dim), codes, 2 * size_t(head_dim));
  }

  static float scale(const uint8_t* record, uint32_t block) {
    uint16_t half[L];
    float out[L];
    std::memset(half, 0, sizeof half);
    std::memcpy(half, record + 2 * block, 2);
    vf_store(out, vf_from_f16(half));
    return out[0];
  }
  static VF key(const uint8_t* record, uint32_t head_dim, uint32_t d) {
    return vf_mul_set1(vf_from_i8(record + scales_bytes(head_dim) + d), scale(record, d / 32));
  }

  template <int N>
  static void dot(const uint8_t* record, const float* const* q, uint32_t head_dim, float* out) {
    float scale[kMaxHeadDim / 32 + L];
    for (uint32_t b = 0; b < head_dim / 32; b += L) vf_store(scale + b, vf_from_f16(record + 2 * b));
    const uint8_t* codes = record + scales_bytes(head_dim);
    VF acc[N][C16];
    unroll<N>([&](auto n) { unroll<C16>([&](auto c) { acc[n][c] = vf_zero(); }); });
    for (uint32_t b = 0; b < head_dim / 32; ++b)
      unroll<2>([&](auto half) {
        unroll<C16>([&](auto c) {
          const uint32_t d = b * 32 + half * 16 + c * L;
          const VF k = vf_mul_set1(vf_from_i8(codes + d), scale[b]);
          unroll<N>([&](auto n) { acc[n][c] = vf_fma(k, vf_load(q[n] + d), acc[n][c]); });
        });
      });
    unroll<N>([&](auto n) { out[n * kChunkTokens] = sum16(acc[n]); });
  }

  struct Scales {
    float scale[kMaxHeadDim / 32][kChunkTokens];
    void read(const uint8_t* record, uint32_t head_dim, uint32_t t) {
      float s[kMaxHeadDim / 32 + L];
      for (uint32_t b = 0; b < head_dim / 32; b += L) vf_store(s + b, vf_from_f16(record + head_dim / 16 + 2 * b));
      for (uint32_t b = 0; b < head_dim / 32; ++b) scale[b][t] = s[b];
    }
    float of(uint32_t d, uint32_t t, float weight) const { return scale[d / 32][t] * weight; }
  };
  static VF value(const uint8_t* record, uint32_t head_dim, uint32_t d) {
    return vf_from_i8(record + scales_bytes(head_dim) + head_dim + d);
  }

  static void to_page(const uint8_t* records, uint32_t head_dim, uint8_t* keys, uint8_t* values) {
    const size_t stride = kv_record_bytes(kType, head_dim), size = size_t(kPageTokens) * head_dim;
    for (uint32_t t = 0; t < kPageTokens; ++t) {
      const uint8_t *scales = records + t * stride, *codes = scales + scales_bytes(head_dim);
      for (uint32_t c = 0; c < head_dim; c += 4) std::memcpy(keys + c * kPageTokens + t * 4, codes + c, 4);
      std::memcpy(values + t * size_t(head_dim), codes + head_dim, head_dim);
      for (uint32_t b = 0; b < head_dim / 32; ++b) {
        std::memcpy(keys + size + 2 * (b * kPageTokens + t), scales + 2 * b, 2);
        std::memcpy(values + size + 2 * (b * kPageTokens + t), scales + head_dim / 16 + 2 * b, 2);
      }
    }
  }
};

inline void fetch_record(const uint8_t* record, size_t bytes) {
  for (size_t i = 0; i < bytes; i += 64) __builtin_prefetch(record + i, 0, 2);
}

template <class R>
void attend_records(const AttnRecords& c) {
  constexpr uint32_t kLinesAhead = 80;
  const size_t bytes = kv_record_bytes(R::kType, c.head_dim);
  const uint32_t ahead = std::max(2u, kLinesAhead / uint32_t((bytes + 63) / 64));
  typename R::Scales scales;
  const uint32_t padded = (c.count + L - 1) / L * L;
  in_rows<kGroupRows>(0, c.rows, [&]<int N>(uint32_t r) {
    float* scores = c.scores;
    if (r == 0)
      for (uint32_t t = 0; t < std::min(ahead, c.count); ++t) fetch_record(c.records[t], bytes);
    for (uint32_t t = 0; t < c.count; ++t) {
      if (r == 0) {
        if (t + ahead < c.count) fetch_record(c.records[t + ahead], bytes);
        scales.read(c.records[t], c.head_dim, t);
      }
      R::template dot<N>(c.records[t], c.q + r, c.head_dim, scores + t);
    }
    for (int n = 0; n < N; ++n) {
      float* s = scores + n * kChunkTokens;
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
    in_steps<stretches(N)>(0, c.head_dim / 16, [&]<int S>(uint32_t step) {
      constexpr int T = std::min(S, R::kTogether), C = T * C16;
      for (uint32_t d = step * 16; d < (step + S) * 16; d += T * 16) {
        VF a[N][C];
        unroll<N>([&](auto n) { unroll<C>([&](auto k) { a[n][k] = vf_zero(); }); });
        for (uint32_t t = 0; t < c.count; ++t) {
          VF w[N];
          unroll<N>([&](auto n) { w[n] = vf_set1(scales.of(d, t, scores[n * kChunkTokens + t])); });
          unroll<C>([&](auto k) {
            const VF v = R::value(c.records[t], c.head_dim, d + k * L);
            unroll<N>([&](auto n) { a[n][k] = vf_fma(v, w[n], a[n][k]); });
          });
        }
        unroll<N>([&](auto n) { unroll<C>([&](auto k) { vf_store(c.acc[r + n] + d + k * L, a[n][k]); }); });
      }
    });
  });
}
