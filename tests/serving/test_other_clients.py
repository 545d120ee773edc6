"""Clients that others wrote: LangChain's ChatOpenAI and the command `llm`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

import edgeq
from tests.serving.plain_http import ask

CHAT = "/v1/chat/completions"
SCHEMA = {"title": "Answer", "type": "object", "properties": {"n": {"enum": [1, 2]}},
          "required": ["n"], "additionalProperties": False}  # fmt: skip


def said(server: edgeq.Server, *messages: str) -> str:
    talk = [{"role": ("user", "assistant")[i % 2], "content": m} for i, m in enumerate(messages)]
    body = {"model": "talker", "messages": talk, "temperature": 0, "max_tokens": 8}
    return str(ask(server, CHAT, body).json["choices"][0]["message"]["content"])


@pytest.fixture
def langchain(server: edgeq.Server, monkeypatch: pytest.MonkeyPatch) -> Any:
    module = pytest.importorskip("langchain_openai")
    for name in [name for name in os.environ if name.startswith(("LANGSMITH", "LANGCHAIN"))]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("LANGSMITH_TRACING", "false")

    def make(model: str = "talker", **settings: Any) -> Any:
        return module.ChatOpenAI(
            model=model, base_url=server.url + "/v1", api_key="none", temperature=0,
            max_retries=0, **{"max_tokens": 8, **settings},
        )  # fmt: skip

    return make


@pytest.mark.filterwarnings("ignore")
def test_langchain_talks(langchain: Any, server: edgeq.Server) -> None:
    chat = langchain()
    first = chat.invoke("Tell me.")
    assert first.content == said(server, "Tell me.")
    assert first.usage_metadata["output_tokens"] == 8
    talk = [("user", "Tell me."), ("assistant", "One."), ("user", "And?")]
    assert chat.invoke(talk).content == said(server, "Tell me.", "One.", "And?")
    pieces = list(chat.stream("Tell me."))
    assert len(pieces) > 3
    assert "".join(piece.content for piece in pieces) == first.content


@pytest.mark.filterwarnings("ignore")
def test_langchain_s_forms_and_tools(langchain: Any) -> None:
    pytest.importorskip("llguidance")
    for method in ("json_schema", "function_calling"):
        chat = langchain("caller", max_tokens=80).with_structured_output(SCHEMA, method=method)
        assert chat.invoke("Tell me.")["n"] in (1, 2)
    tool = {"type": "function", "function": {
        "name": "weather", "parameters": {
            "type": "object", "properties": {"city": {"enum": ["Rome", "Oslo"]}},
            "required": ["city"], "additionalProperties": False}}}  # fmt: skip
    chat = langchain("caller", max_tokens=80).bind_tools([tool], tool_choice="required")
    (call,) = chat.invoke("How is it?").tool_calls
    assert call["name"] == "weather"
    assert call["args"]["city"] in ("Rome", "Oslo")


@pytest.mark.filterwarnings("ignore")
def test_langchain_s_embeddings(server: edgeq.Server) -> None:
    module = pytest.importorskip("langchain_openai")
    made = module.OpenAIEmbeddings(
        model="tale", base_url=server.url + "/v1", api_key="none",
        check_embedding_ctx_length=False,
    )  # fmt: skip
    first, second = made.embed_documents(["The sun is warm.", "Once upon a time"])
    assert len(first) == len(second) > 8
    assert first != second


@pytest.mark.filterwarnings("ignore")
def test_langchain_knows_the_errors(langchain: Any) -> None:
    import openai

    with pytest.raises(openai.NotFoundError, match="model"):
        langchain("none").invoke("Tell me.")
    with pytest.raises(openai.BadRequestError, match="context"):
        langchain().invoke("word " * 2000)


def test_the_command_llm(server: edgeq.Server, tmp_path: Path) -> None:
    pytest.importorskip("llm")
    (tmp_path / "extra-openai-models.yaml").write_text(
        f"- model_id: edge\n  model_name: talker\n  api_base: {server.url}/v1\n"
        "  supports_schema: true\n"
    )

    def llm(*arguments: str) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "llm", *arguments, "--key", "none", "-o", "temperature", "0",
             "-o", "max_tokens", "8"],
            capture_output=True, text=True, timeout=300, check=False, stdin=subprocess.DEVNULL,
            env={**os.environ, "LLM_USER_PATH": str(tmp_path), "HOME": str(tmp_path)},
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        return done.stdout.strip()

    want = said(server, "Tell me.").strip()
    assert llm("-m", "edge", "Tell me.") == want
    assert llm("-m", "edge", "--no-stream", "Tell me.") == want
    if pytest.importorskip("llguidance"):
        answer = llm("-m", "edge", "--schema", json.dumps(SCHEMA), "Tell me.")
        assert json.loads(answer)["n"] in (1, 2)
    assert llm("-m", "edge", "-c", "And?")  # goes on with the conversation before
