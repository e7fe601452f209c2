"""Several servers that answer the same: balancing, fail-over, retries, deadlines.

A request goes to the server with the least to do. One that cannot be reached, or says that it is
busy, rests, each time twice as long, and the request goes to another at once; where all rest, it
waits for the first of them. An answer of no use (status 500, not what was asked for) is asked for
again after a pause of its own. Pauses are spread at random so that clients do not come back all at
once; the numbers are this module's own, a run's generators stay as they are.
"""

from __future__ import annotations

import json
import random
import ssl
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import httpx2

T = TypeVar("T")

BUSY = (408, 429, 502, 503, 504)
"""Statuses by which a server says that it cannot now."""
LARGEST = 16 * 2**20
"""Bytes of an answer at most."""
LONGEST = 30.0
"""Seconds of a pause at most, whatever a server asks for."""
IDLE = 30.0
"""Seconds an unused connection is kept: less than servers keep theirs."""


class Unusable(Exception):
    """An answer that is not what was asked for; `again` is what to ask instead, if that differs."""

    def __init__(self, message: str, again: Callable[[], bytes] | None = None) -> None:
        super().__init__(message)
        self.again = again


class Failed(Exception):
    """A request that no server answered, or that one refused; names server, status and prompt."""

    def __init__(self, message: str, status: int | None = None, *, useless: bool = False) -> None:
        super().__init__(message)
        self.status = status
        self.useless = useless
        """Whether servers answered, but never what was asked for."""


