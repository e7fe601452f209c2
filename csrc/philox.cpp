// Standard normals from (seed, sample, step, element): the generator alone.
// Specification: sfgrpo/ops/philox.py.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {
struct NormalArgs {
  Shape shape;
  Array out;
  const NoiseIds& ids;
};
}  // namespace sfgrpo

#define SFGRPO_FILE "philox.cpp"
#include "targets.h"

namespace sfgrpo {

struct NoiseOperands {
  int64_t numel, seed;
  Tensor sample_ids;
  int64_t step;
  Optional step_ids;
  ScalarType dtype;
  auto tie() { return std::tie(numel, seed, sample_ids, step, step_ids, dtype); }
};

Tensor philox_normal(const NoiseOperands& o) {
  const Shape shape(o.sample_ids.numel(), o.numel);
  const NoiseIds ids(o.seed, o.sample_ids, o.step, o.step_ids, shape.rows);
  const Tensor out = new_empty(o.sample_ids, {shape.rows, o.numel}, o.dtype);
  const NormalArgs args{shape, Operand("dtype", out).array, ids};
  for_tiles(shape, kGrainNoise, SFGRPO_SELECT(philox_normal), args);
  return out;
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  SFGRPO_OP(philox_normal);
}

#else  // once per instruction set

#include "vec.h"
#include "normal.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

void philox_normal(const NormalArgs& args, int64_t first, int64_t last) {
  alignas(64) float normals[kNormals];
  NoiseRow row;
  for (int64_t task = first; task < last; ++task) {
    const Tile tile(args.shape, task);
    fill_tile(args.ids, tile, row, normals);
    if (args.out.type == Type::f64) {
      double* __restrict out = static_cast<double*>(args.out.data) + tile.begin;
      for (int i = 0; i < tile.count; ++i) out[i] = normals[i];
    } else if (args.out.type == Type::f32) {
      __builtin_memcpy(static_cast<float*>(args.out.data) + tile.begin, normals,
                       tile.count * sizeof(float));
    } else {
      store(args.out, tile.begin, tile.count, normals);
    }
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
