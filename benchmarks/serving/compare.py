"""First token and tokens per second of `edgeq serve` beside other servers, for 1 and 4 clients.

    python benchmarks/serving/compare.py MODEL.gguf --llama PYTHON [--model OTHER.edgeq]
        [--litert LITERT-LM BUNDLE.litertlm] [-t 1] [--rounds 5]

PYTHON is that of an environment with `llama-cpp-python[server]`, which serves MODEL.gguf;
LITERT-LM is the command of the package `litert-lm`, which serves a bundle that `edgeq convert --to
litertlm` wrote. Each server has its own process and so many threads, and all stay up; rounds
alternate between them, and figures are medians of rounds. Clients stream greedy chat completions
of 64 tokens on different prompts, so that no cache of prompts helps. Tokens are those of the texts
that came, counted with one tokenizer. Beside wall time there is the processor time of each server,
which other programs change little; a first token's is that of a request for one token.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from itertools import count
from pathlib import Path

import edgeq

CLIENTS = (1, 4)
TOKENS = 64
PATIENCE_S = 300.0
_numbers = count()


class Served:
    """A server's process.

    Args:
        name: what to call it.
        model: the name that it serves the model by.
        command: that starts it; ``{port}`` is the port.
        log: a file for what it prints.
        env: further variables of its environment.
        most: the field of a request that limits the answer.
    """

    def __init__(
        self,
        name: str,
        model: str,
        command: Sequence[str],
        log: Path,
        env: dict[str, str] | None = None,
        most: str = "max_tokens",
    ) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.name, self._model, self._most = name, model, most
        self._url = f"http://127.0.0.1:{port}/v1"
        self._log = log
        with log.open("wb") as said:
            self._process = subprocess.Popen(
                [part.replace("{port}", str(port)) for part in command], stdout=said, stderr=said,
                start_new_session=True, env={**os.environ, **(env or {})},
            )  # fmt: skip

    def wait(self) -> None:
        """Until it answers."""
        limit = time.monotonic() + PATIENCE_S
        while True:
            try:
                with urllib.request.urlopen(self._url + "/models", timeout=5):
                    return
            except OSError:
                if self._process.poll() is not None or time.monotonic() > limit:
                    sys.exit(f"{self.name} did not start: {self._log.read_text()[-2000:]}")
                time.sleep(0.2)

    def processor_s(self) -> float:
        """Processor seconds of its processes so far."""
        ticks = 0
        for stat in Path("/proc").glob("[0-9]*/stat"):
            try:
                fields = stat.read_text().rsplit(")", 1)[1].split()
            except OSError:  # it has ended
                continue
            if int(fields[3]) == self._process.pid:  # the session
                ticks += int(fields[11]) + int(fields[12])
        return ticks / os.sysconf("SC_CLK_TCK")

    def answer(self, tokens: int) -> tuple[str, float]:
        """A text on a new subject, and the seconds to the first piece of it."""
        number = next(_numbers)
        body = {
            "model": self._model,
            "messages": [{"role": "user", "content": f"Number {number}: write a long story about "
                          "a small computer that wants to see the sea."}],
            self._most: tokens, "temperature": 0, "stream": True,
        }  # fmt: skip
        request = urllib.request.Request(
            self._url + "/chat/completions", json.dumps(body).encode(),
            {"Content-Type": "application/json"},
        )  # fmt: skip
        start, first, text = time.perf_counter(), 0.0, ""
        with urllib.request.urlopen(request, timeout=PATIENCE_S) as reply:
            for line in reply:
                if line.startswith(b"data: {"):
                    choices = json.loads(line[6:]).get("choices") or [{}]
                    piece = (choices[0].get("delta") or {}).get("content") or ""
                    if piece and not first:
                        first = time.perf_counter() - start
                    text += piece
        return text, first

    def close(self) -> None:
        """End it."""
        self._process.terminate()
        try:
            self._process.wait(30)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()


def servers(args: argparse.Namespace, folder: Path) -> list[Served]:
    """Start all."""
    threads = str(args.threads)
    found = [
        Served("edgeq", "model", [
            sys.executable, "-m", "edgeq", "serve", f"model={args.gguf}", "--port", "{port}",
            "-c", "1024", "-t", threads, "--parallel", "4"], folder / "edgeq.log"),
    ]  # fmt: skip
    if args.llama:
        found.append(Served("llama.cpp (llama-cpp-python)", "model", [
            args.llama, "-m", "llama_cpp.server", "--model", args.gguf, "--port", "{port}",
            "--n_ctx", "1024", "--n_threads", threads, "--n_threads_batch", threads,
            "--interrupt_requests", "false"], folder / "llama.log"))  # fmt: skip
    if args.model:
        found.append(Served("edgeq, w4-g32", "model", [
            sys.executable, "-m", "edgeq", "serve", f"model={args.model}", "--port", "{port}",
            "-c", "1024", "-t", threads, "--parallel", "4"], folder / "other.log"))  # fmt: skip
    if args.litert:
        command, bundle = args.litert
        place = {"LITERT_LM_DIR": str(folder)}
        settings = {"backend": "cpu", "cpu_thread_count": args.threads, "max_num_tokens": 1024}
        (folder / "config.json").write_text(json.dumps({"default": settings}))
        subprocess.run([command, "import", bundle, "model"], check=True, capture_output=True,
                       env={**os.environ, **place})  # fmt: skip
        found.append(Served("LiteRT-LM (litert-lm serve), w4-g32", "model",
                            [command, "serve", "--port", "{port}"], folder / "litert.log",
                            place, "max_completion_tokens"))  # fmt: skip
    return found


def main() -> None:
    """Start the servers, measure in turn, print a table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("gguf", metavar="MODEL.gguf")
    parser.add_argument("--llama", metavar="PYTHON")
    parser.add_argument("--litert", nargs=2, metavar=("LITERT-LM", "BUNDLE"))
    parser.add_argument("--model", help="what edgeq serves too: the model that BUNDLE was made of")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    tokenizer = edgeq.Tokenizer(edgeq.load(args.gguf))
    found: dict[tuple[str, int], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    with ExitStack() as running, tempfile.TemporaryDirectory() as folder:
        listed = servers(args, Path(folder))
        for one in listed:
            running.callback(one.close)
        for one in listed:
            one.wait()
            one.answer(8)  # what is done only once
        for _ in range(args.rounds):
            for clients in CLIENTS:
                for one in listed:
                    measure(one, clients, tokenizer, found[one.name, clients])
    load = os.getloadavg()[1]
    print(f"{args.threads} thread, {args.rounds} rounds, {os.cpu_count()} cores, load {load:.1f}\n")
    print("| server | clients | first token, processor ms (wall) | tokens per processor s (wall) |")
    print("| :--- | ---: | ---: | ---: |")
    for (name, clients), rows in found.items():
        middle = {key: statistics.median(values) for key, values in rows.items()}
        first = f"{1000 * middle['first_cpu']:.0f} ({1000 * middle['first']:.0f})"
        rate = f"{middle['rate_cpu']:.0f} ({middle['rate']:.0f})"
        print(f"| {name} | {clients} | {first} | {rate} |")


def measure(
    one: Served, clients: int, tokenizer: edgeq.Tokenizer, found: dict[str, list[float]]
) -> None:
    """One round of a server: a token, then an answer, for each of so many clients at a time."""
    with ThreadPoolExecutor(clients) as pool:
        before = one.processor_s()
        firsts = [first for _, first in pool.map(one.answer, [1] * clients)]
        found["first"].append(statistics.median(firsts))
        found["first_cpu"].append((one.processor_s() - before) / clients)
        before, start = one.processor_s(), time.perf_counter()
        texts = [text for text, _ in pool.map(one.answer, [TOKENS] * clients)]
        wall, processor = time.perf_counter() - start, one.processor_s() - before
    tokens = sum(len(tokenizer.encode(text, add_bos=False)) for text in texts)
    found["rate"].append(tokens / wall)
    found["rate_cpu"].append(tokens / processor)


if __name__ == "__main__":
    main()
