"""The model card of a pretrained folder."""

from __future__ import annotations

from pathlib import Path

from sfgrpo import files
from sfgrpo.rewards.colour import COLOURS

TEMPLATE = """---
license: apache-2.0
library_name: diffusers
pipeline_tag: text-to-image
---

# A tiny Stable Diffusion 3 of coloured handwritten digits

A `StableDiffusion3Pipeline` of {parameters} million parameters: MMDiT (4 layers, width 128, patch
2), `AutoencoderKL` (factor 4, 4 latent channels), two CLIP text encoders of two layers over a
vocabulary of its own, no T5. Images are 32 x 32, latents 4 x 8 x 8. It exists so that
reinforcement learning of a diffusers text-to-image model can be tried, tested and debugged on a
laptop, and it was stopped early on purpose: it starts out often illegible.

```python
from diffusers import StableDiffusion3Pipeline

pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
pipe(
    "a red seven on a dark blue background",
    height=32,
    width=32,
    num_inference_steps=10,
    guidance_scale=1.0,
    max_sequence_length=0,
).images[0]
```

Captions it knows: "a(n) COLOUR DIGIT on a COLOUR background", digits zero to
nine, colours {colours}.

## Training

- Data: the first 1,197 of scikit-learn's 1,797 handwritten digits (UCI "Optical Recognition of
  Handwritten Digits", E. Alpaydin and C. Kaynak, CC BY 4.0), enlarged to 32 x 32 and recoloured.
  The other 600 are kept for judging and were never seen.
- Autoencoder, then transformer and text encoders together by rectified flow; weights are a running
  average, stored in float16.
- Command: `{command}`, {minutes} minutes on two CPU cores.

## Measured

240 samples (24 per digit), 10 Euler steps, guidance 1.0, noise seed 0:

| score | value |
|---|---|
| OCR: probability of the prompted digit (PP-OCRv6 small) | {ocr} |
| colour: prompted foreground and background | {colour} |
| classifier on held-out digits: accuracy | {classifier} |

OCR by digit:

| 0 | 1 | 2 | 3 | 4 | 5 | 6 | 7 | 8 | 9 |
|---|---|---|---|---|---|---|---|---|---|
| {digits} |
"""


def write_card(
    out: Path, *, scores: dict[str, float], parameters: int, minutes: float, command: str
) -> None:
    """Write `out`/README.md; `scores` are those of `evaluate`."""
    text = TEMPLATE.format(
        command=command,
        minutes=f"{minutes:.0f}",
        parameters=f"{parameters / 1e6:.1f}",
        colours=", ".join(COLOURS),
        digits=" | ".join(f"{scores[f'ocr_{digit}']:.2f}" for digit in range(10)),
        **{name: f"{scores[name]:.3f}" for name in ("ocr", "colour", "classifier")},
    )
    files.write(out / "README.md", text)
