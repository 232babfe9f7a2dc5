// Instruction sets. A kernel file of csrc/cpu is compiled once for each, in namespace cpu::CUDA_CNN_ISA;
// CUDA_CNN_CPU_KERNEL declares the variants and the function that calls the one this machine is to use.
//
// A kernel file holds no inline function of anybody else's (STL, ATen): the linker keeps one copy of those
// for the whole binary, and an AVX-512 copy would end an older machine with SIGILL.
#pragma once

namespace cuda_cnn::cpu {

// kAvx512Bf16 has the kernels of kAvx512, and conv2d's also multiply bfloat16 in pairs: see
// multiplies_pairs().
enum class Isa : int { kBaseline, kAvx2, kAvx512, kAvx512Bf16 };

// The best that both the build and this processor have, or what CUDA_CNN_CPU_ISA names. Chosen once.
Isa isa();
const char* isa_name(Isa isa);
// Whether the build holds this variant and the processor can run it.
bool isa_available(Isa isa);
// For tests: an unavailable one is refused with false.
bool set_isa(Isa isa);

// Whether there is an instruction that adds two products of bfloat16 to each float (AVX512-BF16).
inline bool multiplies_pairs() { return isa() == Isa::kAvx512Bf16; }

}  // namespace cuda_cnn::cpu

#if defined(CUDA_CNN_X86_VARIANTS)
#define CUDA_CNN_CPU_KERNEL(name, Params)                                                            \
  namespace cuda_cnn::cpu {                                                                          \
  namespace baseline {                                                                               \
  void name(const Params&);                                                                          \
  }                                                                                                  \
  namespace avx2 {                                                                                   \
  void name(const Params&);                                                                          \
  }                                                                                                  \
  namespace avx512 {                                                                                 \
  void name(const Params&);                                                                          \
  }                                                                                                  \
  inline void name(const Params& params) {                                                           \
    static constexpr void (*kVariants[])(const Params&) = {baseline::name, avx2::name, avx512::name, \
                                                           avx512::name};                            \
    kVariants[static_cast<int>(isa())](params);                                                      \
  }                                                                                                  \
  }
#else
#define CUDA_CNN_CPU_KERNEL(name, Params)                            \
  namespace cuda_cnn::cpu {                                          \
  namespace baseline {                                               \
  void name(const Params&);                                          \
  }                                                                  \
  inline void name(const Params& params) { baseline::name(params); } \
  }
#endif
