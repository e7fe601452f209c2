"""What goes over the wire arrives as it was sent, and what should not be sent is refused."""

from __future__ import annotations

import base64
import io
import json
import pickle
import struct
import zlib
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save
from torch import Tensor

from sfgrpo.remote import pictures, wire
from sfgrpo.remote.wire import JSON, TENSORS, Limits, Refused

LIMITS = Limits(samples=4, pixels=100, total=250)
PROMPTS, METADATA = ["a", "é 🙂"], [{"box": [1, 2.5, None]}, {"text": "7"}]


def rounded(*shape: int) -> Tensor:
    """Random pixels that eight bits hold exactly."""
    return torch.randint(256, shape, generator=torch.Generator().manual_seed(0)).float() / 255


@pytest.mark.parametrize("shape", [(2, 3, 5, 7), (2, 4, 3, 5, 7)])
@pytest.mark.parametrize("form", ["png", "safetensors"])
def test_images_and_videos_arrive(shape: tuple[int, ...], form: wire.Form) -> None:
    samples = rounded(*shape)
    kind, body = wire.encode(samples, PROMPTS, METADATA, form)
    found = wire.decode(kind, body, Limits())
    assert torch.equal(found.samples, samples)
    assert (found.prompts, found.metadata) == (PROMPTS, METADATA)


@pytest.mark.parametrize("dtype", wire.FLOATS)
def test_tensors_arrive_bit_for_bit(dtype: torch.dtype) -> None:
    samples = torch.randn(2, 9).to(dtype)
    kind, body = wire.encode(samples, PROMPTS, METADATA, "safetensors")
    assert torch.equal(wire.decode(kind, body, LIMITS).samples, samples)


def test_jpeg_is_close() -> None:
    image = torch.linspace(0, 1, 64).repeat(1, 3, 64, 1)
    kind, body = wire.encode(image, ["a"], [{}], "jpeg")
    assert (wire.decode(kind, body, Limits()).samples - image).abs().max() < 0.03


def test_only_images_become_pictures() -> None:
    with pytest.raises(ValueError, match="are no images: send them as safetensors"):
        wire.encode(torch.zeros(2, 9), PROMPTS, METADATA, "png")


@pytest.mark.parametrize("value", [float("nan"), b"x", {1, 2}, 1j])
def test_metadata_that_json_does_not_know_are_named(value: Any) -> None:
    with pytest.raises(ValueError, match="metadata of prompt 'b' is no JSON"):
        wire.question(["a", "b"], [{}, {"x": value}])


@pytest.mark.parametrize(
    "kind", ["application/octet-stream", "", "application/x-pickle", "application/python-pickle"]
)
def test_pickles_are_refused_by_their_type(kind: str) -> None:
    with pytest.raises(
        Refused, match=r"no pickle.*Send JSON with PNG or JPEG.*or safetensors"
    ) as no:
        wire.check_type(kind)
    assert no.value.status == 415


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
@pytest.mark.parametrize("kind", [JSON, TENSORS])
def test_pickles_are_not_read_under_another_type(kind: str, protocol: int) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return pytest.fail, ("it was read",)

    with pytest.raises(Refused):
        wire.decode(kind, pickle.dumps(Runs(), protocol), LIMITS)


def test_types_have_parameters_and_are_named() -> None:
    assert wire.check_type("Application/JSON; charset=utf-8") == JSON
    with pytest.raises(Refused, match="content type 'text/html': send application/json or"):
        wire.check_type("text/html")


