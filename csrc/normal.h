// Kernel side (included once per instruction set): Philox4x32-10 and Box-Muller.
//
// Every step, order and constant is that of sfgrpo/ops/philox.py, the specification; compiled
// without contraction into fused multiply-adds the bits are the same.  Lanes are counters.
namespace sfgrpo::SFGRPO_TARGET {

// kSets vectors in step: one alone would wait for its own chain of operations.
#define SFGRPO_EACH _Pragma("GCC unroll 8") for (int s = 0; s < kSets; ++s)

constexpr uint64_t kMultiplier0 = 0xD2511F53u, kMultiplier1 = 0xCD9E8D57u;

// What the counters of one row share, with the first two rounds done as far as they go without
// the element: there the step and the sample meet constants only.  Keys and words stand in 64-bit
// lanes, ready to be broadcast from memory.
struct NoiseRow {
  int64_t row = -1;
  uint64_t key0[10], key1[10];
  uint64_t last_keys;                        // both of round 10, side by side
  uint64_t first_c2;                         // round 1: c2 = hi(M0 element) ^ this
  uint64_t second_c0, second_c2, second_c3;  // round 2: c0 = hi(M1 c2) ^ , c2 = lo(M0 element) ^

  // For all blocks of a row; where the row has not changed there is nothing to do.
  void move_to(const NoiseIds& ids, int64_t row_) {
    if (row == row_) return;
    row = row_;
    const uint64_t sample = static_cast<uint64_t>(ids.samples->data[row]);
    const uint32_t step = ids.steps ? static_cast<uint32_t>(ids.steps->data[row]) : ids.step;
    uint32_t k0 = static_cast<uint32_t>(ids.seed), k1 = static_cast<uint32_t>(ids.seed >> 32);
    for (int round = 0; round < 10; ++round, k0 += 0x9E3779B9u, k1 += 0xBB67AE85u) {
      key0[round] = k0;
      key1[round] = k1;
    }
    last_keys = key0[9] | key1[9] << 32;
    const uint64_t product1 = kMultiplier1 * static_cast<uint32_t>(sample);
    const uint64_t product0 =
        kMultiplier0 * static_cast<uint32_t>((product1 >> 32) ^ step ^ key0[0]);
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

// The low or the high halves of the lanes of two vectors, side by side.
SFGRPO_INLINE VecU low_words(VecW a, VecW b) {
#if SFGRPO_BYTES == 64  // cheaper than the general permutation that compilers choose
  return (VecU)_mm512_mask_shuffle_epi32((__m512i)a, 0xAAAA, (__m512i)b, _MM_PERM_CCAA);
#elif SFGRPO_BYTES == 32
  return __builtin_shufflevector((VecU)a, (VecU)b, 0, 8, 2, 10, 4, 12, 6, 14);
#else
  return __builtin_shufflevector((VecU)a, (VecU)b, 0, 4, 2, 6);
#endif
}
SFGRPO_INLINE VecU high_words(VecW a, VecW b) {
#if SFGRPO_BYTES == 64
  return (VecU)_mm512_mask_shuffle_epi32((__m512i)b, 0x5555, (__m512i)a, _MM_PERM_DDBB);
#elif SFGRPO_BYTES == 32
  return __builtin_shufflevector((VecU)a, (VecU)b, 1, 9, 3, 11, 5, 13, 7, 15);
#else
  return __builtin_shufflevector((VecU)a, (VecU)b, 1, 5, 3, 7);
#endif
}

// if_odd where the integer is odd, if_even elsewhere.
struct Odd {
#if SFGRPO_BYTES == 64
  __mmask16 mask;

  SFGRPO_INLINE explicit Odd(VecI number)
      : mask(_mm512_test_epi32_mask((__m512i)number, _mm512_set1_epi32(1))) {}
  SFGRPO_INLINE VecF choose(VecF if_odd, VecF if_even) const {
    return (VecF)_mm512_mask_blend_ps(mask, (__m512)if_even, (__m512)if_odd);
  }
#else
  VecI mask;

  SFGRPO_INLINE explicit Odd(VecI number) : mask((number & 1) != 0) {}
  SFGRPO_INLINE VecF choose(VecF if_odd, VecF if_even) const { return mask ? if_odd : if_even; }
#endif
};

// kSets vectors of counters in step, as one alone would wait for its own multiplications.  In:
// element times M0.  Out: words[2 s] the first and third words of a counter side by side (from
// which the radii come), words[2 s + 1] its second and fourth (the angles).
template <int kSets>
SFGRPO_INLINE void philox(const VecW (&first)[kSets], const NoiseRow& row,
                          VecU (&words)[2 * kSets]) {
  const VecW m0 = wide(kMultiplier0), m1 = wide(kMultiplier1);
  Words c[kSets];
  SFGRPO_EACH {
    const VecW product = multiply((first[s] >> 32) ^ wide(row.first_c2), m1);
    c[s] = {(product >> 32) ^ wide(row.second_c0), product, first[s] ^ wide(row.second_c2),
            wide(row.second_c3)};
  }
#pragma GCC unroll 8
  for (int round = 2; round < 9; ++round) {
    SFGRPO_EACH {
      const VecW product0 = multiply(c[s].c0, m0), product1 = multiply(c[s].c2, m1);
      c[s] = {(product1 >> 32) ^ c[s].c1 ^ wide(row.key0[round]), product1,
              (product0 >> 32) ^ c[s].c3 ^ wide(row.key1[round]), product0};
    }
  }
  SFGRPO_EACH {
    const VecW product0 = multiply(c[s].c0, m0), product1 = multiply(c[s].c2, m1);
    words[2 * s] = high_words(product1, product0) ^ low_words(c[s].c1, c[s].c3) ^
                   (VecU)wide(row.last_keys);
    words[2 * s + 1] = low_words(product1, product0);
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

// scale times the uniform number in (0, 1]; the scale is a power of two.
SFGRPO_INLINE VecF uniform(VecU word, float scale) {
  return exact_multiply_add(__builtin_convertvector(word, VecF), scale * 0x1p-32f,
                            VecF{} + scale * 0x1p-33f);
}

// Both halves of Box-Muller for kSets vectors in step, which hides the latency of their chains.

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

// r cos(2 pi u) and r sin(2 pi u), given 4 u: (c, s), (-s, c), (-c, -s), (s, -c) from quarter to
// quarter of the turn, so the second half is the first with -r.
template <int kSets>
SFGRPO_INLINE void polar(const VecF (&r)[kSets], const VecF (&u4)[kSets], VecF (&z_cos)[kSets],
                         VecF (&z_sin)[kSets]) {
  VecI quarter[kSets];
  VecF theta[kSets], z[kSets], sine[kSets], cosine[kSets];
  SFGRPO_EACH {
    quarter[s] = __builtin_convertvector(u4[s] + 0.5f, VecI);  // floor: never negative
    theta[s] = (u4[s] - __builtin_convertvector(quarter[s], VecF)) * (6.2831855f / 4);
    z[s] = theta[s] * theta[s];
  }
  SFGRPO_EACH sine[s] = -1.9515295891e-4f * z[s] + 8.3321608736e-3f;
  SFGRPO_EACH cosine[s] = 2.443315711809948e-5f * z[s] + -1.388731625493765e-3f;
  SFGRPO_EACH sine[s] = sine[s] * z[s] + -1.6666654611e-1f;
  SFGRPO_EACH cosine[s] = cosine[s] * z[s] + 4.166664568298827e-2f;
  SFGRPO_EACH sine[s] = sine[s] * z[s] * theta[s] + theta[s];
  SFGRPO_EACH cosine[s] = exact_multiply_add(z[s], -0.5f, cosine[s] * z[s] * z[s]) + 1.0f;
  SFGRPO_EACH {
    const VecU second_half = (VecU)quarter[s] << 30 & 0x80000000u;
    const VecF signed_r = (VecF)((VecU)r[s] ^ second_half);
    const Odd odd(quarter[s]);
    z_cos[s] = signed_r * odd.choose(-sine[s], cosine[s]);
    z_sin[s] = signed_r * odd.choose(cosine[s], sine[s]);
  }
}

// (a0 b0 a1 b1 ...) of the lower, then the upper halves of both, within each 128 bits.
SFGRPO_INLINE void interleave(VecF a, VecF b, VecF& low, VecF& high) {
#if SFGRPO_BYTES == 64
  low = __builtin_shufflevector(a, b, 0, 16, 1, 17, 4, 20, 5, 21, 8, 24, 9, 25, 12, 28, 13, 29);
  high = __builtin_shufflevector(a, b, 2, 18, 3, 19, 6, 22, 7, 23, 10, 26, 11, 27, 14, 30, 15, 31);
#elif SFGRPO_BYTES == 32
  low = __builtin_shufflevector(a, b, 0, 8, 1, 9, 4, 12, 5, 13);
  high = __builtin_shufflevector(a, b, 2, 10, 3, 11, 6, 14, 7, 15);
#else
  low = __builtin_shufflevector(a, b, 0, 4, 1, 5);
  high = __builtin_shufflevector(a, b, 2, 6, 3, 7);
#endif
}

constexpr int kPair = 2 * kWidth;  // normals from one vector of counters

// The two phases, each on kSets vectors of counters, in place.
template <int kSets>
SFGRPO_INLINE void fill_words(const NoiseRow& row, VecW& first, float* out) {
  VecW firsts[kSets];
  SFGRPO_EACH {
    firsts[s] = first;
    first += kWidth / 2 * kMultiplier0;
  }
  VecU words[2 * kSets];
  philox(firsts, row, words);
#pragma GCC unroll 16
  for (int j = 0; j < 2 * kSets; ++j) put(out + j * kWidth, words[j]);
}

template <int kSets>
SFGRPO_INLINE void words_to_normals(float* out) {
  VecF u[kSets], u4[kSets], r[kSets], z_cos[kSets], z_sin[kSets];
  SFGRPO_EACH {
    u[s] = uniform(vector_at<VecU>(out + s * kPair), 1.0f);
    u4[s] = uniform(vector_at<VecU>(out + s * kPair + kWidth), 4.0f);
  }
  radius(u, r);
  polar(r, u4, z_cos, z_sin);
  SFGRPO_EACH {
    VecF low, high;
    interleave(z_cos[s], z_sin[s], low, high);
    put(out + s * kPair, low);
    put(out + s * kPair + kWidth, high);
  }
}

// `count` normals from element `offset` (a multiple of 4) on; fills whole groups of 64.
// Two short loops over a block in the L1 cache instead of one long one: the latency of a chain of
// ten rounds, a logarithm and a square root is more than the processor can look ahead.  Memory
// that the block needs next is asked for all along, a little at a time.
inline void fill_normals(const NoiseRow& row, int64_t offset, int count, float* out,
                         const Lookahead& ahead = {}) {
  constexpr int kStep = 4 * kPair, kTail = 2 * kPair;
  VecW counter;  // in the order in which `interleave` brings them back
  for (int i = 0; i < kWidth / 2; ++i) counter[i] = offset / 4 + i % 2 * (kWidth / 4) + i / 2;
  VecW first = counter * kMultiplier0;
  int i = 0;
  for (; i + kStep <= count; i += kStep) {
    ahead.elements(i / 2, kStep / 2);
    fill_words<4>(row, first, out + i);
  }
  for (; i < count; i += kTail) fill_words<2>(row, first, out + i);
  for (i = 0; i + kStep <= count; i += kStep) {
    ahead.elements((count + i) / 2, kStep / 2);
    words_to_normals<4>(out + i);
  }
  for (; i < count; i += kTail) words_to_normals<2>(out + i);
}

constexpr int kNormals = kBlock + 64;  // with what the last group of a tile writes beyond its end

// The normals of all rows of a tile, in their order: each one's group ends in the next one's place.
inline void fill_tile(const NoiseIds& ids, const Tile& tile, NoiseRow& row, float* out,
                      const Lookahead& ahead = {}) {
  for (int r = 0, at = 0; r < tile.rows; ++r, at += tile.part) {
    row.move_to(ids, tile.row + r);
    fill_normals(row, tile.offset, tile.part, out + at, ahead);
  }
}

}  // namespace sfgrpo::SFGRPO_TARGET
