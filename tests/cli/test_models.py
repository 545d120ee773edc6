"""The command line with real models, end to end: results, refusals, interruptions."""

from __future__ import annotations

import csv
import io
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.cli import main
from edgeq.core.cache import cache_home
from tests.cli.conftest import Said
from tests.conftest import clear_settings, need
from tests.paths import ROOT

STORY = (
    "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    "One day, she saw a big, red ball. She wanted to play with it, but it was too high."
)
"""What stories260K in float32 says greedily; the shared data's README gives it."""


@pytest.fixture(autouse=True)
def _plain_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    clear_settings(monkeypatch, "EDGEQ_CACHE", "EDGEQ_TEST_DATA")


@pytest.fixture(scope="module")
def checkpoint() -> Path:
    return need("models/stories260K")


@pytest.fixture(scope="module")
def packed(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("packed") / "s8.edgeq"
    assert main(["quantize", str(checkpoint), "-o", str(out), "--bits", "8"]) == 0
    return out


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    source = need("data/text_tinystories_train/tinystories_train_2MB.txt")
    out = tmp_path_factory.mktemp("text") / "text.txt"
    out.write_text(source.read_text("utf-8")[:3000], "utf-8")
    return out


def edgeq(*args: object, **settings: Any) -> subprocess.CompletedProcess[str]:
    """The command in a process of its own."""
    return subprocess.run(
        [sys.executable, "-m", "edgeq", *map(str, args)],
        capture_output=True, text=True, encoding="utf-8", check=False, timeout=300,
        **{
            "stdin": subprocess.DEVNULL,
            "env": {**os.environ, "PYTHONPATH": str(ROOT)},
            **settings,
        },
    )  # fmt: skip


# Quantize, then run


def test_quantize_and_run_tell_the_reference_story(checkpoint: Path, tmp_path: Path) -> None:
    done = edgeq("quantize", checkpoint, "-o", "s8.edgeq", "--bits", "8", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    done = edgeq("run", "s8.edgeq", "-p", "Once upon a time", "-n", 70, "--temp", 0, cwd=tmp_path)
    assert done.returncode == 0
    assert done.stdout.startswith(STORY)
    assert done.stdout.endswith("\n")
    assert "tok/s" in done.stderr


def test_run_the_checkpoint_itself(checkpoint: Path, said: Said) -> None:
    args = ("run", checkpoint, "-p", "Once upon a time", "-n", 60, "--temp", 0, "--kv-bits", 16)
    assert said(*args).startswith(STORY)


@pytest.mark.parametrize("more", [["--backend", "numpy"], ["-ctk", "f16"], ["-t", "1"]])
def test_run_variants_tell_the_same(packed: Path, said: Said, more: list[str]) -> None:
    out = said("run", packed, "-p", "Once upon a time", "-n", 60, "--temp", 0, *more)
    assert out.startswith(STORY)


def test_no_stream_says_the_same(packed: Path, said: Said) -> None:
    args = ("run", packed, "-p", "One day", "-n", 20, "--seed", 3)
    assert said(*args) == said(*args, "--no-stream")
    assert said(*args, "--seed", 4) != said(*args)


def test_prompt_from_a_file_and_from_standard_input(packed: Path, tmp_path: Path) -> None:
    prompt = tmp_path / "prompt.txt"
    prompt.write_text("One day, a döner", "utf-8")
    args = ("run", packed, "-n", 8, "--temp", 0, "-t", 1)
    read = edgeq(*args, "-f", prompt)
    assert read.stdout.startswith("One day, a döner")
    with prompt.open("rb") as stdin:
        assert edgeq(*args, "-f", "-", stdin=stdin).stdout == read.stdout


def test_a_prompt_that_is_no_text(packed: Path, tmp_path: Path, said: Said) -> None:
    prompt = tmp_path / "prompt.bin"
    prompt.write_bytes(b"\xff\xfe\x00")
    said("run", packed, "-f", prompt, code=2)
    assert "not UTF-8" in said.err


def test_stop_text(packed: Path, said: Said) -> None:
    out = said("run", packed, "-p", "Once upon a time", "--temp", 0, "--stop", " Lily")
    assert out == "Once upon a time, there was a little girl named\n"
    assert "end: stop" in said.err


def test_context_overflow_is_refused(packed: Path, said: Said) -> None:
    said("run", packed, "-p", "word " * 100, "-c", 16, code=1)
    assert "the context holds 16" in said.err
    said("run", packed, "-p", "x", "-c", 5000, code=1)
    assert "supports 1 to 512 tokens" in said.err


def test_until_the_context_is_full(packed: Path, said: Said) -> None:
    said("run", packed, "-p", "Once upon a time", "-n", -1, "-c", 32, "--temp", 0)
    assert "end: length" in said.err
    assert "generated 28 tokens" in said.err


# Quantize


def test_inspect_counts_what_the_file_holds(packed: Path, said: Said) -> None:
    found = json.loads(said("inspect", packed, "--format", "json"))
    by_name = {t["name"]: t for t in found["tensors"]}
    down = by_name["model.layers.0.mlp.down_proj.weight"]
    assert (down["scheme"], down["shape"], down["padded"]) == ("w8-channel", [64, 172], [64, 192])
    assert down["nbytes"] == 64 * 192 + 2 * 64
    assert down["bpw"] == pytest.approx(8 * down["nbytes"] / (64 * 172))
    assert 35 < down["sqnr_db"] < 60
    assert by_name["model.norm.weight"]["sqnr_db"] is None
    assert found["nbytes"] == sum(t["nbytes"] for t in found["tensors"])
    assert found["nbytes"] < packed.stat().st_size
    assert len(found["provenance"]["source_sha256"]) == 64
    text = said("inspect", packed, "--tensors")
    assert "64x192" in text
    assert "are padded with zeros to whole blocks" in text


@pytest.mark.parametrize(
    ("options", "scheme"),
    [
        (["--fast"], "w4-g32"),
        (["--preset", "w3-g32"], "w3-g32"),
        (["--preset", "w4-g64-asym"], "w4-g64-asym"),
        (["--bits", "2"], "w2-g16-asym"),
        (["--bits", "4", "--group", "channel"], "w4-channel"),
        (["--group", "tensor", "--bits", "8"], "w8-tensor"),
        (["--group", "64"], "w4-g64"),
        (["--asym"], "w4-g32-asym"),
    ],
)
def test_schemes(
    options: list[str], scheme: str, checkpoint: Path, tmp_path: Path, said: Said
) -> None:
    out = tmp_path / "m.edgeq"
    summary = json.loads(said("quantize", checkpoint, "-o", out, *options, "--format", "json"))
    assert summary["recipe"]["default"] == scheme
    assert summary["file_bytes"] == out.stat().st_size
    held = {t["name"]: t["scheme"] for t in summary["tensors"]}
    assert held["model.layers.0.mlp.up_proj.weight"] == scheme
    assert held["model.embed_tokens.weight"].startswith("w8-")
    assert held["model.norm.weight"] == "f32"


def test_tensor_types_first_match_wins(checkpoint: Path, tmp_path: Path, said: Said) -> None:
    out = tmp_path / "m.edgeq"
    said(
        "quantize", checkpoint, "-o", out, "--method", "mse",
        "--tensor-type", r"layers\.0\..*down=w8-g32",
        "--tensor-type", "down=w3-g32",
        "--tensor-type", "embed=f16",
    )  # fmt: skip
    tensors = json.loads(said("inspect", out, "--format", "json"))["tensors"]
    found = {t["name"]: t["scheme"] for t in tensors}
    assert found["model.layers.0.mlp.down_proj.weight"] == "w8-g32"
    assert found["model.layers.1.mlp.down_proj.weight"] == "w3-g32"
    assert found["model.embed_tokens.weight"] == "f16"
    assert said("run", out, "-p", "Once", "-n", 3, "--temp", 0).startswith("Once")


def test_an_existing_file_is_kept_without_force(
    checkpoint: Path, tmp_path: Path, said: Said
) -> None:
    out = tmp_path / "m.edgeq"
    out.write_text("dear")
    said("quantize", checkpoint, "-o", out, code=1)
    assert "--force" in said.err
    assert out.read_text() == "dear"
    said("quantize", checkpoint, "-o", out, "--force")
    assert said("run", out, "-p", "Once", "-n", 2)


# Refusals: words, exit 1, no traceback, nothing left behind


def copy(checkpoint: Path, target: Path) -> Path:
    target.mkdir()
    for file in checkpoint.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


def truncated(folder: Path) -> None:
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1000])


