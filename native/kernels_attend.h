// Attention, a part of kernels_impl.h: what each type of page holds, and the softmax over either.

constexpr int PV = kPageTokens / L;  // vectors across the tokens of a page
constexpr int kRegisters = L == 16 ? 32 : 16;

// Stretches of 16 values taken at once: as many as the registers hold accumulators for.
constexpr int stretches(int rows) {
  const auto fit = [=](int s) { return rows * s * 16 / L + (rows < s * 16 / L ? rows : s * 16 / L) + 1 <= kRegisters; };
  return fit(4) ? 4 : fit(2) ? 2 : 1;
}

// Pages of f16: K [head_dim][16], V [16][head_dim].
struct F16Pages {
  static constexpr uint32_t kAhead = 0;  // pages asked for ahead: the CPU's own prefetcher does better

  static void append(const float* key, const float* value, uint32_t head_dim, uint32_t slot, uint8_t* keys, uint8_t* values) {
    uint16_t half[kMaxHeadDim];
    to_half(key, head_dim, half);
    uint16_t* k = reinterpret_cast<uint16_t*>(keys) + slot;
    for (uint32_t c = 0; c < head_dim; ++c) k[c * kPageTokens] = half[c];
    to_half(value, head_dim, reinterpret_cast<uint16_t*>(values) + size_t(slot) * head_dim);
  }

  static void code_query(float*, uint32_t) {}

  // A score is the sum over even channels plus the sum over odd ones, whatever N: with few query rows
  // both are taken on one way through the page, since a single chain of dependent multiply-adds would
  // wait for itself; with many rows, whose sums fill the registers, on two ways. Pages are read one
  // after the other: two at a time are two streams, which memory delivers at half the speed.
  template <int N>
  static void scores(const uint8_t* page, const float* const* q, uint32_t head_dim, float* scores) {
    const uint16_t* keys = reinterpret_cast<const uint16_t*>(page);
    constexpr int P = 2 * N * PV + PV + 1 <= kRegisters ? 2 : 1;  // parities at once
    VF even[N][PV];
    for (uint32_t first = 0; first < 2; first += P) {
      VF acc[P][N][PV];
      unroll<P>([&](auto p) { unroll<N>([&](auto n) { unroll<PV>([&](auto v) { acc[p][n][v] = vf_zero(); }); }); });
      for (uint32_t d = first; d < head_dim; d += 2)
        unroll<P>([&](auto p) {
          VF k[PV];
          unroll<PV>([&](auto v) { k[v] = vf_from_f16(keys + (d + p) * kPageTokens + v * L); });
          unroll<N>([&](auto n) {
            const VF qd = vf_set1(q[n][d + p]);
            unroll<PV>([&](auto v) { acc[p][n][v] = vf_fma(k[v], qd, acc[p][n][v]); });
          });
        });
      unroll<N>([&](auto n) {
        unroll<PV>([&](auto v) {
          if (P == 1 && first == 0)
            even[n][v] = acc[0][n][v];
          else
            vf_store(scores + n * kChunkTokens + v * L, vf_add(P == 2 ? acc[0][n][v] : even[n][v], acc[P - 1][n][v]));
        });
      });
    }
  }

  // Adds the weighted values of a page; head_dim is a multiple of 16.
  template <int N>
  static void values(const uint8_t* page, const float* weights, uint32_t head_dim, float* const* acc) {
    const uint16_t* v = reinterpret_cast<const uint16_t*>(page);
    in_steps<stretches(N)>(0, head_dim / 16, [&]<int S>(uint32_t step) {
      constexpr int C = S * 16 / L;
      const uint32_t d = step * 16;
      VF a[N][C];
      unroll<N>([&](auto n) { unroll<C>([&](auto c) { a[n][c] = vf_load(acc[n] + d + c * L); }); });
      for (uint32_t t = 0; t < kPageTokens; ++t) {
        VF w[N];
        unroll<N>([&](auto n) { w[n] = vf_set1(weights[n * kChunkTokens + t]); });
        unroll<C>([&](auto c) {
          const VF vv = vf_from_f16(v + t * head_dim + d + c * L);
          unroll<N>([&](auto n) { a[n][c] = vf_fma(vv, w[n], a[n][c]); });
        });
      }
      unroll<N>([&](auto n) { unroll<C>([&](auto c) { vf_store(acc[n] + d + c * L, a[n][c]); }); });
    });
  }
};

