// x0_hat = x - t v.  Schema and specification: sfgrpo/ops/tweedie.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct TweedieArgs {
  Shape shape;
  Array x, v, x0_hat;
  const double* t;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "tweedie.cpp"
#include "targets.h"

namespace sfgrpo {

Tensor tweedie(const Tensor& x, const Tensor& v, const Tensor& t) {
  const Shape shape(x);
  const bool f64 = x.scalar_type() == ScalarType::Double;
  shape.check("v", v, f64);
  const std::vector<double> times = numbers("t", t, shape.rows);
  for (int64_t row = 0; row < shape.rows; ++row)
    if (!(times[row] >= 0 && times[row] <= 1))
      fail("t: t of row " + std::to_string(row) + " is " + std::to_string(times[row]) +
           "; expected 0 <= t <= 1");
  const Tensor x0_hat = empty_as(x);
  const Operand xs("x", x), vs("v", v);
  const TweedieArgs args{shape, xs.array, vs.array, Operand("x0_hat", x0_hat).array, times.data()};
  for_blocks(shape, f64 ? SFGRPO_SELECT(tweedie<double>) : SFGRPO_SELECT(tweedie<float>), args);
  return x0_hat;
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  library.impl("tweedie", TORCH_BOX(&sfgrpo::tweedie));
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
    T* __restrict out = target(args.x0_hat, block.begin, out_buffer);
    const T t = static_cast<T>(args.t[block.row]);
    for (int i = 0; i < block.count; ++i) out[i] = x[i] - t * v[i];
    store(args.x0_hat, block.begin, block.count, out);
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
