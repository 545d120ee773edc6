"""A chat with a model that answers in channels: reasoning is marked, and not remembered."""

from __future__ import annotations

from pathlib import Path

import edgeq
from edgeq.api.channels import ChannelAnswer, has_channels
from edgeq.serving.harmony import FINAL
from tests.chat_models import chat_copy

TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m.role }}<|message|>{{ m.content }}<|end|>{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant<|channel|>CHANNEL<|message|>{% endif %}"
)
ANSWER = (
    "<|channel|>analysis<|message|>One.<|end|><|start|>assistant<|channel|>final<|message|>Two."
)


def test_reasoning_is_marked(tmp_path: Path) -> None:
    tokenizer = edgeq.Tokenizer(chat_copy(tmp_path / "m", TEMPLATE))
    prompt = tokenizer.encode("<|start|>assistant", add_bos=False)
    for size in (1, 3, 1000):
        answer = ChannelAnswer(tokenizer, prompt, formed=False)
        pieces = [ANSWER[a : a + size] for a in range(0, len(ANSWER), size)]
        text = "".join(answer.text(piece, last=False) for piece in pieces) + answer.text("", True)
        assert (text, answer.said) == ("<think>\nOne.\n</think>\n\nTwo.", "Two.")
    cut = ChannelAnswer(tokenizer, prompt, formed=False)
    assert cut.text("<|channel|>analysis<|message|>Hm", last=True) == "<think>\nHm\n</think>"
    assert not cut.said
    formed = ChannelAnswer(tokenizer, prompt, formed=True)
    assert tokenizer.decode(formed.prompt).endswith(f"<|start|>assistant{FINAL}")
    assert formed.text('{"a": 1}', last=True) == formed.said == '{"a": 1}'


def test_a_conversation_remembers_the_answer_alone(tmp_path: Path) -> None:
    for channel in ("final", "analysis"):
        folder = chat_copy(tmp_path / channel, TEMPLATE.replace("CHANNEL", channel))
        model = edgeq.load(folder)
        assert has_channels(model.files)
        engine = edgeq.Engine(model, context=256, threads=1)
        with edgeq.Conversation(engine, edgeq.Tokenizer(model)) as talk:
            text = "".join(chunk.text for chunk in talk.say("Once", max_tokens=8))
            if channel == "final":
                assert "<think>" not in text
                assert talk.messages[-1] == {"role": "assistant", "content": text.strip()}
            else:
                assert text.startswith("<think>\n")
                assert text.endswith("\n</think>")
                assert not talk.messages  # there was no answer yet
    assert not has_channels(edgeq.load(edgeq.demo_model()).files)
