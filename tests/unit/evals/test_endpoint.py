"""The client of an endpoint, against a server that speaks the formats and has faults."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hpcresume.errors import ConfigError
from hpcresume.evals.endpoint import Endpoint, EndpointError
from hpcresume.evals.item import EvalItem
from hpcresume.evals.settings import EvalSettings
from tests.support.model_server import USAGE, Running, model_server

pytest.importorskip("httpx")


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    """A model server."""
    with model_server(tmp_path_factory.mktemp("server")) as running:
        yield running


def settings(url: str, **more: Any) -> EvalSettings:
    """Return settings with this endpoint."""
    return EvalSettings(dataset="d.jsonl", endpoint=url, **more)


def ask(made: EvalSettings, question: Any) -> tuple[Any, EvalItem]:
    """Ask for one item and return answer and item."""
    item = EvalItem("a", question)

    async def run() -> Any:
        return await Endpoint(made).ask(item)

    return asyncio.run(run()), item


@pytest.mark.parametrize("stream", [False, True])
def test_chat_format(server: Running, stream: bool) -> None:
    """Whole and streamed chat completions give the same text and the same usage."""
    made = settings(server.chat, protocol="openai", params={"stream": stream, "model": "m"})
    answer, item = ask(made, "hello there")
    assert ("HELLO THERE", USAGE) == (answer, item.usage_total)


def test_messages_are_sent_as_they_are(server: Running) -> None:
    """A question that is a list of messages is one already."""
    made = settings(server.chat, protocol="openai")
    messages = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "x"}]
    assert "X" == ask(made, messages)[0]


def test_plain_json(server: Running) -> None:
    """A plain answer is the output, or what the output key leads to."""
    assert {"value": "HI", "usage": USAGE} == ask(settings(server.plain), "hi")[0]
    answer, item = ask(settings(server.plain, output_key="value"), "hi")
    assert ("HI", USAGE) == (answer, item.usage_total)
    with pytest.raises(EndpointError, match=r"no 'text.0'") as caught:
        ask(settings(server.plain, output_key="text.0"), "hi")
    assert not caught.value.may_retry


def test_streamed_values_are_joined(server: Running) -> None:
    """Values of a stream are joined, and intermediate data become steps."""
    answer, item = ask(settings(server.plain + "/stream"), "hello")
    assert ("HELLO", USAGE) == (answer, item.usage_total)
    assert [{"kind": "LLM_END", "data": {"type": "LLM_END", "name": "m"}}] == item.steps


@pytest.mark.parametrize(
    ("fault", "may_retry"),
    [("429", True), ("500", True), ("reset", True), ("half", True), ("garbage", True)],
)
def test_faults_are_errors_of_the_item(server: Running, fault: str, may_retry: bool) -> None:
    """A refusal, a reset, half an answer and what is no JSON raise, and may be tried again."""
    made = settings(server.chat, protocol="openai")
    with pytest.raises(EndpointError) as caught:
        ask(made, f"{fault}|text of {fault}")
    assert may_retry == caught.value.may_retry
    assert (0.0 if fault == "429" else None) == caught.value.retry_after_s


def test_nobody_listens() -> None:
    """A refused connection is an error that may be tried again."""
    with pytest.raises(EndpointError, match="ConnectError") as caught:
        ask(settings("http://127.0.0.1:9/x"), "hi")
    assert caught.value.may_retry


def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without httpx, or without the key's variable, the error names what to do."""
    with pytest.raises(ConfigError, match="KEY_OF_MINE is not set"):
        Endpoint(settings("http://127.0.0.1:9/x", api_key_env="KEY_OF_MINE"))
    monkeypatch.setitem(sys.modules, "httpx", None)
    with pytest.raises(ConfigError, match="pip install 'hpcresume\\[eval\\]'"):
        Endpoint(settings("http://127.0.0.1:9/x"))


def test_the_key_goes_into_the_header(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The variable's value is sent as a bearer token, and is no part of the settings."""
    monkeypatch.setenv("KEY_OF_MINE", "secret")
    made = settings("http://127.0.0.1:9/x", api_key_env="KEY_OF_MINE")
    assert "Bearer secret" == Endpoint(made)._clients[0].headers["Authorization"]
    assert "secret" not in repr(made)
