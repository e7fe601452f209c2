"""A reward that runs somewhere else: `sfgrpo serve-reward` on this machine or another.

For a reward whose packages conflict with the trainer's, or which needs a GPU of its own. Start the
server in the reward's environment and name its address:

    reward: {http: 1.0}
    reward_options: {http: {url: "http://127.0.0.1:8000"}}

Several of them have a label of their own: `reward: {http/pick: 0.5, http/ocr: 0.5}`. The samples of
a call are divided into batches, which go to all servers of `url` side by side; scores come back in
the order of the samples. Sent as safetensors, which is the default, a sample arrives bit for bit,
and scores are those of the reward in process as far as they do not depend on the batch, or on how
its images lie in memory (those that a decoder makes may have their channels last).
"""

from __future__ import annotations

import json
import math
import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from sfgrpo.remote import token as secret
from sfgrpo.remote import trust, wire
from sfgrpo.remote.servers import Failed, Patience, Question, Servers, Unusable
from sfgrpo.rewards.base import Metadata, Unscored

CHECKED = 256
"""Prompts that are checked at once, if servers take as many."""
UNSCORABLE = 422
"""The status by which a server says of prompts that its reward cannot score them."""


class HttpReward:
    """Scores of servers that serve the same reward."""

    bounds_time = True

    def __init__(self, servers: Servers, *, batch: int, form: wire.Form) -> None:
        """Asks every server what it serves.

        Raises:
            ValueError: none answers, or they serve different rewards.
        """
        self._servers = servers
        self._form: wire.Form = form
        found = servers.each(Question("/health", lambda: ("", b""), _described))
        told = [answer for answer in found if not isinstance(answer, Failed)]
        lost = [answer for answer in found if isinstance(answer, Failed)]
        if not told:
            raise ValueError(f"reward 'http': no server answers: {lost[0]}")
        if lost:
            warnings.warn(f"reward 'http': goes on without {lost[0]}", stacklevel=3)
        if len({(answer["reward"], answer["takes_video"]) for answer in told}) > 1:
            served = ", ".join(sorted({str(answer["reward"]) for answer in told}))
            raise ValueError(f"reward 'http': its servers serve different rewards: {served}")
        self._urls = ", ".join(server.url for server in servers.servers)
        self.served: str = told[0]["reward"]
        self.takes_video: bool = told[0]["takes_video"]
        most = min(answer["most_samples"] for answer in told)
        self._batch, self._checked = min(batch, most), min(CHECKED, most)

    @property
    def retried(self) -> int:
        """Requests that were sent once more."""
        return self._servers.retried

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        if not len(images):
            return torch.empty(0, dtype=torch.float32, device="cpu")
        scores = torch.full((len(images),), torch.nan, device="cpu")
        samples, starts = images.detach().cpu(), range(0, len(images), self._batch)
        parts = [slice(start, min(start + self._batch, len(images))) for start in starts]
        failed = self._ask(parts, samples, prompts, metadata, scores)
        # One prompt that cannot be scored must not take those with it that came along.
        divided = [
            piece for part, why in failed if why.useless for piece in _by_prompt(part, prompts)
        ]
        failed = [(part, why) for part, why in failed if not why.useless]
        if divided:
            failed += self._ask(divided, samples, prompts, metadata, scores)
        if failed:
            raise Unscored(str(failed[0][1]), scores)
        return scores

    def _ask(
        self, parts: Sequence[slice], samples: Tensor, prompts: Sequence[str],
        metadata: Sequence[Metadata], scores: Tensor,
    ) -> list[tuple[slice, Failed]]:  # fmt: skip
        """Write the scores of these parts of the samples; returns the parts that have none."""
        questions = [
            Question(
                "/v1/score",
                lambda p=part: wire.encode(samples[p], prompts[p], metadata[p], self._form),
                lambda answer, p=part: self._read(answer, len(prompts[p])),
                _first(prompts[part]),
            )
            for part in parts
        ]
        failed = []
        for part, answer in zip(parts, self._servers.ask_all(questions), strict=True):
            if isinstance(answer, Failed):
                failed.append((part, answer))
            else:
                scores[part] = answer
        return failed

    def _read(self, answer: bytes, count: int) -> Tensor:
        """The scores of an answer, which names their reward: behind the same address another may be
        served after a restart, and a server that was away at the start never told its own.

        Raises:
            Failed: it is another's.
        """
        said = _object(answer)
        if (now := said.get("reward")) != self.served:
            raise Failed(
                f"{self._urls}: scores of reward {now!r}; when the run was started, "
                f"{self.served!r} was served: start that one again"
            )
        return _scores(said, count)

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """ValueError, as the served reward says it, for prompts that it cannot score;
        ConnectionError for what is no prompt's fault: no server answers, or none takes the token.
        """
        for start in range(0, len(prompts), self._checked):
            part = slice(start, start + self._checked)
            body = wire.question(prompts[part], metadata[part])
            try:
                self._servers.ask(Question("/v1/check", lambda b=body: (wire.JSON, b), bool))
            except Failed as error:
                of_prompts = error.status == UNSCORABLE
                raise (ValueError if of_prompts else ConnectionError)(str(error)) from None


