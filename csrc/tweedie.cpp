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

void check_times(const double* times, int64_t rows) {
  const auto wrong =
      std::find_if_not(times, times + rows, [](double time) { return time >= 0 && time <= 1; });
  if (wrong != times + rows)
    fail("t: t of row " + std::to_string(wrong - times) + " is " + std::to_string(*wrong) +
         "; expected 0 <= t <= 1");
}

struct TweedieOperands {
  Tensor x, v;
  Optional t;
  double time;
  auto tie() { return std::tie(x, v, t, time); }
};

// Into x0_hat, or over v without one.
void run_tweedie(const TweedieOperands& o, const Tensor* x0_hat) {
  const Shape shape(o.x);
  const bool f64 = o.x.scalar_type() == ScalarType::Double;
  const Operand x = shape.operand("x", o.x, f64);
  const Operand v = x0_hat ? shape.operand("v", o.v, f64) : shape.dense("v", o.v, f64);
  std::vector<double> times;
  if (o.t) times = numbers("t", *o.t, shape.rows);
  check_times(o.t ? times.data() : &o.time, o.t ? shape.rows : 1);
  const Array out = x0_hat ? shape.result(*x0_hat) : v.array;
  const TweedieArgs args{shape, x.array, v.array, out, o.time, o.t ? times.data() : nullptr};
  for_tiles(shape, kGrainCopy,
            f64 ? SFGRPO_SELECT(tweedie<double>) : SFGRPO_SELECT(tweedie<float>), args);
  if (!x0_hat) v.write_back(o.v);
}

Tensor tweedie(const TweedieOperands& o) {
  const Tensor x0_hat = empty_as(o.x);
  run_tweedie(o, &x0_hat);
  return x0_hat;
}

void tweedie_(const TweedieOperands& o) { run_tweedie(o, nullptr); }

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  SFGRPO_OP(tweedie);
  SFGRPO_OP(tweedie_);
}

#else  // once per instruction set

#include "vec.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

constexpr int64_t kMostBlocks = 64;

template <class T>
void tweedie(const TweedieArgs& args, int64_t first, int64_t last) {
  alignas(64) T x_buffer[kBlock], v_buffer[kBlock], out_buffer[kBlock];
  // Blocks are for buffers; where there are none, the ends of so short a loop would be felt.
  const bool whole = direct<T>(args.x) && direct<T>(args.v) && direct<T>(args.x0_hat);
  for (int64_t task = first; task < last;) {
    const Tile tile(args.shape, task, whole ? std::min(kMostBlocks, last - task) : 1);
    const T* x = load(args.x, tile, x_buffer);
    const T* v = load(args.v, tile, v_buffer);
    T* out = target(args.x0_hat, tile.begin, out_buffer);
    for (int row = 0, at = 0; row < tile.rows; ++row, at += tile.part) {
      const double time = args.times == nullptr ? args.time : args.times[tile.row + row];
      clean(x + at, v + at, tile.part, time, out + at);
    }
    store(args.x0_hat, tile.begin, tile.count, out);
    task += tile.tasks;
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
