// Kernel side (included once per instruction set): vectors of the compiler's own vector extension,
// tiles of the four element types, and what is computed element by element.
namespace sfgrpo::SFGRPO_TARGET {

#define SFGRPO_INLINE inline __attribute__((always_inline))

constexpr int kWidth = SFGRPO_BYTES / 4;
typedef float VecF __attribute__((vector_size(SFGRPO_BYTES)));
typedef int32_t VecI __attribute__((vector_size(SFGRPO_BYTES)));
typedef uint32_t VecU __attribute__((vector_size(SFGRPO_BYTES)));
typedef uint64_t VecW __attribute__((vector_size(SFGRPO_BYTES)));

// Square roots correctly rounded, and products of the low halves of 64-bit lanes.
#if SFGRPO_BYTES == 64
SFGRPO_INLINE VecF sqrt(VecF a) { return (VecF)_mm512_sqrt_ps((__m512)a); }
SFGRPO_INLINE VecW multiply(VecW a, VecW b) {
  return (VecW)_mm512_mul_epu32((__m512i)a, (__m512i)b);
}
#elif SFGRPO_BYTES == 32
SFGRPO_INLINE VecF sqrt(VecF a) { return (VecF)_mm256_sqrt_ps((__m256)a); }
SFGRPO_INLINE VecW multiply(VecW a, VecW b) {
  return (VecW)_mm256_mul_epu32((__m256i)a, (__m256i)b);
}
#elif defined(__x86_64__)
SFGRPO_INLINE VecF sqrt(VecF a) { return (VecF)_mm_sqrt_ps((__m128)a); }
SFGRPO_INLINE VecW multiply(VecW a, VecW b) {
  return (VecW)_mm_mul_epu32((__m128i)a, (__m128i)b);
}
#elif defined(__aarch64__)
SFGRPO_INLINE VecF sqrt(VecF a) { return (VecF)vsqrtq_f32((float32x4_t)a); }
SFGRPO_INLINE VecW multiply(VecW a, VecW b) {
  return (VecW)vmull_u32(vmovn_u64((uint64x2_t)a), vmovn_u64((uint64x2_t)b));
}
#else
SFGRPO_INLINE VecF sqrt(VecF a) {
  for (int i = 0; i < kWidth; ++i) a[i] = __builtin_sqrtf(a[i]);
  return a;
}
SFGRPO_INLINE VecW multiply(VecW a, VecW b) { return (a & 0xFFFFFFFFu) * (b & 0xFFFFFFFFu); }
#endif

// Before a loop whose results may take the place of its operands, element by element.
#if defined(__clang__)
#define SFGRPO_IN_PLACE _Pragma("clang loop vectorize(assume_safety)")
#else
#define SFGRPO_IN_PLACE _Pragma("GCC ivdep")
#endif

template <class To, class From>
SFGRPO_INLINE To bit_cast(From from) {
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// Unaligned vectors in memory, one at a time: GCC takes a copied array of vectors to pieces.
template <class Vec>
SFGRPO_INLINE Vec vector_at(const void* from) {
  Vec vec;
  __builtin_memcpy(&vec, from, sizeof(vec));
  return vec;
}
template <class Vec>
SFGRPO_INLINE void put(void* to, Vec vec) {
  __builtin_memcpy(to, &vec, sizeof(vec));
}

}  // namespace sfgrpo::SFGRPO_TARGET

#include "halves.h"

namespace sfgrpo::SFGRPO_TARGET {

// Memory that a block will need, asked for line by line while something else is computed: the
// hardware's own prefetchers stop at every page, and a burst of requests stalls.
struct Lookahead {
  static constexpr int kStreams = 4;
  const char* streams[kStreams];
  int sizes[kStreams];  // bytes per element, 0 where there is no stream
  int count = 0;

