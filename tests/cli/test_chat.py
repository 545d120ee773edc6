"""Chat models answer by their template: in run, in chat and from Python."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import edgeq
from edgeq.core.errors import EdgeqError, UnsupportedError, UsageError
from edgeq.importers import load
from edgeq.runtime.engine import Engine
from edgeq.runtime.generate import Chunk, generate
from edgeq.runtime.sampling import SamplingParams
from edgeq.runtime.tokenizer import Tokenizer
from tests import tokenizer_zoo as zoo
from tests.chat_models import chat_copy
from tests.paths import ROOT
from tests.real_models import SMOLLM2, real_model

DEMO = ROOT / "edgeq" / "demo_model"
GREEDY = SamplingParams(temperature=0)
QUESTION = "What is the capital of Germany?"
ASKED = [{"role": "user", "content": QUESTION}]
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def command(*args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "edgeq", *map(str, args)],
        capture_output=True, text=True, encoding="utf-8", check=False, timeout=300,
        **{"stdin": subprocess.DEVNULL, "env": {**os.environ, "PYTHONPATH": str(ROOT)}, **settings},
    )  # fmt: skip


@pytest.fixture(scope="module")
def smollm2() -> Path:
    return real_model(SMOLLM2)


def rendered(path: Path, messages: list[dict[str, str]]) -> list[int]:
    """The ids of the GGUF file's own template, by Transformers and nothing of ours."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(path.parent, gguf_file=path.name)
    text = theirs.apply_chat_template(messages, add_generation_prompt=True, tokenize=False)
    return list(theirs(text, add_special_tokens=False)["input_ids"])


def test_run_answers_by_the_template(smollm2: Path) -> None:
    done = command("run", smollm2, QUESTION, "--temp", 0, "-t", 1, "-n", 40)
    assert done.returncode == 0, done.stderr
    assert "Berlin" in done.stdout
    assert QUESTION not in done.stdout
    assert "<|im_" not in done.stdout
    n_prompt = len(rendered(smollm2, ASKED))
    assert (
        f"[chat template (--raw continues the plain text) | prompt {n_prompt} tokens" in done.stderr
    )
    assert "end: stop" in done.stderr


def test_raw_continues_the_text(smollm2: Path) -> None:
    text = "The capital of France is"
    done = command("run", smollm2, "-p", text, "--raw", "--temp", 0, "-t", 1, "-n", 3)
    assert done.stdout.startswith(text)
    assert "chat template" not in done.stderr
    assert f"[prompt {len(Tokenizer(load(smollm2)).encode(text))} tokens" in done.stderr


def test_the_prompt_is_transformers_own(smollm2: Path) -> None:
    tokenizer = Tokenizer(load(smollm2))
    talk = [*ASKED, {"role": "assistant", "content": "Paris."}, {"role": "user", "content": "é?"}]
    for messages in (ASKED, talk, [{"role": "system", "content": "Be brief."}, *ASKED]):
        assert tokenizer.encode_chat(messages) == rendered(smollm2, messages)
    assert tokenizer.turn_end_ids == (2,)  # <|im_end|>
    assert {0, 2} <= set(tokenizer.eos_ids)  # and <|endoftext|>


def test_a_packed_model_answers_too(smollm2: Path, tmp_path: Path) -> None:
    """Its file carries the template and every end token."""
    source = load(smollm2)
    edgeq.save(source, tmp_path / "packed.edgeq")
    packed = load(tmp_path / "packed.edgeq")
    ours, theirs = Tokenizer(packed), Tokenizer(source)
    assert ours.encode_chat(ASKED) == theirs.encode_chat(ASKED)
    assert (ours.eos_ids, ours.turn_end_ids) == (theirs.eos_ids, theirs.turn_end_ids)


