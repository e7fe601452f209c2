// Clipped policy-gradient loss with its statistics, and its gradient, each in one pass.
// Equations, schemas and specification: sfgrpo/ops/policy_loss.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct PolicyArgs {
  Shape shape;
  Array x, v, x_next, v_uncond, v_ref, v_old;
  const Coefficients* coef;
  double guidance;
  double *residual_sums = nullptr, *kl_sums = nullptr, *move_sums = nullptr;  // forward
  const double* back = nullptr;  // backward: (g1, g2) per row
  Array grad_v, grad_v_uncond;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "policy_loss.cpp"
#include "targets.h"

namespace sfgrpo {

struct PolicyOperands {
  Tensor x, v, x_next, coef;
  Optional logp_old;
  Tensor advantages;
  Optional v_uncond;
  double guidance;
  Optional v_ref;
  double clip_low, clip_high, kl_weight;
  Optional kl_scale, weights;
  bool reuse_v;  // for backward
  bool guard;
  Optional v_old;
  auto tie() {
    return std::tie(x, v, x_next, coef, logp_old, advantages, v_uncond, guidance, v_ref, clip_low,
                    clip_high, kl_weight, kl_scale, weights, reuse_v, guard, v_old);
  }
};

struct PolicyBackwardOperands {
  Tensor grad_loss, x, v, x_next, coef, back;
  Optional v_uncond;
  double guidance;
  Optional v_ref, v_old;
  auto tie() {
    return std::tie(grad_loss, x, v, x_next, coef, back, v_uncond, guidance, v_ref, v_old);
  }
};

struct PolicyRows : Transition {
  Operand v_ref, v_old;

