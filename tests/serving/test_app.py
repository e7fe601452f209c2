"""A reward's server: what it answers, to whom, and what it refuses."""

from __future__ import annotations

import json
import pickle
import re
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
import torch
from starlette.testclient import TestClient
from torch import Tensor

from sfgrpo.remote import wire
from sfgrpo.remote.wire import JSON, TENSORS, Limits
from sfgrpo.serving import app, device
from sfgrpo.serving.device import Device
from tests.support.served import served

TOKEN = "0123456789abcdef"
IMAGES = torch.rand(3, 3, 4, 4, generator=torch.Generator().manual_seed(0))


class Mean:
    """The mean of an image, as the prompt wants it."""

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        if prompts[0] == "raise":
            raise OSError("out of memory")
        if prompts[0] == "nan":
            return torch.tensor([torch.nan, torch.inf, 1.0])
        return images.flatten(1).mean(1)

    def check(self, prompts: list[str], metadata: list[dict]) -> None:
        if prompts[0] == "exit":
            sys.exit(0)
        for entry in metadata:
            entry["text"]


class Slow:
    """Waits until it may go on; counts calls side by side."""

    def __init__(self) -> None:
        self.go, self.began = threading.Event(), threading.Semaphore(0)
        self.inside = self.most = self.calls = 0

    def __call__(self, images: Tensor, prompts: list[str], metadata: list[dict]) -> Tensor:
        self.inside, self.calls = self.inside + 1, self.calls + 1
        self.most = max(self.most, self.inside)
        self.began.release()
        self.go.wait(20)
        self.inside -= 1
        return images.flatten(1).mean(1)


def made(reward: Any, *, token: str | None = None, queue: int = 8, **limits: int) -> Any:
    return app.build(Device("mean", reward, limits=Limits(**limits), queue=queue), token)


@pytest.fixture
def client() -> Iterator[TestClient]:
    with TestClient(made(Mean(), body=10_000)) as found:
        yield found


def body(prompt: str = "a", form: wire.Form = "safetensors", **changes: str) -> Any:
    kind, content = wire.encode(IMAGES, [prompt] * 3, [{}] * 3, form)
    return {"content": content, "headers": {"Content-Type": kind, **changes}}


@pytest.mark.parametrize("form", wire.FORMS)
def test_scores(client: TestClient, form: wire.Form) -> None:
    answer = client.post("/v1/score", **body(form=form))
    assert answer.status_code == 200
    scores = torch.tensor(answer.json()["scores"])
    bound = {"safetensors": 0.0, "png": 0.003, "jpeg": 0.1}[form]
    torch.testing.assert_close(scores, IMAGES.flatten(1).mean(1), rtol=0, atol=bound)


def test_scores_that_are_not_finite_are_null(client: TestClient) -> None:
    said = {"reward": "mean", "scores": [None, None, 1.0]}
    assert client.post("/v1/score", **body("nan")).json() == said


def test_a_reward_that_fails_is_told(client: TestClient) -> None:
    answer = client.post("/v1/score", **body("raise"))
    assert answer.status_code == 500
    assert "reward 'mean' failed on prompt 'raise': " in answer.json()["error"]
    assert answer.json()["error"].endswith("OSError: out of memory")
    assert client.post("/v1/score", **body()).status_code == 200


def test_prompts_are_checked(client: TestClient) -> None:
    for metadata, status, said in (({"text": "7"}, 200, {}), ({}, 422, {"error": "KeyError text"})):
        answer = client.post("/v1/check", json={"prompts": ["a"], "metadata": [metadata]})
        assert (answer.status_code, answer.json()) == (status, said)
    answer = client.post("/v1/check", json={"prompts": ["exit"]})
    assert answer.json() == {"error": "the reward called sys.exit(0)"}
    with TestClient(made(lambda *_: None)) as other:
        assert other.post("/v1/check", json={"prompts": ["a"]}).status_code == 200


def test_health_and_metrics(client: TestClient) -> None:
    assert client.get("/health").json() == {
        "status": "ok", "reward": "mean", "takes_video": False, "most_samples": 256,
    }  # fmt: skip
    client.post("/v1/score", **body())
    client.get("/nothing/here")
    answer = client.get("/metrics")
    assert answer.headers["content-type"].startswith("text/plain; version=0.0.4")
    lines = answer.text.splitlines()
    assert 'sfgrpo_reward_samples_total{reward="mean"} 3' in lines
    path = 'sfgrpo_reward_responses_total{reward="mean",path="%s",status="%s"} 1'
    assert path % ("/v1/score", 200) in lines
    assert path % ("other", 404) in lines
    assert all(re.fullmatch(r"# TYPE \w+ \w+|\w+\{.*\} [\d.e-]+", line) for line in lines)


@pytest.mark.parametrize("kind", ["application/octet-stream", "application/python-pickle", JSON])
def test_a_pickle_is_not_read_and_says_what_to_send(client: TestClient, kind: str) -> None:
    class Runs:
        def __reduce__(self) -> Any:
            return pytest.fail, ("it was read",)

    given = {"content": pickle.dumps({"images": Runs()}), "headers": {"Content-Type": kind}}
    answer = client.post("/v1/score", **given)
    assert answer.status_code == 415
    assert answer.json()["error"] == wire.PICKLE


def test_what_is_too_large_is_not_read(client: TestClient) -> None:
    answer = client.post("/v1/score", content=b" " * 10_001, headers={"Content-Type": JSON})
    assert (answer.status_code, answer.headers["connection"]) == (413, "close")
    assert answer.json() == {"error": "a body of 10001 bytes; at most 10000"}
    for length in ("9" * 30, "²", "-1", ""):
        given = {"Content-Type": JSON, "Content-Length": length.encode()}
        answer = client.post("/v1/score", content=b"", headers=given)
        assert answer.status_code == (413 if length[:1] == "9" else 411)
    parts = iter([b"{", b"}"])
    chunked = client.post("/v1/score", content=parts, headers={"Content-Type": JSON})
    assert chunked.status_code == 411


