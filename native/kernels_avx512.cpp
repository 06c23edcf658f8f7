// AVX-512 F, BW, VL, DQ and VNNI: 16 rows a tile, integer dot products in one instruction.
#include "kernels.h"

#include <immintrin.h>

#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <type_traits>
#include <utility>

#include "formats.h"

namespace edgert {
namespace {

constexpr int L = 16, NB = 8, NR = 8;
constexpr uint32_t kMaxHeadDim = 256;
struct VF { __m512 v; };
struct VI { __m512i v; };
struct VB { __m512i v; };

inline VF vf_zero() { return {_mm512_setzero_ps()}; }
inline VF vf_set1(float a) { return {_mm512_set1_ps(a)}; }
inline VF vf_load(const float* p) { return {_mm512_loadu_ps(p)}; }
inline VF vf_load_bytes(const uint8_t* p) { return {_mm512_loadu_ps(p)}; }
inline void vf_store(float* p, VF a) { _mm512_storeu_ps(p, a.v); }
inline VF vf_add(VF a, VF b) { return {_mm512_add_ps(a.v, b.v)}; }
inline VF vf_mul(VF a, VF b) { return {_mm512_mul_ps(a.v, b.v)}; }
inline VF vf_div(VF a, VF b) { return {_mm512_div_ps(a.v, b.v)}; }
inline VF vf_max(VF a, VF b) { return {_mm512_max_ps(a.v, b.v)}; }
inline VF vf_min(VF a, VF b) { return {_mm512_min_ps(a.v, b.v)}; }
inline VF vf_fma(VF a, VF b, VF c) { return {_mm512_fmadd_ps(a.v, b.v, c.v)}; }
inline VF vf_mul_set1(VF a, float b) { return {_mm512_mul_ps(a.v, _mm512_set1_ps(b))}; }
inline VF vf_sub(VF a, VF b) { return {_mm512_sub_ps(a.v, b.v)}; }
inline VF vf_abs(VF a) { return {_mm512_abs_ps(a.v)}; }
inline VF vf_round(VF a) { return {_mm512_roundscale_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline float vf_hmax(VF a) { return _mm512_reduce_max_ps(a.v); }
inline float vf_hsum(VF a) {
  const __m256 h = _mm256_add_ps(_mm512_castps512_ps256(a.v), _mm512_extractf32x8_ps(a.v, 1));
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(h), _mm256_extractf128_ps(h, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
// p * 2^n for whole n in [-126, 127]
inline VF vf_scale2(VF p, VF n) { return {_mm512_scalef_ps(p.v, n.v)}; }
inline VF vf_zero_below(VF p, VF x, float limit) {
  return {_mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x.v, _mm512_set1_ps(limit), _CMP_GE_OQ), p.v)};
}
inline VF vf_from_f16(const void* p) { return {_mm512_cvtph_ps(_mm256_loadu_si256(static_cast<const __m256i*>(p)))}; }
inline void vf_store_f16(uint16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline VF vf_from_bf16(const void* p) {
  const __m256i h = _mm256_loadu_si256(static_cast<const __m256i*>(p));
  return {_mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(h), 16))};
}
inline __m128i load16b(const uint8_t* p) { return _mm_loadu_si128(reinterpret_cast<const __m128i*>(p)); }
inline VF vf_from_u8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepu8_epi32(load16b(p)))}; }
inline VF vf_from_i8(const uint8_t* p) { return {_mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(load16b(p)))}; }
inline VF vf_from_low_nibbles(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_and_si512(_mm512_cvtepu8_epi32(load16b(p)), _mm512_set1_epi32(15)))};
}
inline VF vf_from_high_nibbles(const uint8_t* p) {
  return {_mm512_cvtepi32_ps(_mm512_srli_epi32(_mm512_cvtepu8_epi32(load16b(p)), 4))};
}
inline VF vf_from_vi(VI a) { return {_mm512_cvtepi32_ps(a.v)}; }
// Rounds to nearest even and stores L bytes; a in [-128, 127].
inline void vf_store_i8(int8_t* p, VF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm512_cvtepi32_epi8(_mm512_cvtps_epi32(a.v)));
}
inline VI vi_sub_set1(VI a, int32_t b) { return {_mm512_sub_epi32(a.v, _mm512_set1_epi32(b))}; }
inline VI vi_zero() { return {_mm512_setzero_si512()}; }
inline VI vi_load(const int32_t* p) { return {_mm512_loadu_si512(p)}; }
inline void vf_store_i16(int16_t* p, VF a) {
  _mm256_storeu_si256(reinterpret_cast<__m256i*>(p), _mm512_cvtepi32_epi16(_mm512_cvtps_epi32(a.v)));
}
inline __m512i pair_sums(__m512i a, __m512i b) {
  return _mm512_add_epi32(_mm512_unpacklo_epi32(a, b), _mm512_unpackhi_epi32(a, b));
}
inline void vi_sums(const VI* x, int32_t* sums) {
  const __m512i a = pair_sums(x[0].v, x[1].v), b = pair_sums(x[2].v, x[3].v);
  const __m512i s = _mm512_add_epi32(_mm512_unpacklo_epi64(a, b), _mm512_unpackhi_epi64(a, b));
  const __m256i low = _mm512_castsi512_si256(s), high = _mm512_extracti64x4_epi64(s, 1);
  const __m256i both = _mm256_add_epi32(_mm256_permute2x128_si256(low, high, 0x20), _mm256_permute2x128_si256(low, high, 0x31));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums), _mm256_castsi256_si128(both));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums + kChunkTokens), _mm256_extracti128_si256(both, 1));
}

