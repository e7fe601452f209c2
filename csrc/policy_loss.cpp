// Clipped policy-gradient loss with its statistics, and its gradient, each in one pass.
// Equations, schemas and specification: sfgrpo/ops/policy_loss.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct PolicyArgs {
  Shape shape;
  Array x, v, x_next, v_uncond, v_ref;
  const Coefficients* coef;
  double guidance;
  double *residual_sums, *kl_sums;  // forward
  const double* back;               // backward: (g1, g2) per row
  Array grad_v, grad_v_uncond;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "policy_loss.cpp"
#include "targets.h"

namespace sfgrpo {

using Optional = std::optional<Tensor>;

// The operands of both directions; owns the copies that contiguity may need.
struct PolicyOperands {
  Shape shape;
  bool f64;
  Operand x, v, x_next, v_uncond, v_ref;
  std::vector<Coefficients> coef;

  PolicyOperands(const Tensor& x_, const Tensor& v_, const Tensor& x_next_, const Tensor& coef_,
                 const Optional& v_uncond_, const Optional& v_ref_)
      : shape(x_), f64(x_.scalar_type() == ScalarType::Double) {
    shape.check("v", v_, f64);
    shape.check("x_next", x_next_, f64);
    shape.check("v_uncond", v_uncond_, f64);
    shape.check("v_ref", v_ref_, f64);
    x = Operand("x", x_);
    v = Operand("v", v_);
    x_next = Operand("x_next", x_next_);
    v_uncond = Operand("v_uncond", v_uncond_);
    v_ref = Operand("v_ref", v_ref_);
    coef = coefficients(coef_, shape.rows);
  }
  PolicyArgs args(double guidance) const {
    return {shape,       x.array,  v.array, x_next.array, v_uncond.array, v_ref.array,
            coef.data(), guidance, nullptr, nullptr,      nullptr,        {}, {}};
  }
};

struct RowLoss {
  double logp = 0, ratio = 1, clipped = 0, kl = 0, surrogate = 0;  // the statistics
  double loss = 0, g1 = 0, g2 = 0;
};

struct PolicyOptions {
  double clip_low, clip_high, kl_weight;
  bool f64;
};

// One row with n > 0; scalars in double, rounded once when stored.
RowLoss row_loss(const Coefficients& coef, double residual_square, double kl_square, double logp_old,
                 double advantage, double kl_scale, double weight, int64_t elements,
                 const PolicyOptions& options) {
  RowLoss row;
  const double size = static_cast<double>(std::max<int64_t>(elements, 1));
  const double variance = coef.n * coef.n;
  if (elements > 0) row.logp = gaussian_logp(residual_square / size, coef.n);
  // As stored: logp_old was rounded too, so a policy that has not moved has ratio 1 exactly.
  if (!options.f64) row.logp = static_cast<float>(row.logp);
  row.ratio = std::exp(row.logp - logp_old);
  const double unclipped = advantage * row.ratio;
  const double limited =
      advantage * std::clamp(row.ratio, 1 - options.clip_low, 1 + options.clip_high);
  const bool active = limited < unclipped;
  row.clipped = active;
  row.surrogate = -std::min(unclipped, limited);
  row.kl = kl_scale * kl_square / size;
  row.loss = weight * (row.surrogate + options.kl_weight * row.kl);
  row.g1 = active ? 0.0 : -weight * unclipped * coef.b / (variance * size);
  row.g2 = 2 * options.kl_weight * weight * kl_scale / size;
  return row;
}

std::tuple<Tensor, Tensor, Tensor> policy_loss(
    const Tensor& x, const Tensor& v, const Tensor& x_next, const Tensor& coef,
    const Tensor& logp_old, const Tensor& advantages, const Optional& v_uncond, double guidance,
    const Optional& v_ref, double clip_low, double clip_high, double kl_weight,
    const Optional& kl_scale, const Optional& weights, bool /* reuse_v: for backward */) {
  const PolicyOperands operands(x, v, x_next, coef, v_uncond, v_ref);
  const Shape& shape = operands.shape;
  const int64_t rows = shape.rows;
  PolicyArgs args = operands.args(guidance);
  RowSums residuals(shape), kls(shape);
  args.residual_sums = residuals.partial.get();
  args.kl_sums = kls.partial.get();
  for_blocks(shape,
             operands.f64 ? SFGRPO_SELECT(policy_loss<double>) : SFGRPO_SELECT(policy_loss<float>),
             args);

  const std::vector<double> olds = numbers("logp_old", logp_old, rows);
  const std::vector<double> credits = numbers("advantages", advantages, rows);
  const std::vector<double> scales =
      kl_scale ? numbers("kl_scale", *kl_scale, rows) : std::vector<double>();
  int64_t noisy = 0;
  for (const Coefficients& c : operands.coef) noisy += c.n > 0;
  const std::vector<double> shares =
      weights ? numbers("weights", *weights, rows)
              : std::vector<double>(rows, 1.0 / std::max<int64_t>(noisy, 1));

  const Tensor loss = torch::stable::new_empty(coef, {}, coef.scalar_type());
  const Tensor stats = torch::stable::new_empty(coef, {rows, 5}, coef.scalar_type());
  const Tensor back = torch::stable::new_empty(coef, {rows, 2}, coef.scalar_type());
  const Array stats_out = Operand("stats", stats).array, back_out = Operand("back", back).array;
  const PolicyOptions options{clip_low, clip_high, kl_weight, operands.f64};
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Coefficients& c = operands.coef[row];
    RowLoss r;
    if (c.n > 0) {
      double scale = kl_scale ? scales[row] : c.b * c.b / (2 * c.n * c.n);
      if (!v_ref) scale = 0;
      r = row_loss(c, residuals.total(row), v_ref ? kls.total(row) : 0.0, olds[row], credits[row],
                   scale, shares[row], shape.elements, options);
    }
    const double values[5] = {r.logp, r.ratio, r.clipped, r.kl, r.surrogate};
    for (int column = 0; column < 5; ++column)
      store_number(stats_out, 5 * row + column, values[column]);
    store_number(back_out, 2 * row, r.g1);
    store_number(back_out, 2 * row + 1, r.g2);
    total += r.loss;
  }
  store_number(Operand("loss", loss).array, 0, total);
  return {loss, stats, back};
}