  SFGRPO_INLINE void add(const Array& array, const Tile& tile) {
    if (array.data == nullptr) return;
    const int64_t begin = tile.row * array.stride + tile.offset;
    sizes[count] = array.type == Type::f64 ? 8 : array.type == Type::f32 ? 4 : 2;
    streams[count] = static_cast<const char*>(array.data) + begin * sizes[count];
    ++count;
  }
  SFGRPO_INLINE void elements(int first, int number) const {
    for (int i = 0; i < count; ++i)
      for (int byte = 0; byte < number * sizes[i]; byte += 64)
        __builtin_prefetch(streams[i] + first * sizes[i] + byte);
  }
};

template <class T>
constexpr Type kType = sizeof(T) == 8 ? Type::f64 : Type::f32;

// `count` elements from `begin` on as T (float, or double for float64 tensors): the tensor's own
// memory where it holds T already, else converted into `scratch`.
template <class T>
inline const T* load(const Array& from, int64_t begin, int count, T* __restrict scratch) {
  if (from.type == kType<T>) return static_cast<const T*>(from.data) + begin;
  if (from.type == Type::f32) {  // noise beside float64 tensors
    const float* __restrict source = static_cast<const float*>(from.data) + begin;
    for (int i = 0; i < count; ++i) scratch[i] = static_cast<T>(source[i]);
    return scratch;
  }
  if constexpr (kType<T> == Type::f32) {  // beside float64 all are of 32 or 64 bits
    const uint16_t* source = static_cast<const uint16_t*>(from.data) + begin;
    from.type == Type::bf16 ? widen<bfloats_at>(source, count, scratch)
                            : widen<halves_at>(source, count, scratch);
  }
  return scratch;
}

// The rows of a tile, one behind the other: several that lie apart are gathered in `scratch`.
template <class T>
inline const T* load(const Array& from, const Tile& tile, T* scratch) {
  const int64_t begin = tile.row * from.stride + tile.offset;
  if (tile.rows == 1 || from.stride == tile.part) return load(from, begin, tile.count, scratch);
  for (int row = 0, at = 0; row < tile.rows; ++row, at += tile.part) {
    const T* loaded = load(from, begin + row * from.stride, tile.part, scratch + at);
    if (loaded != scratch + at) __builtin_memcpy(scratch + at, loaded, tile.part * sizeof(T));
  }
  return scratch;
}

// Whether kernels in T read and write the tensor's own memory, without a buffer between.
template <class T>
inline bool direct(const Array& array) {
  return array.type == kType<T> && !array.streamed;
}

// Where to compute results for `to`: there if that is direct, else in `scratch`.
template <class T>
inline T* target(const Array& to, int64_t begin, T* scratch) {
  return direct<T>(to) ? static_cast<T*>(to.data) + begin : scratch;
}

// Past the caches, a whole vector at a time where the memory is aligned.
inline void stream(const float* __restrict from, int count, float* __restrict to) {
  int i = 0;
  for (; i < count && reinterpret_cast<uintptr_t>(to + i) % SFGRPO_BYTES != 0; ++i) to[i] = from[i];
  for (; i + kWidth <= count; i += kWidth) {
    const VecF vec = vector_at<VecF>(from + i);
#if SFGRPO_BYTES == 64
    _mm512_stream_ps(to + i, (__m512)vec);
#elif SFGRPO_BYTES == 32
    _mm256_stream_ps(to + i, (__m256)vec);
#elif defined(__x86_64__)
    _mm_stream_ps(to + i, (__m128)vec);
#else
    put(to + i, vec);
#endif
  }
  for (; i < count; ++i) to[i] = from[i];
}

// What was computed in `scratch` to where it belongs; nothing to do where that was no detour.
template <class T>
inline void store(const Array& to, int64_t begin, int count, const T* __restrict scratch) {
  if (direct<T>(to)) return;
  if constexpr (kType<T> == Type::f32) {
    if (to.streamed) return stream(scratch, count, static_cast<float*>(to.data) + begin);
    uint16_t* destination = static_cast<uint16_t*>(to.data) + begin;
    to.type == Type::bf16 ? narrow<put_bfloats>(scratch, count, destination)
                          : narrow<put_halves>(scratch, count, destination);
  }
}

// v_uncond + w (v - v_uncond), or v itself without v_uncond; buffers hold one tile each.
template <class T>
inline const T* velocity(const Array& v, const Array& v_uncond, double guidance, const Tile& tile,
                         T* __restrict scratch, T* __restrict scratch_uncond) {
  const T* cond = load(v, tile, scratch);
  if (v_uncond.data == nullptr) return cond;
  const T* uncond = load(v_uncond, tile, scratch_uncond);
  const T w = static_cast<T>(guidance);
  for (int i = 0; i < tile.count; ++i) scratch[i] = uncond[i] + w * (cond[i] - uncond[i]);
  return scratch;
}

// Mean of the transition, a x + b v; may take the place of either.
template <class T>
inline void transition_mean(const Coefficients& coef, const T* x, const T* v, int count, T* mean) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b);
  SFGRPO_IN_PLACE for (int i = 0; i < count; ++i) mean[i] = a * x[i] + b * v[i];
}

// factor * (x_next - a x - b v); may take the place of any of them.
template <class T>
inline void scaled_residual(const Coefficients& coef, const T* x, const T* v, const T* x_next,
                            int count, double factor, T* out) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b), scale = static_cast<T>(factor);
  SFGRPO_IN_PLACE for (int i = 0; i < count; ++i)
    out[i] = scale * (x_next[i] - (a * x[i] + b * v[i]));
}

// Clean estimate x - t v; may take the place of either.
template <class T>
inline void clean(const T* x, const T* v, int count, double time, T* x0_hat) {
  const T t = static_cast<T>(time);
  SFGRPO_IN_PLACE for (int i = 0; i < count; ++i) x0_hat[i] = x[i] - t * v[i];
}

// factor * values into a tensor, where the tensor is wanted.
template <class T>
inline void store_scaled(const Array& to, int64_t begin, int count, double factor,
                         const T* __restrict values, T* scratch) {
  if (to.data == nullptr) return;
  T* __restrict out = target(to, begin, scratch);
  const T scale = static_cast<T>(factor);
  for (int i = 0; i < count; ++i) out[i] = scale * values[i];
  store(to, begin, count, out);
}

}  // namespace sfgrpo::SFGRPO_TARGET