def png(width: int, height: int) -> str:
    """A black image, its file far smaller than its pixels."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return (
            struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        )

    head = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    rows = zlib.compress(bytes(min(width * height * 3 + height, 10**6)))
    file = b"\x89PNG\r\n\x1a\n" + head + chunk(b"IDAT", rows) + chunk(b"IEND", b"")
    return base64.b64encode(file).decode()


def gif() -> str:
    file = io.BytesIO()
    Image.new("RGB", (2, 2)).save(file, "GIF")
    return base64.b64encode(file.getvalue()).decode()


def asked(**changes: Any) -> dict[str, Any]:
    return {"prompts": ["a"], "images": [png(2, 2)], **changes}


@pytest.mark.parametrize(
    ("said", "status", "message"),
    [
        (asked(images=[png(30_000, 30_000)]), 413, "more than 100 pixels"),
        (asked(images=[png(9_000, 9_000)]), 413, "more than 100 pixels"),
        (asked(images=[png(11, 10)]), 413, "an image of 11 x 10 has more than 100 pixels"),
        (asked(prompts=["a"] * 3, images=[png(10, 10)] * 3), 413, "more than 50 pixels"),
        (asked(prompts=["a"] * 5), 413, "5 prompts; at most 4 in a request"),
        (asked(images=[png(2, 2)] * 5), 413, "5 samples; at most 4"),
        (asked(images=[png(2, 2), png(2, 3)]), 400, "must have one size"),
        (asked(images=[png(2, 2), png(2, 2)]), 400, "2 samples for 1 prompts"),
        (asked(images=[gif()]), 400, "neither PNG nor JPEG, or damaged"),
        (asked(images=[png(2, 2)[:60]]), 400, "neither PNG nor JPEG, or damaged"),
        (asked(images=["/etc/passwd"]), 400, "an image is n"),
        (asked(images=["file:///etc/passwd"]), 400, "not base64"),
        (asked(images=[7]), 400, "must be base64 text"),
        (asked(images=[]), 400, "not empty"),
        (asked(images="x"), 400, "must be lists"),
        (asked(videos=[[png(2, 2)]]), 400, "'images' or 'videos'"),
        ({"prompts": ["a"]}, 400, "'images' or 'videos'"),
        (asked(prompts="a"), 400, "'prompts' must be a list of texts"),
        (asked(prompts=[1]), 400, "'prompts' must be a list of texts"),
        (asked(metadata=[{}, {}]), 400, "2 metadata for 1 prompts"),
        (asked(metadata=["x"]), 400, "'metadata' must be a list of objects"),
        ([], 400, "no JSON object"),
    ],
)
def test_what_json_may_not_say(said: Any, status: int, message: str) -> None:
    with pytest.raises(Refused, match=message) as refused:
        wire.decode(JSON, json.dumps(said).encode(), LIMITS)
    assert refused.value.status == status


REQUEST = {"request": '{"prompts": ["a"]}'}


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b"", "no safetensors"),
        (b"\xff" * 20, "no safetensors"),
        (save({"samples": torch.zeros(1, 3)}), "no key 'request'"),
        (save({"other": torch.zeros(1, 3)}, metadata=REQUEST), r"got \['other'\]"),
        (save({"samples": torch.zeros(1, 3)}, metadata=REQUEST)[:-1], "no safetensors"),
        (save({"samples": torch.zeros(2, 3)}, metadata=REQUEST), "2 samples for 1 prompts"),
        (save({"samples": torch.zeros(())}, metadata=REQUEST), "send floats"),
        (save({"samples": torch.zeros(1, dtype=torch.int64)}, metadata=REQUEST), "send floats"),
        (b"\x04\0\0\0\0\0\0\0" + b"[" * 4, "no JSON"),
    ],
)
def test_what_tensors_may_not_be(body: bytes, message: str) -> None:
    with pytest.raises(Refused, match=message):
        wire.decode(TENSORS, body, LIMITS)


def test_bytes_are_pixels() -> None:
    samples = torch.tensor([[0, 51, 255]], dtype=torch.uint8)
    body = save({"samples": samples}, metadata=REQUEST)
    torch.testing.assert_close(wire.decode(TENSORS, body, LIMITS).samples, samples / 255)


def test_pixels_are_not_decoded_before_their_number_is_known(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(Image.Image, "convert", lambda *_: pytest.fail("decoded"))
    with pytest.raises(pictures.TooLarge):
        pictures.decode(png(5000, 5000), pixels=5000 * 4999)
