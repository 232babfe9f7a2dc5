#include "cpu/isa.h"

#include <atomic>
#include <cstdlib>
#include <cstring>

namespace cuda_cnn::cpu {
namespace {

constexpr const char* kNames[] = {"baseline", "avx2", "avx512", "avx512_bf16"};
constexpr Isa kAll[] = {Isa::kAvx512Bf16, Isa::kAvx512, Isa::kAvx2, Isa::kBaseline};

bool detect(Isa isa) {
  if (isa == Isa::kBaseline) return true;
#if defined(CUDA_CNN_X86_VARIANTS)
  __builtin_cpu_init();
  // Every processor with AVX2 has F16C, too, which clang cannot ask for before its version 15.
  const bool avx2 =
      __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") && __builtin_cpu_supports("bmi2");
  if (isa == Isa::kAvx2) return avx2;
#if defined(CUDA_CNN_EMULATE_AVX512)
  return avx2;
#endif
  const bool avx512 = avx2 && __builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                      __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq");
  return isa == Isa::kAvx512 ? avx512 : avx512 && __builtin_cpu_supports("avx512bf16");
#else
  return false;
#endif
}

// An unknown or unavailable name in the environment falls back to the best; `python -m cuda_cnn env` shows
// it.
Isa choose() {
  if (const char* wanted = std::getenv("CUDA_CNN_CPU_ISA")) {
    for (Isa isa : kAll) {
      if (std::strcmp(wanted, isa_name(isa)) == 0 && detect(isa)) return isa;
    }
  }
  for (Isa isa : kAll) {
    if (detect(isa)) return isa;
  }
  return Isa::kBaseline;
}

std::atomic<Isa>& current() {
  static std::atomic<Isa> isa{choose()};
  return isa;
}

}  // namespace

Isa isa() { return current().load(std::memory_order_relaxed); }

const char* isa_name(Isa isa) { return kNames[static_cast<int>(isa)]; }

bool isa_available(Isa isa) { return detect(isa); }

bool set_isa(Isa isa) {
  if (!detect(isa)) return false;
  current().store(isa, std::memory_order_relaxed);
  return true;
}

}  // namespace cuda_cnn::cpu