def wrong_magic(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes(b"PK\x03\x04" * 500)


def not_a_number(folder: Path) -> None:
    weights = folder / "model.safetensors"
    raw = bytearray(weights.read_bytes())
    raw[-8:-4] = np.float32(np.nan).tobytes()
    weights.write_bytes(raw)


def missing_shard(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    names = {"model.embed_tokens.weight": "model-00001-of-00002.safetensors"}
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))


def unknown_family(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config |= {"model_type": "lama", "architectures": ["LamaForCausalLM"]}
    (folder / "config.json").write_text(json.dumps(config))


def wrong_shape(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"intermediate_size": 170}))


@pytest.mark.parametrize(
    ("damage", "words"),
    [
        (truncated, "model.safetensors"),
        (wrong_magic, "model.safetensors"),
        (not_a_number, "finite"),
        (missing_shard, "model-00001-of-00002.safetensors"),
        (unknown_family, "qwen2"),
        (wrong_shape, "172"),
    ],
)
def test_damaged_checkpoints_are_refused(
    damage: Any, words: str, checkpoint: Path, tmp_path: Path
) -> None:
    folder = copy(checkpoint, tmp_path / "model")
    damage(folder)
    done = edgeq("quantize", folder, "-o", tmp_path / "out.edgeq")
    assert done.returncode == 1
    assert done.stderr.startswith("error: ")
    assert words in done.stderr
    assert "Traceback" not in done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"model"}


