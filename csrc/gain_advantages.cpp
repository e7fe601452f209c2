// Rewards along trajectories -> advantage of each step, statistics in double.
// Equations, schema and specification: sfgrpo/ops/gain_advantages.py.
//
// Sums run down the trajectories, one for each step side by side: vectors of steps need no
// reordering of additions, so every instruction set adds in the same order.
#ifndef SFGRPO_TARGET

#include "rows.h"

namespace sfgrpo {

enum class Normalization : int64_t { joint, per_step, centered, uniform };
constexpr double kRelativeStdFloor = 1e-6;

struct GainArgs {
  int64_t trajectories, steps;
  Normalization how;
  double limit;
  Array rewards;           // [P, N, T + 1]
  const uint8_t* mask;     // [P, N, T], of which rows may be one and the same, or null
  int64_t mask_strides[2];  // from prompt to prompt, from trajectory to trajectory
  float* advantages;       // [P, N, T]
  uint8_t* finite;         // [P]: whether all rewards of the prompt are
};

}  // namespace sfgrpo

#define SFGRPO_FILE "gain_advantages.cpp"
#include "targets.h"

namespace sfgrpo {

struct GainOperands {
  Tensor rewards;
  int64_t normalize;
  Optional mask;
  std::optional<double> clamp;
  auto tie() { return std::tie(rewards, normalize, mask, clamp); }
};

Tensor gain_advantages(const GainOperands& o) {
  const Tensor& rewards = o.rewards;
  if (rewards.dim() != 3) fail("rewards: expected [P, N, T + 1]");
  const int64_t prompts = rewards.size(0), trajectories = rewards.size(1);
  const int64_t steps = rewards.size(2) - 1, gains = trajectories * steps;
  if (steps < 1) fail("rewards: expected at least two states");
  const Operand values("rewards", rewards);
  const bool f64 = values.array.type == Type::f64;
  if (!f64 && values.array.type != Type::f32) fail("rewards: expected float32 or float64");
  Optional mask = o.mask;
  if (mask) {
    if (mask->scalar_type() != ScalarType::Bool || mask->dim() != 3 ||
        mask->numel() != prompts * gains)
      fail("mask: expected bool [P, N, T]");
    if (steps > 1 && mask->stride(2) != 1) mask = torch::stable::contiguous(*mask);
  }
  const Tensor advantages =
      new_empty(rewards, {prompts, trajectories, steps}, ScalarType::Float);
  std::vector<uint8_t> finite(prompts, 1);
  const GainArgs args{trajectories,
                      steps,
                      static_cast<Normalization>(o.normalize),
                      o.clamp ? *o.clamp : HUGE_VAL,
                      values.array,
                      mask ? static_cast<const uint8_t*>(mask->data_ptr()) : nullptr,
                      {mask ? mask->stride(0) : 0, mask ? mask->stride(1) : 0},
                      static_cast<float*>(advantages.data_ptr()),
                      finite.data()};
  const auto kernel =
      f64 ? SFGRPO_SELECT(gain_advantages<double>) : SFGRPO_SELECT(gain_advantages<float>);
  torch::stable::parallel_for(0, prompts,
                              std::max<int64_t>(1, 16384 / std::max<int64_t>(gains, 1)),
                              [&](int64_t begin, int64_t end) { kernel(args, begin, end); });
  if (std::find(finite.begin(), finite.end(), 0) != finite.end())
    fail("rewards: got a value that is not finite, expected finite rewards");
  return advantages;
}

// Rows of T advantages over the first T of the T + 1 rewards.
template <class R>
void overwrite(R* rewards, const float* advantages, int64_t rows, int64_t steps) {
  torch::stable::parallel_for(0, rows, std::max<int64_t>(1, kGrainCopy / steps),
                              [&](int64_t begin, int64_t end) {
                                for (int64_t row = begin; row < end; ++row)
                                  std::copy_n(advantages + row * steps, steps,
                                              rewards + row * (steps + 1));
                              });
}

// The advantage of step k over the reward of state k; the final rewards stay.
void gain_advantages_(const GainOperands& o) {
  const Tensor result = gain_advantages(o);
  const Operand all("rewards", o.rewards);
  const float* advantages = static_cast<const float*>(result.data_ptr());
  const int64_t rows = result.size(0) * result.size(1), steps = result.size(2);
  if (all.array.type == Type::f64)
    overwrite(static_cast<double*>(all.array.data), advantages, rows, steps);
  else
    overwrite(static_cast<float*>(all.array.data), advantages, rows, steps);
  all.write_back(o.rewards);
}

}  // namespace sfgrpo

STABLE_TORCH_LIBRARY_IMPL(sfgrpo, CPU, library) {
  SFGRPO_OP(gain_advantages);
  SFGRPO_OP(gain_advantages_);
}

#else  // once per instruction set

#include "vec.h"

namespace sfgrpo::SFGRPO_TARGET {
namespace {

// Per step, over the trajectories of one group; `mask` is the row of one, as numbers.
struct Columns {
  std::vector<double> sum, count, centre, square, std, mask;
  explicit Columns(int64_t steps)
      : sum(steps), count(steps), centre(steps), square(steps), std(steps), mask(steps) {}
};

template <class R>
struct Group {
  const GainArgs& args;
  Columns& c;
  const R* rewards;
  const uint8_t* mask;
  bool uniform;

