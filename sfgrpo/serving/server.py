"""A uvicorn server that ends when its last answer is sent."""

from __future__ import annotations

import asyncio
from socket import socket
from typing import Any

import uvicorn


class Server(uvicorn.Server):
    """Its encrypted connections are not waited for once nothing is left to be said on them.

    asyncio says goodbye over TLS and waits half a minute for the answer, which a client does not
    give while its connection idles in a pool.
    """

    async def shutdown(self, sockets: list[socket] | None = None) -> None:
        ending = asyncio.create_task(super().shutdown(sockets))
        while not ending.done():
            await asyncio.wait({ending}, timeout=0.2)
            if self.server_state.tasks:
                continue
            for connection in list[Any](self.server_state.connections):
                transport = connection.transport
                if transport is not None and not transport.get_write_buffer_size():
                    transport.abort()
        await ending
