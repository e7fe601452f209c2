// x_next = a x + b v + n eps and the log-density of the stored x_next, in one pass over memory.
// Equation, schema and specification: sfgrpo/ops/sde_step.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct StepArgs {
  Shape shape;
  Array x, v, v_uncond, noise, x_next, x0_hat;
  const Coefficients* coef;
  double guidance;
  uint64_t seed;
  const int64_t *sample_ids, *step_ids;
  double* square_sums;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "sde_step.cpp"
#include "targets.h"

namespace sfgrpo {

using Ids = std::optional<Tensor>;

// x0_hat only if asked for.
std::tuple<Tensor, Tensor, std::optional<Tensor>> step(
    const Tensor& x, const Tensor& v, const Tensor& coef, int64_t seed, const Ids& sample_ids,
    const Ids& step_ids, const std::optional<Tensor>& v_uncond, double guidance,
    const std::optional<Tensor>& noise, bool with_x0) {
  const Shape shape(x);
  const bool f64 = x.scalar_type() == ScalarType::Double;
  shape.check("v", v, f64);
  shape.check("v_uncond", v_uncond, f64);
  shape.check("noise", noise, f64);
  const std::vector<Coefficients> rows = coefficients(coef, shape.rows);
  Tensor samples, steps;
  if (!noise) {
    if (!sample_ids || !step_ids) fail("sde_step: without noise, sample_ids and step_ids are needed");
    samples = int64_rows("sample_ids", *sample_ids, shape.rows);
    steps = int64_rows("step_ids", *step_ids, shape.rows);
  }
  const Operand xs("x", x), vs("v", v), us("v_uncond", v_uncond), es("noise", noise);
  const Tensor x_next = empty_as(x);
  std::optional<Tensor> x0_hat;
  if (with_x0) x0_hat = empty_as(x);
  const Tensor logp = torch::stable::new_empty(coef, {shape.rows}, coef.scalar_type());
  RowSums sums(shape);
  const StepArgs args{shape,
                      xs.array,
                      vs.array,
                      us.array,
                      es.array,
                      Operand("x_next", x_next).array,
                      Operand("x0_hat", x0_hat).array,
                      rows.data(),
                      guidance,
                      static_cast<uint64_t>(seed),
                      noise ? nullptr : static_cast<const int64_t*>(samples.data_ptr()),
                      noise ? nullptr : static_cast<const int64_t*>(steps.data_ptr()),
                      sums.partial.get()};
  for_blocks(shape, f64 ? SFGRPO_SELECT(sde_step<double>) : SFGRPO_SELECT(sde_step<float>), args);
  const Array out = Operand("logp", logp).array;
  for (int64_t row = 0; row < shape.rows; ++row) {
    const double n = rows[row].n;
    const bool scored = n > 0 && shape.elements > 0;
    store_number(out, row, scored ? gaussian_logp(sums.total(row) / shape.elements, n) : 0.0);
  }
  return {x_next, logp, x0_hat};
}

std::tuple<Tensor, Tensor> sde_step(const Tensor& x, const Tensor& v, const Tensor& coef,
                                    int64_t seed, const Ids& sample_ids, const Ids& step_ids,
                                    const std::optional<Tensor>& v_uncond, double guidance,
                                    const std::optional<Tensor>& noise) {
  auto [x_next, logp, x0_hat] =
      step(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, false);
  return {x_next, logp};
}

std::tuple<Tensor, Tensor, Tensor> sde_step_x0(const Tensor& x, const Tensor& v, const Tensor& coef,
                                               int64_t seed, const Ids& sample_ids,
                                               const Ids& step_ids,
                                               const std::optional<Tensor>& v_uncond,
                                               double guidance,
                                               const std::optional<Tensor>& noise) {
  auto [x_next, logp, x0_hat] =
      step(x, v, coef, seed, sample_ids, step_ids, v_uncond, guidance, noise, true);
  return {x_next, logp, *x0_hat};
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  library.impl("sde_step", TORCH_BOX(&sfgrpo::sde_step));
  library.impl("sde_step_x0", TORCH_BOX(&sfgrpo::sde_step_x0));
}

#else  // once per instruction set

#include "vec.h"
#include "normal.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

// x_next = a x + b v + n eps of one block; returns the sum of (x_next - a x - b v)^2.
template <class T>
double move(const T* x, const T* v, const T* eps, int count, const Coefficients& coef, T* x_next) {
  using Sum = LaneSum<T>;
  const T a = static_cast<T>(coef.a), b = static_cast<T>(coef.b), n = static_cast<T>(coef.n);
  Sum sum;
  int i = 0;
  for (; i + 16 <= count; i += 16) {
    for (int j = 0; j < Sum::kVecs; ++j) {
      const int k = i + j * Sum::kLanes;
      const auto mean = a * Sum::at(x + k) + b * Sum::at(v + k);
      const auto next = mean + n * Sum::at(eps + k);
      put(x_next + k, next);
      sum.add_square(j, next - mean);
    }
  }
  T trailing[16];
  for (int k = 0; i + k < count; ++k) {
    const T mean = a * x[i + k] + b * v[i + k];
    x_next[i + k] = mean + n * eps[i + k];
    trailing[k] = x_next[i + k] - mean;
  }
  return sum.total(trailing, count - i);
}

template <class T>
void clean(const T* __restrict x, const T* __restrict v, int count, double time,
           T* __restrict x0_hat) {
  const T t = static_cast<T>(time);
  for (int i = 0; i < count; ++i) x0_hat[i] = x[i] - t * v[i];
}

template <class T>
const T* noise_block(const StepArgs& args, const Block& block, float* normals, T* scratch) {
  if (args.noise.data != nullptr) return load(args.noise, block.begin, block.count, scratch);
  const NoiseRow row(args.seed, static_cast<uint64_t>(args.sample_ids[block.row]),
                     static_cast<uint32_t>(args.step_ids[block.row]));
  Lookahead ahead;
  ahead.add(args.x, block.begin);
  ahead.add(args.v, block.begin);
  ahead.add(args.v_uncond, block.begin);
  ahead.add(args.x_next, block.begin);
  fill_normals(row, block.offset, block.count, normals, ahead);
  return load(Array{normals, Type::f32}, 0, block.count, scratch);
}

template <class T>
void sde_step(const StepArgs& args, int64_t first, int64_t last) {
  alignas(64) float normals[kBlock];
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], uncond_buffer[kBlock], noise_buffer[kBlock];
  alignas(64) T mean[kBlock], next_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Block block(args.shape, task);
    const int64_t begin = block.begin;
    const int count = block.count;
    const Coefficients& coef = args.coef[block.row];
    const T* eps = noise_block(args, block, normals, noise_buffer);
    const T* x = load(args.x, begin, count, x_buffer);
    const T* v =
        velocity(args.v, args.v_uncond, args.guidance, begin, count, v_buffer, uncond_buffer);
    T* x_next = target(args.x_next, begin, next_buffer);
    args.square_sums[task] = move(x, v, eps, count, coef, x_next);
    if (args.x_next.type != kType<T>) {  // what was stored is what is scored
      store(args.x_next, begin, count, x_next);
      transition_mean(coef, x, v, count, mean);
      const T* stored = load(args.x_next, begin, count, next_buffer);
      args.square_sums[task] = square_distance(stored, mean, count);
    }
    if (args.x0_hat.data != nullptr) {
      T* x0_hat = target(args.x0_hat, begin, next_buffer);
      clean(x, v, count, coef.t, x0_hat);
      store(args.x0_hat, begin, count, x0_hat);
    }
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
