// AArch64 NEON with dot product: 8 rows a tile, a vector of 8 is two registers.
#include "kernels.h"

#include <arm_neon.h>

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
struct VF { float32x4_t a, b; };
struct VI { int32x4_t a, b; };
struct VB { uint8x16_t a, b; };

inline VF vf_set1(float x) { return {vdupq_n_f32(x), vdupq_n_f32(x)}; }
inline VF vf_zero() { return vf_set1(0); }
inline VF vf_load(const float* p) { return {vld1q_f32(p), vld1q_f32(p + 4)}; }
inline VF vf_load_bytes(const uint8_t* p) {
  return {vreinterpretq_f32_u8(vld1q_u8(p)), vreinterpretq_f32_u8(vld1q_u8(p + 16))};
}
inline void vf_store(float* p, VF v) {
  vst1q_f32(p, v.a);
  vst1q_f32(p + 4, v.b);
}
inline VF vf_add(VF x, VF y) { return {vaddq_f32(x.a, y.a), vaddq_f32(x.b, y.b)}; }
inline VF vf_mul(VF x, VF y) { return {vmulq_f32(x.a, y.a), vmulq_f32(x.b, y.b)}; }
inline VF vf_div(VF x, VF y) { return {vdivq_f32(x.a, y.a), vdivq_f32(x.b, y.b)}; }
inline VF vf_max(VF x, VF y) { return {vmaxq_f32(x.a, y.a), vmaxq_f32(x.b, y.b)}; }
inline VF vf_min(VF x, VF y) { return {vminq_f32(x.a, y.a), vminq_f32(x.b, y.b)}; }
inline VF vf_fma(VF x, VF y, VF z) { return {vfmaq_f32(z.a, x.a, y.a), vfmaq_f32(z.b, x.b, y.b)}; }
inline VF vf_mul_set1(VF x, float y) { return {vmulq_n_f32(x.a, y), vmulq_n_f32(x.b, y)}; }
inline VF vf_sub(VF x, VF y) { return {vsubq_f32(x.a, y.a), vsubq_f32(x.b, y.b)}; }
inline VF vf_abs(VF x) { return {vabsq_f32(x.a), vabsq_f32(x.b)}; }
inline VF vf_round(VF x) { return {vrndnq_f32(x.a), vrndnq_f32(x.b)}; }
inline float vf_hmax(VF x) { return vmaxvq_f32(vmaxq_f32(x.a, x.b)); }
// The tree of the other levels of 8 lanes.
inline float vf_hsum(VF x) {
  const float32x4_t m = vaddq_f32(x.a, x.b);
  const float32x2_t h = vadd_f32(vget_low_f32(m), vget_high_f32(m));
  return vget_lane_f32(h, 0) + vget_lane_f32(h, 1);
}
inline float32x4_t power_of_two(float32x4_t n) {
  return vreinterpretq_f32_s32(vshlq_n_s32(vaddq_s32(vcvtnq_s32_f32(n), vdupq_n_s32(127)), 23));
}
// p * 2^n for whole n in [-126, 127]
inline VF vf_scale2(VF p, VF n) { return {vmulq_f32(p.a, power_of_two(n.a)), vmulq_f32(p.b, power_of_two(n.b))}; }
inline float32x4_t where(uint32x4_t mask, float32x4_t x) {
  return vreinterpretq_f32_u32(vandq_u32(mask, vreinterpretq_u32_f32(x)));
}
// p where x >= limit, 0 elsewhere
inline VF vf_zero_below(VF p, VF x, float limit) {
  const float32x4_t l = vdupq_n_f32(limit);
  return {where(vcgeq_f32(x.a, l), p.a), where(vcgeq_f32(x.b, l), p.b)};
}
inline uint16x8_t load_u16(const void* p) { return vreinterpretq_u16_u8(vld1q_u8(static_cast<const uint8_t*>(p))); }
inline VF vf_from_f16(const void* p) {
  const float16x8_t h = vreinterpretq_f16_u16(load_u16(p));
  return {vcvt_f32_f16(vget_low_f16(h)), vcvt_high_f32_f16(h)};
}
inline void vf_store_f16(uint16_t* p, VF x) {
  vst1q_u16(p, vreinterpretq_u16_f16(vcombine_f16(vcvt_f16_f32(x.a), vcvt_f16_f32(x.b))));
}
inline VF vf_from_bf16(const void* p) {
  const uint16x8_t h = load_u16(p);
  return {vreinterpretq_f32_u32(vshll_n_u16(vget_low_u16(h), 16)), vreinterpretq_f32_u32(vshll_high_n_u16(h, 16))};
}
inline VF vf_from_bytes(uint8x8_t x) {
  const uint16x8_t w = vmovl_u8(x);
  return {vcvtq_f32_u32(vmovl_u16(vget_low_u16(w))), vcvtq_f32_u32(vmovl_high_u16(w))};
}
inline VF vf_from_u8(const uint8_t* p) { return vf_from_bytes(vld1_u8(p)); }
inline VF vf_from_i8(const uint8_t* p) {
  const int16x8_t w = vmovl_s8(vreinterpret_s8_u8(vld1_u8(p)));
  return {vcvtq_f32_s32(vmovl_s16(vget_low_s16(w))), vcvtq_f32_s32(vmovl_high_s16(w))};
}
inline VF vf_from_low_nibbles(const uint8_t* p) { return vf_from_bytes(vand_u8(vld1_u8(p), vdup_n_u8(15))); }
inline VF vf_from_high_nibbles(const uint8_t* p) { return vf_from_bytes(vshr_n_u8(vld1_u8(p), 4)); }
inline VF vf_from_vi(VI x) { return {vcvtq_f32_s32(x.a), vcvtq_f32_s32(x.b)}; }
// Rounds to nearest even and stores L bytes; x in [-128, 127].
inline void vf_store_i8(int8_t* p, VF x) {
  const int16x4_t a = vmovn_s32(vcvtnq_s32_f32(x.a)), b = vmovn_s32(vcvtnq_s32_f32(x.b));
  vst1_s8(p, vmovn_s16(vcombine_s16(a, b)));
}
inline VI vi_zero() { return {vdupq_n_s32(0), vdupq_n_s32(0)}; }
inline VI vi_load(const int32_t* p) { return {vld1q_s32(p), vld1q_s32(p + 4)}; }
inline void vf_store_i16(int16_t* p, VF x) {
  vst1q_s16(p, vcombine_s16(vmovn_s32(vcvtnq_s32_f32(x.a)), vmovn_s32(vcvtnq_s32_f32(x.b))));
}
inline void vi_sums(const VI* x, int32_t* sums) {
  const auto both = [&](int i) { return vaddq_s32(x[i].a, x[i].b); };
  vst1q_s32(sums, vpaddq_s32(vpaddq_s32(both(0), both(1)), vpaddq_s32(both(2), both(3))));
}
inline VI vi_sub_set1(VI x, int32_t y) { return {vsubq_s32(x.a, vdupq_n_s32(y)), vsubq_s32(x.b, vdupq_n_s32(y))}; }