// Pages of int8: K [head_dim/4][16][4], V [16][head_dim], each with f16 scales [head_dim/32][16] behind
// it. The four channels of a key that lie together are what an integer dot product takes at once.
struct Q8Pages {
  static constexpr uint32_t kAhead = 4;  // streams half as long, of which the CPU misses a larger part

  static void fetch(const uint8_t* page, uint32_t head_dim) {
    for (size_t i = 0; i < kv_page_bytes(KvType::Q8, head_dim); i += 64) __builtin_prefetch(page + i, 0, 2);
  }

  // n floats, a multiple of 32, as codes and, `stride` apart, the f16 scale of each 32. Finite whatever
  // happens: NaN becomes 0, what a scale in f16 cannot reach the largest number it can.
  static void encode(const float* x, uint32_t n, int8_t* codes, uint16_t* scales, uint32_t stride) {
    constexpr int V = 32 / L;
    constexpr float top = 127 * 65504.0f;
    for (uint32_t b = 0; b < n / 32; ++b) {
      VF v[V], m = vf_zero();
      unroll<V>([&](auto i) {
        const VF f = vf_load(x + b * 32 + i * L);
        v[i] = vf_max(vf_min(vf_zero_below(f, f, -INFINITY), vf_set1(top)), vf_set1(-top));
        m = vf_max(m, vf_abs(v[i]));
      });
      uint16_t half[L];
      float stored[L];
      vf_store_f16(half, vf_set1(vf_hmax(m) / 127.0f));
      vf_store(stored, vf_from_f16(half));
      scales[b * stride] = half[0];
      // A scale near the least of f16 may be much less than the quotient: codes end at 127 all the same.
      const float inv = stored[0] > 0 ? 1.0f / stored[0] : 0.0f;
      unroll<V>([&](auto i) {
        const VF code = vf_round(vf_mul_set1(v[i], inv));
        vf_store_i8(codes + b * 32 + i * L, vf_max(vf_min(code, vf_set1(127.0f)), vf_set1(-127.0f)));
      });
    }
  }

  static void append(const float* key, const float* value, uint32_t head_dim, uint32_t slot, uint8_t* keys, uint8_t* values) {
    int8_t codes[kMaxHeadDim];
    const size_t size = size_t(kPageTokens) * head_dim;
    encode(key, head_dim, codes, reinterpret_cast<uint16_t*>(keys + size) + slot, kPageTokens);
    for (uint32_t c = 0; c < head_dim; c += 4) std::memcpy(keys + c * kPageTokens + slot * 4, codes + c, 4);
    encode(value, head_dim, reinterpret_cast<int8_t*>(values) + size_t(slot) * head_dim,
           reinterpret_cast<uint16_t*>(values + size) + slot, kPageTokens);
  }

  // A query as scores() takes it, in the place of its floats: codes of 16 bits, so that keys alone are
  // coarse, in blocks of 32 with a scale.
  struct Query {
    int8_t* quads;   // [head_dim/4][8]
    float* scale;    // [head_dim/32]
    int32_t* sum;    // [head_dim/32] of the block's codes
    Query(const float* place, uint32_t head_dim)
        : quads(reinterpret_cast<int8_t*>(const_cast<float*>(place))),
          scale(reinterpret_cast<float*>(quads + 2 * head_dim)),
          sum(reinterpret_cast<int32_t*>(scale + head_dim / 32)) {}
  };

  // Codes of 32 floats in 16 bits, 256 * hi + lo, and their scale. Returns the sum of the codes. What is no number
  // stays none, as in quantize().
  static int32_t code_block(const float* x, int8_t* hi, int8_t* lo, float& scale) {
    constexpr int V = 32 / L;
    VF v[V], m = vf_zero(), sum = vf_zero();
    unroll<V>([&](auto i) {
      v[i] = vf_load(x + i * L);
      m = vf_max(m, vf_abs(v[i]));
    });
    const float amax = vf_hmax(m), inv = amax > 1e-30f ? 32512.0f / amax : 0.0f;
    unroll<V>([&](auto i) {
      const VF code = vf_round(vf_mul_set1(v[i], inv));
      // A little is added so that halves go up and lo ends at 127.
      const VF high = vf_round(vf_fma(code, vf_set1(1.0f / 256), vf_set1(1.0f / 1024)));
      vf_store_i8(hi + i * L, high);
      vf_store_i8(lo + i * L, vf_fma(high, vf_set1(-256.0f), code));
      sum = vf_add(sum, code);
    });
    const float total = vf_hsum(sum);  // whole and below 2^24, so exact in any order
    const bool finite = std::abs(total) <= 32 * 32512;
    scale = finite ? (amax > 1e-30f ? amax / 32512.0f : 0.0f) : NAN;
    return finite ? int32_t(total) : 0;
  }

