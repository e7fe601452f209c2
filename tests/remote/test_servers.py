"""Several servers: who is asked, how often, and what is said if nobody answers."""

from __future__ import annotations

import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import httpx2
import numpy as np
import pytest
import torch

from sfgrpo.remote import servers
from sfgrpo.remote.servers import Failed, Patience, Question, Servers, Unusable, checked_url
from tests.support.served import PATIENCE

URLS = [f"http://s{number}:1" for number in range(3)]
Answer = Callable[[httpx2.Request], httpx2.Response]


class Network(httpx2.BaseTransport):
    """Answers by host; keeps which hosts were asked."""

    def __init__(self, **answers: Answer) -> None:
        self.answers, self.asked = answers, list[str]()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        self.asked.append(request.url.host)
        return self.answers.get(request.url.host, echo)(request)


def echo(request: httpx2.Request) -> httpx2.Response:
    return httpx2.Response(200, content=request.read())


def dead(request: httpx2.Request) -> httpx2.Response:
    raise httpx2.ConnectError("refused", request=request)


def says(status: int, body: Any = None, **headers: str) -> Answer:
    return lambda _: httpx2.Response(status, json=body, headers=headers)


def over(network: Network, urls: list[str] = URLS, **patience: Any) -> Servers:
    given = {**vars(PATIENCE), **patience}
    return Servers(urls, token=None, patience=Patience(**given), transport=network)


def question(number: int) -> Question[int]:
    def read(body: bytes) -> int:
        try:
            return int(body)
        except ValueError:
            raise Unusable(f"no number: {body[:20]!r}") from None

    return Question("/x", lambda: ("text/plain", b"%d" % number), read, f"prompt 'p{number}'")


def test_answers_are_in_order_whatever_the_arrival() -> None:
    def late(request: httpx2.Request) -> httpx2.Response:
        time.sleep(0.02 * (int(request.read()) % 3))
        return echo(request)

    network = Network(**dict.fromkeys(("s0", "s1", "s2"), late))
    assert over(network).ask_all([question(n) for n in range(30)]) == list(range(30))
    assert min(Counter(network.asked).values()) >= 5  # the least busy is asked


def test_a_dead_server_is_passed_over_and_rests() -> None:
    network = Network(s1=dead)
    asked = over(network, backoff=30.0)
    assert asked.ask_all([question(n) for n in range(20)]) == list(range(20))
    assert network.asked.count("s1") <= 4  # those that were in flight at once
    assert asked.retried == network.asked.count("s1")


def test_a_server_that_comes_back_is_asked_again() -> None:
    network = Network(s0=dead)
    asked = over(network, URLS[:1], retries=10_000)
    threading.Timer(0.05, network.answers.clear).start()
    assert asked.ask(question(7)) == 7
    assert network.asked.count("s0") > 1


@pytest.mark.parametrize("status", servers.BUSY)
def test_a_busy_server_is_asked_later(status: int) -> None:
    network = Network(s0=says(status, {"error": "full"}))
    assert over(network, URLS[:2]).ask(question(3)) == 3
    with pytest.raises(Failed, match=f"http://s0:1 for prompt 'p3': status {status}: full"):
        over(network, URLS[:1], retries=1).ask(question(3))


def test_a_server_says_when_to_come_back() -> None:
    answers = [says(503, **{"Retry-After": "1"})]
    network = Network(s0=lambda request: (answers.pop() if answers else echo)(request))
    before = time.monotonic()
    assert over(network, URLS[:1]).ask(question(3)) == 3
    assert time.monotonic() - before >= 1


def test_a_reward_that_failed_is_asked_again_and_a_wrong_request_is_not() -> None:
    answers: list[Answer] = [says(500), says(200, "none"), echo]
    network = Network(s0=lambda request: answers.pop(0)(request))
    assert over(network, URLS[:1]).ask(question(3)) == 3
    for status in (400, 401, 404, 413, 422, 302):
        network = Network(s0=says(status, {"error": "no\x1b good"}))
        with pytest.raises(Failed, match=f"s0:1 for prompt 'p3': status {status}: no good") as no:
            over(network, URLS[:1]).ask(question(3))
        assert (no.value.status, len(network.asked)) == (status, 1)


def test_what_is_asked_instead() -> None:
    """A question whose answer is of no use may be asked in other words."""
    network = Network()

    def read(body: bytes) -> bytes:
        if body == b"first":
            raise Unusable("no", lambda: b"second")
        return body

    asked = over(network, URLS[:1])
    assert asked.ask(Question("/", lambda: ("text/plain", b"first"), read)) == b"second"


