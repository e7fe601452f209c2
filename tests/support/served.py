"""Servers for tests: an application in a thread of this process, on a socket of its own."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn

from sfgrpo.remote.servers import Patience
from sfgrpo.serving.server import Server

QUICK = {"retries": 8, "backoff": 0.001, "timeout": 20.0}
"""Options of a client that loses no time."""
PATIENCE = Patience(retries=8, backoff=0.001, timeout=20.0)


def free_port() -> int:
    """A port that was free a moment ago."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


@contextmanager
def served(app: Any, port: int = 0, **options: Any) -> Iterator[str]:
    """Within the context an ASGI application answers at the URL; then it finishes what it began."""
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    listening.bind(("127.0.0.1", port))
    server = Server(uvicorn.Config(app, log_level="error", **options))
    thread = threading.Thread(target=server.run, args=([listening],))
    thread.start()
    while not server.started and thread.is_alive():
        time.sleep(0.005)
    try:
        yield f"{'https' if 'ssl_certfile' in options else 'http'}://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join(15)
        listening.close()
        assert not thread.is_alive(), "the server waits for somebody"
