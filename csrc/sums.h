// Kernel side (included once per instruction set): sums whose order does not depend on the width of
// a vector.
namespace sfgrpo::SFGRPO_TARGET {

template <class T>
struct Lanes {
  typedef T Vec __attribute__((vector_size(SFGRPO_BYTES)));
  static constexpr int kLanes = SFGRPO_BYTES / sizeof(T);
};

// A whole vector in memory.
template <class T>
struct Whole : Lanes<T> {
  using typename Lanes<T>::Vec;
  SFGRPO_INLINE Vec at(const T* from) const { return vector_at<Vec>(from); }
  SFGRPO_INLINE void put(T* to, Vec vec) const { sfgrpo::SFGRPO_TARGET::put(to, vec); }
};

// The first `count` lanes of one, if there are any; the others are 0 and stay in the register.
template <class T>
struct Part : Lanes<T> {
  using typename Lanes<T>::Vec;
  int count;
  SFGRPO_INLINE explicit Part(int count_)
      : count(std::max(0, std::min(count_, Lanes<T>::kLanes))) {}
#if SFGRPO_BYTES == 64
  SFGRPO_INLINE Vec at(const T* from) const {
    if constexpr (sizeof(T) == 4) return (Vec)_mm512_maskz_loadu_ps((1u << count) - 1, from);
    else return (Vec)_mm512_maskz_loadu_pd((1u << count) - 1, from);
  }
  SFGRPO_INLINE void put(T* to, Vec vec) const {
    if constexpr (sizeof(T) == 4) _mm512_mask_storeu_ps(to, (1u << count) - 1, (__m512)vec);
    else _mm512_mask_storeu_pd(to, (1u << count) - 1, (__m512d)vec);
  }
#else
  SFGRPO_INLINE Vec at(const T* from) const {
    if (count == Lanes<T>::kLanes) return vector_at<Vec>(from);
    Vec vec = {};
    for (int i = 0; i < count; ++i) vec[i] = from[i];
    return vec;
  }
  SFGRPO_INLINE void put(T* to, Vec vec) const {
    if (count == Lanes<T>::kLanes) return sfgrpo::SFGRPO_TARGET::put(to, vec);
    for (int i = 0; i < count; ++i) to[i] = vec[i];
  }
#endif
};

// Sum of term(k, lanes) over one block, a vector of terms from element k on, which reads memory
// through `lanes`.  Sixteen lanes in every instruction set, lane i taking the elements i mod 16,
// and one tree at the end: the order is part of the result.  To a sum, which is never -0, the
// zeros beyond the last element add nothing.
template <class T, class Term>
SFGRPO_INLINE double lane_sum(int count, Term term) {
  constexpr int kLanes = Lanes<T>::kLanes, kVecs = 16 / kLanes;
  typename Lanes<T>::Vec sums[kVecs] = {};
  int i = 0;
  for (; i + 16 <= count; i += 16)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j) sums[j] += term(i + j * kLanes, Whole<T>());
  if (i < count)
#pragma GCC unroll 8
    for (int j = 0; j < kVecs; ++j)
      sums[j] += term(i + j * kLanes, Part<T>(count - i - j * kLanes));
  T lanes[16];
  __builtin_memcpy(lanes, sums, sizeof(lanes));
  double tree[8];
#pragma GCC unroll 8
  for (int k = 0; k < 8; ++k)
    tree[k] = static_cast<double>(lanes[k]) + static_cast<double>(lanes[k + 8]);
#pragma GCC unroll 4
  for (int k = 0; k < 4; ++k) tree[k] += tree[k + 4];
  return (tree[0] + tree[2]) + (tree[1] + tree[3]);
}

// Sum of squared differences of one block.
template <class T>
inline double square_distance(const T* a, const T* b, int count) {
  return lane_sum<T>(count, [&](int k, auto lanes) {
    const auto difference = lanes.at(a + k) - lanes.at(b + k);
    return difference * difference;
  });
}

// Sum of (x_next - a x - b v)^2 of one block.
template <class T>
inline double residual_square(const Coefficients& coef, const T* x, const T* v, const T* x_next,
                              int count) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b);
  return lane_sum<T>(count, [&](int k, auto lanes) {
    const auto residual = lanes.at(x_next + k) - (a * lanes.at(x + k) + b * lanes.at(v + k));
    return residual * residual;
  });
}

}  // namespace sfgrpo::SFGRPO_TARGET
