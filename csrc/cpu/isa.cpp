#include "cpu/isa.h"

#include <cstdlib>
#include <cstring>
#include <initializer_list>

namespace glow_kernels {
namespace {

Isa best() {
  // F16C is not checked: every processor with AVX2 has it, and not every compiler's builtin knows its name.
#ifdef GLOW_KERNELS_HAS_AVX512
  if (__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
      __builtin_cpu_supports("avx512vl")) {
    return Isa::avx512;
  }
#endif
#ifdef GLOW_KERNELS_HAS_AVX2
  if (__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")) return Isa::avx2;
#endif
  return Isa::baseline;
}

// An unknown name, or a set that the processor does not support, is ignored; native_isa() tells what was chosen.
Isa choose() {
  const char* wanted = std::getenv("GLOW_KERNELS_ISA");
  const Isa limit = best();
  if (wanted == nullptr) return limit;
  for (Isa isa : {Isa::baseline, Isa::avx2, Isa::avx512}) {
    if (isa <= limit && std::strcmp(wanted, isa_name(isa)) == 0) return isa;
  }
  return limit;
}

}  // namespace

Isa isa() {
  static const Isa chosen = choose();
  return chosen;
}

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::avx512:
      return "avx512";
    case Isa::avx2:
      return "avx2";
    default:
      return "baseline";
  }
}

}  // namespace glow_kernels
