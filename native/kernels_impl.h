// The kernels, once for all ISA levels. A kernels_<isa>.cpp defines, in its own anonymous namespace
// before including this file:
//   L               float lanes (8 or 16); NB, the most rows of activations a matmul step takes at
//                   once (even, for the two parts of a token); NR, the most query rows an attention
//                   step takes at once
//   VF, VI, VB      L floats, L int32, L*4 bytes
//   vf_*, vi_*, vb_*  the primitives used below
//   Dot<bits>, DotSigned   sums of products of codes with four activation bytes a lane: type Codes
//                   built from a VB, add(Codes, const int8_t* quad), total(sum of the activations)
//   above64         which of 64 int8 are above a limit, one bit each
//   DotWide         the same of signed codes with four codes of 16 bits, 256 * hi + lo, which pack() puts in a
//                   quad of 8 bytes; lanes() is of a vector of codes with a Row of as many codes of 16 bits, and only
//                   the sum over each 8 of its lanes means something
//   vi_sums         those sums of four vectors: of the first eight lanes [4], kChunkTokens behind them of the others
//   TokenPair       kChannels = 2L codes of two tokens, for sums of both times 16-bit weights: add(weights, two VI), and
//                   store(two VI, unit, kChannels floats)
// No `#pragma once`: every ISA file includes its own copy, so no inline function is shared.

// Calls f(constant<0>) ... f(constant<N-1>): indices known early, so that arrays of vectors stay in
// registers.
template <class F, int... I>
[[gnu::always_inline]] inline void unroll_over(F&& f, std::integer_sequence<int, I...>) {
  (f(std::integral_constant<int, I>{}), ...);
}
template <int N, class F>
[[gnu::always_inline]] inline void unroll(F&& f) {
  unroll_over(f, std::make_integer_sequence<int, N>{});
}

template <const Format& F>
inline VB load_quad(const uint8_t* c, int j) {
  constexpr int V = L * 4;
  if constexpr (F.bits == 8) {
    return vb_load(c + j * V);
  } else if constexpr (F.bits >= 4) {
    VB q = vb_load(c + (j % 4) * V);
    q = j < 4 ? vb_and(q, 15) : vb_and(vb_shr(q, 4), 15);
    if constexpr (F.code == CodeKind::Table) q = vb_lookup(code_table(F.type), q);
    if constexpr (F.bits == 5) {
      const VB h = vb_load(c + 4 * V);
      q = vb_or(q, vb_and(j <= 4 ? vb_shl(h, 4 - j) : vb_shr(h, j - 4), 16));
    }
    if constexpr (F.bits == 6) {
      const VB h = vb_load(c + (4 + j / 4) * V);
      const int s = 2 * (j % 4);
      q = vb_or(q, vb_and(s <= 4 ? vb_shl(h, 4 - s) : vb_shr(h, s - 4), 48));
    }
    return q;
  } else {
    VB q = vb_and(vb_shr(vb_load(c + (j / 4) * V), 2 * (j % 4)), 3);
    if constexpr (F.bits == 3) {
      const VB h = vb_load(c + 2 * V);
      q = vb_or(q, vb_and(j <= 2 ? vb_shl(h, 2 - j) : vb_shr(h, j - 2), 4));
    }
    return q;
  }
}

template <const Format& F>
using DotOf = std::conditional_t<F.code == CodeKind::Plain, Dot<F.bits>, DotSigned>;

