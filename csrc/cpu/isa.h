#pragma once

namespace glow_kernels {

// Instruction sets that csrc/cpu/kernels is compiled for, each a superset of those before it.
enum class Isa { baseline, avx2, avx512 };

// The instruction set in use: the best that this build has and this processor supports, or a lower one that the
// environment variable GLOW_KERNELS_ISA names. Chosen at the first call.
Isa isa();

const char* isa_name(Isa isa);

}  // namespace glow_kernels
