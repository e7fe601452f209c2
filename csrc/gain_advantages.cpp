// Rewards along trajectories -> advantage of each step, statistics in double.
// Equations, schema and specification: sfgrpo/ops/gain_advantages.py.
//
// A few thousand numbers, memory-bound and rarely called: plain loops, one prompt per task.
#include "rows.h"

namespace sfgrpo {

enum class Normalization : int64_t { joint, per_step, centered, uniform };
constexpr double kRelativeStdFloor = 1e-6;

// Mean and population variance of what was added.
struct Moments {
  double sum = 0, squares = 0;
  int64_t count = 0;

  double mean() const { return count > 0 ? sum / count : 0.0; }
  double std() const { return count > 0 ? std::sqrt(squares / count) : 0.0; }
};

// One prompt's group: N trajectories of T steps.
struct Group {
  int64_t trajectories, steps;
  const double* rewards;  // [N, T + 1]
  const bool* mask;       // [N, T], or null
  float* advantages;      // [N, T]

  bool counts(int64_t i, int64_t k) const { return mask == nullptr || mask[i * steps + k]; }
  double value(Normalization how, int64_t i, int64_t k) const {
    const double* r = rewards + i * (steps + 1);
    return how == Normalization::uniform ? r[steps] : r[k + 1] - r[k];
  }
  bool enters(Normalization how, int64_t i, int64_t k) const {
    return how == Normalization::uniform || counts(i, k);
  }

  void run(Normalization how, double limit) const {
    double largest = 0;
    for (int64_t i = 0; i < trajectories * (steps + 1); ++i)
      largest = std::max(largest, std::abs(rewards[i]));
    // Two passes: means first, then deviations from them.
    const bool joint_mean = how == Normalization::joint;
    const bool joint_std = how == Normalization::joint || how == Normalization::centered;
    std::vector<Moments> means(steps), spreads(steps);
    for (int64_t i = 0; i < trajectories; ++i)
      for (int64_t k = 0; k < steps; ++k)
        if (enters(how, i, k)) {
          Moments& m = means[joint_mean ? 0 : k];
          m.sum += value(how, i, k);
          ++m.count;
        }
    for (int64_t i = 0; i < trajectories; ++i)
      for (int64_t k = 0; k < steps; ++k)
        if (enters(how, i, k)) {
          const double deviation = value(how, i, k) - means[joint_mean ? 0 : k].mean();
          Moments& m = spreads[joint_std ? 0 : k];
          m.squares += deviation * deviation;
          ++m.count;
        }
    for (int64_t k = 0; k < steps; ++k) {
      const double mean = means[joint_mean ? 0 : k].mean(), std = spreads[joint_std ? 0 : k].std();
      const bool alive = std > kRelativeStdFloor * largest;
      for (int64_t i = 0; i < trajectories; ++i) {
        const double advantage = alive ? (value(how, i, k) - mean) / std : 0.0;
        const double limited = std::clamp(advantage, -limit, limit);
        advantages[i * steps + k] = counts(i, k) ? static_cast<float>(limited) : 0.0f;
      }
    }
  }
};

Tensor gain_advantages(const Tensor& rewards, int64_t normalize, const std::optional<Tensor>& mask,
                       std::optional<double> clamp) {
  if (rewards.dim() != 3) fail("rewards: expected [P, N, T + 1]");
  const int64_t prompts = rewards.size(0), trajectories = rewards.size(1);
  const int64_t steps = rewards.size(2) - 1, gains = trajectories * steps;
  if (steps < 1) fail("rewards: expected at least two states");
  const std::vector<double> values = numbers("rewards", rewards, rewards.numel());
  for (const double value : values)
    if (!std::isfinite(value)) fail("rewards: got a value that is not finite, expected finite rewards");
  Tensor dense_mask;
  if (mask) {
    if (mask->scalar_type() != ScalarType::Bool || mask->numel() != prompts * gains)
      fail("mask: expected bool [P, N, T]");
    dense_mask = mask->is_contiguous() ? *mask : torch::stable::contiguous(*mask);
  }
  const bool* masks = mask ? static_cast<const bool*>(dense_mask.data_ptr()) : nullptr;
  const Tensor advantages =
      torch::stable::new_empty(rewards, {prompts, trajectories, steps}, ScalarType::Float);
  float* out = static_cast<float*>(advantages.data_ptr());
  const double limit = clamp ? *clamp : HUGE_VAL;
  torch::stable::parallel_for(
      0, prompts, std::max<int64_t>(1, 16384 / std::max<int64_t>(gains, 1)),
      [&](int64_t begin, int64_t end) {
        for (int64_t p = begin; p < end; ++p)
          Group{trajectories, steps, values.data() + p * trajectories * (steps + 1),
                masks == nullptr ? nullptr : masks + p * gains, out + p * gains}
              .run(static_cast<Normalization>(normalize), limit);
      });
  return advantages;
}

// The advantage of step k over the reward of state k; the final rewards stay.
void gain_advantages_(const Tensor& rewards, int64_t normalize, const std::optional<Tensor>& mask,
                      std::optional<double> clamp) {
  const Tensor advantages = gain_advantages(rewards, normalize, mask, clamp);
  Tensor all = rewards;
  Tensor overwritten = torch::stable::narrow(all, 2, 0, rewards.size(2) - 1);
  torch::stable::copy_(overwritten, advantages);
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  library.impl("gain_advantages", TORCH_BOX(&sfgrpo::gain_advantages));
  library.impl("gain_advantages_", TORCH_BOX(&sfgrpo::gain_advantages_));
}
