// Instructions for the rest of a source file: QK_TARGET("avx2,fma"), after all headers that are
// shared with other files. A function of a shared header that is compiled with them might be the
// one that the linker keeps, and would then crash older machines.

#pragma once

#define QK_PRAGMA(text) _Pragma(#text)
#if defined(__clang__)
#define QK_TARGET(names) \
  QK_PRAGMA(clang attribute push(__attribute__((target(names))), apply_to = function))
#define QK_TARGET_END QK_PRAGMA(clang attribute pop)
#else
#define QK_TARGET(names) QK_PRAGMA(GCC target(names))
#define QK_TARGET_END
#endif

// Loops over arrays of registers must be unrolled whole for these to be registers.
#define QK_UNROLL QK_PRAGMA(GCC unroll 16)
#define QK_INLINE inline __attribute__((always_inline))
#define QK_LAMBDA_INLINE __attribute__((always_inline))

// Asks for the line that holds `p`, which need not be an address of anything: into the L1 cache,
// for what is read soon, or into the L2 cache, which can wait for more lines at once.
#define QK_PREFETCH(p) __builtin_prefetch(p)
#define QK_PREFETCH_FAR(p) __builtin_prefetch(p, 0, 2)