def test_a_group_that_cannot_hold(checkpoint: Path, tmp_path: Path, said: Said) -> None:
    said("quantize", checkpoint, "-o", tmp_path / "m.edgeq", "--group", 128, code=1)
    assert "group_size 128" in said.err
    assert "use 16, 32, 64" in said.err
    assert not list(tmp_path.iterdir())


def test_too_little_memory(checkpoint: Path, tmp_path: Path, said: Said) -> None:
    said("quantize", checkpoint, "-o", tmp_path / "m.edgeq", "--fast", "--max-ram", "1M", code=1)
    assert "too little" in said.err
    assert not list(tmp_path.iterdir())


def test_a_damaged_artifact_is_refused(packed: Path, tmp_path: Path, said: Said) -> None:
    broken = tmp_path / "broken.edgeq"
    broken.write_bytes(packed.read_bytes()[:-64])
    for verb in (["inspect", broken], ["run", broken, "-p", "x"], ["bench", broken]):
        said(*verb, code=1)
        assert "broken.edgeq" in said.err


@pytest.mark.skipif(not hasattr(signal, "SIGXFSZ"), reason="needs a limit on file sizes")
def test_quantize_on_a_full_disk(checkpoint: Path, tmp_path: Path) -> None:
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, 100_000));"
        "import sys; from edgeq.cli import main; sys.exit(main())"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, "quantize", checkpoint, "-o", tmp_path / "m.edgeq", "--fast"],
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 1
    assert "no room for" in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


# Interruptions