  static void code_query(float* query, uint32_t head_dim) {
    float x[kMaxHeadDim];
    std::memcpy(x, query, head_dim * sizeof(float));
    const Query out(query, head_dim);
    for (uint32_t b = 0; b < head_dim / 32; ++b) {
      int8_t hi[32], lo[32];
      out.sum[b] = code_block(x + b * 32, hi, lo, out.scale[b]);
      for (int j = 0; j < 32; j += 4) DotWide::pack(hi + j, lo + j, out.quads + 2 * (b * 32 + j));
    }
  }

  template <int N>
  static void scores(const uint8_t* keys, const float* const* q, uint32_t head_dim, float* scores) {
    for (int v = 0; v < PV; ++v) {
      const uint8_t* codes = keys + v * L * 4;
      const uint8_t* scale = keys + size_t(kPageTokens) * head_dim + v * L * 2;
      VF acc[N];
      unroll<N>([&](auto n) { acc[n] = vf_zero(); });
      for (uint32_t b = 0; b < head_dim / 32; ++b, codes += 32 * kPageTokens, scale += 2 * kPageTokens) {
        DotWide dot[N];
        for (uint32_t j = 0; j < 8; ++j) {
          const DotWide::Codes c(vb_load(codes + j * 4 * kPageTokens));
          unroll<N>([&](auto n) { dot[n].add(c, reinterpret_cast<const int8_t*>(q[n]) + b * 64 + j * 8); });
        }
        const VF s = vf_from_f16(scale);
        unroll<N>([&](auto n) {
          const Query x(q[n], head_dim);
          acc[n] = vf_fma(vf_mul_set1(vf_from_vi(dot[n].total(x.sum[b])), x.scale[b]), s, acc[n]);
        });
      }
      unroll<N>([&](auto n) { vf_store(scores + n * kChunkTokens + v * L, acc[n]); });
    }
  }

  // The weight of a token takes in the scale of its block: one multiplication for 32 values.
  template <int N>
  static void values(const uint8_t* codes, const float* weights, uint32_t head_dim, float* const* acc) {
    constexpr int S = std::min(stretches(N), 2), C = S * 16 / L;
    const uint8_t* scales = codes + size_t(kPageTokens) * head_dim;
    for (uint32_t b = 0; b < head_dim; b += 32, scales += 2 * kPageTokens) {
      float w[N][kPageTokens];
      unroll<PV>([&](auto v) {
        const VF s = vf_from_f16(scales + v * L * 2);
        unroll<N>([&](auto n) { vf_store(w[n] + v * L, vf_mul(vf_load(weights + n * kChunkTokens + v * L), s)); });
      });
      for (uint32_t d = b; d < b + 32; d += 16 * S) {
        VF a[N][C];
        unroll<N>([&](auto n) { unroll<C>([&](auto c) { a[n][c] = vf_load(acc[n] + d + c * L); }); });
        for (uint32_t t = 0; t < kPageTokens; ++t) {
          VF wt[N];
          unroll<N>([&](auto n) { wt[n] = vf_set1(w[n][t]); });
          unroll<C>([&](auto c) {
            const VF x = vf_from_i8(codes + t * head_dim + d + c * L);
            unroll<N>([&](auto n) { a[n][c] = vf_fma(x, wt[n], a[n][c]); });
          });
        }
        unroll<N>([&](auto n) { unroll<C>([&](auto c) { vf_store(acc[n] + d + c * L, a[n][c]); }); });
      }
    }
  }
};

