// Host side, shared by every op: tensors as rows of blocks.
//
// A row (D elements) is cut into blocks of kBlock elements whatever the batch and the number of
// threads; a block is the unit of work and of summation, and a row's partial sums are added in
// order.  Hence results do not depend, not even in the last bit, on threads or on batch splits.
#pragma once

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <memory>
#include <string>
#include <tuple>
#include <vector>

#include "isa.h"
#include "tensors.h"

namespace sfgrpo {

// Five float32 buffers of a block fit the smallest L1 cache in use; a multiple of 64, the number
// of normals that one round of the generator makes.
constexpr int kBlock = 1024;
// Bytes from which on a result is written past the caches: none would keep it until it is read, and
// the lines that it overwrites need not be fetched.
constexpr int64_t kStreamed = int64_t{12} << 20;
constexpr double kHalfLog2Pi = 0.91893853320467274178;

// A kernel takes one struct of operands, which declares its fields in the schema's order, as does
// its tie(); Unpacked<kernel>::call takes them one by one, which is what the dispatcher needs.
template <class Result, class Operands>
Operands operands_of(Result (*)(const Operands&));
template <auto kernel, class Fields = decltype(operands_of(kernel).tie())>
struct Unpacked;
template <auto kernel, class... Fields>
struct Unpacked<kernel, std::tuple<Fields&...>> {
  static auto call(Fields... fields) {
    return kernel(decltype(operands_of(kernel)){std::move(fields)...});
  }
};

// Inside of STABLE_TORCH_LIBRARY_IMPL: the kernel of the op of its name.
#define SFGRPO_OP(name) library.impl(#name, TORCH_BOX(&sfgrpo::Unpacked<&sfgrpo::name>::call))

// [rows, elements], each row in blocks; a task is one block, or several rows that fit one.
struct Shape {
  int64_t rows = 0, elements = 0, blocks = 0, rows_per_task = 1, tasks = 0;

  Shape(int64_t rows_, int64_t elements_)
      : rows(rows_), elements(elements_), blocks((elements_ + kBlock - 1) / kBlock) {
    if (blocks == 1) rows_per_task = kBlock / elements;
    tasks = blocks == 1 ? (rows + rows_per_task - 1) / rows_per_task : rows * blocks;
  }
  explicit Shape(const Tensor& x) : Shape(x.size(0), row_elements(x)) {}

  static int64_t row_elements(const Tensor& x) {
    int64_t product = 1;
    for (int64_t axis = 1; axis < x.dim(); ++axis) product *= x.size(axis);
    return product;
  }

  // What is read row by row: without a copy if each row is contiguous, however far apart they lie.
  Operand operand(const char* name, const Tensor& tensor, bool f64) const {
    check(name, tensor, f64);
    if (!contiguous_rows(tensor)) return dense(name, tensor, f64);
    Operand result;
    const int64_t stride = tensor.size(0) > 1 ? tensor.stride(0) : elements;
    result.array = {tensor.data_ptr(), type_of(name, tensor), stride};
    return result;
  }
  Operand operand(const char* name, const Optional& tensor, bool f64) const {
    return tensor ? operand(name, *tensor, f64) : Operand();
  }

  // What is written, too: contiguous altogether.
  Operand dense(const char* name, const Tensor& tensor, bool f64) const {
    check(name, tensor, f64);
    Operand result(name, tensor);
    result.array.stride = elements;
    return result;
  }
  Operand dense(const char* name, const Optional& tensor, bool f64) const {
    return tensor ? dense(name, *tensor, f64) : Operand();
  }

  // A new tensor that is written, in one piece.
  Array result(const Tensor& tensor) const {
    Array array = Operand("result", tensor).array;
    array.stride = elements;
    array.streamed = kStreams && array.type == Type::f32 && blocks > 1 &&
                     rows * elements * int64_t{sizeof(float)} >= kStreamed;
    return array;
  }
  // One that is there only if asked for, [0] otherwise; `array` points at its data.
  Tensor optional_result(bool wanted, const Tensor& like, ScalarType type, Array& array) const {
    if (!wanted) return new_empty(like, {0}, type);
    const Tensor made = empty_as(like, type);
    array = result(made);
    return made;
  }