def test_chat_remembers(smollm2: Path) -> None:
    done = command(
        "chat", smollm2, "--temp", 0, "-t", 1, "-n", 30, stdin=None,
        input=f"{QUESTION}\nAnd of Italy?\n",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    first, second = done.stdout.strip().splitlines()
    assert "Berlin" in first
    assert "Rome" in second


def test_python_takes_a_text_messages_and_ids(smollm2: Path) -> None:
    model = load(smollm2)
    tokenizer = Tokenizer(model)

    def said(prompt: Any) -> list[Chunk]:
        with Engine(model, threads=1) as engine:
            return list(generate(engine, tokenizer, prompt, GREEDY, max_tokens=12))

    answer = said(ASKED)
    assert "Berlin" in "".join(chunk.text for chunk in answer)
    assert answer[-1].finish_reason == "stop"
    ids = tokenizer.encode_chat(ASKED)
    assert [c.token for c in said(ids)] == [c.token for c in said(np.array(ids))]
    assert [c.token for c in said(ids)] == [c.token for c in answer]
    text = "The capital of France is"
    assert [c.token for c in said(text)] == [c.token for c in said(tokenizer.encode(text))]


# Without published models: the demo model, with and without a template


@pytest.fixture(scope="module")
def talker(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model, said to be a chat model."""
    return chat_copy(tmp_path_factory.mktemp("talker") / "model")


def test_without_a_template_the_text_goes_on() -> None:
    text = "Once upon a time"
    for args in ((DEMO, text), (DEMO, "-p", text), ("-m", DEMO, "--raw", text)):
        done = command("run", *args, "-n", 4, "--temp", 0, "-t", 1)
        assert done.stdout.startswith("Once upon a time, ")
        assert "chat template" not in done.stderr


def test_a_prompt_from_a_file_is_a_message_too(talker: Path, tmp_path: Path) -> None:
    (tmp_path / "prompt").write_text("Tell me.")
    done = command("run", talker, "-f", tmp_path / "prompt", "-n", 4, "--temp", 0, "-t", 1)
    assert done.stderr.startswith("[chat template")
    assert "Tell me." not in done.stdout
    raw = command("run", talker, "-f", tmp_path / "prompt", "-n", 4, "--temp", 0, "--raw")
    assert raw.stdout.startswith("Tell me.")


def test_one_prompt_is_given_once() -> None:
    for args in ((), ("a", "-p", "b"), ("-p", "b", "-f", str(DEMO / "README.md"))):
        done = command("run", DEMO, *args)
        assert done.returncode == 2
        assert 'give one prompt: edgeq run MODEL "PROMPT"' in done.stderr
    twice = command("run", "-m", DEMO, DEMO, "Once")
    assert "the model is given twice" in twice.stderr


def test_a_template_that_refuses_leaves_a_way_out(talker: Path, tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(talker, folder)
    (folder / "chat_template.jinja").write_text("{{ raise_exception('no users') }}")
    done = command("run", folder, "Hello")
    assert (done.returncode, done.stdout) == (1, "")
    assert "no users (--raw continues the prompt without the template)" in done.stderr


def test_what_ends_an_answer() -> None:
    """The token that the template writes after one, if the listed end tokens lack it."""
    document = zoo.byte_level()
    files = {
        "tokenizer.json": document.encode(),
        "tokenizer_config.json": json.dumps({**zoo.CONFIG, "chat_template": CHATML}).encode(),
    }
    tokenizer = Tokenizer(files)
    assert tokenizer.eos_ids == (1,)
    assert tokenizer.turn_end_ids == (3,)
    for template in ("{{ messages[-1].content }}", "{{ messages[-1].content }}\nUser:<|im_end|>",
                     "{{ raise_exception('no') }}", "{% for m in messages %}"):  # fmt: skip
        config = json.dumps({**zoo.CONFIG, "chat_template": template}).encode()
        assert Tokenizer(files | {"tokenizer_config.json": config}).turn_end_ids == ()
    assert not Tokenizer({"tokenizer.json": document.encode()}).has_chat_template


def test_templates_beside_templates() -> None:
    """Files go before tokenizer_config.json, and other names stand beside the default."""
    document = zoo.byte_level().encode()
    listed = [{"name": "default", "template": "A"}, {"name": "tool_use", "template": "B"}]
    config = json.dumps({"chat_template": listed}).encode()
    files = {"tokenizer.json": document, "tokenizer_config.json": config}
    assert edgeq.render_chat(files, ASKED) == "A"
    assert edgeq.render_chat(files, ASKED, tools=[{}]) == "B"
    files["chat_template.jinja"] = b"C"
    assert edgeq.render_chat(files, ASKED, tools=[{}]) == "C"
    files["additional_chat_templates/tool_use.jinja"] = b"D"
    assert edgeq.render_chat(files, ASKED) == "C"
    assert edgeq.render_chat(files, ASKED, tools=[{}]) == "D"
    assert edgeq.render_chat(files, ASKED, chat_template="tool_use") == "D"


def test_a_folder_s_further_templates_and_tokens_are_read(tmp_path: Path) -> None:
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    (folder / "additional_chat_templates").mkdir()
    (folder / "additional_chat_templates" / "rag.jinja").write_text("R")
    vocab = len(json.loads((folder / "tokenizer.json").read_text())["model"]["vocab"])
    (folder / "added_tokens.json").write_text(json.dumps({"<|late|>": vocab}))
    model = load(folder)
    edgeq.save(model, tmp_path / "m.edgeq")
    for files in (model.files, load(tmp_path / "m.edgeq").files):
        assert edgeq.render_chat(files, ASKED, chat_template="rag") == "R"
        assert Tokenizer(files).encode("<|late|>")[-1] == vocab


def test_end_ids_given_with_a_prompt() -> None:
    model = load(DEMO)
    tokenizer = Tokenizer(model)
    with Engine(model, threads=1) as engine:
        free = [c.token for c in generate(engine, tokenizer, "Once", GREEDY, max_tokens=9)]
        end = free[4]
        assert end is not None
        engine.reset()
        made = list(generate(engine, tokenizer, "Once", GREEDY, max_tokens=9, end_ids=[end]))
    assert [c.token for c in made[:-1]] == free[: free.index(end)]
    assert made[-1].finish_reason == "stop"


def test_a_conversation_reads_only_what_is_new(talker: Path) -> None:
    model = load(talker)
    tokenizer = Tokenizer(model)
    talk = [{"role": "user", "content": "A long first message about a red ball and a dog."}]
    with Engine(model, threads=1) as engine:
        first = list(generate(engine, tokenizer, talk, GREEDY, max_tokens=5))
        talk += [{"role": "assistant", "content": "".join(c.text for c in first)},
                 {"role": "user", "content": "And?"}]  # fmt: skip
        again = list(generate(engine, tokenizer, talk, GREEDY, max_tokens=5))
    assert again[-1].n_reused > 5
    with Engine(model, threads=1) as engine:
        fresh = list(generate(engine, tokenizer, talk, GREEDY, max_tokens=5))
    assert [c.token for c in again] == [c.token for c in fresh]


def test_text_after_what_the_cache_holds_has_no_bos() -> None:
    model = load(DEMO)
    tokenizer = Tokenizer(model)
    with Engine(model, threads=1) as engine:
        list(generate(engine, tokenizer, "Once upon", GREEDY, max_tokens=1))
        list(generate(engine, tokenizer, " a time", GREEDY, max_tokens=1))
        assert engine.tokens == tokenizer.encode("Once upon") + tokenizer.encode(" a time", False)


@pytest.mark.parametrize(
    ("prompt", "words"),
    [
        ([], "has no tokens"),
        ([1, "a"], "the prompt holds 'a'; give a text"),
        ([1.5], "the prompt holds 1.5"),
        ([True], "the prompt holds True"),
        ([-1], r"token -1, but the model's tokens are 0 to 2047"),
        ([2048], "token 2048"),
        (7, "the prompt is a int; give"),
        (None, "the prompt is a NoneType; give"),
        (b"text", "the prompt is a bytes"),
        ({"role": "user"}, "the prompt is a dict"),
    ],
)
def test_prompts_that_are_refused(prompt: Any, words: str) -> None:
    model = load(DEMO)
    tokenizer = Tokenizer(model)
    with Engine(model, backend="numpy") as engine, pytest.raises(UsageError, match=words):
        generate(engine, tokenizer, prompt)


def test_a_base_model_has_no_messages() -> None:
    model = load(DEMO)
    words = "the model has no chat template"
    with Engine(model, backend="numpy") as engine, pytest.raises(UnsupportedError, match=words):
        generate(engine, Tokenizer(model), ASKED)


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("temperature", "hot", "temperature is 'hot'; use a number"),
        ("temperature", float("nan"), "temperature is nan"),
        ("temperature", None, "temperature is None; use a number"),
        ("top_k", 2.5, "top_k is 2.5; use a whole number"),
        ("top_k", True, "top_k is True; use a whole number"),
        ("top_p", [], r"top_p is \[\]; use a number"),
        ("seed", 1.0, "seed is 1.0; use a whole number"),
        ("repeat_last_n", "all", "repeat_last_n is 'all'; use a whole number"),
    ],
)
def test_sampling_parameters_of_other_types(name: str, value: Any, words: str) -> None:
    with pytest.raises(EdgeqError, match=words):
        SamplingParams(**{name: value})


def test_numpy_numbers_are_numbers() -> None:
    made = SamplingParams(temperature=np.float32(0.5), top_k=np.int64(3), seed=np.uint32(7))  # type: ignore[arg-type]
    assert made.temperature == 0.5


def test_a_tokenizer_of_a_model_its_path_or_its_files() -> None:
    model = load(DEMO)
    for source in (model, model.files, DEMO, str(DEMO)):
        assert Tokenizer(source).encode("Once") == Tokenizer(model).encode("Once")
    wrong: Any
    for wrong in (7, None, [b""]):
        with pytest.raises(UsageError, match="made of a model, its path or its files; this is a"):
            Tokenizer(wrong)
    for wrong in (7, b"Once", None, ["Once"]):
        with pytest.raises(UsageError, match=r"the text is a \w+; give a string"):
            Tokenizer(model).encode(wrong)
    for wrong in ("Hello", {"role": "user", "content": "Hello"}, ["Hello"], [7], 7):
        with pytest.raises(UsageError, match="messages are a list of dictionaries"):
            Tokenizer(model).encode_chat(wrong)


def test_short_reprs() -> None:
    model = load(DEMO)
    tokenizer = Tokenizer(model)
    assert repr(tokenizer) == ("Tokenizer(2048 tokens, bos=0, eos_ids=(1,), chat template: no)")
    with Engine(model, threads=1) as engine:
        made = list(generate(engine, tokenizer, "Once upon a time", GREEDY, max_tokens=2))
    assert repr(made[0]) == f"Chunk({made[0].text!r}, token={made[0].token})"
    assert repr(made[-1]) == "Chunk('', finish_reason='length', n_prompt=5, n_generated=2)"


def test_no_end_token_is_none_at_all(tmp_path: Path) -> None:
    """null in config.json is no token, not the family's default."""
    folder = tmp_path / "m"
    shutil.copytree(DEMO, folder)
    config = json.loads((folder / "config.json").read_text())
    (folder / "generation_config.json").unlink()
    (folder / "config.json").write_text(
        json.dumps(config | {"eos_token_id": None, "bos_token_id": None})
    )
    assert load(folder).config.eos == ()
    assert load(folder).config.bos is None
    del config["eos_token_id"]
    (folder / "config.json").write_text(json.dumps(config))
    assert load(folder).config.eos == (2,)  # what a Llama has where nothing is said


def test_tasks_end_where_answers_end() -> None:
    """At the configuration's end tokens too, not at the tokenizer's alone."""
    from edgeq.api.evaluate import EngineAnswers

    model = load(DEMO)
    tokenizer = Tokenizer(model)
    with Engine(model, threads=1) as engine:
        free = list(EngineAnswers(engine, tokenizer).generate(tokenizer.encode("Once"), 6))
    ending = replace(model, config=replace(model.config, eos=(free[3],)))
    with Engine(ending, threads=1) as engine:
        made = list(EngineAnswers(engine, tokenizer).generate(tokenizer.encode("Once"), 6))
    assert made == free[: free.index(free[3])]


def test_answers_keep_to_a_json_schema(talker: Path, tmp_path: Path) -> None:
    pytest.importorskip("llguidance")
    schema = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"],
              "additionalProperties": False}  # fmt: skip
    (tmp_path / "schema.json").write_text(json.dumps(schema))
    options = ("--json-schema", tmp_path / "schema.json", "-t", 1)
    run = command("run", talker, "Tell me.", *options)
    assert json.loads(run.stdout)["n"] in (1, 2)
    chat = command("chat", talker, *options, stdin=None, input="Tell me.\nAgain.\n")
    assert [json.loads(line)["n"] in (1, 2) for line in chat.stdout.split("\n") if line] == [
        True
    ] * 2
    chunks = edgeq.run(talker, "Tell me.", json_schema=schema, threads=1)
    assert json.loads("".join(chunk.text for chunk in chunks))["n"] in (1, 2)
    (tmp_path / "schema.json").write_text("{")
    for verb in ("run", "chat"):
        done = command(verb, talker, *(("a",) if verb == "run" else ()), *options)
        assert done.returncode == 1
        assert "the JSON schema cannot be read" in done.stderr
