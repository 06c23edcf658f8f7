// AVX2 + FMA + F16C: 8 rows a tile.
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

constexpr int L = 8, NB = 4, NR = 4;
constexpr uint32_t kMaxHeadDim = 256;
struct VF { __m256 v; };
struct VI { __m256i v; };
struct VB { __m256i v; };

inline VF vf_zero() { return {_mm256_setzero_ps()}; }
inline VF vf_set1(float a) { return {_mm256_set1_ps(a)}; }
inline VF vf_load(const float* p) { return {_mm256_loadu_ps(p)}; }
inline VF vf_load_bytes(const uint8_t* p) { return {_mm256_loadu_ps(reinterpret_cast<const float*>(p))}; }
inline void vf_store(float* p, VF a) { _mm256_storeu_ps(p, a.v); }
inline VF vf_add(VF a, VF b) { return {_mm256_add_ps(a.v, b.v)}; }
inline VF vf_mul(VF a, VF b) { return {_mm256_mul_ps(a.v, b.v)}; }
inline VF vf_div(VF a, VF b) { return {_mm256_div_ps(a.v, b.v)}; }
inline VF vf_max(VF a, VF b) { return {_mm256_max_ps(a.v, b.v)}; }
inline VF vf_min(VF a, VF b) { return {_mm256_min_ps(a.v, b.v)}; }
inline VF vf_fma(VF a, VF b, VF c) { return {_mm256_fmadd_ps(a.v, b.v, c.v)}; }
inline VF vf_mul_set1(VF a, float b) { return {_mm256_mul_ps(a.v, _mm256_set1_ps(b))}; }
inline VF vf_sub(VF a, VF b) { return {_mm256_sub_ps(a.v, b.v)}; }
inline VF vf_abs(VF a) { return {_mm256_andnot_ps(_mm256_set1_ps(-0.0f), a.v)}; }
inline VF vf_round(VF a) { return {_mm256_round_ps(a.v, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC)}; }
inline float vf_hmax(VF a) {
  __m128 m = _mm_max_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_max_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_max_ss(m, _mm_movehdup_ps(m)));
}
inline float vf_hsum(VF a) {
  __m128 m = _mm_add_ps(_mm256_castps256_ps128(a.v), _mm256_extractf128_ps(a.v, 1));
  m = _mm_add_ps(m, _mm_movehl_ps(m, m));
  return _mm_cvtss_f32(_mm_add_ss(m, _mm_movehdup_ps(m)));
}
// p * 2^n for whole n in [-126, 127]
inline VF vf_scale2(VF p, VF n) {
  const __m256i e = _mm256_slli_epi32(_mm256_add_epi32(_mm256_cvtps_epi32(n.v), _mm256_set1_epi32(127)), 23);
  return {_mm256_mul_ps(p.v, _mm256_castsi256_ps(e))};
}
// p where x >= limit, 0 elsewhere (also for NaN in x: a score is never NaN unless a weight is)
inline VF vf_zero_below(VF p, VF x, float limit) {
  return {_mm256_and_ps(p.v, _mm256_cmp_ps(x.v, _mm256_set1_ps(limit), _CMP_GE_OQ))};
}
inline VF vf_from_f16(const void* p) {
  return {_mm256_cvtph_ps(_mm_loadu_si128(static_cast<const __m128i*>(p)))};
}
inline void vf_store_f16(uint16_t* p, VF a) {
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm256_cvtps_ph(a.v, _MM_FROUND_TO_NEAREST_INT));
}
inline VF vf_from_bf16(const void* p) {
  const __m128i h = _mm_loadu_si128(static_cast<const __m128i*>(p));
  return {_mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(h), 16))};
}
inline __m128i load8(const uint8_t* p) { return _mm_loadl_epi64(reinterpret_cast<const __m128i*>(p)); }
inline VF vf_from_u8(const uint8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepu8_epi32(load8(p)))}; }
inline VF vf_from_i8(const uint8_t* p) { return {_mm256_cvtepi32_ps(_mm256_cvtepi8_epi32(load8(p)))}; }
inline VF vf_from_low_nibbles(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_and_si256(_mm256_cvtepu8_epi32(load8(p)), _mm256_set1_epi32(15)))};
}
inline VF vf_from_high_nibbles(const uint8_t* p) {
  return {_mm256_cvtepi32_ps(_mm256_srli_epi32(_mm256_cvtepu8_epi32(load8(p)), 4))};
}
inline VF vf_from_vi(VI a) { return {_mm256_cvtepi32_ps(a.v)}; }
// Rounds to nearest even and stores L bytes; a in [-128, 127].
inline void vf_store_i8(int8_t* p, VF a) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  const __m128i h = _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1));
  _mm_storel_epi64(reinterpret_cast<__m128i*>(p), _mm_packs_epi16(h, h));
}
inline VI vi_sub_set1(VI a, int32_t b) { return {_mm256_sub_epi32(a.v, _mm256_set1_epi32(b))}; }
inline VI vi_zero() { return {_mm256_setzero_si256()}; }
inline VI vi_load(const int32_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline void vf_store_i16(int16_t* p, VF a) {
  const __m256i i = _mm256_cvtps_epi32(a.v);
  _mm_storeu_si128(reinterpret_cast<__m128i*>(p), _mm_packs_epi32(_mm256_castsi256_si128(i), _mm256_extracti128_si256(i, 1)));
}
inline void vi_sums(const VI* x, int32_t* sums) {
  const __m256i s = _mm256_hadd_epi32(_mm256_hadd_epi32(x[0].v, x[1].v), _mm256_hadd_epi32(x[2].v, x[3].v));
  _mm_storeu_si128(reinterpret_cast<__m128i*>(sums),
                   _mm_add_epi32(_mm256_castsi256_si128(s), _mm256_extracti128_si256(s, 1)));
}

inline VB vb_load(const uint8_t* p) { return {_mm256_loadu_si256(reinterpret_cast<const __m256i*>(p))}; }
inline VB vb_and(VB a, int b) { return {_mm256_and_si256(a.v, _mm256_set1_epi8(char(b)))}; }
inline VB vb_or(VB a, VB b) { return {_mm256_or_si256(a.v, b.v)}; }
inline VB vb_shr(VB a, int n) { return {_mm256_srli_epi16(a.v, n)}; }  // bits of the neighbour are masked off
inline VB vb_shl(VB a, int n) { return {_mm256_slli_epi16(a.v, n)}; }
inline VB vb_lookup(const int8_t* table, VB i) {
  const __m128i t = _mm_loadu_si128(reinterpret_cast<const __m128i*>(table));
  return {_mm256_shuffle_epi8(_mm256_broadcastsi128_si256(t), i.v)};
}

inline __m256i quad(const int8_t* a) {
  int32_t v;
  std::memcpy(&v, a, 4);
  return _mm256_set1_epi32(v);
}

// Unsigned codes of `Bits` bits times int8: pairs are summed in 16 bits for as many steps as cannot
// overflow there.
template <int Bits>
struct Dot {
  static constexpr int kSteps = Bits <= 4 ? 8 : Bits == 5 ? 4 : 2;  // 2 * (2^Bits - 1) * 127 * kSteps < 2^15
  struct Codes {
    explicit Codes(VB b) : c(b.v) {}
    __m256i c;
  };
  __m256i s16 = _mm256_setzero_si256(), s32 = _mm256_setzero_si256();
  int steps = 0;
  [[gnu::always_inline]] void add(const Codes& k, const int8_t* a) {
    s16 = _mm256_add_epi16(s16, _mm256_maddubs_epi16(k.c, quad(a)));
    if (++steps == kSteps) flush();
  }
  [[gnu::always_inline]] void flush() {
    s32 = _mm256_add_epi32(s32, _mm256_madd_epi16(s16, _mm256_set1_epi16(1)));
    s16 = _mm256_setzero_si256();
    steps = 0;
  }
  [[gnu::always_inline]] VI total(int32_t) {
    if (steps) flush();
    return {s32};
  }
};

// Signed codes: |c| times a with the sign of c. |c| <= 128 and |a| <= 127, so a pair fits 16 bits.
struct DotSigned {
  struct Codes {
    explicit Codes(VB b) : c(b.v), abs(_mm256_abs_epi8(b.v)) {}
    __m256i c, abs;
  };
  __m256i s32 = _mm256_setzero_si256();
  [[gnu::always_inline]] void add(const Codes& k, const int8_t* a) {
    const __m256i p = _mm256_maddubs_epi16(k.abs, _mm256_sign_epi8(quad(a), k.c));
    s32 = _mm256_add_epi32(s32, _mm256_madd_epi16(p, _mm256_set1_epi16(1)));
  }
  [[gnu::always_inline]] VI total(int32_t) { return {s32}; }
};

// Codes widened to 16 bits: half the instructions of two parts of int8. A sum is two lanes until the end.
struct DotWide {
  static void pack(const int8_t* hi, const int8_t* lo, int8_t* quad) {
    int16_t wide[4];
    for (int i = 0; i < 4; ++i) wide[i] = int16_t(256 * hi[i] + lo[i]);
    std::memcpy(quad, wide, 8);
  }
  struct Codes {
    explicit Codes(VB b)
        : a(_mm256_cvtepi8_epi16(_mm256_castsi256_si128(b.v))), b(_mm256_cvtepi8_epi16(_mm256_extracti128_si256(b.v, 1))) {}
    __m256i a, b;
  };
  __m256i a = _mm256_setzero_si256(), b = _mm256_setzero_si256();
  [[gnu::always_inline]] void add(const Codes& k, const int8_t* quad) {
    int64_t v;
    std::memcpy(&v, quad, 8);
    const __m256i x = _mm256_set1_epi64x(v);
    a = _mm256_add_epi32(a, _mm256_madd_epi16(k.a, x));
    b = _mm256_add_epi32(b, _mm256_madd_epi16(k.b, x));
  }
  [[gnu::always_inline]] VI total(int32_t) { return {_mm256_permute4x64_epi64(_mm256_hadd_epi32(a, b), 0xd8)}; }

  struct Row {
    __m256i a, b;
    Row(const int8_t* hi, const int8_t* lo) : a(wide(hi, lo)), b(wide(hi + 16, lo + 16)) {}
    static __m256i wide(const int8_t* hi, const int8_t* lo) {
      const auto load = [](const int8_t* p) { return _mm256_cvtepi8_epi16(_mm_loadu_si128(reinterpret_cast<const __m128i*>(p))); };
      return _mm256_add_epi16(_mm256_slli_epi16(load(hi), 8), load(lo));
    }
  };
  [[gnu::always_inline]] static VI lanes(const Codes& k, const Row& r) {
    return {_mm256_add_epi32(_mm256_madd_epi16(k.a, r.a), _mm256_madd_epi16(k.b, r.b))};
  }
};

// 16 channels: the first eight in one sum, the others in the other.
struct TokenPair {
  static constexpr uint32_t kChannels = 16;
  __m256i low, high;
  TokenPair(const uint8_t* a, const uint8_t* b) {
    const __m128i x = _mm_loadu_si128(reinterpret_cast<const __m128i*>(a));
    const __m128i y = _mm_loadu_si128(reinterpret_cast<const __m128i*>(b));
    low = _mm256_cvtepi8_epi16(_mm_unpacklo_epi8(x, y));
    high = _mm256_cvtepi8_epi16(_mm_unpackhi_epi8(x, y));
  }
  [[gnu::always_inline]] void add(const int16_t* weights, VI* acc) const {
    int32_t both;
    std::memcpy(&both, weights, 4);
    const __m256i w = _mm256_set1_epi32(both);
    acc[0].v = _mm256_add_epi32(acc[0].v, _mm256_madd_epi16(low, w));
    acc[1].v = _mm256_add_epi32(acc[1].v, _mm256_madd_epi16(high, w));
  }
  static void store(const VI* acc, float unit, float* out) {
    vf_store(out, vf_mul_set1(vf_from_vi(acc[0]), unit));
    vf_store(out + 8, vf_mul_set1(vf_from_vi(acc[1]), unit));
  }
};

inline uint64_t above64(const int8_t* p, int limit) {
  const __m256i l = _mm256_set1_epi8(char(limit)), *x = reinterpret_cast<const __m256i*>(p);
  const uint32_t low = uint32_t(_mm256_movemask_epi8(_mm256_cmpgt_epi8(_mm256_loadu_si256(x), l)));
  const uint32_t high = uint32_t(_mm256_movemask_epi8(_mm256_cmpgt_epi8(_mm256_loadu_si256(x + 1), l)));
  return low | uint64_t(high) << 32;
}

#include "kernels_impl.h"

constexpr Kernels kTable = make_kernels(Isa::Avx2);

}  // namespace

const Kernels& kernels_avx2() { return kTable; }

}  // namespace edgert
