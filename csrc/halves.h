// Kernel side (included once per instruction set): numbers of 16 bits, a vector at a time.
namespace sfgrpo::SFGRPO_TARGET {

// kWidth numbers in half precision and back, rounded to nearest even: by the processor where it
// can, else one by one by integer arithmetic (F. Giesen's conversions), which compilers vectorise.
#if SFGRPO_BYTES == 64
SFGRPO_INLINE VecF halves_at(const uint16_t* from) {
  return (VecF)_mm512_cvtph_ps(vector_at<__m256i>(from));
}
SFGRPO_INLINE void put_halves(uint16_t* to, VecF values) {
  put(to, _mm512_cvtps_ph((__m512)values, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC));
}
#elif SFGRPO_BYTES == 32
SFGRPO_INLINE VecF halves_at(const uint16_t* from) {
  return (VecF)_mm256_cvtph_ps(vector_at<__m128i>(from));
}
SFGRPO_INLINE void put_halves(uint16_t* to, VecF values) {
  put(to, _mm256_cvtps_ph((__m256)values, _MM_FROUND_TO_NEAREST_INT));
}
#elif defined(__aarch64__)
SFGRPO_INLINE VecF halves_at(const uint16_t* from) {
  return (VecF)vcvt_f32_f16(vector_at<float16x4_t>(from));
}
SFGRPO_INLINE void put_halves(uint16_t* to, VecF values) {
  put(to, vcvt_f16_f32((float32x4_t)values));
}
#else
SFGRPO_INLINE float from_half(uint16_t half) {
  constexpr uint32_t kExponent = 0x7c00u << 13;
  uint32_t bits = (half & 0x7fffu) << 13;
  const uint32_t exponent = bits & kExponent;
  bits += (127u - 15u) << 23;
  const uint32_t infinite = bits + ((128u - 16u) << 23);
  const float subnormal = bit_cast<float>(bits + (1u << 23)) - bit_cast<float>(113u << 23);
  bits = exponent == kExponent ? infinite : bits;
  bits = exponent == 0 ? bit_cast<uint32_t>(subnormal) : bits;
  return bit_cast<float>(bits | (half & 0x8000u) << 16);
}

SFGRPO_INLINE uint16_t to_half(float value) {
  constexpr uint32_t kInfinity = 255u << 23, kOverflow = (127u + 16u) << 23;
  constexpr uint32_t kMagic = ((127u - 15u) + (23u - 10u) + 1u) << 23;
  const uint32_t sign = bit_cast<uint32_t>(value) & 0x80000000u;
  const uint32_t bits = bit_cast<uint32_t>(value) ^ sign;
  const uint32_t special = bits > kInfinity ? 0x7e00u : 0x7c00u;
  const uint32_t subnormal =
      bit_cast<uint32_t>(bit_cast<float>(bits) + bit_cast<float>(kMagic)) - kMagic;
  const uint32_t normal = (bits + ((15u - 127u) << 23) + 0xfffu + ((bits >> 13) & 1u)) >> 13;
  uint32_t result = bits < (113u << 23) ? subnormal : normal;
  result = bits >= kOverflow ? special : result;
  return static_cast<uint16_t>(result | sign >> 16);
}

SFGRPO_INLINE VecF halves_at(const uint16_t* from) {
  VecF values;
  for (int i = 0; i < kWidth; ++i) values[i] = from_half(from[i]);
  return values;
}
SFGRPO_INLINE void put_halves(uint16_t* to, VecF values) {
  for (int i = 0; i < kWidth; ++i) to[i] = to_half(values[i]);
}
#endif

// The same of bfloat16, the upper half of a number in single precision.
SFGRPO_INLINE VecF bfloats_at(const uint16_t* from) {
  VecU bits;
  for (int i = 0; i < kWidth; ++i) bits[i] = static_cast<uint32_t>(from[i]) << 16;
  return (VecF)bits;
}
SFGRPO_INLINE void put_bfloats(uint16_t* to, VecF values) {
  const VecU bits = (VecU)values;
  const VecU rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
  const VecU words = values != values ? VecU{} + 0x7fc0u : rounded;
#if SFGRPO_BYTES == 64
  put(to, _mm512_cvtepi32_epi16((__m512i)words));
#elif SFGRPO_BYTES == 32
  put(to, _mm_packus_epi32(_mm256_castsi256_si128((__m256i)words),
                           _mm256_extracti128_si256((__m256i)words, 1)));
#else
  for (int i = 0; i < kWidth; ++i) to[i] = static_cast<uint16_t>(words[i]);
#endif
}

// `count` numbers into single precision, whole vectors at a time: the last ones through a part.
template <VecF (*at)(const uint16_t*)>
SFGRPO_INLINE void widen(const uint16_t* __restrict from, int count, float* __restrict to) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) put(to + i, at(from + i));
  if (i == count) return;
  uint16_t part[kWidth] = {};
  __builtin_memcpy(part, from + i, (count - i) * sizeof(uint16_t));
  const VecF values = at(part);
  __builtin_memcpy(to + i, &values, (count - i) * sizeof(float));
}
template <void (*put_at)(uint16_t*, VecF)>
SFGRPO_INLINE void narrow(const float* __restrict from, int count, uint16_t* __restrict to) {
  int i = 0;
  for (; i + kWidth <= count; i += kWidth) put_at(to + i, vector_at<VecF>(from + i));
  if (i == count) return;
  VecF values = {};
  uint16_t part[kWidth];
  __builtin_memcpy(&values, from + i, (count - i) * sizeof(float));
  put_at(part, values);
  __builtin_memcpy(to + i, part, (count - i) * sizeof(uint16_t));
}

}  // namespace sfgrpo::SFGRPO_TARGET