inline VB vb_load(const uint8_t* p) { return {_mm512_loadu_si512(p)}; }
inline VB vb_and(VB a, int b) { return {_mm512_and_si512(a.v, _mm512_set1_epi8(char(b)))}; }
inline VB vb_or(VB a, VB b) { return {_mm512_or_si512(a.v, b.v)}; }
inline VB vb_shr(VB a, int n) { return {_mm512_srli_epi16(a.v, unsigned(n))}; }  // the neighbour's bits are masked off
inline VB vb_shl(VB a, int n) { return {_mm512_slli_epi16(a.v, unsigned(n))}; }
inline VB vb_lookup(const int8_t* table, VB i) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm512_shuffle_epi8(_mm512_broadcast_i32x4(t), i.v)};
}

inline __m512i quad(const int8_t* a) {
  int32_t v;
  std::memcpy(&v, a, 4);
  return _mm512_set1_epi32(v);
}

// Unsigned codes times int8.
template <int>
struct Dot {
  struct Codes {
    explicit Codes(VB b) : c(b.v) {}
    __m512i c;
  };
  __m512i s = _mm512_setzero_si512();
  [[gnu::always_inline]] void add(const Codes& k, const int8_t* a) { s = _mm512_dpbusd_epi32(s, k.c, quad(a)); }
  [[gnu::always_inline]] VI total(int32_t) { return {s}; }
};

// Signed codes: the instruction wants one side unsigned, so 128 is added to the codes and 128 times
// the activations taken off again.
struct DotSigned {
  struct Codes {
    explicit Codes(VB b) : c(_mm512_xor_si512(b.v, _mm512_set1_epi8(char(0x80)))) {}
    __m512i c;
  };
  __m512i s = _mm512_setzero_si512();
  [[gnu::always_inline]] void add(const Codes& k, const int8_t* a) { s = _mm512_dpbusd_epi32(s, k.c, quad(a)); }
  [[gnu::always_inline]] void add(const Codes& k, VB a) { s = _mm512_dpbusd_epi32(s, k.c, a.v); }
  [[gnu::always_inline]] VI total(int32_t sum) { return {_mm512_sub_epi32(s, _mm512_set1_epi32(128 * sum))}; }
  // What sums over lanes of products with `a` must begin with.
  static DotSigned zero(VB a) {
    DotSigned d;
    d.add(Codes({_mm512_setzero_si512()}), a);
    return {_mm512_sub_epi32(_mm512_setzero_si512(), d.s)};
  }
};

inline DotSigned high_low(const DotSigned& hi, const DotSigned& lo) {
  return {_mm512_add_epi32(_mm512_slli_epi32(hi.s, 8), lo.s)};
}

// 32 channels: those whose number has bit 3 clear in one sum, the others in the other.
struct TokenPair {
  static constexpr uint32_t kChannels = 32;
  __m512i even, odd;
  TokenPair(const uint8_t* a, const uint8_t* b) {
    const __m256i x = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(a));
    const __m256i y = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(b));
    even = _mm512_cvtepi8_epi16(_mm256_unpacklo_epi8(x, y));
    odd = _mm512_cvtepi8_epi16(_mm256_unpackhi_epi8(x, y));
  }
  [[gnu::always_inline]] void add(const int16_t* weights, VI* acc) const {
    int32_t both;
    std::memcpy(&both, weights, 4);
    const __m512i w = _mm512_set1_epi32(both);
    acc[0].v = _mm512_dpwssd_epi32(acc[0].v, even, w);
    acc[1].v = _mm512_dpwssd_epi32(acc[1].v, odd, w);
  }
  static void store(const VI* acc, float unit, float* out) {
    const VF e = vf_mul_set1(vf_from_vi(acc[0]), unit), o = vf_mul_set1(vf_from_vi(acc[1]), unit);
    _mm256_storeu_ps(out, _mm512_castps512_ps256(e.v));
    _mm256_storeu_ps(out + 8, _mm512_castps512_ps256(o.v));
    _mm256_storeu_ps(out + 16, _mm512_extractf32x8_ps(e.v, 1));
    _mm256_storeu_ps(out + 24, _mm512_extractf32x8_ps(o.v, 1));
  }
};

inline uint64_t above64(const int8_t* p, int limit) {
  return _mm512_cmpgt_epi8_mask(_mm512_loadu_si512(p), _mm512_set1_epi8(char(limit)));
}

#include "kernels_dot_wide.h"

#include "kernels_impl.h"

constexpr Kernels kTable = make_kernels(Isa::Avx512Vnni);

}  // namespace

const Kernels& kernels_avx512() { return kTable; }

}  // namespace edgert