@dataclass(frozen=True)
class Question(Generic[T]):
    """One request."""

    path: str
    body: Callable[[], tuple[str, bytes]]
    """Makes content type and body, when its turn has come; ("", b"") is a GET."""
    read: Callable[[bytes], T]
    """What the answer's body says; `Unusable` if it says nothing."""
    about: str = ""
    """The prompt, for messages."""


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long, how often and how many at once."""

    connect_timeout: float = 5.0
    timeout: float = 120.0
    """Seconds from a request to the end of its answer."""
    retries: int = 8
    """How often more a request is sent, for each server."""
    backoff: float = 0.5
    """Seconds of the first pause; each further one is twice as long, up to `LONGEST`."""
    in_flight: int = 4
    """Requests at once, for each server."""

    def __post_init__(self) -> None:
        for name in ("connect_timeout", "timeout", "backoff"):
            if not 0 < getattr(self, name) < float("inf"):
                raise ValueError(f"{name} must be seconds above 0, got {getattr(self, name)!r}")
        for name, least in (("retries", 0), ("in_flight", 1)):
            value = getattr(self, name)
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be at least {least}, got {value!r}")

    def pause(self, failures: int) -> float:
        """Seconds after so many failures in a row (1, 2, ...), before they are spread."""
        return min(LONGEST, self.backoff * 2.0 ** min(failures - 1, 20))


@dataclass
class _Server:
    url: str
    busy: int = 0
    failures: int = 0
    """In a row, each after a rest."""
    rests_until: float = 0.0


def checked_url(url: str) -> str:
    """A server's address without a slash at its end.

    Raises:
        ValueError: it is none, or holds a user or a password, which belong to no recipe.
    """
    try:
        found = httpx2.URL(url)
    except (httpx2.InvalidURL, TypeError) as error:
        raise ValueError(f"url {url!r} is none: {error}") from None
    if found.userinfo or found.query or found.fragment:
        raise ValueError(
            f"url of {found.host!r}: give scheme, host, port and path alone; a token goes into an "
            "environment variable or a file"
        )
    if found.scheme not in ("http", "https") or not found.host:
        raise ValueError(f"url {url!r} must be like http://127.0.0.1:8000")
    return str(found).rstrip("/")


class Servers:
    """One or more servers that answer the same."""

    def __init__(
        self, urls: str | Sequence[str], *, token: str | None, patience: Patience,
        verify: ssl.SSLContext | bool = True, transport: httpx2.BaseTransport | None = None,
    ) -> None:  # fmt: skip
        """`transport` stands for the network in tests. ValueError for an address that is none."""
        given = [urls] if isinstance(urls, str) else list(urls)
        if not given:
            raise ValueError("url: needs at least one server")
        self.servers = [_Server(checked_url(url)) for url in given]
        self.patience = patience
        self.retried = 0
        """Requests that were sent once more."""
        self._dead = False  # nobody answered the last request: the next one asks each once
        self._lock = threading.Lock()
        self._random = random.Random()  # seeded by the system
        most = patience.in_flight * len(self.servers)
        self._pool = ThreadPoolExecutor(most, thread_name_prefix="sfgrpo-reward")
        self._client = httpx2.Client(
            headers={"Authorization": f"Bearer {token}"} if token else {},
            timeout=httpx2.Timeout(patience.timeout, connect=patience.connect_timeout),
            limits=httpx2.Limits(max_connections=most, keepalive_expiry=IDLE),
            transport=transport,
            verify=verify,
            # A proxy of the environment would be asked for 127.0.0.1, .netrc replace the token.
            trust_env=False,
        )

    def ask_all(self, questions: Sequence[Question[T]]) -> list[T | Failed]:
        """The answers in the order of the questions, whatever order they arrive in."""

        def one(question: Question[T]) -> T | Failed:
            try:
                return self.ask(question)
            except Failed as error:
                return error

        return list(self._pool.map(one, questions))

    def each(self, question: Question[T]) -> list[T | Failed]:
        """Every server's own answer, asked once."""
        return list(self._pool.map(lambda server: self._once(server, question), self.servers))

    def _once(self, server: _Server, question: Question[T]) -> T | Failed:
        try:
            status, _, answer = self._send(server, question.path, *question.body())
            if status == 200:
                return question.read(answer)
            return Failed(f"{server.url}: status {status}: {_told(answer)}", status)
        except (httpx2.TransportError, TimeoutError, Unusable) as error:
            return Failed(f"{server.url}: {type(error).__name__}: {_shown(str(error))}")

    def ask(self, question: Question[T]) -> T:
        """One answer.

        Raises:
            Failed: a server refused it, or none answered in all attempts.
        """
        attempts = len(self.servers) * (1 if self._dead else self.patience.retries + 1)
        kind, body = question.body()
        useless, said, last = 0, "", None
        for attempt in range(attempts):
            self.retried += attempt > 0
            with self._turn(last) as server:
                last = server
                try:
                    status, headers, answer = self._send(server, question.path, kind, body)
                except (httpx2.TransportError, TimeoutError) as error:
                    said = f"{type(error).__name__}: {_shown(str(error))}"
                    self._rest(server)
                    continue
                if status in BUSY:
                    said = f"status {status}: {_told(answer)}"
                    self._rest(server, headers.get("retry-after"))
                    continue
                self._well(server)
            if status == 200:
                try:
                    return question.read(answer)
                except Unusable as error:
                    said = str(error)
                    body = error.again() if error.again else body
            else:
                said = f"status {status}: {_told(answer)}"
                if status != 500:  # the request is wrong, and stays so
                    raise Failed(f"{server.url}{_about(question)}: {said}", status)
            useless += 1
            if attempt + 1 < attempts:
                time.sleep(self._spread(self.patience.pause(useless)))
        self._dead = not useless
        where = last.url if last else ""
        said = f"{said} (attempt {attempts} of {attempts})"
        raise Failed(f"{where}{_about(question)}: {said}", useless=useless > 0)

    def _send(
        self, server: _Server, path: str, kind: str, body: bytes
    ) -> tuple[int, httpx2.Headers, bytes]:
        """Status, headers and body; httpx2's timeout counts from one byte to the next, this one
        all of them."""
        method, deadline = "POST" if kind else "GET", time.monotonic() + self.patience.timeout
        headers, answer = {"Content-Type": kind} if kind else {}, bytearray()
        with self._client.stream(
            method, server.url + path, content=body or None, headers=headers
        ) as response:
            for part in response.iter_bytes():
                answer += part
                if time.monotonic() > deadline:
                    raise TimeoutError(f"no whole answer in {self.patience.timeout:g} s")
                if len(answer) > LARGEST:
                    raise httpx2.RemoteProtocolError(f"an answer of more than {LARGEST} bytes")
            return response.status_code, response.headers, bytes(answer)

    @contextmanager
    def _turn(self, last: _Server | None) -> Iterator[_Server]:
        """The server whose turn it is: one that does not rest, or the first to be back; of those
        the least busy; of those another than the `last`."""
        while True:
            with self._lock:
                now = time.monotonic()
                server = min(
                    self.servers,
                    key=lambda s: (max(0.0, s.rests_until - now), s.busy, s is last),
                )
                rest = server.rests_until - now
                if rest <= 0:
                    server.busy += 1
                    break
            time.sleep(self._spread(rest))
        try:
            yield server
        finally:
            with self._lock:
                server.busy -= 1

    def _rest(self, server: _Server, after: str | None = None) -> None:
        """Leave a server alone for a while; requests that fail together count once."""
        with self._lock:
            now = time.monotonic()
            if now < server.rests_until:
                return
            server.failures += 1
            pause = self.patience.pause(server.failures)
            if after is not None and after.strip().isdecimal():
                pause = max(pause, min(LONGEST, float(after)))
            server.rests_until = now + self._spread(pause)

    def _well(self, server: _Server) -> None:
        with self._lock:
            server.failures, self._dead = 0, False

    def _spread(self, seconds: float) -> float:
        return seconds * self._random.uniform(1, 1.5)


def _about(question: Question[Any]) -> str:
    return f" for {question.about}" if question.about else ""


def _told(answer: bytes) -> str:
    """What the body of an error says, as far as it fits a line."""
    try:
        found = json.loads(answer)
    except (ValueError, RecursionError):
        found = answer.decode("utf-8", "replace")
    if isinstance(found, dict):
        found = found.get("error", found.get("detail", found.get("message", found)))
    if isinstance(found, dict):  # OpenAI's
        found = found.get("message", found)
    return _shown(str(found)) or "no reason given"


def _shown(text: str) -> str:
    line = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    return line if len(line) <= 300 else line[:297] + "..."