// Fills in the gradients, which may take the place of v and v_uncond.
void run_backward(const Tensor& grad_loss, const PolicyOperands& operands, const Tensor& back,
                  double guidance, const Array& grad_v, const Array& grad_v_uncond) {
  const double grad = numbers("grad_loss", grad_loss, 1)[0];
  std::vector<double> factors = numbers("back", back, 2 * operands.shape.rows);
  for (double& factor : factors) factor *= grad;
  PolicyArgs args = operands.args(guidance);
  args.back = factors.data();
  args.grad_v = grad_v;
  args.grad_v_uncond = grad_v_uncond;
  for_blocks(operands.shape,
             operands.f64 ? SFGRPO_SELECT(policy_loss_backward<double>)
                          : SFGRPO_SELECT(policy_loss_backward<float>),
             args);
}

std::tuple<Tensor, Tensor> policy_loss_backward(const Tensor& grad_loss, const Tensor& x,
                                                const Tensor& v, const Tensor& x_next,
                                                const Tensor& coef, const Tensor& back,
                                                const Optional& v_uncond, double guidance,
                                                const Optional& v_ref) {
  const PolicyOperands operands(x, v, x_next, coef, v_uncond, v_ref);
  Array first, second;
  const Tensor like_uncond = v_uncond ? *v_uncond : v;
  const Tensor grad_v = optional_result(true, v, v.scalar_type(), first);
  const Tensor grad_v_uncond =
      optional_result(v_uncond.has_value(), like_uncond, like_uncond.scalar_type(), second);
  run_backward(grad_loss, operands, back, guidance, first, second);
  return {grad_v, grad_v_uncond};
}

void policy_loss_backward_(const Tensor& grad_loss, const Tensor& x, const Tensor& v,
                           const Tensor& x_next, const Tensor& coef, const Tensor& back,
                           const Optional& v_uncond, double guidance, const Optional& v_ref) {
  const PolicyOperands operands(x, v, x_next, coef, v_uncond, v_ref);
  run_backward(grad_loss, operands, back, guidance, operands.v.array, operands.v_uncond.array);
  operands.v.write_back(v);
  if (v_uncond) operands.v_uncond.write_back(*v_uncond);
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  library.impl("policy_loss", TORCH_BOX(&sfgrpo::policy_loss));
  library.impl("policy_loss_backward", TORCH_BOX(&sfgrpo::policy_loss_backward));
  library.impl("policy_loss_backward_", TORCH_BOX(&sfgrpo::policy_loss_backward_));
}

#else  // once per instruction set

#include "vec.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

template <class T>
void policy_loss(const PolicyArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock], next_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Block block(args.shape, task);
    const int64_t begin = block.begin;
    const int count = block.count;
    const T* v =
        velocity(args.v, args.v_uncond, args.guidance, begin, count, v_buffer, uncond_buffer);
    const T* x = load(args.x, begin, count, x_buffer);
    const T* x_next = load(args.x_next, begin, count, next_buffer);
    args.residual_sums[task] = residual_square(args.coef[block.row], x, v, x_next, count);
    if (args.v_ref.data != nullptr)
      args.kl_sums[task] =
          square_distance(v, load(args.v_ref, begin, count, uncond_buffer), count);
  }
}

// g1 (x_next - a x - b v) + g2 (v - v_ref); may take the place of v.
template <class T>
void loss_gradient(const Coefficients& coef, const T* x, const T* v, const T* x_next,
                   const T* v_ref, int count, const double* back, T* grad) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b);
  const T g1 = static_cast<T>(back[0]), g2 = static_cast<T>(back[1]);
  SFGRPO_IN_PLACE for (int i = 0; i < count; ++i)
    grad[i] = g1 * (x_next[i] - (a * x[i] + b * v[i])) + g2 * (v[i] - v_ref[i]);
}

template <class T>
void policy_loss_backward(const PolicyArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock], next_buffer[kBlock];
  alignas(64) T ref_buffer[kBlock], grad_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Block block(args.shape, task);
    const int64_t begin = block.begin;
    const int count = block.count;
    const T* v =
        velocity(args.v, args.v_uncond, args.guidance, begin, count, v_buffer, uncond_buffer);
    const T* x = load(args.x, begin, count, x_buffer);
    const T* x_next = load(args.x_next, begin, count, next_buffer);
    const bool guided = args.v_uncond.data != nullptr;
    T* grad = guided ? grad_buffer : target(args.grad_v, begin, grad_buffer);
    const double* back = args.back + 2 * block.row;
    if (args.v_ref.data == nullptr) {
      scaled_residual(args.coef[block.row], x, v, x_next, count, back[0], grad);
    } else {
      const T* v_ref = load(args.v_ref, begin, count, ref_buffer);
      loss_gradient(args.coef[block.row], x, v, x_next, v_ref, count, back, grad);
    }
    if (guided) {
      store_scaled(args.grad_v, begin, count, args.guidance, grad, x_buffer);
      store_scaled(args.grad_v_uncond, begin, count, 1.0 - args.guidance, grad, x_buffer);
    } else {
      store(args.grad_v, begin, count, grad);
    }
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
