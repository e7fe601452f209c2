"""What a vision-language model behind a server answers, as numbers."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from typing import Any

from sfgrpo.remote.servers import Unusable

FENCED = re.compile(r"```(?:json)?\s*(.*?)\s*```", re.DOTALL)


def parsed_score(said: Any, low: float, high: float) -> float:
    """The score of an answer: a JSON object, at most in a code fence, with a number within the
    range under "score"; further keys, such as a reason, do not matter.

    Raises:
        ValueError: it is anything else; says what.
    """
    if not isinstance(said, str):
        raise ValueError(f"an answer without text ({type(said).__name__})")
    text = said.strip()
    if fence := FENCED.fullmatch(text):
        text = fence[1]
    try:
        found = json.loads(text)
    except (ValueError, RecursionError):
        raise ValueError(f"no JSON alone, but {text[:60]!r}") from None
    score = found.get("score") if isinstance(found, dict) else None
    if isinstance(score, bool) or not isinstance(score, int | float):
        raise ValueError(f"JSON without a number under 'score': {text[:60]!r}")
    if not low <= score <= high:  # nor is a nan
        raise ValueError(f"a score of {score!r:.20}, outside {low:g} to {high:g}")
    return float(score)


def probability_of_yes(choice: Mapping[str, Any]) -> float:
    """P(yes) / (P(yes) + P(no)) of the first token.

    Raises:
        Unusable: the answer has no probabilities, or neither word is among the likely ones.
    """
    try:
        ranked = choice["logprobs"]["content"][0]["top_logprobs"]
        tokens = [(str(one["token"]).strip().lower(), float(one["logprob"])) for one in ranked]
    except (KeyError, IndexError, TypeError, ValueError):
        raise Unusable("an answer without 'logprobs': does the server give them?") from None
    yes, no = (sum(math.exp(p) for word, p in tokens if word == w) for w in ("yes", "no"))
    if not 0 < yes + no < math.inf:
        raise Unusable("neither yes nor no among the likely tokens")
    return yes / (yes + no)