@pytest.fixture(scope="module")
def slow_checkpoint(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """60 million random weights: some seconds of work for the least squares search."""
    from safetensors.numpy import save_file

    from edgeq.importers.shapes import SHAPES

    folder = tmp_path_factory.mktemp("slow") / "model"
    folder.mkdir()
    config = SHAPES["stories42m"]
    rng = np.random.default_rng(0)
    tensors = {
        name: rng.standard_normal(shape, np.float32).astype(np.float16) / 64
        for name, shape in (*config.linears(), *config.norms())
    }
    save_file(tensors, folder / "model.safetensors")
    described = json.loads((checkpoint / "config.json").read_text()) | {
        "hidden_size": config.hidden,
        "intermediate_size": config.ffn,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "num_key_value_heads": config.kv_heads,
        "head_dim": config.head_dim,
        "vocab_size": config.vocab,
    }
    (folder / "config.json").write_text(json.dumps(described))
    (folder / "tokenizer.json").write_bytes((checkpoint / "tokenizer.json").read_bytes())
    return folder


def in_mid_write(slow_checkpoint: Path, out: Path) -> subprocess.Popen[str]:
    """A quantization that has begun to write."""
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeq", "quantize", slow_checkpoint, "-o", out,
         "--method", "mse", "--force", "-t", "1"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    deadline = time.monotonic() + 60
    while not list(out.parent.glob(f".{out.name}.*.tmp")):
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.02)
    time.sleep(0.3)
    assert process.poll() is None, "it was over before it could be interrupted"
    return process


@pytest.mark.parametrize(
    ("how", "code", "word"),
    [
        (signal.SIGINT, 130, "interrupted"),
        (signal.SIGTERM, 143, "terminated"),
        (signal.SIGHUP, 129, "terminated"),
    ],
)
def test_a_terminated_command_leaves_no_files(
    how: signal.Signals, code: int, word: str, slow_checkpoint: Path, tmp_path: Path
) -> None:
    process = in_mid_write(slow_checkpoint, tmp_path / "m.edgeq")
    process.send_signal(how)
    process.send_signal(how if how != signal.SIGINT else 0)  # twice is once
    out, err = process.communicate(timeout=60)
    assert process.returncode == code
    assert err.strip() == word
    assert not out
    assert not list(tmp_path.iterdir())


def test_kill_leaves_the_old_file(slow_checkpoint: Path, tmp_path: Path) -> None:
    target = tmp_path / "m.edgeq"
    target.write_text("dear")
    process = in_mid_write(slow_checkpoint, target)
    process.kill()
    process.communicate(timeout=60)
    assert target.read_text() == "dear"
    assert all(p.name.endswith(".tmp") for p in tmp_path.iterdir() if p != target)


