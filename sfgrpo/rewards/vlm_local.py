"""A vision-language model as judge, in this process: any of transformers' image-text-to-text class.

Each image is shown on its own, with a question in which {prompt} stands for its prompt and
{metadata.KEY} for what else its line of the prompt file says, as one turn of the model's own chat
template. There are two kinds of answer:

    "yes"    the reward is P(yes) / (P(yes) + P(no)) of the first token, over those of the
             vocabulary that spell yes or no in any case; in [0, 1], and as smooth as the model is
             sure. One forward, nothing is generated.
    "score"  the answer is generated greedily, and must hold what `pattern` matches, exactly once;
             the reward is the number in its first group. The default question and pattern are
             UnifiedReward's (Wang et al. 2025, arXiv 2503.05236), as Flow-GRPO asks it: from 1 to
             5, which it divides by 5. An answer without a score is an error, not a 0 as there.

With `sources: true` the images that a prompt brings (`sfgrpo.prompts.images`) are shown before the
one that was made, no larger than it: for edits.

Images are [B, 3, H, W] in [0, 1]; the model's own processor resizes them, from 8 bits. Those of
Qwen2-VL, Qwen2.5-VL and Qwen3-VL are read without their part for videos; another that takes videos
needs torchvision. Each model has a license of its own.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, Literal

import torch
from PIL import Image
from torch import Tensor

from sfgrpo.rewards import _sources
from sfgrpo.rewards._pixels import to_bytes
from sfgrpo.rewards._template import EDITED, PLACE, check, filled
from sfgrpo.rewards._weights import Place, Weights
from sfgrpo.rewards.base import Metadata

QUESTIONS = {
    "yes": 'Does this image show "{prompt}"? Please answer yes or no.',
    "score": "You are given a text caption and a generated image based on that caption. Your task "
    "is to evaluate this image based on two key criteria:\n1. Alignment with the Caption: Assess "
    "how well this image aligns with the provided caption. Consider the accuracy of depicted "
    "objects, their relationships, and attributes as described in the caption.\n2. Overall Image "
    "Quality: Examine the visual quality of this image, including clarity, detail preservation, "
    "color accuracy, and overall aesthetic appeal.\nBased on the above criteria, assign a score "
    "from 1 to 5 after 'Final Score:'.\nYour task is provided as follows:\n"
    "Text Caption: [{prompt}]",
}
OF_EDITS = {
    "yes": EDITED
    + "Does it do what was told, and keep all else as it was? Please answer yes or no.",
    "score": EDITED + "Your task is to evaluate how well it does what was told, and how well it "
    "keeps all else as it was. Assign a score from 1 to 5 after 'Final Score:'.",
}
PATTERN = r"Final Score:\s*([1-5](?:\.\d+)?)"


class LocalVlm:
    """What a vision-language model thinks of each image."""

    def __init__(
        self, place: Place, *, model: str, answer: str, question: str, pattern: str, tokens: int,
        sources: bool,
    ) -> None:  # fmt: skip
        from transformers import AutoModelForImageTextToText

        from sfgrpo import processors

        network = AutoModelForImageTextToText.from_pretrained(
            model, dtype=place.dtype, use_safetensors=True
        )
        self._network: Any = place.settle(network)
        self._processor: Any = processors.read(model, network.config)
        # The next token is the last one's of each row.
        self._processor.tokenizer.padding_side = "left"
        self._place, self._sources = place, sources
        self._answer, self._question, self._tokens = answer, question, tokens
        self._pattern = re.compile(pattern)
        self._words = {word: self._spelt(word) for word in ("yes", "no")}
        if answer == "yes" and not all(map(len, self._words.values())):
            raise ValueError(f"reward 'vlm_local': '{model}' has no token for yes, or none for no")

    @torch.no_grad()
    def __call__(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> Tensor:
        found = [torch.empty(0)]
        for rows in self._place.batches(len(images)):
            given = self._asked(images[rows], prompts[rows], metadata[rows])
            scores = self._yes(given) if self._answer == "yes" else self._score(given)
            found.append(scores.float().cpu())
        return torch.cat(found)

    def check(self, prompts: Sequence[str], metadata: Sequence[Metadata]) -> None:
        """KeyError for metadata that lack what is shown, FileNotFoundError for a lost image."""
        if self._sources:
            _sources.check(metadata)
        check(self._question, prompts, metadata)

    def _asked(
        self, images: Tensor, prompts: Sequence[str], metadata: Sequence[Metadata]
    ) -> dict[str, Tensor]:
        """The network's inputs."""
        made = [Image.fromarray(image) for image in to_bytes(images)]
        talks = []
        for image, prompt, entry in zip(made, prompts, metadata, strict=True):
            given = _sources.beside(entry, images.shape) if self._sources else []
            content: list[dict[str, Any]] = [
                {"type": "image", "image": picture} for picture in (*given, image)
            ]
            content.append({"type": "text", "text": filled(self._question, prompt, entry)})
            talks.append([{"role": "user", "content": content}])
        given = self._processor.apply_chat_template(
            talks, add_generation_prompt=True, tokenize=True, return_dict=True,
            processor_kwargs={"padding": True, "return_tensors": "pt"},
        )  # fmt: skip
        given = given.to(self._place.device)
        return {
            key: value.to(self._place.dtype) if value.is_floating_point() else value
            for key, value in given.items()
        }

    def _yes(self, given: dict[str, Tensor]) -> Tensor:
        logits = self._network(**given, logits_to_keep=1).logits[:, -1].float()
        both = [logits[:, self._words[word]].logsumexp(1) for word in ("yes", "no")]
        return torch.stack(both, 1).softmax(1)[:, 0]

    def _score(self, given: dict[str, Tensor]) -> Tensor:
        written = self._network.generate(**given, max_new_tokens=self._tokens, do_sample=False)
        fresh = written[:, given["input_ids"].shape[1] :]
        answers = self._processor.batch_decode(fresh, skip_special_tokens=True)
        return torch.tensor([self._read(answer) for answer in answers])

    def _read(self, answer: str) -> float:
        found = self._pattern.findall(answer)
        if len(found) != 1:
            raise ValueError(
                f"expected {self._pattern.pattern!r} once in the answer, found it {len(found)} "
                f"times in {answer[-200:]!r}"
            )
        return float(found[0])

    def _spelt(self, word: str) -> list[int]:
        """The tokens that spell a word, in any case and with or without a space."""
        words = self._processor.tokenizer
        spelt = words.batch_decode([[token] for token in range(len(words))])
        return [token for token, text in enumerate(spelt) if text.strip().lower() == word]