  template <class Operands>
  explicit PolicyRows(const Operands& o)
      : Transition(o),
        v_ref(shape.operand("v_ref", o.v_ref, f64)),
        v_old(shape.operand("v_old", o.v_old, f64)) {}
  PolicyArgs args() const {
    return {shape,       x.array,     v.array,     x_next.array, v_uncond.array,
            v_ref.array, v_old.array, coef.data(), guidance};
  }
};

struct RowLoss {
  double logp = 0, ratio = 1, clipped = 0, kl = 0, surrogate = 0;  // the statistics
  double loss = 0, g1 = 0, g2 = 0;
};

// What a row's blocks add up to.
struct RowTotals {
  double residual_square, kl_square, move;
};

// One row with n > 0; scalars in double, rounded once when stored. Without logp_old it is the row's
// own, of which a nan is to reach the loss.
RowLoss row_loss(const Coefficients& coef, const RowTotals& totals, const double* logp_old,
                 double advantage, double kl_scale, double weight, int64_t elements, bool f64,
                 const PolicyOperands& o) {
  RowLoss row;
  const double size = static_cast<double>(std::max<int64_t>(elements, 1));
  const double variance = coef.n * coef.n;
  if (elements > 0) row.logp = gaussian_logp(totals.residual_square / size, coef.n);
  // As stored: logp_old was rounded too, so a policy that has not moved has ratio 1 exactly.
  if (!f64) row.logp = static_cast<float>(row.logp);
  const double per_nat = o.guard ? coef.n : 1.0;
  const double log_ratio = o.v_old ? coef.b * totals.move / (coef.n * size)
                                   : per_nat * (row.logp - (logp_old ? *logp_old : row.logp));
  row.ratio = std::exp(log_ratio);
  const double unclipped = advantage * row.ratio;
  const double limited = advantage * std::clamp(row.ratio, 1 - o.clip_low, 1 + o.clip_high);
  const bool active = limited < unclipped;
  row.clipped = active;
  row.surrogate = -std::min(unclipped, limited);
  row.kl = kl_scale * totals.kl_square / size;
  row.loss = weight * (row.surrogate + o.kl_weight * row.kl);
  row.g1 = active ? 0.0 : -weight * unclipped * per_nat * coef.b / (variance * size);
  row.g2 = 2 * o.kl_weight * weight * kl_scale / size;
  return row;
}

std::tuple<Tensor, Tensor, Tensor> policy_loss(const PolicyOperands& o) {
  const PolicyRows operands(o);
  const Shape& shape = operands.shape;
  const int64_t rows = shape.rows;
  PolicyArgs args = operands.args();
  RowSums residuals(shape), kls(shape), moves(shape);
  args.residual_sums = residuals.partial.get();
  args.kl_sums = kls.partial.get();
  args.move_sums = moves.partial.get();
  for_tiles(shape, kGrainSums,
             operands.f64 ? SFGRPO_SELECT(policy_loss<double>) : SFGRPO_SELECT(policy_loss<float>),
             args);

  const std::vector<double> olds =
      o.logp_old ? numbers("logp_old", *o.logp_old, rows) : std::vector<double>();
  const std::vector<double> credits = numbers("advantages", o.advantages, rows);
  const std::vector<double> scales =
      o.kl_scale ? numbers("kl_scale", *o.kl_scale, rows) : std::vector<double>();
  int64_t noisy = 0;
  for (const Coefficients& c : operands.coef) noisy += c.n > 0;
  const std::vector<double> shares =
      o.weights ? numbers("weights", *o.weights, rows)
                : std::vector<double>(rows, 1.0 / std::max<int64_t>(noisy, 1));

  const Tensor loss = new_empty(o.coef, {}, o.coef.scalar_type());
  const Tensor stats = new_empty(o.coef, {rows, 5}, o.coef.scalar_type());
  const Tensor back = new_empty(o.coef, {rows, 2}, o.coef.scalar_type());
  const Array stats_out = Operand("stats", stats).array, back_out = Operand("back", back).array;
  double total = 0;
  for (int64_t row = 0; row < rows; ++row) {
    const Coefficients& c = operands.coef[row];
    RowLoss r;
    if (c.n > 0) {
      double scale = o.kl_scale ? scales[row] : c.b * c.b / (2 * c.n * c.n);
      if (!o.v_ref) scale = 0;
      const RowTotals totals{residuals.total(row), o.v_ref ? kls.total(row) : 0.0,
                             o.v_old ? moves.total(row) : 0.0};
      r = row_loss(c, totals, o.logp_old ? &olds[row] : nullptr, credits[row], scale, shares[row],
                   shape.elements, operands.f64, o);
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
void run_backward(const PolicyBackwardOperands& o, const PolicyRows& operands, const Array& grad_v,
                  const Array& grad_v_uncond) {
  const double grad = numbers("grad_loss", o.grad_loss, 1)[0];
  std::vector<double> factors = numbers("back", o.back, 2 * operands.shape.rows);
  for (double& factor : factors) factor *= grad;
  PolicyArgs args = operands.args();
  args.back = factors.data();
  args.grad_v = grad_v;
  args.grad_v_uncond = grad_v_uncond;
  for_tiles(operands.shape, kGrainSums,
             operands.f64 ? SFGRPO_SELECT(policy_loss_backward<double>)
                          : SFGRPO_SELECT(policy_loss_backward<float>),
             args);
}

std::tuple<Tensor, Tensor> policy_loss_backward(const PolicyBackwardOperands& o) {
  const PolicyRows operands(o);
  const Shape& shape = operands.shape;
  Array first, second;
  const Tensor& like_uncond = o.v_uncond ? *o.v_uncond : o.v;
  const Tensor grad_v = shape.optional_result(true, o.v, o.v.scalar_type(), first);
  const Tensor grad_v_uncond =
      shape.optional_result(o.v_uncond.has_value(), like_uncond, like_uncond.scalar_type(), second);
  run_backward(o, operands, first, second);
  return {grad_v, grad_v_uncond};
}

void policy_loss_backward_(const PolicyBackwardOperands& o) {
  PolicyRows operands(o);
  operands.v = operands.shape.dense("v", o.v, operands.f64);
  operands.v_uncond = operands.shape.dense("v_uncond", o.v_uncond, operands.f64);
  run_backward(o, operands, operands.v.array, operands.v_uncond.array);
  operands.v.write_back(o.v);
  if (o.v_uncond) operands.v_uncond.write_back(*o.v_uncond);
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  SFGRPO_OP(policy_loss);
  SFGRPO_OP(policy_loss_backward);
  SFGRPO_OP(policy_loss_backward_);
}

#else  // once per instruction set

#include "vec.h"
#include "sums.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

// Sum of (x_next - a x - b v_old) (v - v_old) of one block.
template <class T>
double move_along_noise(const Coefficients& coef, const T* x, const T* v, const T* x_next,
                        const T* v_old, int count) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b);
  return lane_sum<T>(count, [&](int k, auto lanes) {
    const auto old = lanes.at(v_old + k);
    const auto noise = lanes.at(x_next + k) - (a * lanes.at(x + k) + b * old);
    return noise * (lanes.at(v + k) - old);
  });
}

template <class T>
void policy_loss(const PolicyArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock], next_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Tile tile(args.shape, task);
    const int64_t begin = tile.begin;
    const int count = tile.count, part = tile.part;
    const T* v = velocity(args.v, args.v_uncond, args.guidance, tile, v_buffer, uncond_buffer);
    const T* x = load(args.x, tile, x_buffer);
    const T* x_next = load(args.x_next, tile, next_buffer);
    const Coefficients* coef = args.coef + tile.row;
    for (int row = 0, at = 0; row < tile.rows; ++row, at += part)
      args.residual_sums[tile.sum + row] =
          residual_square(coef[row], x + at, v + at, x_next + at, part);
    if (args.v_ref.data != nullptr) {
      const T* v_ref = load(args.v_ref, tile, uncond_buffer);
      for (int row = 0, at = 0; row < tile.rows; ++row, at += part)
        args.kl_sums[tile.sum + row] = square_distance(v + at, v_ref + at, part);
    }
    if (args.v_old.data != nullptr) {
      const T* v_old = load(args.v_old, tile, uncond_buffer);
      for (int row = 0, at = 0; row < tile.rows; ++row, at += part)
        args.move_sums[tile.sum + row] =
            move_along_noise(coef[row], x + at, v + at, x_next + at, v_old + at, part);
    }
  }
}

