// x_next = a x + b v + n eps and the log-density of the stored x_next, in one pass over memory.
// Equation, schema and specification: sfgrpo/ops/sde_step.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct StepArgs {
  Shape shape;
  Array x, v, v_uncond, noise, x_next, x0_hat, mean;
  const Coefficients* coef;
  double guidance;
  const NoiseIds& ids;  // where there is no noise
  double* square_sums;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "sde_step.cpp"
#include "targets.h"

namespace sfgrpo {

struct StepOperands {
  Tensor x, v, coef;
  int64_t seed;
  Optional sample_ids;
  int64_t step;
  Optional step_ids, v_uncond;
  double guidance;
  Optional noise;
  bool with_x0;
  auto tie() {
    return std::tie(x, v, coef, seed, sample_ids, step, step_ids, v_uncond, guidance, noise,
                    with_x0);
  }
};
struct StepAndMeanOperands : StepOperands {
  bool with_mean;
  auto tie() { return std::tuple_cat(StepOperands::tie(), std::tie(with_mean)); }
};

struct StepResults {
  Array x_next, x0_hat, mean;
};

// Fills in the results, of which x_next may be x itself, and returns logp.
Tensor run_step(const StepOperands& o, const Shape& shape, const Operand& x,
                const StepResults& results) {
  const bool f64 = x.array.type == Type::f64;
  const Operand v = shape.operand("v", o.v, f64);
  const Operand v_uncond = shape.operand("v_uncond", o.v_uncond, f64);
  const Operand noise = shape.operand("noise", o.noise, f64);
  const std::vector<Coefficients> rows = coefficients(o.coef, shape.rows);
  if (!o.noise && !o.sample_ids) fail("sde_step: without noise, sample_ids are needed");
  const NoiseIds ids =
      o.noise ? NoiseIds() : NoiseIds(o.seed, *o.sample_ids, o.step, o.step_ids, shape.rows);
  const Tensor logp = new_empty(o.coef, {shape.rows}, o.coef.scalar_type());
  RowSums sums(shape);
  const StepArgs args{shape,       x.array,        v.array,        v_uncond.array,
                      noise.array, results.x_next, results.x0_hat, results.mean,
                      rows.data(), o.guidance,     ids,            sums.partial.get()};
  for_tiles(shape, o.noise ? kGrainSums : kGrainNoise,
            f64 ? SFGRPO_SELECT(sde_step<double>) : SFGRPO_SELECT(sde_step<float>), args);
  const Array out = Operand("logp", logp).array;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const double n = rows[row].n;
    const bool scored = n > 0 && shape.elements > 0;
    store_number(out, row, scored ? gaussian_logp(sums.total(row) / shape.elements, n) : 0.0);
  }
  return logp;
}

std::tuple<Tensor, Tensor, Tensor, Tensor> sde_step(const StepAndMeanOperands& o) {
  const Shape shape(o.x);
  const bool f64 = o.x.scalar_type() == ScalarType::Double;
  StepResults results;
  const Tensor x_next = empty_as(o.x);
  results.x_next = shape.result(x_next);
  const Tensor x0_hat = shape.optional_result(o.with_x0, o.x, o.x.scalar_type(), results.x0_hat);
  const Tensor mean = shape.optional_result(o.with_mean, o.x, o.coef.scalar_type(), results.mean);
  return {x_next, run_step(o, shape, shape.operand("x", o.x, f64), results), x0_hat, mean};
}

std::tuple<Tensor, Tensor> sde_step_(const StepOperands& o) {
  const Shape shape(o.x);
  const Operand x = shape.dense("x", o.x, o.x.scalar_type() == ScalarType::Double);
  StepResults results;
  results.x_next = x.array;
  const Tensor x0_hat = shape.optional_result(o.with_x0, o.x, o.x.scalar_type(), results.x0_hat);
  const Tensor logp = run_step(o, shape, x, results);
  x.write_back(o.x);
  return {logp, x0_hat};
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  SFGRPO_OP(sde_step);
  SFGRPO_OP(sde_step_);
}

