"""What stops a run before it spoils its weights, each with the rows and prompts it is about.

Rewards that are not finite end the run, or drop their group (`train.on_nonfinite`). A loss that is
not finite ends it before the backward pass, a gradient before the optimiser step: weights and
checkpoints stay good. In fp16 a gradient overflows on purpose while the loss scale is searched;
`OVERFLOWS` skipped steps in a row are no search any more.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from sfgrpo import engine, ops
from sfgrpo.config import Recipe
from sfgrpo.credit import Rewards
from sfgrpo.drift import Disagreement, Drift
from sfgrpo.loss import Rows
from sfgrpo.prompts import Prompt
from sfgrpo.rewards import Failure
from sfgrpo.statistics import finite_groups

OVERFLOWS = 40
"""Halving the first loss scale, 2^16, to 1 takes half as many."""
SHOWN = 3
"""How many rows a message lists."""
SPOILT = "the sample itself is not finite, so look at the network and its decoder"
"""Said where a reward is not to blame for its number."""


class NonFinite(ValueError):
    """A reward, loss or gradient is not finite; the message says which."""


class Guard:
    """Looks at the numbers of each iteration."""

    def __init__(self, recipe: Recipe) -> None:
        self.recipe, self.train = recipe, recipe.train
        self.iteration, self.texts = 0, list[str]()
        self.overflows = 0
        self.failed_groups = 0
        """Of the iteration: a reward gave some of their trajectories no score."""
        self._warned = False
        self._rows: list[Tensor] = []

    def begin(self, iteration: int, prompts: Sequence[Prompt]) -> None:
        """What the following numbers belong to: an iteration or its evaluation, its prompts."""
        self.iteration, self.texts = iteration, [prompt.text for prompt in prompts]
        self._rows.clear()

    def rewards(
        self, rewards: Rewards, failures: Sequence[Failure] = (), spoilt: Tensor | None = None
    ) -> None:
        """The rewards of all ranks; sets `failed_groups`.

        Args:
            failures: prompts that a reward gave no score, of all ranks.
            spoilt: bool `[P N]`, trajectories whose last state is not finite; none by default.

        Raises:
            NonFinite: a reward is not finite and `train.on_nonfinite` is "stop", or it is
                "drop_group" and no group is left.
        """
        kept_P, lost = finite_groups(rewards.total), {failure.text for failure in failures}
        failed = [g for g, kept in enumerate(kept_P.tolist()) if not kept and self.texts[g] in lost]
        self.failed_groups = len(failed)
        failed_P = torch.zeros_like(kept_P)
        failed_P[failed] = True
        nonfinite_PNS = ~rewards.total.isfinite() & ~failed_P[:, None, None]
        if nonfinite_PNS.any():
            self._nonfinite(rewards, nonfinite_PNS, spoilt)

    def _nonfinite(self, rewards: Rewards, nonfinite_PNS: Tensor, spoilt: Tensor | None) -> None:
        places = nonfinite_PNS.nonzero().tolist()
        told = "; ".join(self._reward(rewards, *place) for place in places[:SHOWN])
        told += f" (and {len(places) - SHOWN} more)" if len(places) > SHOWN else ""
        told += f", in iteration {self.iteration}"
        group, member, _ = places[0]
        if spoilt is not None and spoilt.view(nonfinite_PNS.shape[:2])[group, member]:
            told += f": {SPOILT}"
        if self.train.on_nonfinite == "stop":
            raise NonFinite(f"{told}. Set train.on_nonfinite to drop_group to go on without.")
        if not finite_groups(rewards.total).any():
            raise NonFinite(f"no group is left: {told}")
        dropped = int(nonfinite_PNS.flatten(1).any(1).sum())
        _warn(f"{dropped} of {len(rewards.total)} groups dropped: {told}")

    def _reward(self, rewards: Rewards, group: int, member: int, state: int) -> str:
        name, value = "sum", rewards.total[group, member, state]
        for part, scores in rewards.scores.items():
            score = scores[group, member, state]
            if not score.isfinite():
                name, value = part, score
                break
        return (
            f"reward '{name}' is {float(value)} for prompt '{self.texts[group]}' (group {group}, "
            f"trajectory {member}, clean estimate of state {state} of {rewards.total.shape[2] - 1})"
        )

    def images(
        self, scores: Mapping[str, Tensor], prompt: Tensor, failures: Sequence[Failure],
        samples: Tensor,
    ) -> Mapping[str, Tensor]:  # fmt: skip
        """The scores `[B]` of an evaluation's samples `[B, ...]`, passed on unless they stop the
        run; those of prompts that a reward failed on do not.

        Raises:
            NonFinite: a score is not finite and `train.on_nonfinite` is "stop".
        """
        failed = {failure.text for failure in failures}
        for name, values in scores.items():
            bad = (~values.isfinite()).nonzero().flatten().tolist()
            bad = [row for row in bad if self.texts[int(prompt[row])] not in failed]
            if bad and name != "reward" and self.train.on_nonfinite == "stop":
                text = self.texts[int(prompt[bad[0]])]
                raise NonFinite(
                    f"reward '{name}' is {float(values[bad[0]])} for prompt '{text}' in the "
                    f"evaluation after iteration {self.iteration}"
                    + ("" if samples[bad[0]].isfinite().all() else f": {SPOILT}")
                )
        return scores

    def rows(self, rows: Rows, result: ops.PolicyLoss) -> None:
        """One micro-batch, before its backward pass.

        Raises:
            NonFinite: the loss or a statistic of a row is not finite.
        """
        s = result.stats
        columns = (
            s.ratio,
            s.logp,
            rows.logp_sampling,
            s.kl,
            rows.advantage,
            rows.prompt,
            rows.step,
        )
        numbers = torch.stack([column.double() for column in columns], 1)
        bad = ~numbers.isfinite().all(1)
        if bool(bad.any()) or not bool(result.loss.isfinite()):
            raise NonFinite(
                f"the loss is {result.loss.item()} in iteration {self.iteration}; rows that are not"
                f" finite: {int(bad.sum())} of the {len(bad)} of a micro-batch: "
                f"{self._told(numbers[bad])}. {self._advice()}"
            )
        self._rows.append(numbers)

    def drift(self, drift: Drift, budget: Sequence[float]) -> None:
        """How far rollout and training are apart at each step, before the first update.

        Raises:
            Disagreement: beyond the steps' budgets on average; or, where the ratio's old
                log-density is the sampler's, by more than half of the clip range.
        """
        shares = drift.of(budget)
        noisy = [share for share, b in zip(shares, budget, strict=True) if math.isfinite(b)]
        worst = max(range(len(shares)), key=shares.__getitem__)
        told = (
            f"|logp in training - logp at sampling| is {drift.mean:.2g} on average before the first"
            f" update of iteration {self.iteration}, {drift.per_step[worst]:.2g} at step {worst}, "
            f"where rounding explains {budget[worst]:.2g}"
        )
        if sum(noisy) > len(noisy):
            raise Disagreement(
                f"rollout and training disagree: {told}. The network has to compute the same in "
                "both: no dropout, the same guidance and weights. If it does, compute in higher "
                f"precision (model.dtype {self.recipe.model.dtype}), or accept it with a larger "
                "train.drift_budget."
            )
        limit = self.train.clip_range / 2
        if self.train.old_logp == "sampling" and drift.mean > limit:
            raise Disagreement(
                f"rounding alone fills the clip range: {told}, and train.clip_range / 2 is "
                f"{limit:.2g}. Set train.old_logp to training, which takes the ratio's old "
                "log-density from the training forward, or widen train.clip_range."
            )
        if shares[worst] > 1 and not self._warned:
            self._warned = True
            _warn(f"rollout and training disagree at a step: {told}")

    def norm(self, norm: float, *, taken: bool) -> float:
        """The gradient norm of an optimiser step that was `taken`, or not for overflow.

        Raises:
            NonFinite: the gradient is not finite (in fp16: too many times in a row).
        """
        rows, self._rows = torch.cat(self._rows), []
        if taken and math.isfinite(norm):
            self.overflows = 0
            return norm
        self.overflows += 1
        if self.recipe.model.dtype == "fp16" and self.overflows < OVERFLOWS:
            return norm
        far = (rows[:, 0] - 1).abs().argsort(descending=True)
        times = f"{self.overflows} times in a row, last " if self.overflows > 1 else ""
        raise NonFinite(
            f"the gradient is not finite {times}in iteration {self.iteration}, though the loss is. "
            f"Rows of this step whose ratio is farthest from 1: {self._told(rows[far])}. "
            f"{self._advice()}"
        )

    def _told(self, rows: Tensor) -> str:
        return "; ".join(
            f"prompt '{self.texts[int(prompt)]}', step {int(step)}, ratio {ratio:.4g}, "
            f"logp {logp:.4g} (at sampling {old:.4g}), kl {kl:.3g}, advantage {advantage:.3g}"
            for ratio, logp, old, kl, advantage, prompt, step in rows[:SHOWN].tolist()
        )

    def _advice(self) -> str:
        return (
            "No optimiser step was taken with it: the weights and the checkpoints are as they were."
            f" A lower train.learning_rate (now {self.train.learning_rate:g}) or, in fp16, bf16 may"
            " help; continuing the run as it is repeats this."
        )


def _warn(message: str) -> None:
    """Once for all ranks, which see the same numbers."""
    if engine.rank() == 0:
        warnings.warn(message, stacklevel=3)
