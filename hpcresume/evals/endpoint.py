"""The client of a remote workflow: one POST per item, answered as plain JSON or as a stream.

Two protocols: ``json`` posts ``{request_key: question, ...}`` and takes any JSON value, or
server-sent events whose values are joined; ``openai`` speaks the chat completions format,
streaming or not.  Whatever goes wrong is an error of the item that was asked for.
"""

from __future__ import annotations

import json
import os
import ssl
from collections.abc import AsyncIterator, Mapping
from typing import TYPE_CHECKING, Any

from hpcresume.errors import ConfigError
from hpcresume.evals.item import EvalItem
from hpcresume.evals.settings import EvalSettings

if TYPE_CHECKING:
    import httpx

_CONNECT_S = 30.0
_CONNECTIONS_EACH = 8
"""Of one client: what its pool does for a request grows with the square of its connections."""
_TOLD_CHARS = 500
_RETRIED = frozenset({408, 425, 429})
_LONGEST_WAIT_S = 120.0


class EndpointError(Exception):
    """The endpoint did not answer an item as it should.

    Attributes:
        may_retry: Whether asking again may help.
        retry_after_s: Seconds that it asks to wait, None where it does not say.
    """

    def __init__(
        self, message: str, *, may_retry: bool = True, retry_after_s: float | None = None
    ) -> None:
        super().__init__(message)
        self.may_retry, self.retry_after_s = may_retry, retry_after_s