// Calls f<N>(first) with N = NR, then once with what is left.
template <int N, class F>
inline void in_rows(uint32_t i, uint32_t rows, F&& f) {
  for (; i + N <= rows; i += N) f.template operator()<N>(i);
  if constexpr (N > 1) {
    if (i < rows) in_rows<N - 1>(i, rows, f);
  }
}

void merge(float* max, float* sum, float* acc, float max2, float sum2, const float* acc2, uint32_t head_dim) {
  const float m = *max > max2 ? *max : max2;
  float both[L] = {*max - m, max2 - m};
  vf_store(both, vf_exp2(vf_load(both)));
  const VF a = vf_set1(both[0]), b = vf_set1(both[1]);
  *sum = both[0] * *sum + both[1] * sum2;
  *max = m;
  for (uint32_t d = 0; d < head_dim; d += L)
    vf_store(acc + d, vf_fma(vf_load(acc2 + d), b, vf_mul(vf_load(acc + d), a)));
}

template <class Pages>
void attend(const AttnChunk& c) {
  in_rows<NR>(0, c.rows, [&]<int N>(uint32_t r) {
    uint32_t lo = kChunkTokens, hi = 0;
    for (int n = 0; n < N; ++n)
      if (c.lo[r + n] < c.hi[r + n]) {
        lo = std::min(lo, c.lo[r + n]);
        hi = std::max(hi, c.hi[r + n]);
      }
    if (lo >= hi) return;
    const uint32_t first = lo / kPageTokens, last = (hi + kPageTokens - 1) / kPageTokens;
    float* scores = c.scores;
    for (uint32_t p = first; p < last; ++p) {
      if constexpr (Pages::kAhead > 0) {  // behind the keys come the values
        const uint32_t ahead = p + Pages::kAhead;
        Pages::fetch(ahead < last ? c.keys[ahead] : c.values[std::min(first + ahead - last, last - 1)], c.head_dim);
      }
      Pages::template scores<N>(c.keys[p], c.q + r, c.head_dim, scores + p * kPageTokens);
    }
    float max[N], sum[N];
    for (int n = 0; n < N; ++n) {
      float* s = scores + n * kChunkTokens;
      const uint32_t a = c.lo[r + n], b = c.hi[r + n];
      for (uint32_t t = first * kPageTokens; t < a; ++t) s[t] = -INFINITY;
      for (uint32_t t = b; t < last * kPageTokens; ++t) s[t] = -INFINITY;
      VF m = vf_set1(-INFINITY);
      for (uint32_t t = first * kPageTokens; t < last * kPageTokens; t += L) m = vf_max(m, vf_load(s + t));
      max[n] = vf_hmax(m);
      if (a >= b) max[n] = 0;  // every weight of this row becomes exp(-inf) = 0
      const VF top = vf_set1(max[n]);
      VF total = vf_zero();
      for (uint32_t t = first * kPageTokens; t < last * kPageTokens; t += L) {
        const VF e = vf_exp2(vf_sub(vf_load(s + t), top));
        vf_store(s + t, e);
        total = vf_add(total, e);
      }
      sum[n] = vf_hsum(total);
    }
    float acc[N][kMaxHeadDim];
    float* accp[N];
    for (int n = 0; n < N; ++n) {
      accp[n] = acc[n];
      std::memset(acc[n], 0, c.head_dim * sizeof(float));
    }
    for (uint32_t p = first; p < last; ++p) {
      if constexpr (Pages::kAhead > 0)
        if (p + Pages::kAhead < last) Pages::fetch(c.values[p + Pages::kAhead], c.head_dim);
      Pages::template values<N>(c.values[p], scores + p * kPageTokens, c.head_dim, accp);
    }
    for (int n = 0; n < N; ++n) {
      if (c.lo[r + n] >= c.hi[r + n]) continue;
      if (c.sum[r + n] == 0) {  // first chunk this row sees
        c.max[r + n] = max[n];
        c.sum[r + n] = sum[n];
        std::memcpy(c.acc[r + n], acc[n], c.head_dim * sizeof(float));
      } else {
        merge(c.max + r + n, c.sum + r + n, c.acc[r + n], max[n], sum[n], acc[n], c.head_dim);
      }
    }
  });
}

template <class Pages>
constexpr KvKernels kKvKernels = {Pages::append, Pages::code_query, attend<Pages>};
