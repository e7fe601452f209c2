"""A rank that dies takes the run down, at once and with its reason.

Without this, ranks that wait for a dead one wait until NCCL or gloo times out, half an hour later,
and say "connection closed".

Every rank holds one TCP connection to rank 0, apart from those that carry tensors, and a thread
that does nothing but read it. A process that dies, even by SIGKILL, has its connections closed by
the system: rank 0 sees the end of the stream, tells the others which rank it was, and all exit. A
rank that fails with an exception sends it first. A machine that falls silent is noticed by TCP's
own keep-alive within `run.peer_timeout`. There are no heartbeats: a rank that is busy for minutes
(writing a checkpoint, compiling) cannot be taken for dead.

Only ranks other than 0 connect, so rank 0 sees W - 1 connections and a thread each. Whoever else
connects while it waits for them, a port scanner or a check of health, is told from a rank by a
secret of the run; it may be silent, reset, or send what it likes meanwhile.
"""

from __future__ import annotations

import hmac
import json
import os
import secrets
import selectors
import socket
import sys
import threading
import time
import traceback
from collections.abc import Callable
from contextlib import ExitStack, suppress
from pathlib import Path
from types import TracebackType
from typing import NoReturn, TextIO

from torch.distributed import DistError

STATUS = 1
"""Exit status of a rank that ends because of another."""
GONE = "died without a word: killed from outside, perhaps by the system for want of memory"
REASON = "failure.txt"
SETTLE = 5.0
"""Seconds a rank whose communication failed waits to hear which rank is behind it."""
HELLO = 4096
"""At most so many bytes introduce a rank; who sends more is none."""


def leave(reason: str) -> NoReturn:
    """Say why and exit, where nobody else is watched."""
    _say(reason)
    _exit()


class Agreed(Exception):
    """An error that every rank raises at the same point: none has to be told."""