 private:
  // An op called behind the public function's back must not read out of bounds.
  void check(const char* name, const Tensor& tensor, bool f64) const {
    if (tensor.numel() != rows * elements)
      fail(std::string(name) + ": expected as many elements as x");
    if ((tensor.scalar_type() == ScalarType::Double) != f64)
      fail(std::string(name) + ": expected float64 in all tensors or in none");
  }

  // As many rows as x, and none with a gap.
  bool contiguous_rows(const Tensor& tensor) const {
    if (tensor.dim() == 0 || tensor.size(0) != rows) return false;
    int64_t expected = 1;
    for (int64_t axis = tensor.dim() - 1; axis > 0; --axis) {
      if (tensor.size(axis) != 1 && tensor.stride(axis) != expected) return false;
      expected *= tensor.size(axis);
    }
    return true;
  }
};

// What a task covers, contiguous in memory: a block of a long row, or whole short rows, so that
// what is done once per task is not done once per few elements.  Of up to `most` tasks, those that
// go on in the same long row are one tile.
struct Tile {
  int64_t row, offset, begin;  // the first row, offset within it, begin within the tensor
  int64_t sum;                 // where the partial sum of the first row stands
  int64_t tasks = 1;
  int rows, part, count;  // rows, elements of each, elements of all

  Tile(const Shape& shape, int64_t task, int64_t most = 1) {
    const int64_t each = shape.rows_per_task;
    row = shape.blocks > 1 ? task / shape.blocks : task * each;
    offset = shape.blocks > 1 ? (task - row * shape.blocks) * kBlock : 0;
    if (shape.blocks > 1) tasks = std::min(most, (row + 1) * shape.blocks - task);
    begin = row * shape.elements + offset;
    sum = shape.blocks > 1 ? task : row;
    rows = static_cast<int>(std::min(each, shape.rows - row));
    part = static_cast<int>(std::min<int64_t>(kBlock * tasks, shape.elements - offset));
    count = rows * part;
  }
};

// One number per row, in double: float64 or float32 tensors, [rows * columns].
inline std::vector<double> numbers(const char* name, const Tensor& tensor, int64_t expected) {
  if (tensor.numel() != expected) fail(std::string(name) + ": wrong number of elements");
  const Operand operand(name, tensor);
  const void* data = operand.array.data;
  switch (operand.array.type) {
    case Type::f32: {
      const float* values = static_cast<const float*>(data);
      return std::vector<double>(values, values + expected);
    }
    case Type::f64: {
      const double* values = static_cast<const double*>(data);
      return std::vector<double>(values, values + expected);
    }
    default: fail(std::string(name) + ": expected float32 or float64");
  }
}

// int64 [rows].
struct RowIds {
  Optional copy;
  const int64_t* data = nullptr;

  RowIds() = default;
  RowIds(const char* name, const Tensor& ids, int64_t rows) {
    if (ids.scalar_type() != ScalarType::Long || ids.numel() != rows)
      fail(std::string(name) + ": expected int64, one per row");
    if (!ids.is_contiguous()) copy = torch::stable::contiguous(ids);
    data = static_cast<const int64_t*>((copy ? *copy : ids).data_ptr());
  }
};

// Which noise the rows draw; owns the ids.  One step for all rows unless there are step_ids.
struct NoiseIds {
  std::optional<RowIds> samples, steps;
  uint64_t seed = 0;
  uint32_t step = 0;