  Group(const GainArgs& args_, Columns& columns, int64_t prompt)
      : args(args_),
        c(columns),
        rewards(static_cast<const R*>(args_.rewards.data) +
                prompt * args_.trajectories * (args_.steps + 1)),
        mask(args_.mask == nullptr ? nullptr : args_.mask + prompt * args_.mask_strides[0]),
        uniform(args_.how == Normalization::uniform) {}

  // 1 where the mask lets a step of the trajectory count, else 0; null where all count.
  const double* masked(int64_t i) const {
    if (mask == nullptr) return nullptr;
    if (i > 0 && args.mask_strides[1] == 0) return c.mask.data();  // the same for all
    const uint8_t* __restrict m = mask + i * args.mask_strides[1];
    double* __restrict row = c.mask.data();
    for (int64_t k = 0; k < args.steps; ++k) row[k] = m[k] ? 1.0 : 0.0;
    return row;
  }

  // body(step, value, 1 or counts[step]).
  template <class Body>
  void each(int64_t i, const double* __restrict counts, Body body) const {
    const R* __restrict r = rewards + i * (args.steps + 1);
    const auto over = [&](auto value) {
      const int64_t steps = args.steps;
      if (counts == nullptr)
        for (int64_t k = 0; k < steps; ++k) body(k, value(k), 1.0);
      else
        for (int64_t k = 0; k < steps; ++k) body(k, value(k), counts[k]);
    };
    const double last = r[args.steps];
    if (uniform) over([&](int64_t) { return last; });
    else over([&](int64_t k) { return static_cast<double>(r[k + 1]) - static_cast<double>(r[k]); });
  }

  // Of what enters the statistics.
  template <class Body>
  void each_counted(Body body) const {
    for (int64_t i = 0; i < args.trajectories; ++i)
      each(i, uniform ? nullptr : masked(i), body);
  }

  // The largest |reward|; infinite if one is not finite.
  double largest() const {
    double most[8] = {}, spoilt[8] = {};
    const int64_t count = args.trajectories * (args.steps + 1);
    const auto look = [&](int64_t lane, double reward) {
      const double size = std::abs(reward);
      most[lane] = size > most[lane] ? size : most[lane];
      spoilt[lane] += reward - reward;  // nan for inf and nan, else 0
    };
    int64_t i = 0;
    for (; i + 8 <= count; i += 8)
      for (int64_t lane = 0; lane < 8; ++lane) look(lane, rewards[i + lane]);
    for (; i < count; ++i) look(0, rewards[i]);
    double result = 0;
    for (int64_t lane = 0; lane < 8; ++lane) {
      if (!(spoilt[lane] == 0)) return HUGE_VAL;
      result = std::max(result, most[lane]);
    }
    return result;
  }

  // Replaces each column's numbers by those of all columns.
  static void pool(std::vector<double>& columns) {
    double total = 0;
    for (const double value : columns) total += value;
    std::fill(columns.begin(), columns.end(), total);
  }

  void statistics() const {
    const bool joint = args.how == Normalization::joint;
    double* __restrict sum = c.sum.data();
    double* __restrict count = c.count.data();
    double* __restrict square = c.square.data();
    double* __restrict centre = c.centre.data();
    std::fill(c.sum.begin(), c.sum.end(), 0.0);
    std::fill(c.count.begin(), c.count.end(), 0.0);
    std::fill(c.square.begin(), c.square.end(), 0.0);
    each_counted([&](int64_t k, double value, double enters) {
      sum[k] += enters * value;
      count[k] += enters;
    });
    if (joint) {
      pool(c.sum);
      pool(c.count);
    }
    for (int64_t k = 0; k < args.steps; ++k) centre[k] = sum[k] / std::max(count[k], 1.0);
    each_counted([&](int64_t k, double value, double enters) {
      const double deviation = value - centre[k];
      square[k] += enters * deviation * deviation;
    });
    if (joint || args.how == Normalization::centered) {
      pool(c.square);
      if (!joint) pool(c.count);
    }
    for (int64_t k = 0; k < args.steps; ++k)
      c.std[k] = std::sqrt(square[k] / std::max(count[k], 1.0));
  }

  void write(double largest_reward, float* out) const {
    // A column without signal gets 0, as does what is masked: the values are multiplied away.
    double* __restrict alive = c.count.data();
    double* __restrict divisor = c.std.data();
    const double* __restrict centre = c.centre.data();
    for (int64_t k = 0; k < args.steps; ++k) {
      alive[k] = divisor[k] > kRelativeStdFloor * largest_reward ? 1.0 : 0.0;
      if (alive[k] == 0) divisor[k] = 1.0;
    }
    const double limit = args.limit;
    for (int64_t i = 0; i < args.trajectories; ++i) {
      float* __restrict row = out + i * args.steps;
      each(i, masked(i), [&](int64_t k, double value, double counts) {
        const double advantage = alive[k] * counts * (value - centre[k]) / divisor[k];
        const double above = advantage < -limit ? -limit : advantage;
        row[k] = static_cast<float>(above > limit ? limit : above) + 0.0f;  // no -0
      });
    }
  }
};

template <class R>
void gain_advantages(const GainArgs& args, int64_t first, int64_t last) {
  Columns columns(args.steps);
  for (int64_t prompt = first; prompt < last; ++prompt) {
    const Group<R> group(args, columns, prompt);
    const double largest = group.largest();
    args.finite[prompt] = largest < HUGE_VAL;
    group.statistics();
    group.write(largest, args.advantages + prompt * args.trajectories * args.steps);
  }
}

}  // namespace
}  // namespace sfgrpo::SFGRPO_TARGET

#endif