inline VB vb_load(const uint8_t* p) { return {vld1q_u8(p), vld1q_u8(p + 16)}; }
inline VB vb_and(VB x, int y) { return {vandq_u8(x.a, vdupq_n_u8(uint8_t(y))), vandq_u8(x.b, vdupq_n_u8(uint8_t(y)))}; }
inline VB vb_or(VB x, VB y) { return {vorrq_u8(x.a, y.a), vorrq_u8(x.b, y.b)}; }
// Operators, not intrinsics: those want the count as a literal, which it is only after inlining.
inline VB vb_shr(VB x, int n) { return {x.a >> n, x.b >> n}; }
inline VB vb_shl(VB x, int n) { return {x.a << n, x.b << n}; }
inline VB vb_lookup(const int8_t* table, VB i) {
  const int8x16_t t = vld1q_s8(table);
  return {vreinterpretq_u8_s8(vqtbl1q_s8(t, i.a)), vreinterpretq_u8_s8(vqtbl1q_s8(t, i.b))};
}

// Codes of at most 7 bits are as good signed as unsigned: one instruction serves all.
struct DotSigned {
  struct Codes {
    explicit Codes(VB c) : a(vreinterpretq_s8_u8(c.a)), b(vreinterpretq_s8_u8(c.b)) {}
    int8x16_t a, b;
  };
  int32x4_t a = vdupq_n_s32(0), b = vdupq_n_s32(0);
  [[gnu::always_inline]] void add(const Codes& c, const int8_t* acts) {
    int32_t four;
    std::memcpy(&four, acts, 4);
    const int8x16_t x = vreinterpretq_s8_s32(vdupq_n_s32(four));
    a = vdotq_s32(a, c.a, x);
    b = vdotq_s32(b, c.b, x);
  }
  [[gnu::always_inline]] void add(const Codes& c, VB acts) {
    a = vdotq_s32(a, c.a, vreinterpretq_s8_u8(acts.a));
    b = vdotq_s32(b, c.b, vreinterpretq_s8_u8(acts.b));
  }
  [[gnu::always_inline]] VI total(int32_t) { return {a, b}; }
  static DotSigned zero(VB) { return {}; }
};
template <int>
struct Dot : DotSigned {};

