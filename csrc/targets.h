// Compiles the kernels of an op once per instruction set.
//
// An op's .cpp defines SFGRPO_FILE as its own name and includes this file, which includes the .cpp
// again with SFGRPO_TARGET naming the namespace and SFGRPO_BYTES the width of a vector register.
// Standard and PyTorch headers come before (rows.h), so that nothing of theirs is compiled for an
// instruction set the processor may lack.
#if defined(__x86_64__)

#if defined(__clang__)
#pragma clang attribute push(__attribute__((target("avx512f,avx512bw,avx512dq,avx512vl,avx2"))), \
                             apply_to = function)
#else
#pragma GCC push_options
#pragma GCC target("avx512f,avx512bw,avx512dq,avx512vl,avx2,prefer-vector-width=512")
#endif
#define SFGRPO_TARGET avx512
#define SFGRPO_BYTES 64
#include SFGRPO_FILE
#undef SFGRPO_TARGET
#undef SFGRPO_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#pragma clang attribute push(__attribute__((target("avx2,f16c"))), apply_to = function)
#else
#pragma GCC pop_options
#pragma GCC push_options
#pragma GCC target("avx2,f16c")
#endif
#define SFGRPO_TARGET avx2
#define SFGRPO_BYTES 32
#include SFGRPO_FILE
#undef SFGRPO_TARGET
#undef SFGRPO_BYTES
#if defined(__clang__)
#pragma clang attribute pop
#else
#pragma GCC pop_options
#endif

#endif  // x86-64

// SSE2 on x86-64, NEON on aarch64, scalar code elsewhere.
#define SFGRPO_TARGET baseline
#define SFGRPO_BYTES 16
#include SFGRPO_FILE
#undef SFGRPO_TARGET
#undef SFGRPO_BYTES
