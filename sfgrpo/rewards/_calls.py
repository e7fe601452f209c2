"""How a reward is called: how often again, how long, and what becomes of a call that fails."""

from __future__ import annotations

import copy
import faulthandler
import random
import sys
import threading
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from itertools import groupby
from typing import Any, Literal

import torch
from torch import Tensor

from sfgrpo.names import told
from sfgrpo.prompts import Prompt
from sfgrpo.rewards.base import Reward, RewardError, Unscored, staying

Policy = Literal["raise", "stop", "drop_group"]
GRACE = 10.0
"""Seconds after its time in which a call that holds Python's lock, so that no thread of ours runs,
is ended by the C code of faulthandler."""


@dataclass(frozen=True)
class Failure:
    """A prompt that a reward gave no score, in all its attempts."""

    text: str
    message: str


class Calls:
    """Calls rewards, and keeps account of what failed."""

    def __init__(
        self, *, retries: int = 0, policy: Policy = "raise", timeout: float | None = None,
        end: Callable[[str], object] | None = None,
    ) -> None:  # fmt: skip
        """
        Args:
            retries: how often a call that fails, or whose scores are not finite, is made again.
            policy: when all attempts failed, "raise" RewardError; or score nan and add to
                `failures`: with "drop_group" the prompts that fail on their own, with "stop" all of
                the call, and those of all later ones without asking.
            timeout: seconds after which `end` is told of a call that has not returned.
            end: ends the process for a reason; it may be called from another thread.
        """
        self.retries, self.policy, self.timeout, self.end = retries, policy, timeout, end
        self.failures: list[Failure] = []
        self.retried = 0
        """Calls that were made again,"""
        self.reported = 0
        """and how many of them, and of what the rewards themselves repeat, the logs know."""

    def score(self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt]) -> Tensor:
        """One reward's scores [B] float32 on the CPU; `samples` are its own to overwrite.

        Raises:
            RewardError: with the policy "raise": names reward, prompt and where that stands.
        """
        nothing = torch.full((len(asked),), torch.nan, dtype=torch.float32, device="cpu")
        if self.policy == "stop" and self.failures:
            return self._lost(nothing, asked, self.failures[0].message)
        try:
            return self._attempts(name, reward, samples, asked)
        except Unscored as error:
            if self.policy == "raise":
                raise
            return self._lost(error.scores, asked, str(error))
        except RewardError as error:
            if self.policy == "raise":
                raise
            return self._lost(nothing, asked, str(error))
        except _Divide:
            return self._one_by_one(name, reward, samples, asked)

    def _lost(self, scores: Tensor, asked: Sequence[Prompt], message: str) -> Tensor:
        texts = {asked[row].text for row in scores.isnan().nonzero().flatten().tolist()}
        self.failures += [Failure(text, message) for text in sorted(texts)]
        return scores

    def _one_by_one(
        self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt]
    ) -> Tensor:
        """A call for each prompt, so that one that cannot be scored costs the others nothing."""
        parts, row = [], 0
        for _, same in groupby(asked, key=_which):
            part = list(same)
            parts.append(self.score(name, reward, samples[row : row + len(part)], part))
            row += len(part)
        return torch.cat(parts)

    def _attempts(
        self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt]
    ) -> Tensor:
        """The scores of the first attempt that gives some which are finite, else of the last."""
        for _ in range(self.retries):
            generators = _Generators()
            try:
                scores = self._attempt(name, reward, samples.clone(), asked)
                if scores.isfinite().all():
                    return scores
            except Unscored:  # that reward has tried again itself
                raise
            except (
                Exception
            ):  # a reward of one's own raises what it likes; the last time, it is told
                pass
            generators.restore()
            self.retried += 1
        try:
            return self._attempt(name, reward, samples, asked)
        except Unscored:
            raise
        except Exception as error:
            if self.policy == "drop_group" and len({_which(prompt) for prompt in asked}) > 1:
                raise _Divide from error
            if isinstance(error, RewardError):
                raise
            blamed = self._blamed(name, reward, samples, asked, type(error))
            raise RewardError(f"{blamed}: {told(error)}") from error

    def _attempt(
        self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt]
    ) -> Tensor:
        try:
            found = self._call(name, reward, samples, asked)
        except Unscored as error:
            lost = asked[int(error.scores.isnan().nonzero()[0])]
            place = f"{lost.where}: " if lost.where else ""
            raise Unscored(f"{place}reward {name!r}: {error}", error.scores) from error
        score = _numbers(name, found, len(asked))
        if score.shape != (len(asked),):
            raise RewardError(
                f"reward {name!r} returned shape {tuple(score.shape)} for {counted(samples)}"
            )
        return score

    def _call(self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt]) -> Any:
        """What a reward returns."""
        with staying(f"reward {name!r}"), self._watched(name, reward, samples, asked):
            return reward(
                samples, [p.text for p in asked], [copy.deepcopy(p.metadata) for p in asked]
            )

    def _watched(self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt]) -> Any:
        if self.timeout is None or self.end is None or getattr(reward, "bounds_time", False):
            return nullcontext()
        what = f"reward {name!r} has not returned for {self.timeout:g} s (reward_timeout)"
        first = f", the first of prompt {asked[0].text!r}" if asked else ""
        return watched(self.timeout, self.end, f"{what} on {counted(samples)}{first}")

    def _blamed(
        self, name: str, reward: Reward, samples: Tensor, asked: Sequence[Prompt], how: type
    ) -> str:
        """What a reward failed on: the first prompt that raises such an error without the others,
        or all of them if none does."""
        for row, prompt in enumerate(asked):
            alone = name, reward, samples[row : row + 1], [prompt]
            if len(asked) == 1 or self._raises(how, *alone):
                place = f"{prompt.where}: " if prompt.where else ""
                return f"{place}reward {name!r} failed on prompt {prompt.text!r}"
        return (
            f"reward {name!r} failed on {counted(samples)} at once and on none alone, the first of "
            f"prompt {asked[0].text!r}"
        )

    def _raises(self, how: type, *call: Any) -> bool:
        try:
            self._call(*call)
        except Exception as error:
            return type(error) is how
        return False


