"""A model server with faults: OpenAI's chat format, plain JSON, and server-sent events.

What becomes of a request is said by its question, ``fault[:times]|text``: the first ``times``
requests with that question meet the fault, later ones get ``text`` in capitals.  ``hang`` never
answers, ``429`` and ``500`` are refused, ``reset`` is cut off without a word, ``half`` in the
middle of its answer, ``slow`` waits ``times`` milliseconds, ``garbage`` gets what is no JSON.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import struct
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.support.cli import wait_until

USAGE = {"prompt_tokens": 7, "completion_tokens": 2, "total_tokens": 9}


class Server:
    """Answers requests; every question that comes is written to ``log``, one a line."""

    def __init__(self, log: Path | None) -> None:
        self._asked: Counter[str] = Counter()
        self._log = log.open("a", buffering=1) if log else None

    async def serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """Serve the requests of one connection."""
        with contextlib.suppress(ConnectionError, asyncio.IncompleteReadError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
                path = head.split(" ", 2)[1]
                fields = dict(
                    line.lower().split(": ", 1) for line in head.splitlines()[1:] if ": " in line
                )
                body = json.loads(await reader.readexactly(int(fields["content-length"])))
                if not await self._answer(writer, path, body):
                    break
        writer.close()

    async def _answer(self, writer: asyncio.StreamWriter, path: str, body: Any) -> bool:
        is_chat = path.endswith("/chat/completions")
        question = body["messages"][-1]["content"] if is_chat else body["question"]
        if self._log is not None:
            self._log.write(question.replace("\n", " ") + "\n")
        fault, times, text = _parse(question)
        self._asked[question] += 1
        if fault == "slow":
            await asyncio.sleep(times / 1000)
        elif fault and self._asked[question] <= times:
            return await self._fail(writer, fault)
        streams = body.get("stream", False) or path.endswith("/stream")
        data = _stream(text, is_chat) if streams else _whole(text, is_chat)
        kind = "text/event-stream" if streams else "application/json"
        writer.write(_head(200, kind, len(data)) + data)
        await writer.drain()
        return True

    async def _fail(self, writer: asyncio.StreamWriter, fault: str) -> bool:
        if fault == "hang":
            await asyncio.sleep(3600)
        if fault in ("429", "500"):
            wait = b"Retry-After: 0\r\n" if fault == "429" else b""
            writer.write(_head(int(fault), "text/plain", 4, wait) + b"busy")
            await writer.drain()
            return True
        if fault == "garbage":
            writer.write(_head(200, "application/json", 5) + b"<html")
            await writer.drain()
            return True
        if fault == "half":
            data = _whole("never whole", is_chat=True)
            writer.write(_head(200, "application/json", len(data)) + data[: len(data) // 2])
            await writer.drain()
        # Closing so sends a reset.
        writer.get_extra_info("socket").setsockopt(
            socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0)
        )
        return False


def _parse(question: str) -> tuple[str, int, str]:
    fault, bar, text = question.partition("|")
    if not bar:
        return "", 0, question.upper()
    name, _, times = fault.partition(":")
    return name, int(times or 1_000_000), text.upper()


def _head(status: int, kind: str, length: int, more: bytes = b"") -> bytes:
    return (
        b"HTTP/1.1 %d X\r\nContent-Type: %b\r\nContent-Length: %d\r\n%b\r\n"
        % (status, kind.encode(), length, more)
    )  # fmt: skip


def _whole(text: str, is_chat: bool) -> bytes:
    if not is_chat:
        return json.dumps({"value": text, "usage": USAGE}).encode()
    choice = {"index": 0, "message": {"role": "assistant", "content": text}}
    return json.dumps({"choices": [choice], "usage": USAGE}).encode()


def _stream(text: str, is_chat: bool) -> bytes:
    half = len(text) // 2
    parts = [text[:half], text[half:]]
    if is_chat:
        events: list[Any] = [{"choices": [{"delta": {"content": part}}]} for part in parts]
        events.append({"choices": [], "usage": USAGE})
        lines = [f"data: {json.dumps(event)}\n\n" for event in events]
        return "".join([": a comment\n\n", *lines, "data: [DONE]\n\n"]).encode()
    lines = [f"data: {json.dumps({'value': part})}\n\n" for part in parts]
    step = f"intermediate_data: {json.dumps({'type': 'LLM_END', 'name': 'm'})}\n\n"
    return "".join(
        [step, *lines, f"data: {json.dumps({'value': '', 'usage': USAGE})}\n\n"]
    ).encode()


@dataclass(frozen=True)
class Running:
    """A server in a process of its own."""

    port: int
    log: Path

    @property
    def chat(self) -> str:
        """URL of the chat completions."""
        return f"http://127.0.0.1:{self.port}/v1/chat/completions"

    @property
    def plain(self) -> str:
        """URL that takes and answers plain JSON."""
        return f"http://127.0.0.1:{self.port}/generate"

    def asked(self) -> list[str]:
        """Return the questions that came, in order."""
        return self.log.read_text().splitlines() if self.log.exists() else []


@contextlib.contextmanager
def model_server(directory: Path) -> Iterator[Running]:
    """Run a server in a child process until the body ends."""
    port_file, log = directory / "port", directory / "asked"
    argv = [sys.executable, "-m", "tests.support.model_server", str(port_file), str(log)]
    root = Path(__file__).parents[2]
    process = subprocess.Popen(argv, cwd=root)
    try:
        wait_until(
            lambda: port_file.exists() or process.poll() is not None,
            timeout_s=30,
            describe=lambda: f"the server ended: {process.poll()}",
        )
        yield Running(int(port_file.read_text()), log)
    finally:
        process.kill()
        process.wait()


async def _main(port_file: Path, log: Path | None) -> None:
    server = await asyncio.start_server(Server(log).serve, "127.0.0.1", 0, backlog=1024)
    temporary = port_file.with_suffix(".new")
    temporary.write_text(str(server.sockets[0].getsockname()[1]))
    os.replace(temporary, port_file)
    await server.serve_forever()


if __name__ == "__main__":
    asyncio.run(_main(Path(sys.argv[1]), Path(sys.argv[2]) if len(sys.argv) > 2 else None))
