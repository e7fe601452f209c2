// Tensors as kernels see them: a pointer, a type, and what owns the memory.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>
#include <string>

#include <torch/csrc/inductor/aoti_torch/generated/c_shim_aten.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

namespace sfgrpo {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using Optional = std::optional<Tensor>;

enum class Type : int { f32, f64, bf16, f16 };

// Rows of one of the four types, each contiguous; null where an optional tensor is absent.
struct Array {
  void* data = nullptr;
  Type type = Type::f32;
  int64_t stride = 0;  // from row to row, in elements; no matter to what is contiguous altogether
  bool streamed = false;  // written past the caches
};

[[noreturn]] inline void fail(const std::string& message) { throw std::runtime_error(message); }

inline Type type_of(const char* name, const Tensor& tensor) {
  switch (tensor.scalar_type()) {
    case ScalarType::Float: return Type::f32;
    case ScalarType::Double: return Type::f64;
    case ScalarType::BFloat16: return Type::bf16;
    case ScalarType::Half: return Type::f16;
    default: fail(std::string(name) + ": expected float32, float64, bfloat16 or float16");
  }
}

// A contiguous operand: the tensor's own memory, or a copy if there is none in one piece.
struct Operand {
  Optional copy;
  Array array;

  Operand() = default;
  Operand(const char* name, const Tensor& source)
      : copy(source.is_contiguous() ? Optional() : torch::stable::contiguous(source)),
        array{(copy ? *copy : source).data_ptr(), type_of(name, source)} {}

  // After the operand was overwritten: back into the tensor it was copied from, if it was.
  void write_back(Tensor source) const {
    if (copy) torch::stable::copy_(source, *copy);
  }
};

// Beside `like`, not initialised.  torch::stable::new_empty asks the dispatcher for the operator by
// its name in every call, which takes twice as long as a small kernel.
inline Tensor new_empty(const Tensor& like, torch::headeronly::IntHeaderOnlyArrayRef sizes,
                        ScalarType type) {
  int32_t dtype = torch::stable::detail::to<int32_t>(torch::stable::detail::from(type));
  AtenTensorHandle made = nullptr;
  STABLE_TORCH_ERROR_CODE_CHECK(aoti_torch_aten_new_empty(
      like.get(), sizes.data(), static_cast<int64_t>(sizes.size()), &dtype, nullptr, nullptr, 0,
      nullptr, &made));
  return Tensor(made);
}
inline Tensor empty_as(const Tensor& like, ScalarType type) {
  return new_empty(like, like.sizes(), type);
}
inline Tensor empty_as(const Tensor& like) { return empty_as(like, like.scalar_type()); }


}  // namespace sfgrpo