def test_videos_are_for_rewards_of_videos(client: TestClient) -> None:
    kind, content = wire.encode(IMAGES[None], ["a"], [{}], "safetensors")
    given = {"content": content, "headers": {"Content-Type": kind}}
    answer = client.post("/v1/score", **given)
    assert (answer.status_code, kind) == (400, TENSORS)
    assert "scores images" in answer.json()["error"]
    reward = Mean()
    vars(reward)["takes_video"] = True
    with TestClient(made(reward)) as other:
        assert other.post("/v1/score", **given).status_code == 200
        assert other.get("/health").json()["takes_video"] is True


def test_a_token_is_asked_for_before_anything_else() -> None:
    with TestClient(made(Mean(), token=TOKEN)) as client:
        assert client.get("/health").status_code == 200
        for header in ("", TOKEN, f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x"):
            for method, path in (("POST", "/v1/score"), ("GET", "/metrics"), ("GET", "/docs")):
                answer = client.request(method, path, headers={"Authorization": header})
                assert answer.status_code == 401
                assert answer.headers["www-authenticate"] == "Bearer"
                assert TOKEN[:-1] not in answer.text
        known = {"Authorization": f"bearer {TOKEN}"}
        assert client.post("/v1/score", **body("a", "safetensors", **known)).status_code == 200
        metrics = client.get("/metrics", headers=known)
        assert metrics.status_code == 200
        assert TOKEN not in metrics.text


def test_tokens_are_compared_in_constant_time(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(app.hmac, "compare_digest", lambda *pair: asked.append(pair) or True)
    assert app.knows(TOKEN, "Bearer guess\xff")
    assert asked == [("guess\xff".encode(), TOKEN.encode())]


def test_one_batch_at_a_time_and_a_full_queue_says_so() -> None:
    slow = Slow()
    with served(made(slow, queue=3)) as url, httpx2.Client(timeout=20) as client:
        answers: list[httpx2.Response] = []

        def ask() -> None:
            answers.append(client.post(f"{url}/v1/score", **body()))

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        slow.began.acquire(timeout=20)
        waiting = 'queued_requests{reward="mean"} 3'
        while waiting not in client.get(f"{url}/metrics").text:
            time.sleep(0.01)
        refused = client.post(f"{url}/v1/score", **body())
        assert refused.status_code == 503
        assert int(refused.headers["retry-after"]) >= 1
        slow.go.set()
        for thread in threads:
            thread.join()
        assert [answer.status_code for answer in answers] == [200] * 3
        assert (slow.most, slow.calls) == (1, 3)
        assert 'queued_requests{reward="mean"} 0' in client.get(f"{url}/metrics").text


def test_what_waits_is_bounded_in_bytes(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(device, "HELD", 1)
    slow, large = Slow(), body()
    size = len(large["content"])
    with served(made(slow, body=2 * size - 1)) as url, httpx2.Client(timeout=20) as client:
        first = threading.Thread(target=client.post, args=(f"{url}/v1/score",), kwargs=large)
        first.start()
        slow.began.acquire(timeout=20)
        assert client.post(f"{url}/v1/score", **large).status_code == 503
        slow.go.set()
        first.join()


def test_a_client_that_left_costs_no_batch() -> None:
    slow = Slow()
    with served(made(slow)) as url, httpx2.Client(timeout=20) as client:
        first = threading.Thread(target=client.post, args=(f"{url}/v1/score",), kwargs=body())
        first.start()
        slow.began.acquire(timeout=20)
        with pytest.raises(httpx2.ReadTimeout):
            httpx2.post(f"{url}/v1/score", timeout=0.2, **body())
        slow.go.set()
        first.join()
        while 'queued_requests{reward="mean"} 0' not in client.get(f"{url}/metrics").text:
            time.sleep(0.01)
        assert slow.calls == 1


def test_what_is_in_flight_is_finished_before_the_end() -> None:
    slow, answers = Slow(), list[int]()
    with served(made(slow)) as url:

        def ask() -> None:
            answers.append(httpx2.post(f"{url}/v1/score", timeout=20, **body()).status_code)

        threads = [threading.Thread(target=ask) for _ in range(3)]
        for thread in threads:
            thread.start()
        slow.began.acquire(timeout=20)
        waiting = 'queued_requests{reward="mean"} 3'
        while waiting not in httpx2.get(f"{url}/metrics").text:
            time.sleep(0.01)
        threading.Timer(0.2, slow.go.set).start()
    for thread in threads:
        thread.join()
    assert answers == [200] * 3


def test_a_body_that_does_not_come_gives_up_its_place(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(app, "READING", 0.1)

    def slowly() -> Iterator[bytes]:
        yield b"{"
        time.sleep(0.5)
        yield b"}"

    headers = {"Content-Type": JSON, "Content-Length": "2"}
    with served(made(Mean(), queue=1)) as url:
        answer = httpx2.post(f"{url}/v1/score", content=slowly(), headers=headers)
        assert answer.status_code == 408
        assert httpx2.post(f"{url}/v1/score", **body()).status_code == 200


def test_no_path_of_a_client_is_opened(client: TestClient, monkeypatch: pytest.MonkeyPatch) -> None:
    opened = []
    monkeypatch.setattr("builtins.open", lambda *given, **_: opened.append(given))
    said = {"prompts": ["/etc/passwd"], "images": ["/etc/passwd"]}
    assert client.post(
        "/v1/score", content=json.dumps(said), headers={"Content-Type": JSON}
    ).is_error
    assert opened == []
