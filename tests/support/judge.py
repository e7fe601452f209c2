"""A server that speaks OpenAI's chat protocol as vLLM does, and judges images by their colour.

    python -m tests.support.judge PORT

Of an image it says how red it is. What a prompt begins with decides how it says so: "prose" answers
in prose once and in JSON when it is corrected, "never" never in JSON, "busy" with status 503 every
other time.
"""

from __future__ import annotations

import base64
import io
import math
import re
import sys
from collections import Counter
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse
from PIL import Image, ImageStat

app = FastAPI()
seen: Counter[str] = Counter()
requests: list[dict[str, Any]] = []


def redness(url: str) -> float:
    """In [0, 1], of a data URL."""
    with Image.open(io.BytesIO(base64.b64decode(url.partition("base64,")[2]))) as image:
        red, green, blue = (mean / 255 for mean in ImageStat.Stat(image).mean)
    return red * (1 - (green + blue) / 2)


def said(prompt: str, red: float, corrected: bool) -> str:
    """The answer's text."""
    if prompt.startswith("never") or (prompt.startswith("prose") and not corrected):
        return f"I would give it a {10 * red:.1f} of 10."
    if prompt.startswith("fence"):
        return f'```json\n{{"score": {10 * red}, "reason": "red"}}\n```'
    return f'{{"score": {10 * red}}}'


def ranked(red: float) -> list[dict[str, Any]]:
    """Tokens with their log-probabilities: yes and no in two spellings, and something else."""
    shares = {"Yes": 0.6 * red, " yes": 0.2 * red, "No": 0.8 * (1 - red), "Maybe": 0.2}
    return [
        {"token": token, "logprob": math.log(share) if share > 0 else -9999.0}
        for token, share in shares.items()
    ]


@app.post("/v1/chat/completions")
async def completions(request: Request) -> JSONResponse:
    asked = await request.json()
    requests.append(asked)
    users = [m for m in asked["messages"] if m["role"] == "user"]
    *_, image, text = users[0]["content"]  # the last is judged
    found = re.search(r'"(.*?)"', text["text"])
    prompt = found[1] if found else text["text"]
    seen[prompt] += 1
    if prompt.startswith("busy") and seen[prompt] % 2:
        return JSONResponse({"error": {"message": "overloaded"}}, 503)
    if asked["model"] != "judge":
        error = {"message": f"The model `{asked['model']}` does not exist."}
        return JSONResponse({"error": error}, 404)
    red = redness(image["image_url"]["url"])
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop", "logprobs": None}
    choice["message"] = {"role": "assistant", "content": said(prompt, red, len(users) > 1)}
    if asked.get("logprobs"):
        choice["logprobs"] = {"content": [{"token": "Yes", "top_logprobs": ranked(red)}]}
    return JSONResponse({"object": "chat.completion", "choices": [choice]})


if __name__ == "__main__":
    uvicorn.run(app, port=int(sys.argv[1]), log_level="warning")
