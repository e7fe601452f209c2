// Included before a kernel's .cpp, which is then a program of its own: the kernels without PyTorch,
// for a processor that is emulated.  Operands are the same numbers everywhere; results are printed
// as hashes of their bits.
#pragma once

#include <cstdint>
#include <cstdio>
#include <vector>

#include <torch/csrc/stable/library.h>

// Nothing is registered, so nothing of PyTorch's is called.
#undef STABLE_TORCH_LIBRARY_IMPL
#define STABLE_TORCH_LIBRARY_IMPL(space, key, library) \
  template <class Library>                             \
  void unregistered(Library& library)

// Below a vector, several rows in a block, a block, and several blocks in a row.
constexpr int64_t kElements[] = {3, 8, 15, 56, 64, 511, 1000, 1024, 3000};
constexpr int64_t kRows = 40;

inline float number() {
  static uint32_t state = 1;
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) * 0x1p-30f;
}

inline std::vector<float> numbers(int64_t count) {
  std::vector<float> values(count);
  for (float& value : values) value = number();
  return values;
}

template <class T>
void show(const char* what, int64_t elements, const T* values, int64_t count) {
  uint64_t hash = 14695981039346656037u;  // FNV-1a
  const auto* bytes = reinterpret_cast<const unsigned char*>(values);
  for (size_t i = 0; i < count * sizeof(T); ++i) hash = (hash ^ bytes[i]) * 1099511628211u;
  std::printf("%s %d %016llx\n", what, static_cast<int>(elements),
              static_cast<unsigned long long>(hash));
}
