"""The golden test of an Android package's conversations, in the real LiteRT-LM.

The app's own test runs on a phone alone. This does the same calls with LiteRT-LM's Python library.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from edgeq.importers import load
from edgeq.packaging.build import package
from tests.families import quantized
from tests.packaging.conftest import need_runtimes
from tests.paths import DEMO

BODY = (
    "{% for m in messages %}<|{{ m.role }}|> {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


def packaged(template: str, out: Path) -> Path:
    """A package of the demo's model with a chat template, for LiteRT-LM alone."""
    need_runtimes("android")
    model = quantized(load(DEMO), "w4-g32")
    config = json.loads(model.files["tokenizer_config.json"]) | {"chat_template": template}
    files = {**model.files, "tokenizer_config.json": json.dumps(config).encode()}
    package(
        replace(model, files=files), "android", out, name="tale", forms=["litertlm"], context=128
    )
    return out


def prompts_of(folder: Path) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = json.loads((folder / "golden/prompts.json").read_text("utf-8"))[
        "prompts"
    ]
    return found


@pytest.mark.slow
@pytest.mark.parametrize("start", ["", "{{ bos_token }}", "<|bos|>"])
def test_conversations_have_the_golden_tokens_and_answers(start: str, tmp_path: Path) -> None:
    lm = pytest.importorskip("litert_lm")
    folder = packaged(start + BODY, tmp_path / "out")
    golden = json.loads((folder / "golden/litertlm.json").read_text("utf-8"))["results"]
    lm.set_min_log_severity(lm.LogSeverity.ERROR)
    greedy = lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    backend = lm.Backend.CPU(thread_count=1)
    asked, different, written = 0, [], []
    with lm.Engine(
        str(folder / "model/tale.litertlm"), backend=backend, cache_dir=":nocache"
    ) as engine:
        for prompt, result in zip(prompts_of(folder), golden, strict=True):
            if len(prompt.get("messages", ())) != 1 or prompt["dated"] or prompt["cut"]:
                continue
            asked += 1
            content = prompt["messages"][0]["content"]
            with engine.create_conversation(sampler_config=greedy, max_output_tokens=4) as chat:
                # LiteRT-LM leaves bos_token empty, and puts the token before the text
                shown = "<|bos|>" if start == "{{ bos_token }}" else ""
                assert shown + chat.render_message_to_string(content) == prompt["rendered"]
                said = str(chat.send_message(content))
                written.append(chat.token_count - len(prompt["ids"]))
            if not said or not result["text"].startswith(said):
                different.append((prompt["id"], said, result["text"]))
    assert asked >= 5
    # four tokens, or fewer at the end of a text; a start token too many would be a fifth
    assert max(written) == 4, written
    assert len(different) * 5 <= asked, different


def test_conversations_that_depend_on_the_day_are_marked(chat_artifact: Path) -> None:
    from edgeq.packaging.prompts import golden_prompts

    files = load(chat_artifact).files
    dated = [one["dated"] for one in golden_prompts(files, 2048, 400) if "messages" in one]
    assert dated
    assert all(dated)
    config = json.loads(files["tokenizer_config.json"]) | {"chat_template": BODY}
    plain = {**files, "tokenizer_config.json": json.dumps(config).encode()}
    dated = [one["dated"] for one in golden_prompts(plain, 2048, 400) if "messages" in one]
    assert dated
    assert not any(dated)
