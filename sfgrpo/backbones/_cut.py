"""Which prompts are longer than a text encoder reads: stock pipelines cut them, some in silence.

A pipeline's tokenizers are watched while it embeds, so that the count is of what really happens:
templates, cleaned texts and each tokenizer's own length.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar


class _Watched:
    """A tokenizer that notes which of its texts it cuts."""

    OWN: ClassVar = ("_tokenizer", "_most", "cut")

    def __init__(self, tokenizer: Any, most: int | None) -> None:
        """`most` is how many tokens the network sees, None for as many as are asked for."""
        self._tokenizer, self._most = tokenizer, most
        self.cut: set[str] = set()

    def __call__(self, texts: Any, *args: Any, **options: Any) -> Any:
        self._note(self._tokenizer, texts, {**options, "verbose": False})
        return self._tokenizer(texts, *args, **options)

    def apply_chat_template(self, messages: Any, *args: Any, **options: Any) -> Any:
        if options.get("tokenize", True):
            self._note(self._tokenizer.apply_chat_template, messages, options)
        return self._tokenizer.apply_chat_template(messages, *args, **options)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __setattr__(self, name: str, value: Any) -> None:
        """What a pipeline sets on its way (SANA: the side to pad) is meant for the tokenizer."""
        if name in self.OWN:
            super().__setattr__(name, value)
        else:
            setattr(self._tokenizer, name, value)

    def _note(self, call: Callable[..., Any], texts: Any, options: dict[str, Any]) -> None:
        if not options.get("truncation"):
            return
        whole = {"truncation": False, "padding": False, "max_length": None, "return_tensors": None}
        many = [texts] if isinstance(texts, str) else texts
        longest = min(options["max_length"], self._most or options["max_length"])
        tokens = call(many, **{**options, **whole})["input_ids"]
        self.cut |= {repr(t) for t, ids in zip(many, tokens, strict=True) if len(ids) > longest}


class Watch:
    """Says once, of a pipeline, how many prompts it cuts."""

    def __init__(self, pipeline: Any, length: int) -> None:
        """`length` is the text tokens that the pipeline is asked for."""
        self._pipeline, self._told = pipeline, False
        # Qwen-Image's pipeline lets its tokenizer read more, and cuts the embeddings.
        template = getattr(pipeline, "prompt_template_encode_start_idx", None)
        self._most = None if template is None else template + length

    @contextmanager
    def over(self, prompts: Sequence[str]) -> Iterator[None]:
        """Within the context, where `prompts` are embedded, tokenizers are watched."""
        parts = self._pipeline.components.items()
        kept = {name: part for name, part in parts if part and name.startswith("tokenizer")}
        watched = {name: _Watched(part, self._most) for name, part in kept.items()}
        # Past the pipeline's __setattr__, which would note another class in its configuration.
        vars(self._pipeline).update(watched)
        try:
            yield
        finally:
            vars(self._pipeline).update(kept)
        cut = set().union(*(part.cut for part in watched.values()))
        if cut and not self._told:
            self._told = True
            warnings.warn(
                f"{len(cut)} of {len(set(prompts))} prompts are longer than a text encoder reads: "
                "they lose their ends, as may later ones; see model.max_sequence_length",
                stacklevel=4,
            )
