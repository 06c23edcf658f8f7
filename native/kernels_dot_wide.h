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
};