class Endpoint:
    """An endpoint with its client; made once per worker, on the event loop.

    Raises:
        ConfigError: httpx is not installed, or the variable with the key is not set.
    """

    def __init__(self, settings: EvalSettings) -> None:
        try:
            import httpx
        except ImportError as error:
            raise ConfigError(
                "asking an endpoint needs httpx, which is not installed. "
                "Install it: pip install 'hpcresume[eval]'."
            ) from error
        self._settings = settings
        verify = ssl.create_default_context()
        headers = _headers(settings)
        self._clients = [
            httpx.AsyncClient(
                headers=headers,
                verify=verify,
                # The item's own time-out bounds the answer, however slowly it streams.
                timeout=httpx.Timeout(None, connect=_CONNECT_S),
                limits=httpx.Limits(max_keepalive_connections=_CONNECTIONS_EACH),
            )
            for _ in range(-(-settings.max_concurrency // _CONNECTIONS_EACH))
        ]
        # One entry for each request that may be under way.
        self._free = self._clients * _CONNECTIONS_EACH

    async def ask(self, item: EvalItem) -> Any:
        """Return what the endpoint answers for an item.

        Raises:
            EndpointError: It refused, broke off, or answered something else.
        """
        import httpx

        # Requests that were given up may be under way still.
        client = self._free.pop() if self._free else self._clients[0]
        try:
            async with client.stream(
                "POST", self._settings.endpoint, json=self._request(item)
            ) as response:
                await _check(response)
                if response.headers.get("content-type", "").startswith("text/event-stream"):
                    return await self._read_stream(response, item)
                return self._read_whole(await response.aread(), item)
        except httpx.HTTPError as error:
            raise EndpointError(f"{type(error).__name__}: {error or 'no answer'}") from error
        finally:
            self._free.append(client)

    def _request(self, item: EvalItem) -> dict[str, Any]:
        settings = self._settings
        if settings.protocol == "openai":
            question = item.question
            messages = question if _is_messages(question) else [_user(question)]
            return {"messages": messages, **settings.params}
        return {settings.request_key: item.question, **settings.params}

    def _read_whole(self, data: bytes, item: EvalItem) -> Any:
        try:
            answer = json.loads(data)
        except ValueError as error:
            raise EndpointError(f"its answer is not JSON: {data[:_TOLD_CHARS]!r}") from error
        if self._settings.protocol == "openai":
            _note_usage(answer, item)
            return _dig(answer, "choices.0.message.content")
        _note_usage(answer, item)
        key = self._settings.output_key
        return _dig(answer, key) if key else answer

    async def _read_stream(self, response: httpx.Response, item: EvalItem) -> Any:
        parts: list[Any] = []
        is_openai = self._settings.protocol == "openai"
        ended = False
        async for name, data in _events(response):
            if data == "[DONE]":
                ended = True
                break
            try:
                value = json.loads(data)
            except ValueError as error:
                raise EndpointError(f"an event is not JSON: {data[:_TOLD_CHARS]!r}") from error
            if name == "intermediate_data":
                item.step(str(_get(value, "type", "intermediate")), value)
                continue
            _note_usage(value, item)
            if is_openai:
                parts.append(_get(_get(_get(value, "choices", []), 0, {}), "delta", {}))
            else:
                parts.append(_dig(value, self._settings.output_key or "value", value))
        if is_openai:
            if not ended:
                raise EndpointError("its stream ended before [DONE]")
            return "".join(_get(delta, "content", None) or "" for delta in parts)
        return _joined(parts)


def _headers(settings: EvalSettings) -> dict[str, str]:
    if not settings.api_key_env:
        return {}
    key = os.environ.get(settings.api_key_env)
    if not key:
        raise ConfigError(
            f"the variable {settings.api_key_env} is not set. It is to hold the endpoint's key. "
            "Export it, or write it into the file of --env-file."
        )
    return {"Authorization": f"Bearer {key}"}


async def _check(response: httpx.Response) -> None:
    status = response.status_code
    if status < 400:
        return
    text = (await response.aread())[:_TOLD_CHARS].decode("utf-8", "replace")
    wait = response.headers.get("retry-after", "")
    raise EndpointError(
        f"HTTP {status}: {text}",
        may_retry=status in _RETRIED or status >= 500,
        retry_after_s=min(float(wait), _LONGEST_WAIT_S) if wait.isdecimal() else None,
    )


async def _events(response: httpx.Response) -> AsyncIterator[tuple[str, str]]:
    """Yield (field, data) of a stream's events; lines of one event are joined as the norm says.

    ``intermediate_data:`` is not in the norm; NeMo Agent Toolkit sends its steps so.
    """
    lines: list[str] = []
    async for line in response.aiter_lines():
        name, colon, rest = line.partition(":")
        rest = rest.removeprefix(" ")
        if not line and lines:
            yield "data", "\n".join(lines)
            lines = []
        elif name == "data" and colon:
            lines.append(rest)
        elif name == "intermediate_data":
            yield name, rest
    if lines:
        yield "data", "\n".join(lines)


def _joined(parts: list[Any]) -> Any:
    if not parts:
        raise EndpointError("its stream held no value")
    if all(isinstance(part, str) for part in parts):
        return "".join(parts)
    return parts[0] if len(parts) == 1 else parts


def _is_messages(question: Any) -> bool:
    return isinstance(question, list) and all(
        isinstance(message, Mapping) and "role" in message for message in question
    )


def _user(question: Any) -> dict[str, str]:
    text = question if isinstance(question, str) else json.dumps(question, ensure_ascii=False)
    return {"role": "user", "content": text}


def _note_usage(answer: Any, item: EvalItem) -> None:
    usage = _get(answer, "usage", None)
    if isinstance(usage, Mapping):
        amounts = {k: v for k, v in usage.items() if type(v) in (int, float)}
        item.usage(**amounts)


_MISSING = object()


def _get(value: Any, key: str | int, default: Any) -> Any:
    try:
        found = value[key]
    except (LookupError, TypeError):
        return default
    return found


def _dig(value: Any, path: str, default: Any = _MISSING) -> Any:
    """Return what a dotted path leads to.

    Raises:
        EndpointError: It leads nowhere, and there is no default.
    """
    found = value
    for part in path.split("."):
        found = _get(found, int(part) if part.isdecimal() else part, _MISSING)
    if found is not _MISSING:
        return found
    if default is not _MISSING:
        return default
    told = json.dumps(value)[:_TOLD_CHARS]
    raise EndpointError(f"its answer has no {path!r}: {told}", may_retry=False)
