"""A vision-language model as judge, behind a server that speaks OpenAI's protocol (vLLM, SGLang).

    vllm serve Qwen/Qwen2.5-VL-7B-Instruct --port 8000

    reward: {vlm: 1.0}
    reward_options:
      vlm: {url: "http://127.0.0.1:8000/v1", model: Qwen/Qwen2.5-VL-7B-Instruct}

Each image is shown on its own, with a text in which {prompt} stands for its prompt and
{metadata.KEY} for what its metadata hold under KEY. There are two kinds of answer:

    "score"  a JSON object such as {"score": 7}, within `score_range`; the reward is where it lies
             in the range, from 0 to 1. Anything else is malformed: it is sent back once more with
             what is wrong about it.
    "yes"    the reward is P(yes) / (P(yes) + P(no)) of the answer's first token, of those tokens
             that spell yes or no in any case; as smooth as the model is sure.

With `sources: true` the images that a prompt brings (`sfgrpo.prompts.images`) are shown before the
one that was made, no larger than it: for edits.

Sampling is greedy. Servers that batch requests as they come may still answer the same question with
other last digits, as every model on a GPU does whose batches differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from sfgrpo.remote import pictures, trust
from sfgrpo.remote import token as secret
from sfgrpo.remote.servers import Failed, Patience, Question, Servers, Unusable
from sfgrpo.remote.wire import JSON
from sfgrpo.rewards import _sources
from sfgrpo.rewards._answers import parsed_score, probability_of_yes
from sfgrpo.rewards._template import EDITED, PLACE, check, filled
from sfgrpo.rewards.base import Metadata, Unscored, expect_images

Answer = Literal["score", "yes"]
TOKENS = {"score": 256, "yes": 1}
"""Of an answer, unless `extra` has its own `max_tokens`."""
RANKED = 20
"""Tokens whose probability is asked for, the most that vLLM gives."""
TEMPLATES = {
    "score": 'An image was made for the prompt "{prompt}". How well does it follow the prompt, and '
    'how good is it? Answer with JSON alone: {"score": S}, S a number from LOW (not at all) to '
    "HIGH (perfectly).",
    "yes": 'Does this image show "{prompt}"? Answer yes or no.',
}
OF_EDITS = {
    "score": EDITED + "How well does it do what was told, and how well does it keep all else as it "
    'was? Answer with JSON alone: {"score": S}, S a number from LOW (not at all) to HIGH '
    "(perfectly).",
    "yes": EDITED + "Does it do what was told, and keep all else as it was? Answer yes or no.",
}


@dataclass(frozen=True, kw_only=True)
class Talk:
    """What is asked, and how an answer is read."""

    model: str
    template: str
    answer: Answer = "score"
    score_range: tuple[float, float] = (0.0, 10.0)
    system: str | None = None
    form: pictures.Kind = "png"
    sources: bool = False
    """Whether a prompt's images are shown, too."""
    extra: Mapping[str, Any] = field(default_factory=dict)
    """More of the request's keys."""

    def request(self, image: Tensor, prompt: str, metadata: Metadata) -> dict[str, Any]:
        """The request's JSON for one image `[3, H, W]`."""
        given = _sources.beside(metadata, image.shape) if self.sources else []
        shown = [pictures.pack(source, self.form) for source in given]
        shown.append(pictures.encode(image, self.form))
        content: list[dict[str, Any]] = [
            {"type": "image_url", "image_url": {"url": f"data:image/{self.form};base64,{file}"}}
            for file in shown
        ]
        content.append({"type": "text", "text": filled(self.template, prompt, metadata)})
        said: list[dict[str, Any]] = [{"role": "user", "content": content}]
        if self.system is not None:
            said.insert(0, {"role": "system", "content": self.system})
        asked: dict[str, Any] = {
            "model": self.model, "messages": said, "temperature": 0,
            "max_tokens": TOKENS[self.answer],
        }  # fmt: skip
        if self.answer == "yes":
            asked |= {"logprobs": True, "top_logprobs": RANKED}
        return asked | dict(self.extra)

    def read(self, answer: bytes, asked: dict[str, Any]) -> float:
        """The reward of an answer to `asked`.

        Raises:
            Unusable: it is malformed; what to send instead is the talk so far and a correction.
        """
        try:
            choice = json.loads(answer)["choices"][0]
            said = choice["message"]["content"]
        except (ValueError, KeyError, IndexError, TypeError, RecursionError):
            raise Unusable("an answer that is not of OpenAI's protocol") from None
        if self.answer == "yes":
            return probability_of_yes(choice)
        try:
            score = parsed_score(said, *self.score_range)
        except ValueError as error:
            wrong = str(error)
            raise Unusable(wrong, lambda: self._corrected(asked, said, wrong)) from None
        low, high = self.score_range
        return (score - low) / (high - low)

    def _corrected(self, asked: dict[str, Any], said: Any, wrong: str) -> bytes:
        """Greedy sampling would repeat itself, so the model is told."""
        low, high = self.score_range
        correction = (
            f'This was {wrong}. Answer with a JSON object alone, whose key "score" is a number '
            f"from {low:g} to {high:g}."
        )
        more = [
            {"role": "assistant", "content": str(said)[:2000]},
            {"role": "user", "content": correction},
        ]
        return json.dumps({**asked, "messages": [*asked["messages"], *more]}).encode()


