"""A server on the demo model, with and without a chat template, for all tests of a session."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import edgeq
from tests.chat_models import chat_copy
from tests.paths import DEMO

TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'refuse' %}{{ raise_exception('no') }}{% endif %}"
    "{{ m.content }}{% if m.role == 'assistant' %}<|eos|>{% endif %} {% endfor %}"
    "{% if add_generation_prompt %}Once upon a time{% endif %}"
)


@pytest.fixture(scope="session", autouse=True)
def _packages() -> None:
    """Skips what runs a server, by name, where its packages are absent."""
    pytest.importorskip("starlette")
    pytest.importorskip("uvicorn")


@pytest.fixture(scope="session")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, said to be a chat model."""
    return chat_copy(tmp_path_factory.mktemp("serving") / "talker", TEMPLATE)


@pytest.fixture(scope="session")
def caller(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, said to know tools and thought."""
    return chat_copy(
        tmp_path_factory.mktemp("serving") / "caller",
        TEMPLATE + "{% if tools %}{# <tool_call> #}{{ tools[0].function.name }}{% endif %}"
        "{% if enable_thinking %}<think>{% endif %}",
    )


@pytest.fixture(scope="session")
def server(talker: Path, caller: Path) -> Iterator[edgeq.Server]:
    """Three models, two slots each."""
    settings = edgeq.ServerSettings(port=0, parallel=2, queue=64, body_bytes=100_000)
    models: list[Any] = [("talker", talker), ("tale", DEMO), ("caller", caller)]
    with edgeq.Server(models, settings, context=256, threads=1) as made:
        yield made


@pytest.fixture(scope="session")
def openai_client(server: edgeq.Server) -> Iterator[Any]:
    """OpenAI's own client of it."""
    openai = pytest.importorskip("openai")
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as client:
        yield client
