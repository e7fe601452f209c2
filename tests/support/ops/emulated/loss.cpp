// The loss's sums and its gradients, with every operand it can have.
#include "bits.h"

#include "policy_loss.cpp"

using namespace sfgrpo;

void run(int64_t elements) {
  const Shape shape(kRows, elements);
  const int64_t count = kRows * elements, blocks = kRows * shape.blocks;
  std::vector<float> x = numbers(count), v = numbers(count), x_next = numbers(count);
  std::vector<float> v_uncond = numbers(count), v_ref = numbers(count), v_old = numbers(count);
  std::vector<float> grad_v(count), grad_v_uncond(count);
  std::vector<Coefficients> coef;
  std::vector<double> back;
  for (int row = 0; row < kRows; ++row) {
    coef.push_back({.9 + .001 * row, -.1, .3 + .01 * row, .5});
    back.push_back(number());
    back.push_back(number());
  }
  RowSums residuals(shape), kls(shape), moves(shape);
  const auto array = [&](std::vector<float>& values) {
    return Array{values.data(), Type::f32, elements};
  };
  const PolicyArgs args{shape,
                        array(x),
                        array(v),
                        array(x_next),
                        array(v_uncond),
                        array(v_ref),
                        array(v_old),
                        coef.data(),
                        2.5,
                        residuals.partial.get(),
                        kls.partial.get(),
                        moves.partial.get(),
                        back.data(),
                        array(grad_v),
                        array(grad_v_uncond)};
  baseline::policy_loss<float>(args, 0, shape.tasks);
  baseline::policy_loss_backward<float>(args, 0, shape.tasks);
  show("residuals", elements, residuals.partial.get(), blocks);
  show("kls", elements, kls.partial.get(), blocks);
  show("moves", elements, moves.partial.get(), blocks);
  show("grad_v", elements, grad_v.data(), count);
  show("grad_v_uncond", elements, grad_v_uncond.data(), count);
}

int main() {
  for (const int64_t elements : kElements) run(elements);
}