class Watch:
    """Within the context, ranks live and die together."""

    def __init__(
        self,
        *,
        rank: int,
        world: int,
        largest: Callable[[int], int],
        timeout: float,
        folder: Path,
        interface: str,
        told: tuple[type[BaseException], ...] = (),
    ) -> None:
        """
        Args:
            largest: the largest of all ranks' values (a collective).
            timeout: seconds after which a machine that fell silent is given up.
            folder: the run's; the reason is left in it.
            interface: address at which rank 0 listens; "" is every one of its machine.
            told: errors whose message says all; of others the traceback is printed.
        """
        self.rank, self.world, self.largest, self.timeout = rank, world, largest, timeout
        self.folder, self.interface, self.told = folder, interface, told
        self.name = f"rank {rank} (process {os.getpid()} on {socket.gethostname()})"
        self.others: list[socket.socket] = []
        self._readers: list[threading.Thread] = []
        self._done = threading.Event()
        self._lock = threading.Lock()

    def __enter__(self) -> Watch:
        if self.rank == 0:
            (self.folder / REASON).unlink(missing_ok=True)
        if self.world > 1:
            # Both numbers are rank 0's; the secret keeps strangers on the network out.
            secret = self.largest(secrets.randbits(62) if self.rank == 0 else 0)
            if self.rank == 0:
                self._listen(secret)
            else:
                self._connect(secret)
            self.largest(0)  # nobody works before everybody is watched
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if self.world == 1:
            return
        if error is None or isinstance(error, Agreed):
            self.largest(0)  # nobody leaves before everybody is done
            for other in self.others:
                _send(other, {"done": True})
            self._done.set()
            for reader in self._readers:  # Python aborts if one still reads while it shuts down
                reader.join(self.timeout)
            return
        told = isinstance(error, self.told)
        if not told:
            traceback.print_exception(error)
        if concerns_others(error):
            time.sleep(SETTLE)  # the rank that is behind it is heard of meanwhile
        reason = str(error) if told else "".join(traceback.format_exception_only(error)).strip()
        self.fail(f"{self.name} failed: {reason}")

    def fail(self, reason: str) -> NoReturn:
        """Tell every rank the reason, and exit with it."""
        with self._lock:  # the first reason counts: who comes later waits for the exit
            _say(reason)
            for other in self.others:
                _send(other, {"failure": reason})
            with suppress(OSError), (self.folder / REASON).open("x", encoding="utf-8") as file:
                file.write(reason + "\n")
            _exit()

    def _listen(self, secret: int) -> None:
        """Rank 0: let every other rank connect."""
        missing = set(range(1, self.world))
        with ExitStack() as opened, selectors.DefaultSelector() as waiting:
            server = opened.enter_context(
                socket.create_server((self.interface, 0), backlog=max(128, self.world))
            )
            self.largest(server.getsockname()[1])
            waiting.register(server, selectors.EVENT_READ)
            deadline = time.monotonic() + self.timeout
            while missing:
                ready = waiting.select(max(0, deadline - time.monotonic()))
                if time.monotonic() >= deadline:
                    absent = ", ".join(map(str, sorted(missing)))
                    self.fail(
                        f"of the other ranks, {absent} did not connect to {self.name} within "
                        f"{self.timeout:g} s (run.peer_timeout): is there a firewall?"
                    )
                for key, _ in ready:
                    if key.fileobj is server:
                        connection = opened.enter_context(server.accept()[0])
                        connection.setblocking(False)
                        waiting.register(connection, selectors.EVENT_READ, Greeting(connection))
                    elif (hello := key.data.read()) is not None:
                        waiting.unregister(key.fileobj)
                        self._admit(key.data.connection, hello, secret, missing)

    def _admit(
        self, stranger: socket.socket, hello: dict[str, object], secret: int, missing: set[int]
    ) -> None:
        """Watch who knows the secret, as the rank it says it is; close the connection of others."""
        known = hmac.compare_digest(str(hello.get("secret")).encode(), str(secret).encode())
        rank = hello.get("rank")
        if known and isinstance(rank, int) and rank in missing:
            missing.remove(rank)
            connection = stranger.dup()  # the stranger's own ends with the listening
            connection.setblocking(True)
            self._watch(
                connection, connection.makefile("r", encoding="utf-8"), str(hello.get("name"))
            )
        stranger.close()

    def _connect(self, secret: int) -> None:
        """The other ranks."""
        host, port = os.environ["MASTER_ADDR"], self.largest(0)
        try:
            connection = socket.create_connection((host, port), self.timeout)
        except OSError as error:
            self.fail(
                f"{self.name} cannot connect to rank 0 on {host}, port {port}: {error}; is there a "
                "firewall?"
            )
        _send(connection, {"secret": secret, "rank": self.rank, "name": self.name})
        stream = connection.makefile("r", encoding="utf-8")
        self._watch(connection, stream, f"rank 0 (on {host})")

    def _watch(self, connection: socket.socket, stream: TextIO, name: str) -> None:
        connection.settimeout(None)
        self._keep_alive(connection)
        self.others.append(connection)
        reader = threading.Thread(target=self._follow, args=(stream, name), daemon=True)
        self._readers.append(reader)
        reader.start()

    def _follow(self, stream: TextIO, name: str) -> None:
        """Wait for what `name` has to say, or for its end."""
        try:
            said = _read(stream.readline())
        except OSError as error:  # nothing answered the keep-alive, or a reset
            said = {"failure": f"{name} is out of reach: {error}"}
        if not (self._done.is_set() or said.get("done")):
            self.fail(str(said.get("failure", f"{name} {GONE}")))

    def _keep_alive(self, connection: socket.socket) -> None:
        """Let the system ask a silent machine four times within the timeout."""
        pause = max(1, int(self.timeout / 5))
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE, pause)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPINTVL, pause)
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPCNT, 4)


class Greeting:
    """The first line of whoever connected, as far as it has come."""

    def __init__(self, connection: socket.socket) -> None:
        self.connection = connection
        self._heard = b""

    def read(self) -> dict[str, object] | None:
        """What it says: None while the line goes on, nothing if it is no rank's."""
        try:
            part = self.connection.recv(HELLO)
        except BlockingIOError:
            return None
        except OSError:  # a reset
            return {}
        self._heard += part
        line, ended, _ = self._heard.partition(b"\n")
        if ended:
            return _read(line)
        return None if part and len(self._heard) < HELLO else {}


def concerns_others(error: BaseException) -> bool:
    """Whether an error was raised by communication: then another rank is behind it."""
    frames = traceback.extract_tb(error.__traceback__)
    places = ("torch/distributed/", "deepspeed/comm/")
    return isinstance(error, DistError) or any(place in frames[-1].filename for place in places)


def _say(reason: str) -> None:
    print(f"\nsfgrpo: the run ends: {reason}", file=sys.stderr, flush=True)


def _exit() -> NoReturn:
    sys.stdout.flush()
    os._exit(STATUS)


def _send(connection: socket.socket, message: dict[str, object]) -> None:
    try:
        connection.sendall(json.dumps(message).encode() + b"\n")
    except OSError:
        return  # whoever cannot be told sees the connection end


def _read(line: str | bytes) -> dict[str, object]:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # not JSON, not UTF-8, or nested without end
        return {}
    return found if isinstance(found, dict) else {}
