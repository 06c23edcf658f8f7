// DotWide of kernels_impl.h as two sums of int8, for ISA levels where that is as good as it gets. They define
// DotSigned and high_low(hi, lo), the sum 256 * hi + lo, before including this file.
struct DotWide {
  using Codes = DotSigned::Codes;
  DotSigned hi, lo;
  static void pack(const int8_t* hi, const int8_t* lo, int8_t* quad) {
    std::memcpy(quad, hi, 4);
    std::memcpy(quad + 4, lo, 4);
  }
  [[gnu::always_inline]] void add(const Codes& k, const int8_t* quad) {
    hi.add(k, quad);
    lo.add(k, quad + 4);
  }
  [[gnu::always_inline]] VI total(int32_t sum) { return high_low(hi, lo).total(sum); }

  struct Row {
    VB hi, lo;
    DotSigned zero;
    Row(const int8_t* hi, const int8_t* lo)
        : hi(vb_load(reinterpret_cast<const uint8_t*>(hi))),
          lo(vb_load(reinterpret_cast<const uint8_t*>(lo))),
          zero(high_low(DotSigned::zero(this->hi), DotSigned::zero(this->lo))) {}
  };
  [[gnu::always_inline]] static VI lanes(const Codes& k, const Row& r) {
    DotSigned high, low = r.zero;
    high.add(k, r.hi);
    low.add(k, r.lo);
    return high_low(high, low).total(0);
  }
};