class _Divide(Exception):
    """A call of several prompts failed, perhaps for one of them."""


class _Generators:
    """The generators that a reward may draw from: what a failed attempt drew, the next draws."""

    def __init__(self) -> None:
        self._numpy = sys.modules.get("numpy")
        self._python, self._torch = random.getstate(), torch.get_rng_state()
        self._arrays = self._numpy.random.get_state() if self._numpy else None
        self._cuda = torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else None

    def restore(self) -> None:
        random.setstate(self._python)
        torch.set_rng_state(self._torch)
        if self._numpy:
            self._numpy.random.set_state(self._arrays)
        if self._cuda is not None:
            torch.cuda.set_rng_state_all(self._cuda)


@contextmanager
def watched(seconds: float, end: Callable[[str], object], what: str) -> Iterator[None]:
    """Within the context, `end` is told what is late, and where it is, after so many seconds.

    Python cannot stop code that does not return, and whatever it holds stays held: all that is safe
    is to end the process, which leaves the checkpoints as they are.
    """
    thread = threading.get_ident()

    def late() -> None:
        at = traceback.extract_stack(sys._current_frames()[thread])[-1]
        end(f"{what}; it is at {at.filename}, line {at.lineno}")

    timer = threading.Timer(seconds, late)
    timer.daemon = True
    timer.start()
    if sys.__stderr__ is not None:
        faulthandler.dump_traceback_later(seconds + GRACE, exit=True, file=sys.__stderr__)
    try:
        yield
    finally:
        timer.cancel()
        faulthandler.cancel_dump_traceback_later()


def _which(prompt: Prompt) -> tuple[str, str]:
    """What tells prompts apart; their metadata may hold what no two samples share, or tensors."""
    return prompt.text, prompt.where


def _numbers(name: str, found: Any, count: int) -> Tensor:
    """What a reward returned, as float32 on the CPU and apart from what the reward may keep."""
    try:
        if not isinstance(found, Tensor):
            found = torch.as_tensor(found, device="cpu")
        if found.is_complex():
            raise TypeError("complex numbers have no order")
        if found.layout != torch.strided:
            raise TypeError(f"its layout is {found.layout}")
        return found.detach().to("cpu", torch.float32, copy=True)
    except (TypeError, ValueError, RuntimeError) as error:
        raise RewardError(
            f"reward {name!r} returned {type(found).__name__}, expected a tensor, an array or a "
            f"list of {count} numbers ({error})"
        ) from error


def counted(samples: Tensor) -> str:
    """How many samples there are, and of what kind."""
    return f"{len(samples)} {({4: 'images', 5: 'videos'}).get(samples.ndim, 'samples')}"