#else  // once per instruction set

#include "vec.h"
#include "sums.h"
#include "normal.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

// x_next = a x + b v + n eps of one block; returns the sum of (x_next - a x - b v)^2.
template <class T>
double move(const T* x, const T* v, const T* eps, int count, const Coefficients& coef, T* x_next) {
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b), n = static_cast<T>(coef.n);
  return lane_sum<T>(count, [&](int k, auto lanes) {
    const auto mean = a * lanes.at(x + k) + b * lanes.at(v + k);
    const auto next = mean + n * lanes.at(eps + k);
    lanes.put(x_next + k, next);
    return (next - mean) * (next - mean);
  });
}

template <class T>
const T* noise_tile(const StepArgs& args, const Tile& tile, NoiseRow& row, float* normals,
                    T* scratch) {
  if (args.noise.data != nullptr) return load(args.noise, tile, scratch);
  Lookahead ahead;
  if (tile.rows == 1) {
    ahead.add(args.x, tile);
    ahead.add(args.v, tile);
    ahead.add(args.v_uncond, tile);
    if (!args.x_next.streamed) ahead.add(args.x_next, tile);
  }
  fill_tile(args.ids, tile, row, normals, ahead);
  return load(Array{normals, Type::f32}, 0, tile.count, scratch);
}

template <class T>
void sde_step(const StepArgs& args, int64_t first, int64_t last) {
  alignas(64) float normals[kNormals];
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock], noise_buffer[kBlock];
  alignas(64) T mean_buffer[kBlock], next_buffer[kBlock];
  NoiseRow noise_row;
  const bool with_x0 = args.x0_hat.data != nullptr, with_mean = args.mean.data != nullptr;
  for (int64_t task = first; task < last; ++task) {
    const Tile tile(args.shape, task);
    const int64_t begin = tile.begin;
    const int count = tile.count, part = tile.part;
    const Coefficients* coefs = args.coef + tile.row;
    const bool rounded = args.x_next.type != kType<T>;
    bool noisy = false;
    for (int row = 0; row < tile.rows; ++row) noisy |= coefs[row].n > 0;
    const T* eps = noisy ? noise_tile(args, tile, noise_row, normals, noise_buffer) : nullptr;
    const T* x = load(args.x, tile, x_buffer);
    const T* v = velocity(args.v, args.v_uncond, args.guidance, tile, v_buffer, uncond_buffer);
    if (with_x0) {  // first: x_next may take the place of x
      T* x0_hat = target(args.x0_hat, begin, next_buffer);
      for (int row = 0, at = 0; row < tile.rows; ++row, at += part)
        clean(x + at, v + at, part, coefs[row].t, x0_hat + at);
      store(args.x0_hat, begin, count, x0_hat);
    }
    T* mean = with_mean ? target(args.mean, begin, mean_buffer) : mean_buffer;
    T* x_next = target(args.x_next, begin, next_buffer);
    for (int row = 0, at = 0; row < tile.rows; ++row, at += part) {
      const Coefficients& coef = coefs[row];
      if (with_mean || (noisy && rounded))
        transition_mean(coef, x + at, v + at, part, mean + at);
      double& sum = args.square_sums[tile.sum + row];
      sum = 0;
      if (coef.n > 0) sum = move(x + at, v + at, eps + at, part, coef, x_next + at);
      else transition_mean(coef, x + at, v + at, part, x_next + at);
    }
    if (with_mean) store(args.mean, begin, count, mean);
    store(args.x_next, begin, count, x_next);
    if (!noisy || !rounded) continue;
    const T* stored = load(args.x_next, tile, next_buffer);  // what is scored
    for (int row = 0, at = 0; row < tile.rows; ++row, at += part)
      if (coefs[row].n > 0)
        args.square_sums[tile.sum + row] = square_distance(stored + at, mean + at, part);
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
