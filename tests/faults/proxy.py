"""An HTTP proxy before an S3 server that spoils a share of the requests, and counts what it did."""

from __future__ import annotations

import asyncio
import random
import socket
import struct
import threading
from collections import Counter
from typing import Any

REFUSED = (
    b"<?xml version='1.0'?><Error><Code>SlowDown</Code>"
    b"<Message>Please reduce your request rate</Message></Error>"
)
SHARES = {  # of requests; together 22 %
    "503": 0.05,  # refused before it takes effect
    "reset": 0.05,  # the connection breaks before it takes effect
    "lost reply": 0.05,  # it takes effect, then the connection breaks
    "torn reply": 0.03,  # ... in the middle of the answer
    "slow": 0.03,  # answered after 2 s
    "time-out": 0.01,  # never answered
}
SLOW_S, NEVER_S = 2.0, 120.0


class FaultyProxy:
    """Serves on ``port`` in a thread of its own until `stop`; ``counts`` by fault, "requests" is
    all.
    """

    def __init__(
        self, upstream: int, shares: dict[str, float] | None = None, seed: int = 0
    ) -> None:
        self.upstream, self.shares = upstream, SHARES if shares is None else shares
        self.random, self.counts = random.Random(seed), Counter[str]()
        self._loop = asyncio.new_event_loop()
        self._server: Any = self._loop.run_until_complete(
            asyncio.start_server(self._serve, "127.0.0.1", 0)
        )
        self.port: int = self._server.sockets[0].getsockname()[1]
        self._thread = threading.Thread(target=self._loop.run_forever, daemon=True)
        self._thread.start()

    @property
    def faults(self) -> int:
        return sum(count for name, count in self.counts.items() if name != "requests")

    def stop(self) -> None:
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            await self._answer(reader, writer)
        except (OSError, asyncio.IncompleteReadError):
            _reset(writer)
        writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        headers = dict(
            line.lower().split(b": ", 1) for line in head.split(b"\r\n")[1:] if b": " in line
        )
        if headers.get(b"expect"):
            writer.write(b"HTTP/1.1 100 Continue\r\n\r\n")
        body = await reader.readexactly(int(headers.get(b"content-length", 0)))
        self.counts["requests"] += 1
        fault = self._choose()
        if fault:
            self.counts[fault] += 1
        if fault == "reset":
            return _reset(writer)
        if fault == "time-out":
            await asyncio.sleep(NEVER_S)
            return None
        if fault == "503":
            writer.write(
                b"HTTP/1.1 503 Slow Down\r\nContent-Type: application/xml\r\nConnection: close\r\n"
            )
            writer.write(
                b"Content-Length: %d\r\n\r\n%s"
                % (len(REFUSED), b"" if head[:4] == b"HEAD" else REFUSED)
            )
            return await writer.drain()
        answer = await self._ask(head, body)
        if fault == "lost reply":
            return _reset(writer)
        if fault == "torn reply":
            writer.write(answer[: len(answer) - max(1, len(answer) // 3)])
            await writer.drain()
            return _reset(writer)
        if fault == "slow":
            await asyncio.sleep(SLOW_S)
        writer.write(answer)
        await writer.drain()
        return None

    def _choose(self) -> str:
        point = self.random.random()
        for fault, share in self.shares.items():
            point -= share
            if point < 0:
                return fault
        return ""

    async def _ask(self, head: bytes, body: bytes) -> bytes:
        reader, writer = await asyncio.open_connection("127.0.0.1", self.upstream)
        first, _, rest = head.partition(b"\r\n")
        kept = [
            line for line in rest.split(b"\r\n") if line and line.lower().split(b":")[0] not in _HOP
        ]
        writer.write(b"\r\n".join([first, *kept, b"Connection: close"]) + b"\r\n\r\n" + body)
        answer = await reader.read(-1)
        writer.close()
        if not answer:
            raise ConnectionResetError
        return answer


_HOP = (b"connection", b"expect", b"keep-alive")


def _reset(writer: asyncio.StreamWriter) -> None:
    """Ends the connection with RST instead of a polite FIN."""
    found: socket.socket | None = writer.get_extra_info("socket")
    if found is not None:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
    writer.transport.abort()