def test_nobody_answers() -> None:
    network = Network(**dict.fromkeys(("s0", "s1"), dead))
    asked = over(network, URLS[:2], retries=2)
    with pytest.raises(Failed, match=r"for prompt 'p1': ConnectError: refused \(attempt 6 of 6\)"):
        asked.ask(question(1))
    assert Counter(network.asked) == {"s0": 3, "s1": 3}
    with pytest.raises(Failed, match="attempt 2 of 2"):  # it is known by now
        asked.ask(question(1))
    network.answers.clear()
    assert asked.ask(question(1)) == 1


def test_some_answers_and_some_failures() -> None:
    def odd(request: httpx2.Request) -> httpx2.Response:
        return (says(422, {"error": "odd"}) if int(request.read()) % 2 else echo)(request)

    answers = over(Network(s0=odd), URLS[:1]).ask_all([question(n) for n in range(4)])
    assert [a if isinstance(a, int) else str(a) for a in answers] == [
        0, "http://s0:1 for prompt 'p1': status 422: odd",
        2, "http://s0:1 for prompt 'p3': status 422: odd",
    ]  # fmt: skip


def test_an_answer_without_end_is_given_up(monkeypatch: pytest.MonkeyPatch) -> None:
    class Endless(httpx2.SyncByteStream):
        def __iter__(self) -> Any:
            while True:
                time.sleep(0.001)
                yield b" " * 100

    def endless(_: httpx2.Request) -> httpx2.Response:
        return httpx2.Response(200, stream=Endless())

    network = Network(s0=endless)
    with pytest.raises(Failed, match=r"TimeoutError: no whole answer in 0.05 s"):
        over(network, URLS[:1], retries=0, timeout=0.05).ask(question(1))
    monkeypatch.setattr(servers, "LARGEST", 1000)
    with pytest.raises(Failed, match="an answer of more than 1000 bytes"):
        over(network, URLS[:1], retries=0).ask(question(1))


def test_the_run_s_generators_stay_as_they_are() -> None:
    states = random.getstate(), str(np.random.get_state()), torch.get_rng_state()
    over(Network(s0=dead), URLS[:2]).ask_all([question(n) for n in range(10)])
    assert random.getstate() == states[0]
    assert str(np.random.get_state()) == states[1]
    assert torch.equal(torch.get_rng_state(), states[2])


def test_pauses_grow_and_end() -> None:
    pauses = [Patience(backoff=0.5).pause(failures) for failures in (1, 2, 3, 7, 10_000)]
    assert pauses == [0.5, 1, 2, 30, 30]


def test_a_token_is_sent_and_not_told(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level("DEBUG")
    seen = []

    def look(request: httpx2.Request) -> httpx2.Response:
        seen.append(request.headers["authorization"])
        return httpx2.Response(401, json={"error": "another token"})

    asked = Servers(
        URLS[0], token="s3cret-s3cret-s3", patience=PATIENCE, transport=Network(s0=look)
    )
    with pytest.raises(Failed) as failed:
        asked.ask(question(1))
    assert seen == ["Bearer s3cret-s3cret-s3"]
    assert "s3cret" not in str(failed.value) + caplog.text + repr(asked._client.headers)


@pytest.mark.parametrize(
    ("url", "message"),
    [
        ("127.0.0.1:8000", "must be like http://127.0.0.1:8000"),
        ("ftp://x", "must be like"),
        ("http://", "must be like"),
        ("http://me:secret@host:1", "a token goes into an environment variable or a file"),
        ("http://host:1/?token=secret", "a token goes into"),
        ("http://host:port", "is none"),
    ],
)
def test_addresses(url: str, message: str) -> None:
    with pytest.raises(ValueError, match=message) as refused:
        checked_url(url)
    assert "secret" not in str(refused.value)
    assert checked_url("http://[::1]:8000/v1/") == "http://[::1]:8000/v1"


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"timeout": 0}, "timeout must be seconds above 0"),
        ({"backoff": float("nan")}, "backoff must be seconds above 0"),
        ({"retries": -1}, "retries must be at least 0"),
        ({"in_flight": 0}, "in_flight must be at least 1"),
    ],
)
def test_patience_makes_sense(given: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Patience(**given)


def test_errors_of_both_protocols_are_read() -> None:
    for body in ({"error": "e"}, {"error": {"message": "e"}}, {"detail": "e"}, {"message": "e"}):
        assert servers._told(json.dumps(body).encode()) == "e"
    assert servers._told(b"\xff" * 1000).endswith("...")
    assert servers._told(b"") == "no reason given"
