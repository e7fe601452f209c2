// Kernel side (included once per instruction set): Philox4x32-10 and Box-Muller.
//
// Every step, order and constant is that of sfgrpo/ops/philox.py, the specification; compiled
// without contraction into fused multiply-adds the bits are the same.  Lanes are counters.
namespace sfgrpo::SFGRPO_TARGET {

// What the counters of one row share, with the first two rounds done as far as they go without
// the element: there the step and the sample meet constants only.
struct NoiseRow {
  uint32_t key0[10], key1[10];
  uint64_t first_c2;                       // round 1: c2 = hi(M0 element) ^ this
  uint64_t second_c0, second_c2, second_c3;  // round 2: c0 = hi(M1 c2) ^ , c2 = lo(M0 element) ^

  NoiseRow(const NoiseIds& ids, int64_t row) {
    const uint64_t sample = static_cast<uint64_t>(ids.sample_ids[row]);
    const uint32_t step =
        ids.step_ids == nullptr ? ids.step : static_cast<uint32_t>(ids.step_ids[row]);
    uint32_t k0 = static_cast<uint32_t>(ids.seed), k1 = static_cast<uint32_t>(ids.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      key0[round] = k0;
      key1[round] = k1;
    }
    const uint64_t product1 = 0xCD9E8D57ull * static_cast<uint32_t>(sample);
    const uint64_t product0 = 0xD2511F53ull * (static_cast<uint32_t>(product1 >> 32) ^ step ^ key0[0]);
    first_c2 = (sample >> 32) ^ key1[0];
    second_c0 = static_cast<uint32_t>(product1) ^ key0[1];
    second_c2 = (product0 >> 32) ^ key1[1];
    second_c3 = static_cast<uint32_t>(product0);
  }
};

SFGRPO_INLINE VecW wide(uint64_t value) { return VecW{} + value; }

// One 32-bit word per 64-bit lane; the upper halves hold rubbish that products ignore.
struct Words {
  VecW c0, c1, c2, c3;
};

// The low or the high words of even and odd counters -> one vector of kWidth consecutive ones.
SFGRPO_INLINE VecU low_words(VecW even, VecW odd) {
#if SFGRPO_BYTES == 64
  return __builtin_shufflevector((VecU)even, (VecU)odd, 0, 16, 2, 18, 4, 20, 6, 22, 8, 24, 10, 26,
                                 12, 28, 14, 30);
#elif SFGRPO_BYTES == 32
  return __builtin_shufflevector((VecU)even, (VecU)odd, 0, 8, 2, 10, 4, 12, 6, 14);
#else
  return __builtin_shufflevector((VecU)even, (VecU)odd, 0, 4, 2, 6);
#endif
}
SFGRPO_INLINE VecU high_words(VecW even, VecW odd) {
#if SFGRPO_BYTES == 64
  return __builtin_shufflevector((VecU)even, (VecU)odd, 1, 17, 3, 19, 5, 21, 7, 23, 9, 25, 11, 27,
                                 13, 29, 15, 31);
#elif SFGRPO_BYTES == 32
  return __builtin_shufflevector((VecU)even, (VecU)odd, 1, 9, 3, 11, 5, 13, 7, 15);
#else
  return __builtin_shufflevector((VecU)even, (VecU)odd, 1, 5, 3, 7);
#endif
}

// The four words of 2 kWidth consecutive counters, 4 vectors for the first half, 4 for the second.
// Four vectors of 64-bit lanes go in step (even and odd counters of both halves): one alone would
// wait for its own multiplications.
SFGRPO_INLINE void philox(VecU counter, const NoiseRow& row, VecU (&words)[8]) {
  const VecW m0 = wide(0xD2511F53u), m1 = wide(0xCD9E8D57u);
  const VecU next = counter + kWidth;
  const VecW element[4] = {(VecW)counter, (VecW)counter >> 32, (VecW)next, (VecW)next >> 32};
  Words c[4];
#pragma GCC unroll 4
  for (int s = 0; s < 4; ++s) {
    const VecW first = multiply(element[s], m0);
    const VecW product = multiply((first >> 32) ^ wide(row.first_c2), m1);
    c[s] = {(product >> 32) ^ wide(row.second_c0), product, first ^ wide(row.second_c2),
            wide(row.second_c3)};
  }
#pragma GCC unroll 8
  for (int round = 2; round < 9; ++round) {
    const VecW k0 = wide(row.key0[round]), k1 = wide(row.key1[round]);
#pragma GCC unroll 4
    for (int s = 0; s < 4; ++s) {
      const VecW product0 = multiply(c[s].c0, m0), product1 = multiply(c[s].c2, m1);
      c[s] = {(product1 >> 32) ^ c[s].c1 ^ k0, product1, (product0 >> 32) ^ c[s].c3 ^ k1, product0};
    }
  }
  // The last round, in 32-bit lanes.
#pragma GCC unroll 2
  for (int half = 0; half < 2; ++half) {
    const Words &even = c[2 * half], &odd = c[2 * half + 1];
    const VecW even0 = multiply(even.c0, m0), even1 = multiply(even.c2, m1);
    const VecW odd0 = multiply(odd.c0, m0), odd1 = multiply(odd.c2, m1);
    VecU* out = words + 4 * half;
    out[0] = high_words(even1, odd1) ^ low_words(even.c1, odd.c1) ^ row.key0[9];
    out[1] = low_words(even1, odd1);
    out[2] = high_words(even0, odd0) ^ low_words(even.c3, odd.c3) ^ row.key1[9];
    out[3] = low_words(even0, odd0);
  }
}

// a b + c where a b is exact, so that fusing cannot change a bit: a power of two, or few digits.
SFGRPO_INLINE VecF exact_multiply_add(VecF a, float b, VecF c) {
#if SFGRPO_BYTES == 64
  return (VecF)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#else
  return a * b + c;
#endif
}
SFGRPO_INLINE VecF exact_multiply_subtract(VecF a, float b, VecF c) {
#if SFGRPO_BYTES == 64
  return (VecF)_mm512_fmsub_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#else
  return a * b - c;
#endif
}

SFGRPO_INLINE VecF uniform(VecU word) {
  return exact_multiply_add(__builtin_convertvector(word, VecF), 0x1p-32f, VecF{} + 0x1p-33f);
}

// Both halves of Box-Muller for kSets vectors in step, which hides the latency of their chains.
#define SFGRPO_EACH _Pragma("GCC unroll 8") for (int s = 0; s < kSets; ++s)

// sqrt(-2 ln u).  The specification's operations with powers of two moved where they are free:
// e stands for 2^23 e, and the polynomial and all after it are doubled; no rounding changes.
template <int kSets>
SFGRPO_INLINE void radius(const VecF (&u)[kSets], VecF (&r)[kSets]) {
  constexpr float kUlp = 0x1p-23f;
  constexpr float kPolynomial[] = {2 * -1.1514610310e-1f, 2 * 1.1676998740e-1f,
                                   2 * -1.2420140846e-1f, 2 * 1.4249322787e-1f,
                                   2 * -1.6668057665e-1f, 2 * 2.0000714765e-1f,
                                   2 * -2.4999993993e-1f, 2 * 3.3333331174e-1f};
  VecF e[kSets], f[kSets], y[kSets];
  SFGRPO_EACH {
    const VecI exponent = ((VecI)u[s] - 0x3F3504F3) & ~0x7FFFFF;
    e[s] = __builtin_convertvector(exponent, VecF);
    f[s] = (VecF)((VecI)u[s] - exponent) - 1.0f;
    y[s] = VecF{} + 2 * 7.0376836292e-2f;
  }
#pragma GCC unroll 8
  for (const float coefficient : kPolynomial) SFGRPO_EACH y[s] = y[s] * f[s] + coefficient;
  SFGRPO_EACH {
    const VecF z = f[s] * f[s];
    y[s] = y[s] * f[s] * z;
    y[s] = y[s] + e[s] * (2 * -2.12194440e-4f * kUlp);
    y[s] = y[s] - z;
  }
  SFGRPO_EACH {
    const VecF sum = exact_multiply_add(f[s], 2.0f, y[s]);
    // -2 ln 2's leading 9 bits times 6 bits.
    r[s] = sqrt(exact_multiply_subtract(e[s], -2 * 0.693359375f * kUlp, sum));
  }
}

// r cos(2 pi u) and r sin(2 pi u).
template <int kSets>
SFGRPO_INLINE void polar(const VecF (&r)[kSets], const VecF (&u)[kSets], VecF (&z_cos)[kSets],
                         VecF (&z_sin)[kSets]) {
  VecU turn[kSets];
  VecF theta[kSets], z[kSets], sine[kSets], cosine[kSets];
  SFGRPO_EACH {
    const VecI quarter = __builtin_convertvector(  // floor: never negative
        exact_multiply_add(u[s], 4.0f, VecF{} + 0.5f), VecI);
    const VecF whole = __builtin_convertvector(quarter, VecF);
    theta[s] = exact_multiply_add(whole, -0.25f, u[s]) * 6.2831855f;
    z[s] = theta[s] * theta[s];
    turn[s] = (VecU)quarter << 30;
  }
  SFGRPO_EACH sine[s] = -1.9515295891e-4f * z[s] + 8.3321608736e-3f;
  SFGRPO_EACH cosine[s] = 2.443315711809948e-5f * z[s] + -1.388731625493765e-3f;
  SFGRPO_EACH sine[s] = sine[s] * z[s] + -1.6666654611e-1f;
  SFGRPO_EACH cosine[s] = cosine[s] * z[s] + 4.166664568298827e-2f;
  SFGRPO_EACH sine[s] = sine[s] * z[s] * theta[s] + theta[s];
  SFGRPO_EACH cosine[s] = exact_multiply_add(z[s], -0.5f, cosine[s] * z[s] * z[s]) + 1.0f;
  SFGRPO_EACH {
    const VecI odd = (VecI)(turn[s] << 1) < 0;
    const VecF along = odd ? sine[s] : cosine[s], across = odd ? cosine[s] : sine[s];
    const VecU sign = VecU{} + 0x80000000u;
    z_cos[s] = r[s] * (VecF)((VecU)along ^ ((turn[s] + 0x40000000u) & sign));
    z_sin[s] = r[s] * (VecF)((VecU)across ^ (turn[s] & sign));
  }
}

// (a0 b0 a1 b1 ...): the lower, then the upper halves of both.
SFGRPO_INLINE void interleave(VecF a, VecF b, VecF& low, VecF& high) {
#if SFGRPO_BYTES == 64
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 2, 18, 3, 19, 4, 20, 5, 21, 6, 22, 7, 23);
  high = __builtin_shufflevector(a, b, 8, 24, 9, 25, 10, 26, 11, 27, 12, 28, 13, 29, 14, 30, 15, 31);
#elif SFGRPO_BYTES == 32
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 2, 10, 3, 11);
  high = __builtin_shufflevector(a, b, 4, 12, 5, 13, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

// `count` normals from element `offset` (a multiple of 4) on; fills whole groups of 4 kWidth.
// Two short loops over a block in the L1 cache instead of one long one: the latency of a chain of
// ten rounds, a logarithm and a square root is more than the processor can look ahead.  Memory
// that the block needs next is asked for all along, a little at a time.
inline void fill_normals(const NoiseRow& row, int64_t offset, int count, float* out,
                         const Lookahead& ahead = {}) {
  constexpr int kGroup = 4 * kWidth;
  VecU lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
  VecU element = lane + static_cast<uint32_t>(offset / 4);
  for (int i = 0; i < count; i += 2 * kGroup, element += 2 * kWidth) {
    ahead.elements(i / 2, kGroup);
    VecU words[8];
    philox(element, row, words);
#pragma GCC unroll 8
    for (int j = 0; j < 8; ++j) put(out + i + j * kWidth, words[j]);
  }
  constexpr int kSets = 4;
  for (int i = 0; i < count; i += kSets / 2 * kGroup) {
    ahead.elements((count + i) / 2, kSets * kWidth);
    VecF u[kSets], angle[kSets], r[kSets], z_cos[kSets], z_sin[kSets];
    SFGRPO_EACH {
      u[s] = uniform(vector_at<VecU>(out + i + 2 * s * kWidth));
      angle[s] = uniform(vector_at<VecU>(out + i + (2 * s + 1) * kWidth));
    }
    radius(u, r);
    polar(r, angle, z_cos, z_sin);
#pragma GCC unroll 4
    for (int s = 0; s < kSets; s += 2) {
      VecF even_low, even_high, odd_low, odd_high, first, second, third, fourth;
      interleave(z_cos[s], z_cos[s + 1], even_low, even_high);
      interleave(z_sin[s], z_sin[s + 1], odd_low, odd_high);
      interleave(even_low, odd_low, first, second);
      interleave(even_high, odd_high, third, fourth);
      float* group = out + i + s / 2 * kGroup;
      put(group, first);
      put(group + kWidth, second);
      put(group + 2 * kWidth, third);
      put(group + 3 * kWidth, fourth);
    }
  }
}

}  // namespace sfgrpo::SFGRPO_TARGET
