"""The command `sfgrpo serve-reward`."""

from __future__ import annotations

import argparse
import ipaddress
import os
import signal
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from sfgrpo import json_text
from sfgrpo.remote import token as secret
from sfgrpo.remote import trust

MIB = 2**20
EPILOG = f"""\
The recipe of a run names it: reward: {{http: 1.0}}, reward_options: {{http: {{url:
"http://127.0.0.1:8000"}}}}. Beyond this machine (--host) clients have to know a token, which
{secret.VARIABLE} or --token-file holds on both sides. Where the network is not yours alone,
encrypt: --tls-cert and --tls-key here, and url "https://..." there, with ca_file where the
certificate is your own. Ctrl-C and SIGTERM finish what is in the queue; a second one does not.

  sfgrpo serve-reward pickscore --port 8000 --option device=cuda:1 --option batch=64
  sfgrpo serve-reward mine:score --port 8001      a function in mine.py that returns a reward
  curl http://127.0.0.1:8000/health
"""


def add_parser(commands: Any) -> None:
    """Add the command to those of `sfgrpo`."""
    parser = commands.add_parser(
        "serve-reward", help="serve a reward to trainings elsewhere",
        description="Serve a reward over HTTP, from the environment that it needs.",
        epilog=EPILOG, formatter_class=argparse.RawDescriptionHelpFormatter,
    )  # fmt: skip
    parser.add_argument("name", help="a reward of sfgrpo, or module:function of your own")
    parser.add_argument("--port", type=int, required=True, help="0 takes a free one")
    parser.add_argument("--host", default="127.0.0.1", help="address to listen at (this machine)")
    parser.add_argument("--token-file", type=Path, help=f"file of the token ({secret.VARIABLE})")
    parser.add_argument("--tls-cert", type=Path, help="PEM of the certificate to encrypt with")
    parser.add_argument("--tls-key", type=Path, help="PEM of its key")
    parser.add_argument(
        "--option", action="append", default=[], metavar="NAME=VALUE",
        help="an argument of the reward; the value is read as JSON where it is that",
    )  # fmt: skip
    parser.add_argument("--queue", type=int, default=64, help="requests that wait at most (64)")
    parser.add_argument("--max-body", type=int, default=256, metavar="MIB", help="a request (256)")
    parser.add_argument("--max-samples", type=int, default=256, help="samples of a request (256)")
    parser.add_argument(
        "--max-pixels", type=int, default=4096 * 4096, help="pixels of a PNG or JPEG (4096 x 4096)"
    )


def main(parsed: argparse.Namespace) -> int:
    """Serve until a signal; returns the exit status.

    Raises:
        ValueError: arguments that make no sense, naming them.
        OSError: the address cannot be listened at; a file that is not there.
    """
    import uvicorn

    from sfgrpo import rewards
    from sfgrpo.remote.wire import Limits
    from sfgrpo.serving import app
    from sfgrpo.serving.device import Device
    from sfgrpo.serving.server import Server

    for name in ("queue", "max_body", "max_samples", "max_pixels"):
        if getattr(parsed, name) < 1:
            key = "--" + name.replace("_", "-")
            raise ValueError(f"{key} must be at least 1, got {getattr(parsed, name)}")
    token = secret.read(file=parsed.token_file)
    if token is None and not is_loopback(parsed.host):
        raise ValueError(
            f"--host {parsed.host}: others can reach this address, so clients need a token; put "
            f"one (`openssl rand -hex 32`) into {secret.VARIABLE} or a file for --token-file"
        )
    scheme = "https" if trust.check_pair(parsed.tls_cert, parsed.tls_key) else "http"
    listening = listen(parsed.host, parsed.port)  # before the reward, which may take minutes
    with listening:
        device = Device(
            parsed.name, rewards.build(parsed.name, **options(parsed.option)),
            limits=Limits(
                body=parsed.max_body * MIB, samples=parsed.max_samples, pixels=parsed.max_pixels,
                total=4 * parsed.max_pixels,
            ),
            queue=parsed.queue,
        )  # fmt: skip
        host, port = listening.getsockname()[:2]
        shown = f"[{host}]" if ":" in host else host
        asks = "asks for its token" if token else "asks for no token"
        print(f"reward '{parsed.name}' at {scheme}://{shown}:{port}, {asks}", flush=True)
        server = Server(uvicorn.Config(
            app.build(device, token), log_level="warning", access_log=False, server_header=False,
            proxy_headers=False, timeout_keep_alive=120,
            ssl_certfile=parsed.tls_cert, ssl_keyfile=parsed.tls_key,
        ))  # fmt: skip
        for number in (signal.SIGINT, signal.SIGTERM):
            # uvicorn takes them while it serves, and sends itself the one it got when it is done.
            signal.signal(number, signal.SIG_IGN)
        server.run(sockets=[listening])
    if device.counts.began is not None:  # told twice: the batch that runs is given up
        os._exit(1)
    return 0


def is_loopback(host: str) -> bool:
    """Whether an address is this machine's own alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def listen(host: str, port: int) -> socket.socket:
    """A socket bound to an address.

    Raises:
        OSError: it is taken, or none of this machine.
    """
    if not 0 <= port < 2**16:
        raise ValueError(f"--port must be 0 to 65535, got {port}")
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        found = socket.socket(family, socket.SOCK_STREAM)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except OSError as error:
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror or error}") from error
    return found


def options(given: Sequence[str]) -> dict[str, Any]:
    """`["batch=64", "device=cuda:1"] -> {"batch": 64, "device": "cuda:1"}`."""
    found: dict[str, Any] = {}
    for entry in given:
        name, equals, value = entry.partition("=")
        if not equals or not name:
            raise ValueError(f"--option needs NAME=VALUE, got '{entry}'")
        if name in found:
            raise ValueError(f"--option {name}: it is given twice")
        try:
            found[name] = json_text.read(value)
        except json_text.RepeatedKey as error:
            raise ValueError(f"--option {name}: {error}") from None
        except ValueError:
            found[name] = value
    return found
