"""Requests and answers of a reward's server."""

from __future__ import annotations

import asyncio
import hmac
import logging

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, PlainTextResponse
from starlette.datastructures import Headers
from starlette.requests import ClientDisconnect
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from sfgrpo.remote import wire
from sfgrpo.remote.wire import Refused
from sfgrpo.rewards import RewardError
from sfgrpo.serving.counts import TEXT, Counts
from sfgrpo.serving.device import Busy, Device, Gone

OPEN = "/health"
"""Needs no token: those who look whether a server lives have none."""
READING = 60.0
"""Seconds in which a body must have come."""
NOBODY = 499
"""nginx' status for a client that has left; nobody reads it."""
UNREAD = (408, 411, 413)
"""Statuses behind which a body may go on without end, so that the connection is closed. Otherwise
what is left of it is read and thrown away: a client that writes hears no answer."""
PATHS = {OPEN, "/metrics", "/v1/score", "/v1/check"}
"""What is counted by name."""
LOG = logging.getLogger("sfgrpo.serving")


def build(device: Device, token: str | None) -> FastAPI:
    """The application; with a token, all but `OPEN` asks for it."""
    # Pages of documentation would load scripts from elsewhere.
    app = FastAPI(title="sfgrpo serve-reward", openapi_url=None, docs_url=None, redoc_url=None)
    app.add_middleware(Guard, counts=device.counts, token=token)

    @app.get(OPEN)
    async def health() -> JSONResponse:
        return JSONResponse({
            "status": "ok", "reward": device.name, "takes_video": device.takes_video,
            "most_samples": device.limits.samples,
        })  # fmt: skip

    @app.get("/metrics")
    async def metrics() -> PlainTextResponse:
        return PlainTextResponse(device.counts.text(), media_type=TEXT)

    @app.post("/v1/score")
    async def score(request: Request) -> JSONResponse:
        kind = wire.check_type(request.headers.get("content-type", ""))
        size = _length(request, device.limits.body)
        async with device.admitted(size):
            body = await _body(request, size)
            scores = await device.score(kind, body, request.is_disconnected)
            return JSONResponse({"reward": device.name, "scores": scores})

    @app.post("/v1/check")
    async def check(request: Request) -> JSONResponse:
        wire.check_type(request.headers.get("content-type", ""))
        size = _length(request, device.limits.body)
        async with device.admitted(size):
            asked = wire.decode_question(await _body(request, size), device.limits)
            try:
                await device.check(*asked)
            except RewardError as error:
                raise Refused(422, str(error)) from error
            return JSONResponse({})

    @app.exception_handler(Refused)
    async def refused(_: Request, error: Refused) -> JSONResponse:
        response = _error(error.status, str(error))
        if isinstance(error, Busy):
            response.headers["Retry-After"] = str(error.after)
        if error.status in UNREAD:
            response.headers["Connection"] = "close"
        return response

    @app.exception_handler(RewardError)
    async def failed(_: Request, error: RewardError) -> JSONResponse:
        LOG.warning("%s", error)
        return _error(500, str(error))

    @app.exception_handler(Gone)
    @app.exception_handler(ClientDisconnect)
    async def gone(_: Request, __: Exception) -> JSONResponse:
        return _error(NOBODY, "the client has left")

    return app


class Guard:
    """Asks for the token before anything else is looked at, and counts responses."""

    def __init__(self, app: ASGIApp, *, counts: Counts, token: str | None) -> None:
        self.app, self.counts, self.token = app, counts, token

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        path = scope["path"]

        async def counted(message: Message) -> None:
            if message["type"] == "http.response.start":
                known = path if path in PATHS else "other"
                self.counts.responses[known, message["status"]] += 1
            await send(message)

        header = Headers(scope=scope).get("authorization", "")
        if path == OPEN or knows(self.token, header):
            await self.app(scope, receive, counted)
        else:
            refusal = _error(401, "this server asks for a bearer token: none came, or another")
            refusal.headers["WWW-Authenticate"] = "Bearer"
            await refusal(scope, receive, counted)


def knows(token: str | None, header: str) -> bool:
    """Whether an Authorization header holds the token, in a time that does not tell how much of it
    is right."""
    if token is None:
        return True
    scheme, _, given = header.partition(" ")
    return scheme.lower() == "bearer" and hmac.compare_digest(
        given.strip().encode("utf-8", "replace"), token.encode()
    )


def _error(status: int, message: str) -> JSONResponse:
    return JSONResponse({"error": message}, status_code=status)


def _length(request: Request, most: int) -> int:
    """Bytes of the body, as the request says.

    Raises:
        Refused: it does not say, or too many.
    """
    said = request.headers.get("content-length", "")
    if not (said.isascii() and said.isdecimal()):
        raise Refused(411, "the request must say how long its body is (Content-Length)")
    size = int(said) if len(said) < 20 else most + 1
    if size > most:
        raise Refused(413, f"a body of {said[:20]} bytes; at most {most}")
    return size


async def _body(request: Request, size: int) -> bytes:
    """The body, as long as it said; Refused for one that comes too slowly."""
    found = bytearray()

    async def read() -> None:
        async for part in request.stream():
            found.extend(part)
            if len(found) > size:
                raise Refused(413, f"a body of more than the {size} bytes that it said")

    try:
        await asyncio.wait_for(read(), READING)
    except asyncio.TimeoutError:
        raise Refused(408, f"the body did not come within {READING:g} s") from None
    return bytes(found)
