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
  double* square_sums;  // forward
  Array mean;           // likewise; null where it is not asked for
  const double* scale;  // backward: dlogp/dmean of a row is scale (x_next - mean)
  Array grad_mean;      // null where there is none
  Array grad_x, grad_v, grad_x_next, grad_v_uncond;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "sde_logprob.cpp"
#include "targets.h"

namespace sfgrpo {

// The operands of both directions; owns the copies that contiguity may need.
struct LogprobOperands {
  Shape shape;
  bool f64;
  Operand x, v, x_next, v_uncond;
  std::vector<Coefficients> coef;

  LogprobOperands(const Tensor& x_, const Tensor& v_, const Tensor& x_next_, const Tensor& coef_,
                  const std::optional<Tensor>& v_uncond_)
      : shape(x_), f64(x_.scalar_type() == ScalarType::Double) {
    shape.check("v", v_, f64);
    shape.check("x_next", x_next_, f64);
    shape.check("v_uncond", v_uncond_, f64);
    x = Operand("x", x_);
    v = Operand("v", v_);
    x_next = Operand("x_next", x_next_);
    v_uncond = Operand("v_uncond", v_uncond_);
    coef = coefficients(coef_, shape.rows);
  }
  LogprobArgs args(double guidance) const {
    return {shape,   x.array, v.array, x_next.array, v_uncond.array, coef.data(), guidance,
            nullptr, {},      nullptr, {},           {},             {},          {}, {}};
  }
};

std::tuple<Tensor, Tensor> sde_logprob(const Tensor& x, const Tensor& v, const Tensor& x_next,
                                       const Tensor& coef, const std::optional<Tensor>& v_uncond,
                                       double guidance, bool mean_reduction, bool with_mean) {
  const LogprobOperands operands(x, v, x_next, coef, v_uncond);
  const Shape& shape = operands.shape;
  LogprobArgs args = operands.args(guidance);
  RowSums sums(shape);
  args.square_sums = sums.partial.get();
  const Tensor mean = optional_result(with_mean, x, coef.scalar_type(), args.mean);
  for_blocks(shape,
             operands.f64 ? SFGRPO_SELECT(sde_logprob<double>) : SFGRPO_SELECT(sde_logprob<float>),
             args);
  const Tensor logp = torch::stable::new_empty(coef, {shape.rows}, coef.scalar_type());
  const Array out = Operand("logp", logp).array;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const double n = operands.coef[row].n;
    const bool scored = n > 0 && shape.elements > 0;
    const double each = scored ? gaussian_logp(sums.total(row) / shape.elements, n) : 0.0;
    store_number(out, row, mean_reduction ? each : each * shape.elements);
  }
  return {logp, mean};
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sde_logprob_backward(
    const Tensor& grad, const std::optional<Tensor>& grad_mean, const Tensor& x, const Tensor& v,
    const Tensor& x_next, const Tensor& coef, const std::optional<Tensor>& v_uncond,
    double guidance, bool mean_reduction, bool need_x, bool need_v, bool need_x_next,
    bool need_v_uncond) {
  const LogprobOperands operands(x, v, x_next, coef, v_uncond);
  const Shape& shape = operands.shape;
  std::vector<double> scale = numbers("grad", grad, shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row) {
    const double n = operands.coef[row].n;
    const double share = mean_reduction ? std::max<int64_t>(shape.elements, 1) : 1;
    scale[row] = n > 0 ? scale[row] / (n * n * share) : 0.0;
  }
  LogprobArgs args = operands.args(guidance);
  args.scale = scale.data();
  shape.check("grad_mean", grad_mean, operands.f64);
  const Operand grad_means("grad_mean", grad_mean);
  args.grad_mean = grad_means.array;
  const auto wanted = [&](bool needed, const Tensor& like, Array& array) {
    return optional_result(needed, like, needed ? like.scalar_type() : x.scalar_type(), array);
  };
  const Tensor grad_x = wanted(need_x, x, args.grad_x);
  const Tensor grad_v = wanted(need_v, v, args.grad_v);
  const Tensor grad_x_next = wanted(need_x_next, x_next, args.grad_x_next);
  const Tensor grad_v_uncond =
      wanted(need_v_uncond && v_uncond, v_uncond ? *v_uncond : x, args.grad_v_uncond);
  for_blocks(shape,
             operands.f64 ? SFGRPO_SELECT(sde_logprob_backward<double>)
                          : SFGRPO_SELECT(sde_logprob_backward<float>),
             args);
  return {grad_x, grad_v, grad_x_next, grad_v_uncond};
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  library.impl("sde_logprob", TORCH_BOX(&sfgrpo::sde_logprob));
  library.impl("sde_logprob_backward", TORCH_BOX(&sfgrpo::sde_logprob_backward));
}

#else  // once per instruction set

#include "vec.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

template <class T>
void sde_logprob(const LogprobArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock];
  alignas(64) T next_buffer[kBlock], mean_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Block block(args.shape, task);
    const T* v = velocity(args.v, args.v_uncond, args.guidance, block.begin, block.count, v_buffer,
                          uncond_buffer);
    const T* x = load(args.x, block.begin, block.count, x_buffer);
    const T* x_next = load(args.x_next, block.begin, block.count, next_buffer);
    const Coefficients& coef = args.coef[block.row];
    args.square_sums[task] = residual_square(coef, x, v, x_next, block.count);
    if (args.mean.data != nullptr)  // in the dtype of the arithmetic
      transition_mean(coef, x, v, block.count, target(args.mean, block.begin, mean_buffer));
  }
}

template <class T>
void sde_logprob_backward(const LogprobArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock];
  alignas(64) T next_buffer[kBlock], grad[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Block block(args.shape, task);
    const Coefficients& coef = args.coef[block.row];
    const int64_t begin = block.begin;
    const int count = block.count;
    const T* v =
        velocity(args.v, args.v_uncond, args.guidance, begin, count, v_buffer, uncond_buffer);
    const T* x = load(args.x, begin, count, x_buffer);
    const T* x_next = load(args.x_next, begin, count, next_buffer);
    scaled_residual(coef, x, v, x_next, count, args.scale[block.row], grad);
    const double w = args.v_uncond.data == nullptr ? 1.0 : args.guidance;
    store_scaled(args.grad_x_next, begin, count, -1.0, grad, x_buffer);
    if (args.grad_mean.data != nullptr) {
      const T* grad_mean = load(args.grad_mean, begin, count, x_buffer);
      for (int i = 0; i < count; ++i) grad[i] += grad_mean[i];
    }
    store_scaled(args.grad_x, begin, count, coef.a, grad, x_buffer);
    store_scaled(args.grad_v, begin, count, coef.b * w, grad, x_buffer);
    store_scaled(args.grad_v_uncond, begin, count, coef.b * (1.0 - w), grad, x_buffer);
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