def test_a_reader_that_leaves(packed: Path) -> None:
    process = subprocess.Popen(
        [sys.executable, "-m", "edgeq", "inspect", packed, "--format", "json"],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert process.stdout is not None
    assert process.stderr is not None
    process.stdout.close()
    assert process.stderr.read() == ""
    process.wait(timeout=60)
    process.stderr.close()


@pytest.mark.skipif(sys.platform == "win32", reason="needs pseudo-terminals")
def test_progress_is_drawn_on_a_terminal_only(slow_checkpoint: Path, tmp_path: Path) -> None:
    import pty

    ours, theirs = pty.openpty()
    done = subprocess.Popen(
        [sys.executable, "-m", "edgeq", "quantize", slow_checkpoint, "-o", tmp_path / "m.edgeq",
         "--method", "mse"],  # rounding alone is over before a bar would be drawn
        stdout=subprocess.PIPE, stderr=theirs, text=True, env={**os.environ, "TERM": "xterm"},
    )  # fmt: skip
    os.close(theirs)
    drawn = b""
    try:
        while part := os.read(ours, 65536):
            drawn += part
    except OSError:
        pass  # Linux says so when the other end is closed
    os.close(ours)
    out, _ = done.communicate(timeout=60)
    assert done.returncode == 0
    assert b"Quantizing" in drawn
    assert "bits per weight" in out
    assert "\x1b" not in out


# Perplexity, bench, warmup, chat


def test_perplexity_keys(packed: Path, checkpoint: Path, text: Path, said: Said) -> None:
    args = ("perplexity", packed, "-f", text, "-c", 128, "--kl-base", checkpoint)
    found = json.loads(said(*args, "--format", "json"))
    assert list(found) == [
        "protocol", "n_tokens", "nll_per_token", "ppl", "bits_per_byte",
        "kl_mean", "kl_p99", "kl_max", "top1_agreement",
        "base_nll_per_token", "base_ppl", "flips", "flips_base_right", "flips_right",
    ]  # fmt: skip
    assert "128 tokens" in found["protocol"]
    assert found["ppl"] == pytest.approx(np.exp(found["nll_per_token"]))
    assert 0 < found["kl_mean"] < 0.1
    assert found["top1_agreement"] > 0.9
    shown = said(*args, "--chunks", 2, "--score", "half")
    assert "llama.cpp" in shown
    assert f"{2 * 63}" in shown


def test_perplexity_against_another_vocabulary(
    packed: Path, text: Path, tmp_path: Path, checkpoint: Path, said: Said
) -> None:
    other = copy(checkpoint, tmp_path / "other")
    wide = json.loads((other / "config.json").read_text()) | {"vocab_size": 513}
    (other / "config.json").write_text(json.dumps(wide))
    said("perplexity", packed, "-f", text, "--kl-base", other, code=1)
    assert "513" in said.err


BENCH = ("-p", 16, "-n", 8, "-t", "1", "-r", 2)


def test_bench_markdown_is_llama_bench_s(packed: Path, said: Said) -> None:
    # a busy machine is warned of above the table, and marked figures are explained below it
    lines = [line for line in said("bench", packed, *BENCH).splitlines() if line[:1] == "|"]
    head = [cell.strip() for cell in lines[0].strip("|").split("|")]
    assert head[:7] == ["model", "size", "params", "backend", "threads", "test", "t/s"]
    assert head[7:] == ["GB/s", "of peak", "peak RSS"]
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]
    assert [row[5] for row in rows] == ["pp16", "tg8"]
    assert rows[0][0] == "llama 260.03 K w8-channel"
    assert all(" ± " in row[6] for row in rows)


def test_bench_records(packed: Path, said: Said) -> None:
    rows = json.loads(said("bench", packed, *BENCH, "-d", "0,32", "--format", "json"))
    assert [row["test"] for row in rows] == ["pp16", "tg8", "pp16 @ d32", "tg8 @ d32"]
    for row in rows:
        assert len(row["samples_ns"]) == len(row["samples_ts"]) == 2
        tokens = row["n_prompt"] + row["n_gen"]
        assert row["samples_ts"] == [tokens * 1e9 / ns for ns in row["samples_ns"]]
        assert row["avg_ts"] == pytest.approx(np.mean(row["samples_ts"]))
        assert row["stddev_ts"] == pytest.approx(np.std(row["samples_ts"], ddof=1))
        assert row["n_threads"] == 1
    generation = rows[1]
    assert generation["gb_per_s"] == pytest.approx(
        generation["avg_ts"] * generation["bytes_per_token"] / 1e9
    )
    assert generation["bytes_per_token"] > rows[0]["model_size"]
    assert rows[0]["gb_per_s"] is None


def test_bench_lines_and_csv_say_the_same(packed: Path, said: Said) -> None:
    lines = [
        json.loads(line) for line in said("bench", packed, *BENCH, "--format", "jsonl").splitlines()
    ]
    table = list(csv.DictReader(io.StringIO(said("bench", packed, *BENCH, "--format", "csv"))))
    assert [row["test"] for row in lines] == [row["test"] for row in table] == ["pp16", "tg8"]
    assert table[1]["model_n_params"] == str(lines[1]["model_n_params"]) == "260032"
    assert set(lines[0]) - set(table[0]) == {"samples_ns", "samples_ts"}


