"""The model card of a pretrained folder."""

from __future__ import annotations

from pathlib import Path

from sfgrpo import files
from sfgrpo.embedded.data import record
from sfgrpo.embedded.task import DIGIT, Task
from sfgrpo.rewards.colour import COLOURS

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A tiny Stable Diffusion 3 of {what}

A `StableDiffusion3Pipeline` of {parameters} million parameters: MMDiT (4 layers, width 128, patch
2), `AutoencoderKL` (factor 4, 4 latent channels), two CLIP text encoders of two layers over a
vocabulary of its own, no T5. Images are {height} x {width}, latents 4 x {rows} x {columns}. It
exists so that reinforcement learning of a diffusers text-to-image model can be tried, tested and
debugged on a laptop, and it was stopped early on purpose: it starts out often illegible.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
pipe(
    "{example}",
    height={height},
    width={width},
    num_inference_steps=10,
    guidance_scale=1.0,
    max_sequence_length=0,
).images[0]
```

Captions it knows: "{captions}", {range},
colours {colours}. It knows no others, and writes nothing else.

## Training

- Data: the first 1,197 of scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of
  Handwritten Digits", E. Alpaydin and C. Kaynak, CC BY 4.0), enlarged, recoloured and put into
  images of {height} x {width}. The other 600 are kept for judging and were never seen.
- {course}. The weights are a running average, stored in float16.
- Command: `{command}`, {minutes} minutes.

## Measured

240 samples, 10 Euler steps, guidance 1.0, noise seed 0:

| score | value |
|---|---|
| OCR: probability of the prompted text (PP-OCRv6 small){by} | {ocr} |
| OCR: share that reads as prompted | {right} |
| colour: prompted foreground and background | {colour} |
| classifier on held-out digits: share that reads as prompted | {classifier} |

OCR of the images in which a digit was asked for:

| 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |
|---|---|---|---|---|---|---|---|---|---|
| {digits} |
"""

STARTS = {
    None: "Autoencoder, then transformer and text encoders together by rectified flow",
    "embedded": (
        "Encoder, and the weights to begin with, of the model of single digits; the decoder\n"
        "  fitted to the new images, then transformer and text encoders together by rectified flow"
    ),
}
"""The course of training, by the task it starts from."""


def write_card(
    out: Path,
    *,
    task: Task = DIGIT,
    scores: dict[str, float],
    parameters: int,
    minutes: float,
    command: str,
) -> None:
    """Write `out`/README.md; `scores` are those of `evaluate`."""
    one = task.digits == 1
    text = TEMPLATE.format(
        what="coloured handwritten digits" if one else "numbers in coloured handwriting",
        example=record("7" if one else "472", "red", "dark blue", task)["prompt"],
        captions=task.caption.format(
            article="a(n)", text="DIGIT" if one else "NUMBER", foreground="COLOUR",
            background="COLOUR",
        ),
        range="digits zero to nine" if one else f"numbers {task.texts[0]} to {task.texts[-1]}",
        course=STARTS[task.start],
        by="" if one else ", by the digit",
        height=task.height,
        width=task.width,
        rows=task.height // 4,
        columns=task.width // 4,
        command=command,
        minutes=f"{minutes:.0f}",
        parameters=f"{parameters / 1e6:.1f}",
        colours=", ".join(COLOURS),
        digits=" | ".join(f"{scores[f'ocr_{digit}']:.2f}" for digit in range(10)),
        **{name: f"{scores[name]:.3f}" for name in ("ocr", "right", "colour", "classifier")},
    )  # fmt: skip
    files.write(out / "README.md", text)
