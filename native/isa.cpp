#include "isa.h"

#include <cstdint>
#include <cstdlib>

#include "error.h"

#if defined(__x86_64__)
#include <cpuid.h>
#elif defined(__aarch64__) && defined(__linux__)
#include <sys/auxv.h>
#endif

namespace edgert {
namespace {

#if defined(__x86_64__)
bool bit(uint32_t word, int n) { return (word >> n) & 1u; }

// XCR0 says which register files the OS saves on a context switch: a CPU may have AVX-512 and the
// kernel not. Inline assembly because the intrinsic would need -mxsave on this file.
uint64_t xcr0() {
  uint32_t lo, hi;
  __asm__ volatile("xgetbv" : "=a"(lo), "=d"(hi) : "c"(0));
  return (static_cast<uint64_t>(hi) << 32) | lo;
}

void append_levels(std::vector<Isa>& levels) {
  uint32_t a, b, c, d;
  if (!__get_cpuid(1, &a, &b, &c, &d)) return;
  const bool fma = bit(c, 12), osxsave = bit(c, 27), avx = bit(c, 28), f16c = bit(c, 29);
  if (!osxsave || !avx || !fma || !f16c) return;
  if (!__get_cpuid_count(7, 0, &a, &b, &c, &d)) return;
  const uint64_t os = xcr0();
  constexpr uint64_t kYmm = 0x06, kZmm = 0xE6;  // SSE+AVX state; the same and opmask, ZMM halves
  if (!bit(b, 5) || (os & kYmm) != kYmm) return;
  const bool avx512 = bit(b, 16) && bit(b, 17) && bit(b, 30) && bit(b, 31) && bit(c, 11);
  if (avx512 && (os & kZmm) == kZmm) levels.push_back(Isa::Avx512Vnni);
  levels.push_back(Isa::Avx2);
}
#elif defined(__aarch64__) && defined(__linux__)
void append_levels(std::vector<Isa>& levels) {
  // Bits of AT_HWCAP: ASIMD 1, ASIMDHP 10, ASIMDDP 20 (Linux arch/arm64 ABI).
  constexpr unsigned long kNeeded = (1ul << 1) | (1ul << 10) | (1ul << 20);
  if ((getauxval(AT_HWCAP) & kNeeded) == kNeeded) levels.push_back(Isa::Neon);
}
#elif defined(__aarch64__) && defined(__APPLE__)
// Every Apple Silicon Mac has dot product and fp16.
void append_levels(std::vector<Isa>& levels) { levels.push_back(Isa::Neon); }
#else
void append_levels(std::vector<Isa>&) {}
#endif

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::Avx512Vnni: return "avx512vnni";
    case Isa::Avx2: return "avx2";
    case Isa::Neon: return "neon";
    case Isa::Scalar: break;
  }
  return "scalar";
}

std::vector<Isa> isa_available() {
  std::vector<Isa> levels;
  append_levels(levels);
  levels.push_back(Isa::Scalar);
  return levels;
}

Isa isa_select() {
  const std::vector<Isa> levels = isa_available();
  const char* wanted = std::getenv("EDGERT_ISA");
  if (wanted == nullptr || *wanted == '\0') {
    if (levels.front() == Isa::Scalar)
      throw EngineError("this CPU, or the operating system on it, offers neither AVX2 with FMA and F16C nor NEON with "
                        "dot product: the native engine would be about a hundred times slower than it should. Use "
                        "another engine (--engine llamacpp), or set EDGERT_ISA=scalar to run the portable kernels all the same");
    return levels.front();
  }
  std::string names;
  for (Isa isa : levels) {
    if (std::string(wanted) == isa_name(isa)) return isa;
    if (!names.empty()) names += ", ";
    names += isa_name(isa);
  }
  throw EngineError("EDGERT_ISA is \"" + std::string(wanted) + "\", which this machine cannot run; it offers: " +
                    names + ". Set one of these, or unset EDGERT_ISA to take the best");
}

}  // namespace edgert
