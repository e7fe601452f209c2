// Log-density of a stored transition, and its closed-form gradient, each in one pass.
// Equations, schemas and specification: sfgrpo/ops/sde_logprob.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct LogprobArgs {
  Shape shape;
  Array x, v, x_next, v_uncond;
  const Coefficients* coef;
  double guidance;
  double* square_sums = nullptr;  // forward
  Array mean;                     // likewise; null where it is not asked for
  const double* scale = nullptr;  // backward: dlogp/dmean of a row is scale (x_next - mean)
  Array grad_mean;                // null where there is none
  Array grad_x, grad_v, grad_x_next, grad_v_uncond;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "sde_logprob.cpp"
#include "targets.h"

namespace sfgrpo {

struct LogprobOperands {
  Tensor x, v, x_next, coef;
  Optional v_uncond;
  double guidance;
  bool mean_reduction, with_mean;
  auto tie() {
    return std::tie(x, v, x_next, coef, v_uncond, guidance, mean_reduction, with_mean);
  }
};

struct LogprobBackwardOperands {
  Tensor grad;
  Optional grad_mean;
  Tensor x, v, x_next, coef;
  Optional v_uncond;
  double guidance;
  bool mean_reduction, need_x, need_v, need_x_next, need_v_uncond;
  auto tie() {
    return std::tie(grad, grad_mean, x, v, x_next, coef, v_uncond, guidance, mean_reduction, need_x,
                    need_v, need_x_next, need_v_uncond);
  }
};

LogprobArgs arguments(const Transition& rows) {
  return {rows.shape,          rows.x.array,     rows.v.array, rows.x_next.array,
          rows.v_uncond.array, rows.coef.data(), rows.guidance};
}

std::tuple<Tensor, Tensor> sde_logprob(const LogprobOperands& o) {
  const Transition rows(o);
  const Shape& shape = rows.shape;
  LogprobArgs args = arguments(rows);
  RowSums sums(shape);
  args.square_sums = sums.partial.get();
  const Tensor mean = shape.optional_result(o.with_mean, o.x, o.coef.scalar_type(), args.mean);
  for_tiles(shape, kGrainSums,
             rows.f64 ? SFGRPO_SELECT(sde_logprob<double>) : SFGRPO_SELECT(sde_logprob<float>),
             args);
  const Tensor logp = new_empty(o.coef, {shape.rows}, o.coef.scalar_type());
  const Array out = Operand("logp", logp).array;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const double n = rows.coef[row].n;
    const bool scored = n > 0 && shape.elements > 0;
    const double each = scored ? gaussian_logp(sums.total(row) / shape.elements, n) : 0.0;
    store_number(out, row, o.mean_reduction ? each : each * shape.elements);
  }
  return {logp, mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sde_logprob_backward(
    const LogprobBackwardOperands& o) {
  const Transition rows(o);
  const Shape& shape = rows.shape;
  std::vector<double> scale = numbers("grad", o.grad, shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row) {
    const double n = rows.coef[row].n;
    const double share = o.mean_reduction ? std::max<int64_t>(shape.elements, 1) : 1;
    scale[row] = n > 0 ? scale[row] / (n * n * share) : 0.0;
  }
  LogprobArgs args = arguments(rows);
  args.scale = scale.data();
  const Operand grad_mean = shape.operand("grad_mean", o.grad_mean, rows.f64);
  args.grad_mean = grad_mean.array;
  const auto wanted = [&](bool needed, const Tensor& like, Array& array) {
    const ScalarType type = needed ? like.scalar_type() : o.x.scalar_type();
    return shape.optional_result(needed, like, type, array);
  };
  const Tensor grad_x = wanted(o.need_x, o.x, args.grad_x);
  const Tensor grad_v = wanted(o.need_v, o.v, args.grad_v);
  const Tensor grad_x_next = wanted(o.need_x_next, o.x_next, args.grad_x_next);
  const Tensor grad_v_uncond =
      wanted(o.need_v_uncond && o.v_uncond, o.v_uncond ? *o.v_uncond : o.x, args.grad_v_uncond);
  for_tiles(shape, kGrainSums,
             rows.f64 ? SFGRPO_SELECT(sde_logprob_backward<double>)
                          : SFGRPO_SELECT(sde_logprob_backward<float>),
             args);
  return {grad_x, grad_v, grad_x_next, grad_v_uncond};
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  SFGRPO_OP(sde_logprob);
  SFGRPO_OP(sde_logprob_backward);
}

#else  // once per instruction set

#include "vec.h"
#include "sums.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

template <class T>
void sde_logprob(const LogprobArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock];
  alignas(64) T next_buffer[kBlock], mean_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Tile tile(args.shape, task);
    const T* v = velocity(args.v, args.v_uncond, args.guidance, tile, v_buffer, uncond_buffer);
    const T* x = load(args.x, tile, x_buffer);
    const T* x_next = load(args.x_next, tile, next_buffer);
    // In the dtype of the arithmetic.
    T* mean = args.mean.data == nullptr ? nullptr : target(args.mean, tile.begin, mean_buffer);
    for (int row = 0, at = 0; row < tile.rows; ++row, at += tile.part) {
      const Coefficients& coef = args.coef[tile.row + row];
      args.square_sums[tile.sum + row] =
          residual_square(coef, x + at, v + at, x_next + at, tile.part);
      if (mean != nullptr) transition_mean(coef, x + at, v + at, tile.part, mean + at);
    }
    if (mean != nullptr) store(args.mean, tile.begin, tile.count, mean);
  }
}

template <class T>
void sde_logprob_backward(const LogprobArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock];
  alignas(64) T next_buffer[kBlock], grad[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Tile tile(args.shape, task);
    const int64_t begin = tile.begin;
    const int count = tile.count, part = tile.part;
    const T* v = velocity(args.v, args.v_uncond, args.guidance, tile, v_buffer, uncond_buffer);
    const T* x = load(args.x, tile, x_buffer);
    const T* x_next = load(args.x_next, tile, next_buffer);
    for (int row = 0, at = 0; row < tile.rows; ++row, at += part)
      scaled_residual(args.coef[tile.row + row], x + at, v + at, x_next + at, part,
                      args.scale[tile.row + row], grad + at);
    const double w = args.v_uncond.data == nullptr ? 1.0 : args.guidance;
    store_scaled(args.grad_x_next, begin, count, -1.0, grad, x_buffer);
    if (args.grad_mean.data != nullptr) {
      const T* grad_mean = load(args.grad_mean, tile, x_buffer);
      for (int i = 0; i < count; ++i) grad[i] += grad_mean[i];
    }
    for (int row = 0, at = 0; row < tile.rows; ++row, at += part) {
      const Coefficients& coef = args.coef[tile.row + row];
      const T* rows = grad + at;
      store_scaled(args.grad_x, begin + at, part, coef.a, rows, x_buffer);
      store_scaled(args.grad_v, begin + at, part, coef.b * w, rows, x_buffer);
      store_scaled(args.grad_v_uncond, begin + at, part, coef.b * (1.0 - w), rows, x_buffer);
    }
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
