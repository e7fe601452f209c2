"""The reward `vlm` against a server that speaks OpenAI's protocol."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from PIL import Image

from sfgrpo import rewards
from sfgrpo.remote.pictures import decode
from sfgrpo.remote.servers import Unusable
from sfgrpo.rewards import vlm
from sfgrpo.rewards.base import Unscored
from tests.support import judge
from tests.support.served import QUICK, free_port, served

IMAGES = torch.randint(256, (6, 3, 8, 8), generator=torch.Generator().manual_seed(0)).float() / 255
RED = IMAGES[:, 0].mean((1, 2)) * (1 - IMAGES[:, 1:].mean((1, 2, 3)))
PROMPTS = ["a", "prose", "fence", "busy", "é 🙂", 'a {metadata.x} "b']


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with served(judge.app) as found:
        yield f"{found}/v1"


@pytest.fixture(autouse=True)
def _forget() -> None:
    judge.requests.clear()
    judge.seen.clear()


def made(url: str, **options: Any) -> Any:
    return rewards.build("vlm", **{"url": url, "model": "judge", **QUICK, **options})


def test_scores_are_read_in_order_however_they_are_said(url: str) -> None:
    reward = made(url, in_flight=3)
    torch.testing.assert_close(reward(IMAGES, PROMPTS, [{}] * 6), RED)
    assert reward.retried == 2  # prose was corrected, busy came back
    assert judge.seen["prose"] == 2
    first = judge.requests[0]
    assert (first["temperature"], first["model"], first["max_tokens"]) == (0, "judge", 256)
    assert len(reward(IMAGES[:0], [], [])) == 0


def test_the_probability_of_yes(url: str) -> None:
    reward = made(url, answer="yes")
    torch.testing.assert_close(reward(IMAGES, ["a"] * 6, [{}] * 6), RED)
    assert all(asked["logprobs"] and asked["top_logprobs"] == 20 for asked in judge.requests)


def test_templates_and_further_keys(url: str, tmp_path: Path) -> None:
    (tmp_path / "ask.txt").write_text('{"x": {metadata.box}} {prompt} {other}')
    reward = made(
        url, template_file=str(tmp_path / "ask.txt"), system="You judge.", images="jpeg",
        extra={"max_tokens": 7, "seed": 1},
    )  # fmt: skip
    reward(IMAGES[:1], ["p {metadata.box}"], [{"box": [1, 2]}])
    (asked,) = judge.requests
    system, user = asked["messages"]
    image, text = user["content"]
    assert text["text"] == '{"x": [1, 2]} p {metadata.box} {other}'
    assert image["image_url"]["url"].startswith("data:image/jpeg;base64,")
    assert system == {"role": "system", "content": "You judge."}
    assert (asked["max_tokens"], asked["seed"]) == (7, 1)
    reward.check(["a"], [{"box": 1}])
    with pytest.raises(KeyError, match="prompt 'b' has no metadata 'box'"):
        reward.check(["a", "b"], [{"box": 1}, {}])


def test_what_is_edited_is_shown_before_what_was_made(url: str, tmp_path: Path) -> None:
    for name, size in (("one", (64, 32)), ("two", (4, 4))):
        Image.new("RGB", size, "blue").save(tmp_path / f"{name}.png")
    one, two = (str(tmp_path / f"{name}.png") for name in ("one", "two"))
    reward, entry = made(url, sources=True), {"image": [one, two]}
    reward.check(["a"], [entry])
    reward(IMAGES[:1], ["make it red"], [entry])
    *shown, text = judge.requests[0]["messages"][-1]["content"]
    files = [item["image_url"]["url"].partition("base64,")[2] for item in shown]
    found = [decode(file, pixels=100) for file in files]
    assert [tuple(image.shape[1:]) for image in found] == [(4, 8), (4, 4), (8, 8)]
    assert torch.equal(found[-1], (IMAGES[0] * 255).round().byte())
    assert found[0].float().mean((1, 2)).tolist() == [0, 0, 255]
    assert 'as told: "make it red"' in text["text"]
    with pytest.raises(KeyError, match="no metadata 'image'"):
        reward.check(["a"], [{}])
    with pytest.raises(FileNotFoundError, match=r"there is no file '/gone\.png'"):
        reward.check(["a"], [{"image": "/gone.png"}])


def test_an_answer_that_stays_malformed_is_given_up_by_name(url: str) -> None:
    reward = made(url, retries=2)
    with pytest.raises(Unscored, match=r"prompt 'never': no JSON alone, but 'I would") as failed:
        reward(IMAGES[:2], ["a", "never"], [{}, {}])
    assert failed.value.scores.isnan().tolist() == [False, True]
    assert judge.seen["never"] == 3
    # Two images are asked for at once, so the order of requests says nothing of their images.
    talks = sorted(len(asked["messages"]) for asked in judge.requests)
    assert talks == [1, 1, 3, 3]  # corrected once, not in ever longer talks


def test_a_model_that_is_not_served_is_told_at_once(url: str) -> None:
    with pytest.raises(Unscored, match="prompt 'a': status 404: The model `other` does not exist"):
        made(url, model="other")(IMAGES[:1], ["a"], [{}])
    assert len(judge.requests) == 1


@pytest.mark.parametrize(
    ("said", "score"),
    [
        ('{"score": 7}', 7), (' {"score": 0.5, "why": "x"}\n', 0.5), ('```{"score": 10}```', 10),
        ('```json\n{"score": 1e0}\n```', 1),
    ],
)  # fmt: skip
def test_what_is_a_score(said: str, score: float) -> None:
    assert vlm.parsed_score(said, 0, 10) == score


@pytest.mark.parametrize(
    ("said", "wrong"),
    [
        ("7", "without a number under 'score'"), ("score: 7", "no JSON alone"),
        ('Sure! {"score": 7}', "no JSON alone"), ('{"score": 7} {"score": 8}', "no JSON alone"),
        ('{"score": "7"}', "without a number"), ('{"score": true}', "without a number"),
        ('{"Score": 7}', "without a number"), ('{"score": 11}', "a score of 11, outside 0 to 10"),
        ('{"score": -1}', "outside"), ('{"score": NaN}', "outside"), ('{"score": 1e99}', "outside"),
        ("[" * 100_000, "no JSON alone"), (None, "without text"), ("", "no JSON alone"),
    ],
)  # fmt: skip
def test_what_is_none(said: Any, wrong: str) -> None:
    with pytest.raises(ValueError, match=wrong):
        vlm.parsed_score(said, 0, 10)


def test_a_range_is_mapped_to_one(url: str) -> None:
    with pytest.raises(Unscored, match="outside 5 to 6"):
        made(url, score_range=[5, 6], retries=0)(IMAGES[:1], ["a"], [{}])
    torch.testing.assert_close(made(url, score_range=[0, 20])(IMAGES, PROMPTS, [{}] * 6), RED / 2)
    assert "from 0 (not at all) to 20" in judge.requests[-1]["messages"][0]["content"][1]["text"]


@pytest.mark.parametrize(
    ("choice", "wrong"),
    [
        ({"logprobs": None}, "without 'logprobs'"),
        ({"logprobs": {"content": []}}, "without 'logprobs'"),
        ({"logprobs": {"content": [{"top_logprobs": [{"token": "x", "logprob": 0}]}]}}, "neither"),
    ],
)
def test_an_answer_without_probabilities(choice: dict[str, Any], wrong: str) -> None:
    with pytest.raises(Unusable, match=wrong):
        vlm.probability_of_yes(choice)


@pytest.mark.parametrize("answer", [b"", b"[]", b'{"choices": []}', b'{"choices": [{}]}'])
def test_another_protocol(answer: bytes) -> None:
    with pytest.raises(Unusable, match="not of OpenAI's protocol"):
        vlm.Talk(model="m", template="{prompt}").read(answer, {})


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"answer": "maybe"}, "answer must be score or yes"),
        ({"images": "safetensors"}, "images png or jpeg"),
        ({"score_range": [3, 3]}, "score_range must be two numbers"),
        ({"template": "How good?"}, "shows neither {prompt} nor"),
        ({"template": "{prompt}", "template_file": "x"}, "exclude each other"),
        ({"in_flight": 0}, "in_flight must be at least 1"),
        ({"url": "judge"}, "url 'judge' must be like"),
    ],
)
def test_what_is_wrong_is_said_at_once(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"reward 'vlm': .*{message}"):
        made(**{"url": "http://127.0.0.1:9/v1", **options})


def test_only_images_are_judged(url: str) -> None:
    with pytest.raises(ValueError, match="it scores images"):
        made(url)(torch.zeros(1, 7), ["a"], [{}])


@pytest.mark.slow
def test_a_server_of_its_own_process_that_is_restarted(tmp_path: Path) -> None:
    """Killed and started again between two calls."""
    port = free_port()

    def start() -> subprocess.Popen[bytes]:
        environment = {**os.environ, "PYTHONPATH": os.getcwd()}
        command = [sys.executable, "-m", "tests.support.judge", str(port)]
        process = subprocess.Popen(command, env=environment)
        while process.poll() is None:
            try:
                httpx2.get(f"http://127.0.0.1:{port}/")
                return process
            except httpx2.TransportError:
                time.sleep(0.1)
        raise AssertionError("the server ended")

    process = start()
    reward = made(f"http://127.0.0.1:{port}/v1", backoff=0.5)
    try:
        torch.testing.assert_close(reward(IMAGES, PROMPTS, [{}] * 6), RED)
        process.kill()
        process.wait()
        process = start()
        torch.testing.assert_close(reward(IMAGES, PROMPTS, [{}] * 6), RED)
    finally:
        process.kill()
        process.wait()
