// x0_hat = x - t v.  Schema and specification: sfgrpo/ops/tweedie.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct TweedieArgs {
  Shape shape;
  Array x, v, x0_hat;
  double time;
  const double* times;  // one per row instead of `time`, or null
};
}  // namespace sfgrpo

#define SFGRPO_FILE "tweedie.cpp"
#include "targets.h"

namespace sfgrpo {

void check_time(double time, int64_t row) {
  if (!(time >= 0 && time <= 1))
    fail("t: t of row " + std::to_string(row) + " is " + std::to_string(time) +
         "; expected 0 <= t <= 1");
}

void run_tweedie(const Tensor& x, const Operand& v, const std::optional<Tensor>& t, double time,
                 const Array& x0_hat) {
  const Shape shape(x);
  const bool f64 = x.scalar_type() == ScalarType::Double;
  shape.check("v", v.tensor, f64);
  std::vector<double> times;
  if (t) times = numbers("t", *t, shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row) check_time(t ? times[row] : time, row);
  const Operand xs("x", x);
  const TweedieArgs args{shape, xs.array, v.array, x0_hat, time, t ? times.data() : nullptr};
  for_blocks(shape, f64 ? SFGRPO_SELECT(tweedie<double>) : SFGRPO_SELECT(tweedie<float>), args);
}

Tensor tweedie(const Tensor& x, const Tensor& v, const std::optional<Tensor>& t, double time) {
  const Tensor x0_hat = empty_as(x);
  run_tweedie(x, Operand("v", v), t, time, Operand("x0_hat", x0_hat).array);
  return x0_hat;
}

void tweedie_(const Tensor& x, const Tensor& v, const std::optional<Tensor>& t, double time) {
  const Operand vs("v", v);
  run_tweedie(x, vs, t, time, vs.array);
  vs.write_back(v);
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  library.impl("tweedie", TORCH_BOX(&sfgrpo::tweedie));
  library.impl("tweedie_", TORCH_BOX(&sfgrpo::tweedie_));
}

#else  // once per instruction set

#include "vec.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

template <class T>
void tweedie(const TweedieArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], out_buffer[kBlock];
  for (int64_t task = first; task < last; ++task) {
    const Block block(args.shape, task);
    const T* x = load(args.x, block.begin, block.count, x_buffer);
    const T* v = load(args.v, block.begin, block.count, v_buffer);
    T* out = target(args.x0_hat, block.begin, out_buffer);
    clean(x, v, block.count, args.times == nullptr ? args.time : args.times[block.row], out);
    store(args.x0_hat, block.begin, block.count, out);
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
