// Instruction-set levels: which ones this CPU *and* this operating system offer, and which to use.
#pragma once
#include <string>
#include <vector>

namespace edgert {

enum class Isa {
  Scalar,      // portable C++, always there
  Neon,        // AArch64 with asimd + asimddp (dot product) + asimdhp (fp16)
  Avx2,        // AVX2 + FMA + F16C
  Avx512Vnni,  // Avx2 and AVX-512 F, BW, VL, DQ, VNNI
};

// "scalar", "neon", "avx2", "avx512vnni": the names EDGERT_ISA takes.
const char* isa_name(Isa isa);

// Levels that run here, best first; Scalar is always the last.
std::vector<Isa> isa_available();

// The level named by the environment variable EDGERT_ISA, or the best one when it is unset or empty.
// Throws EngineError for a name that does not exist or that this machine cannot run, and on a machine
// that has only Scalar unless EDGERT_ISA asks for it: slowness of that size must not be a surprise.
Isa isa_select();

}  // namespace edgert