// One tile times N rows of activations, which are N or, in two parts, N / 2 tokens.
template <const Format& F, int N>
inline void matmul_tile(const uint8_t* w, uint32_t cols, const QuantActs* x, float* y, size_t y_stride) {
  constexpr int groups = 32 / F.group;
  VF acc[N], d = vf_zero(), dmin = vf_zero();
  unroll<N>([&](auto n) { acc[n] = vf_zero(); });
  const uint32_t blocks = cols / 32;
  for (uint32_t b = 0; b < blocks; ++b) {
    if (F.scale != ScaleKind::Super || b % 8 == 0) {
      d = F.scale == ScaleKind::BF16 ? vf_from_bf16(w) : vf_from_f16(w);
      if constexpr (F.has_min) dmin = vf_from_f16(w + 2 * L);
      if constexpr (F.scale == ScaleKind::Super) w += L * super_header_bytes(F);
    }
    const uint8_t* codes = w + L * (block_bytes(F) - code_bytes(F));
    unroll<groups>([&](auto g) {
      DotOf<F> dot[N];
      unroll<8 / groups>([&](auto i) {
        constexpr int j = g * (8 / groups) + i;
        const typename DotOf<F>::Codes c(load_quad<F>(codes, j));
        unroll<N>([&](auto n) { dot[n].add(c, x[n].q + b * 32 + j * 4); });
      });
      VF scale = d, min = dmin;
      if constexpr (F.scale == ScaleKind::Super) {
        const uint8_t* sc = w + g * L;
        if constexpr (F.nibble_pair) {
          scale = vf_mul(d, vf_from_low_nibbles(sc));
          min = vf_mul(dmin, vf_from_high_nibbles(sc));
        } else {
          if constexpr (F.type == DType::Q6_K)
            scale = vf_mul(d, vf_from_i8(sc));
          else
            scale = vf_mul(d, vf_sub(vf_from_u8(sc), vf_set1(float(F.scale_bias))));
          if constexpr (F.has_min) min = vf_mul(dmin, vf_from_u8(w + (groups + g) * L));
        }
      }
      unroll<N>([&](auto n) {
        const int32_t sum = groups == 2 ? x[n].sum16[b * 2 + g] : x[n].sum32[b];
        VI s = dot[n].total(sum);
        if constexpr (F.offset != 0) s = vi_sub_set1(s, F.offset * sum);
        acc[n] = vf_fma(vf_mul_set1(vf_from_vi(s), x[n].scale[b]), scale, acc[n]);
        if constexpr (F.has_min) {
          const float fs = groups == 2 ? x[n].fsum16[b * 2 + g] : x[n].fsum32[b];
          // The 256-wide types subtract their minimum.
          acc[n] = vf_fma(min, vf_set1(F.scale == ScaleKind::Super ? -fs : fs), acc[n]);
        }
      });
    });
    w += L * block_bytes(F);
  }
  if constexpr (N % 2 == 0)
    if (x[0].parts == 2)
      return unroll<N / 2>([&](auto n) { vf_store(y + n * y_stride, vf_add(acc[2 * n], acc[2 * n + 1])); });
  unroll<N>([&](auto n) { vf_store(y + n * y_stride, acc[n]); });
}

// Calls f.template operator()<N>(first) for n items in steps of NB, then of what is left.
template <int N, class F>
inline void in_steps(uint32_t i, uint32_t n, F&& f) {
  for (; i + N <= n; i += N) f.template operator()<N>(i);
  if constexpr (N > 1) {
    if (i < n) in_steps<N / 2>(i, n, f);
  }
}

template <const Format& F>
void matmul_format(const PackedMatrix& w, uint32_t begin, uint32_t end, const QuantActs& x, uint32_t n, float* y,
                   size_t y_stride) {
  for (uint32_t t = begin; t < end; ++t)
    in_steps<NB>(0, n * x.parts, [&]<int N>(uint32_t r) {
      QuantActs xs[N];
      for (int k = 0; k < N; ++k) xs[k] = x.row(r + k);
      matmul_tile<F, N>(w.tile(t), w.cols, xs, y + r / x.parts * y_stride + size_t(t - begin) * L, y_stride);
    });
}

template <size_t... I>
void matmul_dispatch(const PackedMatrix& w, uint32_t begin, uint32_t end, const QuantActs& x, uint32_t n, float* y,
                     size_t y_stride, std::index_sequence<I...>) {
  (void)((w.type == kFormats[I].type &&
          (matmul_format<kFormats[I]>(w, begin, end, x, n, y, y_stride), true)) || ...);
}

void matmul(const PackedMatrix& w, uint32_t begin, uint32_t end, const QuantActs& x, uint32_t n, float* y,
            size_t y_stride) {
  matmul_dispatch(w, begin, end, x, n, y, y_stride, std::make_index_sequence<std::size(kFormats)>{});
}

template <DType T>
inline VF load_weight(const uint8_t* w, uint32_t k) {
  if constexpr (T == DType::F32) return vf_load_bytes(w + size_t(k) * L * 4);
  else if constexpr (T == DType::F16) return vf_from_f16(w + size_t(k) * L * 2);
  else return vf_from_bf16(w + size_t(k) * L * 2);
}