@pytest.mark.parametrize("preset", ["w4-g32", "w2-g16"])
def test_bench_a_shape(preset: str, said: Said) -> None:
    args = ("bench", "--shape", "Stories15M", "--preset", preset, *BENCH, "--format", "json")
    row = json.loads(said(*args))[1]
    assert row["model_n_params"] == 15_191_712
    assert row["model_type"].startswith("llama 15.19 M w")
    assert row["avg_ts"] > 0


def test_bench_past_what_the_model_was_made_for(packed: Path, said: Said) -> None:
    rows = json.loads(
        said("bench", packed, "-p", 600, "-n", 0, "-t", 1, "-r", 1, "--format", "json")
    )
    assert rows[0]["test"] == "pp600"


def test_warmup_names_the_kernels(said: Said) -> None:
    rows = [line.split() for line in said("warmup").splitlines()[2:]]
    assert rows[-1][0] == "total"
    assert sum(float(seconds) for _, seconds in rows[:-1]) == pytest.approx(
        float(rows[-1][1]), abs=0.01 * len(rows)
    )


TEMPLATE = (
    "{% for m in messages %}{{ '<s>' if loop.first }}{{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def talker(checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = copy(checkpoint, tmp_path_factory.mktemp("talker") / "model")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_chat_piped(talker: Path) -> None:
    args = ("chat", talker, "-n", 8, "--temp", 0, "-t", 1)
    one = edgeq(*args, input="Hello\n", stdin=None)
    assert one.returncode == 0, one.stderr
    assert one.stdout.strip()
    assert "Traceback" not in one.stderr
    two = edgeq(*args, input="Hello\n/reset\nHello\n/exit\nnever read\n", stdin=None)
    assert two.stdout == one.stdout * 2
    told = edgeq(*args, "--system", "You are a cat.", input="Hello\n", stdin=None)
    assert told.stdout != one.stdout


def test_chat_needs_a_template(packed: Path, said: Said) -> None:
    said("chat", packed, code=1)
    assert "chat template" in said.err


def test_a_conversation_reads_only_what_is_new(talker: Path) -> None:
    from edgeq import Engine, SamplingParams, Tokenizer, load
    from edgeq.api.conversation import Conversation

    model, greedy = load(talker), SamplingParams(temperature=0)
    tokenizer = Tokenizer(model.files)

    def ask(talk: Conversation, text: str) -> tuple[str, int]:
        answer = "".join(chunk.text for chunk in talk.say(text, greedy, max_tokens=12))
        assert talk.last is not None
        return answer, talk.last.n_prompt

    with Engine(model, threads=1) as engine, Engine(model, threads=1) as fresh:
        talk = Conversation(engine, tokenizer, "Be kind.")
        ask(talk, "Hello, I am a very long first message about a red ball")
        follow_up, read = ask(talk, "And?")
        anew = Conversation(fresh, tokenizer, "Be kind.")
        anew.messages = talk.messages[:-2]
        assert ask(anew, "And?")[0] == follow_up
        assert anew.last is not None
        assert read < anew.last.n_prompt / 2
        assert engine.n_past == fresh.n_past


# The demo


def test_demo_without_a_terminal(tmp_path: Path) -> None:
    args = ("demo", "-n", 40, "--prompt", "One day, a cat", "--seed", 5)
    # only the kernels are taken from the user's cache: compiling them takes half a minute
    (tmp_path / "kernels").symlink_to(cache_home() / "kernels")
    done = edgeq(*args, env={**os.environ, "PYTHONPATH": str(ROOT), "EDGEQ_CACHE": str(tmp_path)})
    assert (done.returncode, done.stderr) == (0, "")
    assert "One day, a cat" in done.stdout
    assert "\x1b" not in done.stdout
    table = done.stdout[done.stdout.index("\n  weights ") + 1 :]
    for row in ("tokens per second", "GB/s read", "peak memory", "KL, nats per token"):
        assert row in table
    sizes = [float(line.split()[-2]) for line in table.splitlines()[:1]]
    assert 0.5 < sizes[0] < 4
    assert (tmp_path / "demo.edgeq").exists()
