"""Runs every model of a package in its runtime, without edgeq:   offline.py FOLDER

It is run by `python -I -S` with the folder of the installed packages as its only path, so that
nothing but the runtimes and NumPy is there. It prints a JSON object: form -> what was compared.
"""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np


def main(folder: Path) -> dict[str, str]:
    manifest = json.loads((folder / "manifest.json").read_text("utf-8"))
    found = {}
    for variant in manifest["variants"]:
        entry, kind = folder / variant["entry"], variant["id"]
        golden = json.loads((folder / variant["golden"]).read_text("utf-8"))
        if manifest["kind"] == "graph":
            run = tflite(folder, entry) if kind == "litert" else onnx(entry)
            found[kind] = graph(folder, golden["allowed"], run)
        else:
            prompts = json.loads((folder / "golden/prompts.json").read_text("utf-8"))["prompts"]
            found[kind] = (bundle if kind == "litertlm" else genai)(entry, prompts, golden)
    return found


def graph(folder: Path, allowed: dict[str, float], run: Any) -> str:
    """The five golden inputs give the golden outputs, as far as each is allowed to differ."""
    runs = json.loads((folder / "golden/inputs.json").read_text("utf-8"))["runs"]
    wrong, size = dict.fromkeys(allowed, 0.0), dict.fromkeys(allowed, 0.0)
    for one in runs:
        got = run({name: array(folder, about) for name, about in one["inputs"].items()})
        for name, about in one["outputs"].items():
            right = array(folder, about).astype(np.float64)
            assert got[name].shape == right.shape
            wrong[name] += float(np.square(got[name] - right).sum())
            size[name] += float(np.square(right).sum())
    for name, limit in allowed.items():
        error = (wrong[name] / size[name]) ** 0.5
        assert error <= limit, f"{name} differs by {error}, {limit} is allowed"
    return f"{len(runs)} inputs"


def array(folder: Path, about: dict[str, Any]) -> Any:
    return np.fromfile(folder / about["file"], about["dtype"]).reshape(about["shape"])


def onnx(path: Path) -> Any:
    import onnxruntime

    session = onnxruntime.InferenceSession(path.read_bytes(), providers=["CPUExecutionProvider"])
    names = [end.name for end in session.get_outputs()]
    return lambda feeds: dict(zip(names, session.run(names, feeds), strict=True))


def tflite(folder: Path, path: Path) -> Any:
    """By the table of axes in the package's Kotlin code, which has no other source of it."""
    from ai_edge_litert.interpreter import Interpreter

    code = (folder / "android/src/litert/kotlin/edgeq/model/GraphModel.kt").read_text("utf-8")
    table = re.findall(r'"(.*)" to End\(intArrayOf\([\d, ]*\), intArrayOf\(([\d, ]*)\)\)', code)
    orders = {name: [int(axis) for axis in order.split(",")] for name, order in table}
    (signature,) = re.findall(r'runSignature\(given, taken, "(\w+)"\)', code)
    run = Interpreter(str(path), num_threads=1).get_signature_runner(signature)

    def ran(feeds: dict[str, Any]) -> dict[str, Any]:
        moved = {n: np.ascontiguousarray(a.transpose(orders[n])) for n, a in feeds.items()}
        return {n: a.transpose(np.argsort(orders[n])) for n, a in run(**moved).items()}

    return ran


def genai(path: Path, prompts: list[dict[str, Any]], golden: dict[str, Any]) -> str:
    """Token by token, fed with the golden ones: the logits, and which token is chosen."""
    import onnxruntime_genai as og

    model = og.Model(str(path))
    tie, steps = golden["allowed"]["tie"], 0
    for prompt, result in zip(prompts, golden["results"], strict=True):
        parameters = og.GeneratorParams(model)
        parameters.set_search_options(max_length=len(prompt["ids"]) + len(result["tokens"]))
        generator = og.Generator(model, parameters)
        squares: list[float] = []
        fed = prompt["ids"]
        for token, logits in zip(result["tokens"], result["logits"], strict=True):
            generator.append_tokens(np.asarray(fed, np.int32))
            row = generator.get_logits().reshape(-1)
            squares += [float(row[int(i)] - value) ** 2 for i, value in logits.items()]
            assert row.max() - row[token] <= tie, prompt["id"]
            fed, steps = [token], steps + 1
        rms = float(np.sqrt(np.mean(squares)))
        assert rms <= golden["allowed"]["logits_rms"], (prompt["id"], rms)
    return f"{steps} tokens"


def bundle(path: Path, prompts: list[dict[str, Any]], golden: dict[str, Any]) -> str:
    """What it writes after each prompt; as in the app's own test, one in five may be different."""
    import litert_lm as lm

    lm.set_min_log_severity(lm.LogSeverity.ERROR)
    greedy = lm.SamplerConfig(top_k=1, top_p=1.0, temperature=1.0, seed=0)
    backend = lm.Backend.CPU(thread_count=1)
    asked, different = 0, []
    with lm.Engine(str(path), backend=backend, cache_dir=":nocache") as engine:
        start = [] if engine.bos_token_id is None else [engine.bos_token_id]
        for prompt, result in zip(prompts, golden["results"], strict=True):
            text = prompt.get("rendered", prompt.get("text"))
            if [*start, *engine.tokenize(text)] != prompt["ids"]:
                continue  # it has one start token, for conversations, or none for all texts
            with engine.create_session(
                apply_prompt_template=False, sampler_config=greedy, max_output_tokens=4
            ) as session:
                session.run_prefill([text])
                said = session.run_decode().texts[0]
            asked += 1
            # it stops at the end of a text, and the golden tokens go on
            if not said or not result["text"].startswith(said):
                different.append((prompt["id"], said, result["text"]))
    assert asked >= 10, asked
    assert len(different) * 5 <= asked, different
    return f"{asked - len(different)} of {asked} texts"


if __name__ == "__main__":
    print(json.dumps(main(Path(sys.argv[1]))))
