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

  NoiseRow(uint64_t seed, uint64_t sample, uint32_t step) {
    uint32_t k0 = static_cast<uint32_t>(seed), k1 = static_cast<uint32_t>(seed >> 32);
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

// Several vectors of counters in step: one alone would wait for its own multiplications.
template <int kSets>
SFGRPO_INLINE void philox(const VecW (&element)[kSets], const NoiseRow& row, Words (&c)[kSets]) {
  const VecW m0 = wide(0xD2511F53u), m1 = wide(0xCD9E8D57u);
#pragma GCC unroll 8
  for (int s = 0; s < kSets; ++s) {
    const VecW first = multiply(element[s], m0);
    const VecW product = multiply((first >> 32) ^ wide(row.first_c2), m1);
    c[s] = {(product >> 32) ^ wide(row.second_c0), product, first ^ wide(row.second_c2),
            wide(row.second_c3)};
  }
#pragma GCC unroll 8
  for (int round = 2; round < 10; ++round) {
    const VecW k0 = wide(row.key0[round]), k1 = wide(row.key1[round]);
#pragma GCC unroll 8
    for (int s = 0; s < kSets; ++s) {
      const VecW product0 = multiply(c[s].c0, m0), product1 = multiply(c[s].c2, m1);
      c[s] = {(product1 >> 32) ^ c[s].c1 ^ k0, product1, (product0 >> 32) ^ c[s].c3 ^ k1, product0};
    }
  }
}

// Words of the even and of the odd counters -> one vector of kWidth consecutive ones.
SFGRPO_INLINE VecU weave(VecW even, VecW odd) {
  return (VecU)((even & wide(0xFFFFFFFFu)) | (odd << 32));
}

// a b + c where a b is exact, so that fusing cannot change a bit: a power of two, or few digits.
SFGRPO_INLINE VecF exact_multiply_add(VecF a, float b, VecF c) {
#if SFGRPO_BYTES == 64
  return (VecF)_mm512_fmadd_ps((__m512)a, _mm512_set1_ps(b), (__m512)c);
#else
  return a * b + c;
#endif
}
SFGRPO_INLINE VecF exact_multiply_add(VecF a, float b, float c) {
  return exact_multiply_add(a, b, VecF{} + c);
}

SFGRPO_INLINE VecF convert(VecI value) { return __builtin_convertvector(value, VecF); }
SFGRPO_INLINE VecF uniform(VecU word) {
  return exact_multiply_add(__builtin_convertvector(word, VecF), 0x1p-32f, 0x1p-33f);
}

SFGRPO_INLINE VecF natural_log(VecF u) {
  const VecI bits = (VecI)u;
  const VecI exponent = (bits - 0x3F3504F3) >> 23;
  const VecF f = (VecF)(bits - (exponent << 23)) - 1.0f;
  const VecF e = convert(exponent);
  const VecF z = f * f;
  VecF y = 7.0376836292e-2f * f + -1.1514610310e-1f;
  y = y * f + 1.1676998740e-1f;
  y = y * f + -1.2420140846e-1f;
  y = y * f + 1.4249322787e-1f;
  y = y * f + -1.6668057665e-1f;
  y = y * f + 2.0000714765e-1f;
  y = y * f + -2.4999993993e-1f;
  y = y * f + 3.3333331174e-1f;
  y = y * f * z;
  y = y + e * -2.12194440e-4f;
  y = exact_multiply_add(z, -0.5f, y);
  return exact_multiply_add(e, 0.693359375f, f + y);  // 6 bits times 9 bits
}

// radius cos(2 pi u) and radius sin(2 pi u).
SFGRPO_INLINE void polar(VecF radius, VecF u, VecF& z_cos, VecF& z_sin) {
  const VecI quarter =
      __builtin_convertvector(exact_multiply_add(u, 4.0f, 0.5f), VecI);  // floor: never negative
  const VecF theta = exact_multiply_add(convert(quarter), -0.25f, u) * 6.2831855f;
  const VecF z = theta * theta;
  const VecF s =
      ((-1.9515295891e-4f * z + 8.3321608736e-3f) * z + -1.6666654611e-1f) * z * theta + theta;
  VecF c = (2.443315711809948e-5f * z + -1.388731625493765e-3f) * z + 4.166664568298827e-2f;
  c = exact_multiply_add(z, -0.5f, c * z * z) + 1.0f;
  const VecI odd = (quarter & 1) != 0;
  const VecF cos = odd ? s : c, sin = odd ? c : s;
  const VecI sign_cos = (quarter + 1) << 30 & INT32_MIN, sign_sin = quarter << 30 & INT32_MIN;
  z_cos = radius * (VecF)((VecI)cos ^ sign_cos);
  z_sin = radius * (VecF)((VecI)sin ^ sign_sin);
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
// ten rounds, a logarithm and a square root is more than the processor can look ahead.
inline void fill_normals(const NoiseRow& row, int64_t offset, int count, float* out,
                         const Lookahead& ahead = {}) {
  constexpr int kGroup = 4 * kWidth;
  VecU lane;
  for (int i = 0; i < kWidth; ++i) lane[i] = static_cast<uint32_t>(i);
  VecU element = lane + static_cast<uint32_t>(offset / 4);
  for (int i = 0; i < count; i += 2 * kGroup, element += 2 * kWidth) {
    ahead.elements(i, 2 * kGroup);
    const VecU next = element + kWidth;
    Words c[4];
    philox({(VecW)element, (VecW)element >> 32, (VecW)next, (VecW)next >> 32}, row, c);
#pragma GCC unroll 2
    for (int j = 0; j < 2; ++j) {
      const Words &even = c[2 * j], &odd = c[2 * j + 1];
      const VecU words[4] = {weave(even.c0, odd.c0), weave(even.c1, odd.c1),
                             weave(even.c2, odd.c2), weave(even.c3, odd.c3)};
      __builtin_memcpy(out + i + j * kGroup, words, sizeof(words));
    }
  }
  for (int i = 0; i < count; i += kGroup) {
    VecU words[4];
    __builtin_memcpy(words, out + i, sizeof(words));
    VecF z0, z1, z2, z3;
    polar(sqrt(-2.0f * natural_log(uniform(words[0]))), uniform(words[1]), z0, z1);
    polar(sqrt(-2.0f * natural_log(uniform(words[2]))), uniform(words[3]), z2, z3);
    VecF even_low, even_high, odd_low, odd_high, result[4];
    interleave(z0, z2, even_low, even_high);
    interleave(z1, z3, odd_low, odd_high);
    interleave(even_low, odd_low, result[0], result[1]);
    interleave(even_high, odd_high, result[2], result[3]);
    __builtin_memcpy(out + i, result, sizeof(result));
  }
}

}  // namespace sfgrpo::SFGRPO_TARGET
