#include "kernels.h"

namespace edgert {

const Kernels& kernels_for(Isa isa) {
  switch (isa) {
#if defined(__x86_64__) || defined(_M_X64)
    case Isa::Avx512Vnni: return kernels_avx512();
    case Isa::Avx2: return kernels_avx2();
#elif defined(__aarch64__)
    case Isa::Neon: return kernels_neon();
#endif
    default: return kernels_scalar();
  }
}

}  // namespace edgert
