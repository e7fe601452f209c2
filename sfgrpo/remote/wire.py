"""What goes over the wire: a batch of samples with their prompts and metadata.

    POST /v1/score    a batch         -> {"reward": its name, "scores": [B numbers, null for one
                                         that is not finite]}
    POST /v1/check    prompts alone   -> {}, or status 422 for prompts that cannot be scored
    GET  /health                      -> {"status": "ok", "reward": ..., "takes_video": ...}
    GET  /metrics                     -> Prometheus' text format

A batch is one of

    application/json           {"prompts": [...], "metadata": [{...}, ...], "images": ["...", ...]}
                               with base64 of PNG or JPEG; or "videos": [["...", ...], ...], frames
    application/x-safetensors  one tensor "samples" [B, ...], and the JSON of the rest under the key
                               "request" of the file's metadata: bits as they are, and faster

An error is {"error": "..."} with its status. Nothing here is a pickle: reading one runs what its
sender likes.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor

from sfgrpo.remote import pictures

JSON = "application/json"
TENSORS = "application/x-safetensors"
FLOATS = (torch.float32, torch.float16, torch.bfloat16)
Form = Literal["safetensors", "png", "jpeg"]
FORMS = ("safetensors", "png", "jpeg")
PICKLE = (
    "this server reads no pickle, since reading one runs what its sender likes. Send JSON with PNG "
    "or JPEG images, or safetensors: reward 'http' of sfgrpo does; `sfgrpo.serving` says how to "
    "serve a reward of Flow-GRPO"
)


class Refused(ValueError):
    """A request that is not served, with its HTTP status."""

    def __init__(self, status: int, message: str) -> None:
        super().__init__(message)
        self.status = status


@dataclass(frozen=True, kw_only=True)
class Limits:
    """What a request may be at most."""

    body: int = 256 * 2**20
    """Bytes."""
    samples: int = 256
    pixels: int = 4096 * 4096
    """Of one image, or of one frame."""
    total: int = 4 * 4096 * 4096
    """Pixels of all images of a request."""


@dataclass(frozen=True)
class Batch:
    """A request that was read."""

    samples: Tensor
    """`[B, ...]`; images and videos in [0, 1]."""
    prompts: list[str]
    metadata: list[dict[str, Any]]


def question(prompts: Sequence[str], metadata: Sequence[Any], **more: Any) -> bytes:
    """The JSON of prompts and metadata.

    Raises:
        ValueError: metadata that JSON does not know; names the prompt.
    """
    for text, entry in zip(prompts, metadata, strict=True):
        try:
            json.dumps(entry, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(f"metadata of prompt {text!r} is no JSON: {error}") from None
    said = {"prompts": list(prompts), "metadata": [dict(m) for m in metadata], **more}
    return json.dumps(said).encode()


def encode(
    samples: Tensor, prompts: Sequence[str], metadata: Sequence[Any], form: Form
) -> tuple[str, bytes]:
    """Content type and body of a batch."""
    if form == "safetensors":
        request = {"request": question(prompts, metadata).decode()}
        return TENSORS, save({"samples": samples.detach().cpu().contiguous()}, metadata=request)
    if samples.ndim == 5:
        videos = [[pictures.encode(frame, form) for frame in video] for video in samples]
        return JSON, question(prompts, metadata, videos=videos)
    if samples.ndim != 4:
        raise ValueError(f"samples {tuple(samples.shape)} are no images: send them as safetensors")
    images = [pictures.encode(image, form) for image in samples]
    return JSON, question(prompts, metadata, images=images)


def check_type(content_type: str) -> str:
    """The content type without its parameters, if it is one of ours.

    Raises:
        Refused: status 415.
    """
    found = content_type.partition(";")[0].strip().lower()
    if found in (JSON, TENSORS):
        return found
    if "pickle" in found or found in ("application/octet-stream", ""):
        raise Refused(415, PICKLE)
    raise Refused(415, f"content type '{found[:60]}': send {JSON} or {TENSORS}")


def decode(kind: str, body: bytes, limits: Limits) -> Batch:
    """A batch that somebody sent.

    Raises:
        Refused: it is none, or too large.
    """
    if kind == TENSORS:
        said = _parsed(_request_of(body))
        prompts, metadata = _asked(said, limits)
        samples = _tensor(body)
    else:
        said = _parsed(body)
        prompts, metadata = _asked(said, limits)
        samples = _pictured(said, limits)
    if len(samples) != len(prompts):
        raise Refused(400, f"{len(samples)} samples for {len(prompts)} prompts")
    return Batch(samples, prompts, metadata)


def decode_question(body: bytes, limits: Limits) -> tuple[list[str], list[dict[str, Any]]]:
    """Prompts and metadata of a request without samples; Refused as `decode`."""
    return _asked(_parsed(body), limits)


def _parsed(body: bytes | str) -> dict[str, Any]:
    if body[:1] == b"\x80":  # what a pickle of protocol 2 and later begins with
        raise Refused(415, PICKLE)
    try:
        found = json.loads(body)
    except (ValueError, RecursionError):
        raise Refused(400, "the body is no JSON") from None
    if not isinstance(found, dict):
        raise Refused(400, "the body is no JSON object")
    return found


def _asked(said: dict[str, Any], limits: Limits) -> tuple[list[str], list[dict[str, Any]]]:
    prompts = said.get("prompts")
    if not isinstance(prompts, list) or not all(isinstance(text, str) for text in prompts):
        raise Refused(400, "'prompts' must be a list of texts")
    if len(prompts) > limits.samples:
        raise Refused(413, f"{len(prompts)} prompts; at most {limits.samples} in a request")
    metadata = said.get("metadata", [{} for _ in prompts])
    if not isinstance(metadata, list) or not all(isinstance(entry, dict) for entry in metadata):
        raise Refused(400, "'metadata' must be a list of objects")
    if len(metadata) != len(prompts):
        raise Refused(400, f"{len(metadata)} metadata for {len(prompts)} prompts")
    return prompts, metadata


def _request_of(body: bytes) -> str:
    """What a safetensors file says beside its tensors, of which safetensors reads none from memory:
    eight bytes hold the length of the JSON that follows."""
    length = int.from_bytes(body[:8], "little")
    if len(body) < 8 or length > len(body) - 8:
        raise Refused(400, "the body is no safetensors file")
    extra = _parsed(body[8 : 8 + length]).get("__metadata__")
    if not isinstance(extra, dict) or not isinstance(extra.get("request"), str):
        raise Refused(400, "the safetensors file's metadata have no key 'request'")
    return extra["request"]


def _tensor(body: bytes) -> Tensor:
    try:
        found = load(body)
    except (SafetensorError, ValueError, KeyError) as error:
        raise Refused(400, f"the body is no safetensors file: {error}") from None
    if set(found) != {"samples"}:
        raise Refused(400, f"expected one tensor 'samples', got {sorted(found)[:5]}")
    samples = found["samples"]
    if samples.dtype == torch.uint8:
        return samples.float() / 255
    if samples.dtype not in FLOATS or samples.ndim < 1:
        raise Refused(400, f"'samples' is {samples.dtype} {tuple(samples.shape)}: send floats")
    return samples


def _pictured(said: dict[str, Any], limits: Limits) -> Tensor:
    """`[B, 3, H, W]` of "images", or `[B, F, 3, H, W]` of "videos", in [0, 1]."""
    if ("images" in said) == ("videos" in said):
        raise Refused(400, "expected 'images' or 'videos'")
    left = limits.total

    def picture(text: Any) -> Tensor:
        nonlocal left
        if not isinstance(text, str):
            raise Refused(400, "an image must be base64 text")
        try:
            found = pictures.decode(text, pixels=min(left, limits.pixels))
        except pictures.TooLarge as error:
            raise Refused(413, f"{error} that one image, or a request, may have") from None
        except ValueError as error:
            raise Refused(400, str(error)) from None
        left -= found.shape[1] * found.shape[2]
        return found

    if "images" in said:
        return _stacked(said["images"], picture, limits.samples).float() / 255
    return (
        _stacked(
            said["videos"], lambda frames: _stacked(frames, picture, limits.body), limits.samples
        ).float()
        / 255
    )


def _stacked(items: Any, read: Callable[[Any], Tensor], most: int) -> Tensor:
    if not isinstance(items, list) or not items:
        raise Refused(400, "'images' and 'videos' must be lists that are not empty")
    if len(items) > most:
        raise Refused(413, f"{len(items)} samples; at most {most} in a request")
    found = [read(item) for item in items]
    if len({tensor.shape for tensor in found}) > 1:
        raise Refused(400, "the images of a request must have one size, videos as many frames")
    return torch.stack(found)
