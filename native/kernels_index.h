// The two-bit index of keys, a part of kernels_impl.h. A channel's four levels lie evenly about its mean, a
// standard deviation apart: near the least error for a normal distribution. Mean and deviation are those of
// the block itself, so nothing in the index knows what comes later.

template <class R>
void make_index(const uint8_t* const* pages, uint32_t head_dim, uint8_t* index) {
  float* base = reinterpret_cast<float*>(index);
  float* step = base + head_dim;
  const size_t stride = kv_record_bytes(R::kType, head_dim);
  const auto record = [&](uint32_t t) { return pages[t / kPageTokens] + t % kPageTokens * stride; };
  for (uint32_t d = 0; d < head_dim; d += L) {
    // About the first token: keys with a large bias would lose their deviation in the sum of squares.
    const VF pivot = R::key(record(0), head_dim, d);
    VF sum = vf_zero(), squares = vf_zero();
    for (uint32_t t = 0; t < kIndexTokens; ++t) {
      const VF x = vf_sub(R::key(record(t), head_dim, d), pivot);
      sum = vf_add(sum, x);
      squares = vf_fma(x, x, squares);
    }
    float first[L], s[L], s2[L];
    vf_store(first, pivot);
    vf_store(s, sum);
    vf_store(s2, squares);
    for (int i = 0; i < L; ++i) {
      const float mean = s[i] / kIndexTokens;
      step[d + i] = std::sqrt(std::max(s2[i] / kIndexTokens - mean * mean, 0.0f));
      base[d + i] = first[i] + mean - 1.5f * step[d + i];
    }
  }
  uint8_t* out = index + 8 * size_t(head_dim);
  for (uint32_t t = 0; t < kIndexTokens; ++t) {
    int8_t codes[kMaxHeadDim];
    for (uint32_t d = 0; d < head_dim; d += L) {
      float inverse[L];
      for (int i = 0; i < L; ++i) inverse[i] = step[d + i] > 0 ? 1.0f / step[d + i] : 0.0f;
      const VF x = vf_mul(vf_sub(R::key(record(t), head_dim, d), vf_load(base + d)), vf_load(inverse));
      vf_store_i8(codes + d, vf_max(vf_min(vf_round(x), vf_set1(3.0f)), vf_zero()));
    }
    for (uint32_t g = 0; g < head_dim / 16; ++g) {
      uint32_t quads[4];
      std::memcpy(quads, codes + 16 * g, 16);
      const uint32_t packed = quads[0] | quads[1] << 2 | quads[2] << 4 | quads[3] << 6;
      std::memcpy(out + ((t / kPageTokens * (head_dim / 16) + g) * kPageTokens + t % kPageTokens) * 4, &packed, 4);
    }
  }
}

void scan(const Scan& s) {
  const float* base = reinterpret_cast<const float*>(s.index);
  const float* step = base + s.head_dim;
  const uint8_t* packed = s.index + 8 * size_t(s.head_dim);
  const size_t share = index_block_bytes(s.head_dim) / (kIndexTokens / kPageTokens);
  float best[kIndexTokens];
  in_rows<kGroupRows>(0, s.rows, [&]<int N>(uint32_t r) {
    int8_t codes[N][kMaxHeadDim];  // of the query, with the steps in it
    float scale[N], offset[N];
    for (int n = 0; n < N; ++n) {
      const float* q = s.q[r + n];
      float x[kMaxHeadDim];
      VF largest = vf_zero(), constant = vf_zero();
      for (uint32_t d = 0; d < s.head_dim; d += L) {
        const VF v = vf_mul(vf_load(q + d), vf_load(step + d));
        vf_store(x + d, v);
        largest = vf_max(vf_abs(v), largest);
        constant = vf_fma(vf_load(q + d), vf_load(base + d), constant);
      }
      const float most = vf_hmax(largest), inverse = most > 1e-30f ? 127.0f / most : 0.0f;
      for (uint32_t d = 0; d < s.head_dim; d += L) vf_store_i8(codes[n] + d, vf_round(vf_mul_set1(vf_load(x + d), inverse)));
      scale[n] = kWorthSteps * most / 127.0f;
      offset[n] = kWorthSteps * (vf_hsum(constant) - s.level[r + n]);
    }
    for (uint32_t p = 0; p < kIndexTokens / kPageTokens; ++p, packed += kPageTokens * s.head_dim / 4) {
      if (r == 0)
        for (size_t i = 0; i < share; i += 64) __builtin_prefetch(s.next + p * share + i, 0, 2);
      for (int v = 0; v < PV; ++v) {
        Dot<2> dot[N];
        for (uint32_t g = 0; g < s.head_dim / 16; ++g) {
          const VB four = vb_load(packed + (g * kPageTokens + v * L) * 4);
          unroll<4>([&](auto i) {
            const typename Dot<2>::Codes c(vb_and(vb_shr(four, 2 * i), 3));
            unroll<N>([&](auto n) { dot[n].add(c, codes[n] + 16 * g + 4 * i); });
          });
        }
        float* place = best + p * kPageTokens + v * L;
        VF most = r == 0 ? vf_set1(-INFINITY) : vf_load(place);
        unroll<N>([&](auto n) {
          const VF score = vf_fma(vf_from_vi(dot[n].total(0)), vf_set1(scale[n]), vf_set1(offset[n]));
          most = vf_max(score, most);
        });
        vf_store(place, most);
      }
    }
    packed = s.index + 8 * size_t(s.head_dim);
  });
  for (uint32_t t = 0; t < kIndexTokens; t += L)
    vf_store_i8(s.worth + t, vf_round(vf_min(vf_max(vf_load(best + t), vf_set1(-127.0f)), vf_set1(127.0f))));
}

void pick(const int8_t* worth, uint32_t n, uint32_t count, uint32_t* places) {
  if (count == 0) return;
  const auto above = [&](int limit) {
    uint32_t found = 0;
    for (uint32_t i = 0; i < n; i += 64) found += uint32_t(std::popcount(above64(worth + i, limit)));
    return found;
  };
  // The largest limit with at least `count` above it; those one above the limit are the last to be taken.
  int limit = kNever;
  for (int bit = 128; bit; bit /= 2)
    if (limit + bit <= 126 && above(limit + bit) >= count) limit += bit;
  uint32_t equals = count - above(limit + 1);
  for (uint32_t i = 0; i < n; i += 64) {
    uint64_t taken = above64(worth + i, limit + 1);
    for (uint64_t equal = above64(worth + i, limit) & ~taken; equal && equals; equal &= equal - 1, --equals)
      taken |= equal & (~equal + 1);
    for (; taken; taken &= taken - 1) *places++ = i + uint32_t(std::countr_zero(taken));
  }
}
