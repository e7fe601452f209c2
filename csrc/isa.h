// Host side: the instruction set that the kernels run on, and what it can do.
#pragma once

#include <cstdlib>
#include <cstring>

#if defined(__x86_64__)
#include <cpuid.h>
#include <immintrin.h>
#elif defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace sfgrpo {

enum class Isa { baseline, avx2, avx512 };

#if defined(__x86_64__)
// Conversion of half precision, which __builtin_cpu_supports does not know in every compiler.
inline bool has_f16c() {
  unsigned eax, ebx, ecx, edx;
  return __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx & bit_F16C) != 0;
}
#endif

// The best instruction set of this processor, lowered by PyTorch's own ATEN_CPU_CAPABILITY.
inline Isa instruction_set() {
#if defined(__x86_64__)
  static const Isa chosen = [] {
    const char* limit = std::getenv("ATEN_CPU_CAPABILITY");
    const auto allowed = [&](const char* names) {
      return limit == nullptr || std::strstr(names, limit) != nullptr;
    };
    if (allowed("avx512") && __builtin_cpu_supports("avx512f") &&
        __builtin_cpu_supports("avx512bw") && __builtin_cpu_supports("avx512dq") &&
        __builtin_cpu_supports("avx512vl"))
      return Isa::avx512;
    if (allowed("avx512 avx2") && __builtin_cpu_supports("avx2") && has_f16c()) return Isa::avx2;
    return Isa::baseline;
  }();
  return chosen;
#else
  return Isa::baseline;
#endif
}

#if defined(__x86_64__)
#define SFGRPO_SELECT(...)                                              \
  (instruction_set() == Isa::avx512 ? &avx512::__VA_ARGS__              \
   : instruction_set() == Isa::avx2 ? &avx2::__VA_ARGS__                \
                                    : &baseline::__VA_ARGS__)
#else
#define SFGRPO_SELECT(...) (&baseline::__VA_ARGS__)
#endif

// Whether results may be written past the caches, and what must be done before others read them.
#if defined(__x86_64__)
constexpr bool kStreams = true;
inline void finish_streams() { _mm_sfence(); }
#else
constexpr bool kStreams = false;
inline void finish_streams() {}
#endif

}  // namespace sfgrpo