class VlmReward:
    """What a vision-language model thinks of each image."""

    bounds_time = True

    def __init__(self, servers: Servers, talk: Talk) -> None:
        self._servers, self._talk = servers, talk

    @property
    def retried(self) -> int:
        """Requests that were sent once more."""
        return self._servers.retried

    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        expect_images(images)
        shown = images.detach().cpu()
        questions = [
            self._question(*one) for one in zip(shown, prompts, metadata, strict=True)
        ]  # fmt: skip
        answers = self._servers.ask_all(questions)
        scores = [math.nan if isinstance(answer, Failed) else answer for answer in answers]
        found = torch.tensor(scores, dtype=torch.float32, device="cpu")
        if failed := [answer for answer in answers if isinstance(answer, Failed)]:
            raise Unscored(str(failed[0]), found)
        return found

    def _question(self, image: Tensor, prompt: str, metadata: Metadata) -> Question[float]:
        asked: dict[str, Any] = {}

        def body() -> tuple[str, bytes]:
            asked.update(self._talk.request(image, prompt, metadata))
            return JSON, json.dumps(asked).encode()

        return Question(
            "/chat/completions", body, lambda answer: self._talk.read(answer, asked),
            f"prompt {prompt!r}",
        )  # fmt: skip

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError for metadata that lack what is shown, FileNotFoundError for a lost image."""
        if self._talk.sources:
            _sources.check(metadata)
        check(self._talk.template, prompts, metadata)


def _template(given: str | None, file: str | None, default: str, low: float, high: float) -> str:
    if given is not None and file is not None:
        raise ValueError("template and template_file exclude each other")
    if file is not None:
        given = Path(file).expanduser().read_text(encoding="utf-8")
    if given is None:
        return default.replace("LOW", f"{low:g}").replace("HIGH", f"{high:g}")
    if not PLACE.search(given):
        raise ValueError("the template shows neither {prompt} nor {metadata.KEY}")
    return given


def build(
    *,
    url: str | Sequence[str],
    model: str,
    answer: Answer = "score",
    template: str | None = None,
    template_file: str | None = None,
    system: str | None = None,
    score_range: Sequence[float] = (0, 10),
    images: pictures.Kind = "png",
    sources: bool = False,
    extra: Mapping[str, Any] | None = None,
    token_env: str = "OPENAI_API_KEY",
    token_file: str | None = None,
    ca_file: str | None = None,
    in_flight: int = 16,
    connect_timeout: float = 5.0,
    timeout: float = 120.0,
    retries: int = 8,
    backoff: float = 0.5,
) -> VlmReward:
    """The reward of a vision-language model.

    Args:
        url: address of a server up to "/v1", or a list of them that serve the same model.
        model: its name there.
        answer: "score" or "yes": see above.
        template: what is asked, or `template_file`, a text file of it; by default a question of
            ours for either kind of answer.
        system: the system message; by default none.
        score_range: lowest and highest score.
        images: "png" or "jpeg".
        sources: whether the images that a prompt brings are shown first.
        extra: further keys of the request, as `{response_format: ..., max_tokens: 512}`.
        token_env: environment variable with the servers' key; none is sent if it is not set.
        token_file: file that holds it, instead.
        ca_file: as of reward `http`.
        in_flight: images at once, for each server.
        connect_timeout, timeout, retries, backoff: as of reward `http`.

    Raises:
        ValueError: values that make no sense.
        OSError: a file cannot be read.
    """
    try:
        if answer not in get_args(Answer) or images not in get_args(pictures.Kind):
            raise ValueError(
                f"answer must be score or yes, images png or jpeg; got {answer!r} and {images!r}"
            )
        asked = OF_EDITS if sources else TEMPLATES
        low, high = map(float, score_range)
        if not -math.inf < low < high < math.inf:
            raise ValueError(f"score_range must be two numbers, lowest first: got {score_range!r}")
        patience = Patience(
            connect_timeout=connect_timeout, timeout=timeout, retries=retries, backoff=backoff,
            in_flight=in_flight,
        )  # fmt: skip
        talk = Talk(
            model=model, template=_template(template, template_file, asked[answer], low, high),
            answer=answer, score_range=(low, high), system=system, form=images, sources=sources,
            extra=extra or {},
        )  # fmt: skip
        token = secret.read(file=token_file, variable=token_env)
        verify = trust.context(ca_file)
        servers = Servers(url, token=token, patience=patience, verify=verify)
    except ValueError as error:
        raise ValueError(f"reward 'vlm': {error}") from None
    return VlmReward(servers, talk)