  NoiseIds() = default;
  NoiseIds(int64_t seed_, const Tensor& sample_ids, int64_t step_, const Optional& step_ids,
           int64_t rows)
      : samples(RowIds("sample_ids", sample_ids, rows)),
        seed(static_cast<uint64_t>(seed_)),
        step(static_cast<uint32_t>(step_)) {
    if (step_ids) steps = RowIds("step_ids", *step_ids, rows);
  }
};

inline void store_number(const Array& array, int64_t index, double value) {
  if (array.type == Type::f64) static_cast<double*>(array.data)[index] = value;
  else static_cast<float*>(array.data)[index] = static_cast<float>(value);
}

struct Coefficients {
  double a, b, n, t;
};

template <class T>
std::vector<Coefficients> coefficients_from(const T* values, int64_t rows) {
  std::vector<Coefficients> result(rows);
  for (int64_t row = 0; row < rows; ++row, values += 4) {
    const double a = values[0], b = values[1], n = values[2], t = values[3];
    const bool finite = std::isfinite(a + b) && std::isfinite(n);
    if (!(finite && n >= 0 && t >= 0 && t <= 1))
      fail("coef: row " + std::to_string(row) + " is (a, b, n, t) = (" + std::to_string(a) + ", " +
           std::to_string(b) + ", " + std::to_string(n) + ", " + std::to_string(t) +
           "); expected finite values with n >= 0 and 0 <= t <= 1");
    result[row] = {a, b, n, t};
  }
  return result;
}

inline std::vector<Coefficients> coefficients(const Tensor& coef, int64_t rows) {
  if (coef.numel() != 4 * rows) fail("coef: wrong number of elements");
  const Operand operand("coef", coef);
  switch (operand.array.type) {
    case Type::f32: return coefficients_from(static_cast<const float*>(operand.array.data), rows);
    case Type::f64: return coefficients_from(static_cast<const double*>(operand.array.data), rows);
    default: fail("coef: expected float32 or float64");
  }
}

// A stored transition; owns the copies that contiguity may need.
struct Transition {
  Shape shape;
  bool f64;
  Operand x, v, x_next, v_uncond;
  std::vector<Coefficients> coef;
  double guidance;

  template <class Operands>
  explicit Transition(const Operands& o)
      : shape(o.x),
        f64(o.x.scalar_type() == ScalarType::Double),
        x(shape.operand("x", o.x, f64)),
        v(shape.operand("v", o.v, f64)),
        x_next(shape.operand("x_next", o.x_next, f64)),
        v_uncond(shape.operand("v_uncond", o.v_uncond, f64)),
        coef(coefficients(o.coef, shape.rows)),
        guidance(o.guidance) {}
};

inline double gaussian_logp(double mean_square, double n) {
  return -mean_square / (2 * n * n) - std::log(n) - kHalfLog2Pi;
}

// Partial sums of every block, added up row by row in order.
struct RowSums {
  int64_t blocks;
  std::unique_ptr<double[]> partial;

  explicit RowSums(const Shape& shape)
      : blocks(shape.blocks), partial(new double[std::max<int64_t>(shape.rows * blocks, 1)]) {}
  double total(int64_t row) const {
    double sum = 0;
    for (int64_t block = 0; block < blocks; ++block) sum += partial[row * blocks + block];
    return sum;
  }
};

// Elements worth handing to another thread: 15 microseconds of work or more, what waking it takes.
constexpr int64_t kGrainNoise = 16384, kGrainSums = 32768, kGrainCopy = 65536;

// Runs kernel(args, first task, last task) over all tasks on PyTorch's own threads.
template <class Args>
void for_tiles(const Shape& shape, int64_t grain, void (*kernel)(const Args&, int64_t, int64_t),
               const Args& args) {
  if (shape.tasks == 0) return;
  const int64_t task = std::max<int64_t>(1, shape.rows * shape.elements / shape.tasks);
  torch::stable::parallel_for(0, shape.tasks, std::max<int64_t>(1, grain / task),
                              [&](int64_t begin, int64_t end) {
                                kernel(args, begin, end);
                                finish_streams();
                              });
}

}  // namespace sfgrpo