def build(
    *,
    model: Weights,
    answer: Literal["yes", "score"] = "yes",
    question: str | None = None,
    pattern: str = PATTERN,
    sources: bool = False,
    tokens: int = 512,
    device: str = "auto",
    dtype: Literal["fp32", "bf16", "fp16"] = "bf16",
    batch: int = 4,
) -> LocalVlm:
    """The reward of a vision-language model in this process.

    Args:
        model: local folder or hub id of the model and its processor (safetensors), such as
            CodeGoat24/UnifiedReward-qwen-7b.
        answer: which of those above.
        question: what is asked, with {prompt} or {metadata.KEY} in it; None is what is asked above.
        pattern: regular expression of a score, with one group, the number.
        sources: whether the images that a prompt brings are shown first.
        tokens: of an answer at most.
        device: "auto" is this rank's GPU, or the CPU where there is none.
        dtype: precision of the network; scores are fp32.
        batch: images of one forward.

    Raises:
        ValueError: values that make no sense, naming them.
        OSError: transformers' message, where a model cannot be found or has no safetensors.
    """
    if answer not in QUESTIONS:
        raise ValueError(
            f"reward 'vlm_local': answer must be one of {list(QUESTIONS)}, got {answer!r}"
        )
    asked = OF_EDITS if sources else QUESTIONS
    question = asked[answer] if question is None else question
    if not PLACE.search(question):
        raise ValueError(
            "reward 'vlm_local': question shows neither {prompt} nor {metadata.KEY}: "
            f"{question!r}"
        )
    try:
        groups = re.compile(pattern).groups
    except re.error as error:
        raise ValueError(f"reward 'vlm_local': pattern: {error}") from error
    if groups != 1 or tokens < 1:
        raise ValueError(
            "reward 'vlm_local': needs a pattern with one group, and tokens of at least 1, got "
            f"{pattern!r} and {tokens}"
        )
    place = Place.of("vlm_local", device=device, dtype=dtype, batch=batch)
    return LocalVlm(
        place, model=model, answer=answer, question=question, pattern=pattern, tokens=tokens,
        sources=sources,
    )  # fmt: skip