template <DType T, int N>
inline void matmul_float_tile(const uint8_t* w, uint32_t cols, const float* x, size_t x_stride, float* y,
                              size_t y_stride) {
  VF even[N], odd[N];  // two chains hide the latency of a multiply-add
  unroll<N>([&](auto n) { even[n] = odd[n] = vf_zero(); });
  uint32_t k = 0;
  for (; k + 2 <= cols; k += 2) {
    const VF a = load_weight<T>(w, k), b = load_weight<T>(w, k + 1);
    unroll<N>([&](auto n) {
      even[n] = vf_fma(a, vf_set1(x[n * x_stride + k]), even[n]);
      odd[n] = vf_fma(b, vf_set1(x[n * x_stride + k + 1]), odd[n]);
    });
  }
  if (k < cols)
    unroll<N>([&](auto n) { even[n] = vf_fma(load_weight<T>(w, k), vf_set1(x[n * x_stride + k]), even[n]); });
  unroll<N>([&](auto n) { vf_store(y + n * y_stride, vf_add(even[n], odd[n])); });
}

template <DType T>
void matmul_float_type(const PackedMatrix& w, uint32_t begin, uint32_t end, const float* x, uint32_t n, float* y,
                       size_t y_stride) {
  for (uint32_t t = begin; t < end; ++t)
    in_steps<4>(0, n, [&]<int N>(uint32_t i) {
      matmul_float_tile<T, N>(w.tile(t), w.cols, x + size_t(i) * w.cols, w.cols, y + i * y_stride + size_t(t - begin) * L,
                              y_stride);
    });
}

void matmul_float(const PackedMatrix& w, uint32_t begin, uint32_t end, const float* x, uint32_t n, float* y,
                  size_t y_stride) {
  if (w.type == DType::F32) matmul_float_type<DType::F32>(w, begin, end, x, n, y, y_stride);
  if (w.type == DType::F16) matmul_float_type<DType::F16>(w, begin, end, x, n, y, y_stride);
  if (w.type == DType::BF16) matmul_float_type<DType::BF16>(w, begin, end, x, n, y, y_stride);
}

void quantize(const float* x, const QuantActs& out) {
  constexpr int V = 32 / L;
  for (uint32_t b = 0; b < out.cols / 32; ++b) {
    VF v[V];
    unroll<V>([&](auto i) { v[i] = vf_load(x + b * 32 + i * L); });
    for (uint32_t p = 0; p < out.parts; ++p) {
      VF m = vf_abs(v[0]);
      unroll<V - 1>([&](auto i) { m = vf_max(m, vf_abs(v[i + 1])); });
      const float amax = vf_hmax(m);
      // Below this the inverse overflows; such a block is zero at the precision of anything it meets.
      const float inv = amax > 1e-30f ? 127.0f / amax : 0.0f;
      const float of_codes = amax > 1e-30f ? amax / 127.0f : 0.0f;
      const QuantActs row = out.row(p);
      VF half[2] = {vf_zero(), vf_zero()};  // sums of codes: whole numbers, so exact in any order
      unroll<V>([&](auto i) {
        const VF code = vf_round(vf_mul_set1(v[i], inv));
        vf_store_i8(row.q + b * 32 + i * L, code);
        half[i / (V / 2)] = vf_add(half[i / (V / 2)], code);
        v[i] = vf_fma(code, vf_set1(-of_codes), v[i]);
      });
      // What is no number stays none: a block with infinity or NaN in it gets NaN for a scale.
      const float sums[2] = {vf_hsum(half[0]), vf_hsum(half[1])};
      const bool finite = std::abs(sums[0]) <= 16 * 127 && std::abs(sums[1]) <= 16 * 127;
      const int32_t lo = finite ? int32_t(sums[0]) : 0, hi = finite ? int32_t(sums[1]) : 0;
      const float scale = finite ? of_codes : NAN;
      row.scale[b] = scale;
      row.sum16[2 * b] = lo;
      row.sum16[2 * b + 1] = hi;
      row.sum32[b] = lo + hi;
      row.fsum16[2 * b] = scale * float(lo);
      row.fsum16[2 * b + 1] = scale * float(hi);
      row.fsum32[b] = scale * float(lo + hi);
    }
  }
}

void rmsnorm(const float* x, const float* w, float eps, uint32_t n, float* y) {
  VF s = vf_zero();
  uint32_t i = 0;
  for (; i + L <= n; i += L) s = vf_fma(vf_load(x + i), vf_load(x + i), s);
  float sum = vf_hsum(s);
  for (; i < n; ++i) sum += x[i] * x[i];
  const float f = 1.0f / std::sqrt(sum / float(n) + eps);
  for (i = 0; i + L <= n; i += L) vf_store(y + i, vf_mul(vf_mul_set1(vf_load(x + i), f), vf_load(w + i)));
  for (; i < n; ++i) y[i] = x[i] * f * w[i];
}