// g1 (x_next - a x - b v_scored) + g2 (v - v_ref); may take the place of v and of v_scored.
template <class T>
void loss_gradient(const Coefficients& coef, const T* x, const T* v_scored, const T* v,
                   const T* x_next, const T* v_ref, int count, const double* back, T* grad) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b);
  const T g1 = static_cast<T>(back[0]), g2 = static_cast<T>(back[1]);
  SFGRPO_IN_PLACE for (int i = 0; i < count; ++i)
    grad[i] = g1 * (x_next[i] - (a * x[i] + b * v_scored[i])) + g2 * (v[i] - v_ref[i]);
}

template <class T>
void policy_loss_backward(const PolicyArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock], next_buffer[kBlock];
  alignas(64) T ref_buffer[kBlock], old_buffer[kBlock], grad_buffer[kBlock];
  const bool anchored = args.v_ref.data != nullptr, moved = args.v_old.data != nullptr;
  for (int64_t task = first; task < last; ++task) {
    const Tile tile(args.shape, task);
    const int64_t begin = tile.begin;
    const int count = tile.count, part = tile.part;
    const T* v = nullptr;
    if (anchored || !moved)
      v = velocity(args.v, args.v_uncond, args.guidance, tile, v_buffer, uncond_buffer);
    const T* v_scored = moved ? load(args.v_old, tile, old_buffer) : v;
    const T* x = load(args.x, tile, x_buffer);
    const T* x_next = load(args.x_next, tile, next_buffer);
    const bool guided = args.v_uncond.data != nullptr;
    T* grad = guided ? grad_buffer : target(args.grad_v, begin, grad_buffer);
    const T* v_ref = anchored ? load(args.v_ref, tile, ref_buffer) : nullptr;
    for (int row = 0, at = 0; row < tile.rows; ++row, at += part) {
      const double* back = args.back + 2 * (tile.row + row);
      const Coefficients& coef = args.coef[tile.row + row];
      if (anchored)
        loss_gradient(coef, x + at, v_scored + at, v + at, x_next + at, v_ref + at, part, back,
                      grad + at);
      else
        scaled_residual(coef, x + at, v_scored + at, x_next + at, part, back[0], grad + at);
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
