"""``--no-mtp``: artifacts keep a multi-token-prediction head, and answers are the same without."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

import edgeq
from edgeq.core.errors import FormatError
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.mtp import PREFIX, mtp_config, mtp_linears, needed_mtp
from tests.chat_models import chat_copy
from tests.cli.conftest import Said
from tests.cli.test_chat import command
from tests.mtp_models import with_head
from tests.paths import DEMO
from tests.serving.plain_http import ask


@pytest.fixture(scope="module")
def source() -> Model:
    return with_head(load(DEMO))


@pytest.fixture(scope="module")
def packed(source: Model, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("mtp") / "model.edgeq"
    rules = [r"^mtp\..*down_proj=w8-g32"]
    edgeq.quantize(source, path, edgeq.Recipe.from_options("w4-g32", tensor_types=rules))
    return path


def test_the_head_is_quantized_with_the_recipe(packed: Path, source: Model) -> None:
    model = load(packed)
    assert model.config == source.config
    schemes = {name: str(getattr(model.tensors[name], "scheme", "float")) for name in model.tensors}
    for name, _ in mtp_linears(model.config):
        assert schemes[name] == ("w8-g32" if "down_proj" in name else "w4-g32")
    for name, shape in needed_mtp(model.config):
        if len(shape) == 1:
            assert schemes[name] == "float"
    # the same integers in the rest of the model as without a head
    plain = packed.with_name("plain.edgeq")
    edgeq.quantize(load(DEMO), plain, "w4-g32")
    other = load(plain)
    assert "mtp" not in other.config.to_dict()
    for name, tensor in other.tensors.items():
        assert (model.tensors[name].numpy() == tensor.numpy()).all()


def test_inspect_and_plan_count_the_head(packed: Path, said: Said) -> None:
    found = json.loads(said("inspect", packed, "--format", "json"))
    head = [one for one in found["tensors"] if one["name"].startswith(PREFIX)]
    assert {one["name"] for one in head} == {name for name, _ in needed_mtp(load(packed).config)}
    assert found["nbytes"] == sum(one["nbytes"] for one in found["tensors"])
    assert "mtp" in found["config"]
    plan = edgeq.plan(packed, "rpi5", context=128)
    bare = edgeq.plan(packed.with_name("plain.edgeq"), "rpi5", context=128)
    assert plan.weights_bytes - bare.weights_bytes == sum(one["nbytes"] for one in head)
    assert plan.draft_bytes > 0 == bare.draft_bytes
    assert plan.decode_tokens_per_s == bare.decode_tokens_per_s


@pytest.mark.parametrize("options", [("--temp", 0), ("--temp", 0.9, "--seed", 4)])
def test_run(packed: Path, options: tuple[object, ...]) -> None:
    args = ("run", packed, "Once upon a time", "-n", 60, "-t", 1, *options)
    alone, drafted = command(*args, "--no-mtp"), command(*args)
    assert drafted.stdout == alone.stdout
    assert "drafted tokens accepted, " in drafted.stderr
    assert "drafted" not in alone.stderr


def test_serve_and_python(packed: Path) -> None:
    greedy = edgeq.SamplingParams(temperature=0)
    with edgeq.Engine(load(packed), threads=1) as engine:
        tokenizer = edgeq.Tokenizer(engine.model)
        how = {"max_tokens": 50}
        want = list(edgeq.generate(engine, tokenizer, "Once", greedy, mtp=False, **how))
        engine.reset()
        got = list(edgeq.generate(engine, tokenizer, "Once", greedy, **how))
        assert [one.token for one in got] == [one.token for one in want]
        assert (want[-1].n_drafted, got[-1].n_drafted > 0) == (0, True)
        engine.reset()
        looked = list(edgeq.generate(engine, tokenizer, "Once", greedy, lookup=4, **how))
        assert [one.token for one in looked] == [one.token for one in want]
    for mtp in (True, False):
        settings = edgeq.ServerSettings(port=0, parallel=2, mtp=mtp)
        with edgeq.Server([("tale", packed)], settings, context=256, threads=1) as server:
            body = {"model": "tale", "prompt": "Once", "max_tokens": 50, "temperature": 0}
            answer = ask(server, "/v1/completions", body).json
            assert answer["choices"][0]["text"] == "".join(one.text for one in want)
            assert (answer["timings"].get("draft_n", 0) > 0) == mtp


def test_chat(tmp_path: Path) -> None:
    model = with_head(load(chat_copy(tmp_path / "model")))
    said, drafted = [], []
    for mtp in (True, False):
        with edgeq.chat(model, mtp=mtp, threads=1) as talk:
            params = edgeq.SamplingParams(seed=4)
            pieces = [chunk.text for chunk in talk.say("Tell me.", params, max_tokens=40)]
            assert talk.last is not None
            drafted.append(talk.last.n_drafted > 0)
        said.append("".join(pieces))
    assert said[0] == said[1]
    assert drafted == [True, False]


def test_recipes_that_change_the_states_leave_the_head_out(source: Model, tmp_path: Path) -> None:
    recipe = replace(edgeq.Recipe.from_options("w4-g32"), transforms=("rotate",))
    untied = replace(
        source, config=replace(source.config, tied=False),
        tensors={**source.tensors, "lm_head.weight": source.tensors["model.embed_tokens.weight"]},
    )  # fmt: skip
    edgeq.quantize(untied, tmp_path / "m.edgeq", recipe, data=DEMO / "heldout.txt")
    model = load(tmp_path / "m.edgeq")
    assert model.config.mtp is None
    (said,) = model.provenance["left_out"]
    assert "of the multi-token-prediction head, whose states rotate changes" in said


def test_targets_are_given_the_model_without_its_head(packed: Path, tmp_path: Path) -> None:
    conversion = edgeq.convert(packed, "gguf", tmp_path / "m.gguf", threads=1)
    assert conversion.certificate is not None
    assert edgeq.validate(tmp_path / "m.gguf", packed, threads=1).passed


def test_a_config_with_an_impossible_head_is_refused(source: Model) -> None:
    data = source.config.to_dict()
    assert edgeq.ModelConfig.from_dict(data) == source.config
    for mtp in ("attention", {**data["mtp"], "mixer": "short_conv", "rope": None, "window": 3}):
        with pytest.raises(FormatError, match=r"mtp|a block is"):
            edgeq.ModelConfig.from_dict({**data, "mtp": mtp})
    with pytest.raises(FormatError, match=r"mtp is .* or absent"):
        replace(mtp_config(source.config), mtp=source.config.mtp)
