"""Serve a model and let OpenAI's client use it with a tool.

    pip install 'edgeq[serve,structured]' openai
    python examples/serve_with_a_tool.py MODEL "Is there room for a film of 4 GB?"

MODEL needs a chat template that knows tools (docs/serve.md), as Qwen's and SmolLM3's do.
"""

from __future__ import annotations

import json
import shutil
import sys
from typing import Any

import openai

import edgeq

PLACES = {"system": "/", "temporary": "/tmp"}
TOOL = {
    "type": "function",
    "function": {
        "name": "free_space",
        "description": "Gigabytes that are free on a disk of this computer.",
        "parameters": {
            "type": "object",
            "properties": {"disk": {"enum": list(PLACES)}},
            "required": ["disk"],
            "additionalProperties": False,
        },
    },
}


def main(model: str, question: str) -> None:
    """Ask, do what the model calls for, and let it answer."""
    with edgeq.Server(model, edgeq.ServerSettings(port=0)) as server:
        client = openai.OpenAI(base_url=server.url + "/v1", api_key="none")
        ask: dict[str, Any] = {"model": client.models.list().data[0].id, "tools": [TOOL]}
        messages: list[Any] = [{"role": "user", "content": question}]
        # "required": small models do better if they need not decide; "auto" lets them
        said = client.chat.completions.create(messages=messages, tool_choice="required", **ask)
        messages.append(said.choices[0].message.model_dump(exclude_none=True))
        for call in said.choices[0].message.tool_calls or ():
            disk = json.loads(call.function.arguments)["disk"]
            result = json.dumps({"gigabytes": round(shutil.disk_usage(PLACES[disk]).free / 1e9)})
            print(f"{call.function.name}({disk}) -> {result}")
            messages.append({"role": "tool", "tool_call_id": call.id, "content": result})
        said = client.chat.completions.create(messages=messages, max_tokens=100, **ask)
        print(said.choices[0].message.content)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit(__doc__)
    main(*sys.argv[1:])