void add(float* x, const float* y, uint32_t n) {
  uint32_t i = 0;
  for (; i + L <= n; i += L) vf_store(x + i, vf_add(vf_load(x + i), vf_load(y + i)));
  for (; i < n; ++i) x[i] += y[i];
}

void to_half(const float* x, uint32_t n, uint16_t* y) {
  for (uint32_t i = 0; i < n; i += L)
    vf_store_f16(y + i, vf_max(vf_min(vf_load(x + i), vf_set1(65504.0f)), vf_set1(-65504.0f)));
}

// exp(x) for x <= 88, relative error under 2e-7 (Cephes' polynomial); 0 below -87.
inline VF vf_exp(VF x) {
  x = vf_min(x, vf_set1(88.0f));
  const VF n = vf_round(vf_mul_set1(x, 1.44269504088896341f));
  VF r = vf_fma(n, vf_set1(-0.693359375f), x);
  r = vf_fma(n, vf_set1(2.12194440e-4f), r);
  VF p = vf_set1(1.9875691500e-4f);
  p = vf_fma(p, r, vf_set1(1.3981999507e-3f));
  p = vf_fma(p, r, vf_set1(8.3334519073e-3f));
  p = vf_fma(p, r, vf_set1(4.1665795894e-2f));
  p = vf_fma(p, r, vf_set1(1.6666665459e-1f));
  p = vf_fma(p, r, vf_set1(5.0000001201e-1f));
  p = vf_fma(vf_mul(r, r), p, vf_add(r, vf_set1(1.0f)));
  return vf_zero_below(vf_scale2(p, n), x, -87.0f);
}

// 2^x for x <= 0, relative error under 3e-7 (Cephes' polynomial); 0 below -126.
inline VF vf_exp2(VF x) {
  const VF n = vf_round(x), r = vf_sub(x, n);
  VF p = vf_fma(vf_set1(1.535336188319500e-4f), r, vf_set1(1.339887440266574e-3f));
  p = vf_fma(p, r, vf_set1(9.618437357674640e-3f));
  p = vf_fma(p, r, vf_set1(5.550332471162809e-2f));
  p = vf_fma(p, r, vf_set1(2.402264791363012e-1f));
  p = vf_fma(p, r, vf_set1(6.931472028550421e-1f));
  p = vf_fma(p, r, vf_set1(1.0f));
  return vf_zero_below(vf_scale2(p, n), x, -126.0f);
}

// 1 / (1 + exp(-x))
inline VF vf_sigmoid(VF x) { return vf_div(vf_set1(1.0f), vf_add(vf_set1(1.0f), vf_exp(vf_mul_set1(x, -1.0f)))); }

inline VF silu(VF g) { return vf_mul(g, vf_sigmoid(g)); }

// 0.5 g (1 + tanh(u)) = g sigmoid(2u), u = sqrt(2/pi) (g + 0.044715 g^3)
inline VF gelu(VF g) {
  const VF g3 = vf_mul(vf_mul(g, g), g);
  const VF u = vf_mul_set1(vf_fma(g3, vf_set1(0.044715f), g), 1.5957691216057308f);
  return vf_mul(g, vf_sigmoid(u));
}

template <VF (*A)(VF)>
inline void gated(const float* gate, const float* up, uint32_t n, float* y) {
  uint32_t i = 0;
  for (; i + L <= n; i += L) vf_store(y + i, vf_mul(A(vf_load(gate + i)), vf_load(up + i)));
  if (i < n) {
    float g[L] = {}, u[L] = {}, out[L];
    std::memcpy(g, gate + i, (n - i) * 4);
    std::memcpy(u, up + i, (n - i) * 4);
    vf_store(out, vf_mul(A(vf_load(g)), vf_load(u)));
    std::memcpy(y + i, out, (n - i) * 4);
  }
}

void gate_silu(const float* gate, const float* up, uint32_t n, float* y) { gated<silu>(gate, up, n, y); }
void gate_gelu(const float* gate, const float* up, uint32_t n, float* y) { gated<gelu>(gate, up, n, y); }

#include "kernels_attend.h"

#include "kernels_records.h"

#include "kernels_index.h"

template <class R>
constexpr RecordKernels kRecordKernels = {R::append, attend_records<R>, R::to_page, make_index<R>};

constexpr Kernels make_kernels(Isa isa) {
  return {isa, L,         matmul,    matmul_float, quantize,
          rmsnorm, add,   gate_silu, gate_gelu,    {kKvKernels<F16Pages>, kKvKernels<Q8Pages>},
          {kRecordKernels<F16Records>, kRecordKernels<Q8Records>}, from_half, scan, pick, merge};
}
