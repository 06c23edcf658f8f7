// Attention to records of int8 in integers, a part of kernels_records.h. As floats, codes cost two conversions and
// a multiplication for each 16; as they are, an instruction takes 64 of a key or 16 of two values.

// Scales come first, so that a vector of codes read at once may end behind the keys, but not behind the record.
struct Q8Records {
  static constexpr KvType kType = KvType::Q8;
  static constexpr uint32_t kLinesAhead = 1 << 16;  // all of them: keys are done with sooner than a record comes

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

  // Halves of scales, [of K, then of V][kChunkTokens], zeros up to a whole vector of tokens.
  struct Scratch {
    uint16_t scales[kMaxHeadDim / 16][kChunkTokens + L];
  };

  // Keys meet the query's 16-bit codes: four records at a time, since the sums over the lanes of four vectors cost
  // little more than those of one. A score is the sum over blocks of 32 channels, in their order whatever L.
  template <int N>
  static void scores(const AttnRecords& c, uint32_t r, const Fetch& fetch, Scratch& s) {
    constexpr uint32_t B = L / 8;  // blocks of 32 in a vector of codes
    const uint32_t blocks = c.head_dim / 32;
    int32_t sums[N][B][kChunkTokens];
    for (uint32_t first = 0; first < blocks; first += B) {
      float scale[N][B] = {};
      std::array<int8_t, 32 * B> hi[N] = {}, lo[N] = {};  // zeros for what lies behind the last block: values
      for (int n = 0; n < N; ++n)
        for (uint32_t b = 0; b < std::min(B, blocks - first); ++b)
          Q8Pages::code_block(c.q[r + n] + 32 * (first + b), &hi[n][32 * b], &lo[n][32 * b], scale[n][b]);
      const auto rows = [&]<int... n>(std::integer_sequence<int, n...>) {
        return std::array<DotWide::Row, N>{DotWide::Row(hi[n].data(), lo[n].data())...};
      }(std::make_integer_sequence<int, N>{});
      for (uint32_t t = 0; t < c.count; t += 4) {
        const uint8_t* four[4];
        unroll<4>([&](auto i) { four[i] = c.records[std::min(t + i, c.count - 1)]; });
        if (r == 0 && first == 0) {
          unroll<4>([&](auto i) { fetch.behind(t + i); });
          for (uint32_t j = 0; j < 2 * blocks; j += 4) {
            uint64_t halves[4];
            unroll<4>([&](auto i) { std::memcpy(halves + i, four[i] + 2 * j, 8); });
            transpose_halves(halves);
            for (uint32_t i = 0; i < std::min(4u, 2 * blocks - j); ++i) std::memcpy(s.scales[j + i] + t, halves + i, 8);
          }
        }
        const auto codes = [&](int i) { return DotWide::Codes(vb_load(four[i] + 4 * blocks + 32 * first)); };
        const DotWide::Codes k[4] = {codes(0), codes(1), codes(2), codes(3)};
        unroll<N>([&](auto n) {
          VI lanes[4];
          unroll<4>([&](auto i) { lanes[i] = DotWide::lanes(k[i], rows[n]); });
          vi_sums(lanes, sums[n][0] + t);
        });
      }
      if (r == 0 && first == 0)
        for (uint32_t j = 0; j < 2 * blocks; ++j) std::fill_n(s.scales[j] + c.count, L, uint16_t(0));
      for (uint32_t b = 0; b < std::min(B, blocks - first); ++b)
        for (uint32_t t = 0; t < c.count; t += L) {
          const VF of_keys = vf_from_f16(s.scales[first + b] + t);
          unroll<N>([&](auto n) {
            float* place = c.scores + n * kChunkTokens + t;
            const VF before = first + b == 0 ? vf_zero() : vf_load(place);
            vf_store(place, vf_fma(vf_mul_set1(vf_from_vi(vi_load(sums[n][b] + t)), scale[n][b]), of_keys, before));
          });
        }
    }
  }

  // Weights take in the scales of values and become codes of 16 bits, which integer products of two tokens at once take.
  // Their largest is 32,767, so they are a hundred times finer than the values.
  template <int N>
  static void values(const AttnRecords& c, uint32_t r, Scratch& s) {
    const uint32_t blocks = c.head_dim / 32;
    for (uint32_t b = 0; b < blocks; ++b) {
      int16_t weights[N][kChunkTokens + L];
      float unit[N];
      const uint16_t* scales = s.scales[blocks + b];
      for (int n = 0; n < N; ++n) {
        const float* w = c.scores + n * kChunkTokens;
        const auto scaled = [&](uint32_t t) { return vf_mul(vf_load(w + t), vf_from_f16(scales + t)); };
        VF m = vf_zero();
        for (uint32_t t = 0; t < c.count; t += L) m = vf_max(scaled(t), m);
        const float most = vf_hmax(m), inverse = most > 1e-30f ? 32767.0f / most : 0.0f;
        unit[n] = most / 32767.0f;
        for (uint32_t t = 0; t < c.count; t += L) vf_store_i16(weights[n] + t, vf_round(vf_mul_set1(scaled(t), inverse)));
      }
      for (uint32_t d = 32 * b; d < 32 * b + 32; d += TokenPair::kChannels) {
        VI acc[N][2];
        unroll<N>([&](auto n) { acc[n][0] = acc[n][1] = vi_zero(); });
        const size_t at = 4 * blocks + c.head_dim + d;
        const uint8_t* const* records = c.records;
        const auto add = [&](uint32_t t, const uint8_t* a, const uint8_t* b) {
          const TokenPair pair(a + at, b + at);
          unroll<N>([&](auto n) { pair.add(weights[n] + t, acc[n]); });
        };
        const uint32_t even = c.count & ~1u;
        for (uint32_t t = 0; t < even; t += 2) add(t, records[t], records[t + 1]);
        if (even < c.count) add(even, records[even], records[even]);  // the second weight is 0
        unroll<N>([&](auto n) { TokenPair::store(acc[n], unit[n], c.acc[r + n] + d); });
      }
    }
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
