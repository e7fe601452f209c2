// The step, with drawn and with given noise, into each type of state; and what halves are read as.
#include "bits.h"

#include "sde_step.cpp"

using namespace sfgrpo;

void run(int64_t elements, bool drawn, Type type) {
  const Shape shape(kRows, elements);
  const int64_t count = kRows * elements;
  std::vector<float> x = numbers(count), v = numbers(count), v_uncond = numbers(count);
  std::vector<float> noise = numbers(count), mean(count), x_next(count), x0_hat(count);
  std::vector<Coefficients> coef;
  std::vector<int64_t> samples;
  for (int row = 0; row < kRows; ++row) {  // every seventh without noise
    coef.push_back({.9 + .001 * row, -.1, row % 7 == 6 ? 0 : .3 + .01 * row, .5});
    samples.push_back(1234567890123 * row);
  }
  NoiseIds ids;
  ids.seed = 77;
  ids.step = 5;
  ids.samples.emplace().data = samples.data();
  RowSums sums(shape);
  const auto array = [&](std::vector<float>& values, Type kind) {
    return Array{values.data(), kind, elements};
  };
  const Array given = drawn ? Array() : array(noise, Type::f32);
  const StepArgs args{shape,
                      array(x, Type::f32),
                      array(v, Type::f32),
                      array(v_uncond, Type::f32),
                      given,
                      array(x_next, type),
                      array(x0_hat, type),
                      array(mean, Type::f32),
                      coef.data(),
                      3.5,
                      ids,
                      sums.partial.get()};
  baseline::sde_step<float>(args, 0, shape.tasks);
  show("x_next", elements, x_next.data(), count);
  show("x0_hat", elements, x0_hat.data(), count);
  show("mean", elements, mean.data(), count);
  show("squares", elements, sums.partial.get(), kRows * shape.blocks);
}

// All numbers in half precision, the infinities included, as they are read.
void read_halves() {
  std::vector<uint16_t> halves;
  for (int bits = 0; bits < 1 << 16; ++bits)
    if ((bits & 0x7fff) <= 0x7c00) halves.push_back(static_cast<uint16_t>(bits));
  const int count = static_cast<int>(halves.size());
  std::vector<float> values(count);
  baseline::widen<baseline::halves_at>(halves.data(), count, values.data());
  show("halves", count, values.data(), count);
}

int main() {
  read_halves();
  for (const int64_t elements : kElements)
    for (const bool drawn : {false, true})
      for (const Type type : {Type::f32, Type::bf16, Type::f16}) run(elements, drawn, type);
}