inline DotSigned high_low(const DotSigned& hi, const DotSigned& lo) {
  return {vaddq_s32(vshlq_n_s32(hi.a, 8), lo.a), vaddq_s32(vshlq_n_s32(hi.b, 8), lo.b)};
}

// 16 channels: the first eight in one sum, the others in the other.
struct TokenPair {
  static constexpr uint32_t kChannels = 16;
  int16x8_t a[2], b[2];
  TokenPair(const uint8_t* first, const uint8_t* second) {
    const int8x16_t x = vreinterpretq_s8_u8(vld1q_u8(first)), y = vreinterpretq_s8_u8(vld1q_u8(second));
    a[0] = vmovl_s8(vget_low_s8(x)), a[1] = vmovl_high_s8(x);
    b[0] = vmovl_s8(vget_low_s8(y)), b[1] = vmovl_high_s8(y);
  }
  [[gnu::always_inline]] void add(const int16_t* weights, VI* acc) const {
    for (int i = 0; i < 2; ++i) {
      acc[i].a = vmlal_n_s16(vmlal_n_s16(acc[i].a, vget_low_s16(a[i]), weights[0]), vget_low_s16(b[i]), weights[1]);
      acc[i].b = vmlal_high_n_s16(vmlal_high_n_s16(acc[i].b, a[i], weights[0]), b[i], weights[1]);
    }
  }
  static void store(const VI* acc, float unit, float* out) {
    vf_store(out, vf_mul_set1(vf_from_vi(acc[0]), unit));
    vf_store(out + 8, vf_mul_set1(vf_from_vi(acc[1]), unit));
  }
};

inline uint64_t above64(const int8_t* p, int limit) {
  const int8x16_t l = vdupq_n_s8(int8_t(limit));
  constexpr uint8_t kBits[16] = {1, 2, 4, 8, 16, 32, 64, 128, 1, 2, 4, 8, 16, 32, 64, 128};
  const uint8x16_t bits = vld1q_u8(kBits);
  const auto marks = [&](int i) { return vandq_u8(vcgtq_s8(vld1q_s8(p + 16 * i), l), bits); };
  // Three rounds of sums of neighbours leave a byte of eight marks each.
  const uint8x16_t low = vpaddq_u8(marks(0), marks(1)), high = vpaddq_u8(marks(2), marks(3));
  const uint8x16_t all = vpaddq_u8(low, high);
  return vgetq_lane_u64(vreinterpretq_u64_u8(vpaddq_u8(all, all)), 0);
}

#include "kernels_dot_wide.h"

#include "kernels_impl.h"

constexpr Kernels kTable = make_kernels(Isa::Neon);

}  // namespace

const Kernels& kernels_neon() { return kTable; }

}  // namespace edgert