def _by_prompt(part: slice, prompts: Sequence[str]) -> list[slice]:
    """The part, divided where the prompt changes."""
    starts = [
        row for row in range(part.start, part.stop)
        if row == part.start or prompts[row] != prompts[row - 1]
    ]  # fmt: skip
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], part.stop], strict=True)]


def _first(prompts: Sequence[str]) -> str:
    more = f" and {len(prompts) - 1} more" if len(prompts) > 1 else ""
    return f"prompt {prompts[0]!r}{more}"


def _object(answer: bytes) -> dict[str, Any]:
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        raise Unusable("an answer that is no JSON") from None
    if not isinstance(found, dict):
        raise Unusable("an answer that is no JSON object")
    return found


def _described(answer: bytes) -> dict[str, Any]:
    found = _object(answer)
    kinds = {"reward": str, "takes_video": bool, "most_samples": int}
    known = all(isinstance(found.get(key), kind) for key, kind in kinds.items())
    if not known or found["most_samples"] < 1:
        raise Unusable("it is no server of `sfgrpo serve-reward`")
    return found


def _scores(said: dict[str, Any], count: int) -> Tensor:
    """`[count]` scores; a null, which stands for what is not finite, is nan."""
    found = said.get("scores")
    if not isinstance(found, list) or len(found) != count:
        what = f"{len(found)} scores" if isinstance(found, list) else "no scores"
        raise Unusable(f"an answer with {what} for {count} samples")
    try:
        if any(isinstance(score, str | bool) for score in found):
            raise TypeError
        numbers = [math.nan if score is None else float(score) for score in found]
    except (TypeError, OverflowError):
        raise Unusable("an answer whose scores are no numbers") from None
    return torch.tensor(numbers, dtype=torch.float32, device="cpu")


def build(
    *,
    url: str | Sequence[str],
    token_env: str = secret.VARIABLE,
    token_file: str | None = None,
    ca_file: str | None = None,
    images: wire.Form = "safetensors",
    batch: int = 16,
    in_flight: int = 4,
    connect_timeout: float = 5.0,
    timeout: float = 120.0,
    retries: int = 8,
    backoff: float = 0.5,
) -> HttpReward:
    """The reward of one server or several that serve the same.

    Args:
        url: address of a server, or a list of them, such as "http://127.0.0.1:8000".
        token_env: environment variable that holds the servers' token.
        token_file: file that holds it, instead.
        ca_file: certificate, or those of the authorities, that servers at https are believed by;
            None is the usual ones.
        images: "safetensors" (bits as they are), "png" or "jpeg" (smaller; eight bits a channel).
        batch: samples of one request.
        in_flight: requests at once, for each server.
        connect_timeout: seconds to reach a server.
        timeout: seconds until a batch is scored, with its waiting in the server's queue.
        retries: how often a batch is sent again to each server before it is given up: pauses of
            `backoff` seconds, doubled each time up to 30, last a minute and a half by default,
            in which a server can be started again.

    Raises:
        ValueError: values that make no sense; no server answers.
        OSError: a file cannot be read.
    """
    if images not in wire.FORMS:
        raise ValueError(f"reward 'http': images must be one of {wire.FORMS}, got {images!r}")
    if batch < 1:
        raise ValueError(f"reward 'http': batch must be at least 1, got {batch}")
    try:
        patience = Patience(
            connect_timeout=connect_timeout, timeout=timeout, retries=retries, backoff=backoff,
            in_flight=in_flight,
        )  # fmt: skip
        token = secret.read(file=token_file, variable=token_env)
        verify = trust.context(ca_file)
        servers = Servers(url, token=token, patience=patience, verify=verify)
    except ValueError as error:
        raise ValueError(f"reward 'http': {error}") from None
    return HttpReward(servers, batch=batch, form=images)
