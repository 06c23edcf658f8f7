// Portable level: no intrinsics, the oracle of the others. 8 rows a tile.
#include <algorithm>
#include <array>
#include <bit>
#include <cmath>
#include <cstring>
#include <numeric>
#include <type_traits>
#include <utility>

#include "formats.h"
#include "half.h"
#include "kernels.h"

namespace edgert {
namespace {

constexpr int L = 8, NB = 2, NR = 1;
constexpr uint32_t kMaxHeadDim = 256;
struct VF { float v[L]; };
struct VI { int32_t v[L]; };
struct VB { uint8_t v[L * 4]; };

template <class F>
inline VF each(F&& f) {
  VF r;
  for (int i = 0; i < L; ++i) r.v[i] = f(i);
  return r;
}
template <class F>
inline VB each_byte(F&& f) {
  VB r;
  for (int i = 0; i < L * 4; ++i) r.v[i] = uint8_t(f(i));
  return r;
}
inline uint16_t half_at(const void* p, int i) {
  uint16_t h;
  std::memcpy(&h, static_cast<const uint8_t*>(p) + 2 * i, 2);
  return h;
}

inline VF vf_zero() { return each([](int) { return 0.0f; }); }
inline VF vf_set1(float a) { return each([=](int) { return a; }); }
inline VF vf_load(const float* p) { return each([=](int i) { return p[i]; }); }
inline VF vf_load_bytes(const uint8_t* p) {
  VF r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void vf_store(float* p, VF a) { std::memcpy(p, a.v, sizeof a.v); }
inline VF vf_add(VF a, VF b) { return each([&](int i) { return a.v[i] + b.v[i]; }); }
inline VF vf_mul(VF a, VF b) { return each([&](int i) { return a.v[i] * b.v[i]; }); }
inline VF vf_div(VF a, VF b) { return each([&](int i) { return a.v[i] / b.v[i]; }); }
inline VF vf_max(VF a, VF b) { return each([&](int i) { return a.v[i] > b.v[i] ? a.v[i] : b.v[i]; }); }
inline VF vf_min(VF a, VF b) { return each([&](int i) { return a.v[i] < b.v[i] ? a.v[i] : b.v[i]; }); }
inline VF vf_fma(VF a, VF b, VF c) { return each([&](int i) { return std::fma(a.v[i], b.v[i], c.v[i]); }); }
inline VF vf_mul_set1(VF a, float b) { return each([&](int i) { return a.v[i] * b; }); }
inline VF vf_sub(VF a, VF b) { return each([&](int i) { return a.v[i] - b.v[i]; }); }
inline VF vf_abs(VF a) { return each([&](int i) { return std::fabs(a.v[i]); }); }
inline VF vf_round(VF a) { return each([&](int i) { return std::nearbyint(a.v[i]); }); }
inline float vf_hmax(VF a) { return *std::max_element(a.v, a.v + L); }
// The tree of the vector levels, so that sums agree to the bit.
inline float vf_hsum(VF a) {
  return ((a.v[0] + a.v[4]) + (a.v[2] + a.v[6])) + ((a.v[1] + a.v[5]) + (a.v[3] + a.v[7]));
}
inline VF vf_scale2(VF p, VF n) {
  return each([&](int i) { return p.v[i] * std::bit_cast<float>((int32_t(n.v[i]) + 127) << 23); });
}
inline VF vf_zero_below(VF p, VF x, float limit) {
  return each([&](int i) { return x.v[i] >= limit ? p.v[i] : 0.0f; });
}
inline VF vf_from_f16(const void* p) { return each([=](int i) { return half_to_float(half_at(p, i)); }); }
inline void vf_store_f16(uint16_t* p, VF a) {
  for (int i = 0; i < L; ++i) p[i] = float_to_half(a.v[i]);
}
inline VF vf_from_bf16(const void* p) { return each([=](int i) { return bf16_to_float(half_at(p, i)); }); }
inline VF vf_from_u8(const uint8_t* p) { return each([=](int i) { return float(p[i]); }); }
inline VF vf_from_i8(const uint8_t* p) { return each([=](int i) { return float(int8_t(p[i])); }); }
inline VF vf_from_low_nibbles(const uint8_t* p) { return each([=](int i) { return float(p[i] & 15); }); }
inline VF vf_from_high_nibbles(const uint8_t* p) { return each([=](int i) { return float(p[i] >> 4); }); }
inline VF vf_from_vi(VI a) { return each([&](int i) { return float(a.v[i]); }); }
inline void vf_store_i8(int8_t* p, VF a) {
  for (int i = 0; i < L; ++i) p[i] = a.v[i] >= -128 && a.v[i] <= 127 ? int8_t(a.v[i]) : int8_t(0);  // 0 for NaN too
}
inline VI vi_sub_set1(VI a, int32_t b) {
  for (int i = 0; i < L; ++i) a.v[i] -= b;
  return a;
}
inline VI vi_zero() { return {}; }
inline VI vi_load(const int32_t* p) {
  VI r;
  std::memcpy(r.v, p, sizeof r.v);
  return r;
}
inline void vf_store_i16(int16_t* p, VF a) {
  for (int i = 0; i < L; ++i) p[i] = std::abs(a.v[i]) <= 32767 ? int16_t(a.v[i]) : int16_t(0);
}
inline void vi_sums(const VI* x, int32_t* sums) {
  for (int i = 0; i < 4; ++i) sums[i] = std::accumulate(x[i].v, x[i].v + L, 0);
}
inline VB vb_load(const uint8_t* p) { return each_byte([=](int i) { return p[i]; }); }
inline VB vb_and(VB a, int b) { return each_byte([&](int i) { return a.v[i] & b; }); }
inline VB vb_or(VB a, VB b) { return each_byte([&](int i) { return a.v[i] | b.v[i]; }); }
inline VB vb_shr(VB a, int n) { return each_byte([&](int i) { return a.v[i] >> n; }); }
inline VB vb_shl(VB a, int n) { return each_byte([&](int i) { return a.v[i] << n; }); }
inline VB vb_lookup(const int8_t* table, VB x) { return each_byte([&](int i) { return table[x.v[i]]; }); }

template <class Code>
struct DotScalar {
  struct Codes {
    explicit Codes(VB b) : c(b) {}
    VB c;
  };
  VI s{};
  void add(const Codes& k, const int8_t* a) {
    for (int i = 0; i < L * 4; ++i) s.v[i / 4] += int32_t(Code(k.c.v[i])) * a[i % 4];
  }
  void add(const Codes& k, VB a) {
    for (int i = 0; i < L * 4; ++i) s.v[i / 4] += int32_t(Code(k.c.v[i])) * int8_t(a.v[i]);
  }
  VI total(int32_t) { return s; }
};
template <int>
struct Dot : DotScalar<uint8_t> {};
struct DotSigned : DotScalar<int8_t> {
  static DotSigned zero(VB) { return {}; }
};

inline DotSigned high_low(const DotSigned& hi, const DotSigned& lo) {
  DotSigned d;
  for (int i = 0; i < L; ++i) d.s.v[i] = 256 * hi.s.v[i] + lo.s.v[i];
  return d;
}

// 16 channels: the first eight in one sum, the others in the other.
struct TokenPair {
  static constexpr uint32_t kChannels = 16;
  const uint8_t *a, *b;
  TokenPair(const uint8_t* a, const uint8_t* b) : a(a), b(b) {}
  void add(const int16_t* weights, VI* acc) const {
    for (int i = 0; i < 16; ++i) acc[i / 8].v[i % 8] += int8_t(a[i]) * weights[0] + int8_t(b[i]) * weights[1];
  }
  static void store(const VI* acc, float unit, float* out) {
    vf_store(out, vf_mul_set1(vf_from_vi(acc[0]), unit));
    vf_store(out + 8, vf_mul_set1(vf_from_vi(acc[1]), unit));
  }
};

inline uint64_t above64(const int8_t* p, int limit) {
  uint64_t mask = 0;
  for (int i = 0; i < 64; ++i) mask |= uint64_t(p[i] > limit) << i;
  return mask;
}

#include "kernels_dot_wide.h"

#include "kernels_impl.h"

constexpr Kernels kTable = make_kernels(Isa::Scalar);

}  // namespace

const Kernels& kernels_scalar() { return kTable; }

}  // namespace edgert
