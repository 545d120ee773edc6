"""Tokens per second of processor time that a server generates for 1, 2, 4 and 8 clients at a time.

    python benchmarks/serving/streams.py MODEL [-t THREADS]

Processor time is the server's own, so that other programs change little. Every answer is compared
with the same answer to a client that was alone.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import threading
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

TOPICS = ("a lamp", "a fox", "a tree", "rain", "snow", "a boat", "a cat", "a king")
TOKENS = 100


def processor_seconds(pid: int) -> float:
    """User and system time of a process so far."""
    fields = Path(f"/proc/{pid}/stat").read_text().rsplit(")", 1)[1].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def answer(url: str, number: int) -> str:
    """A text of `TOKENS` tokens; a bias that changes nothing keeps it from computing in bursts."""
    body = {
        "prompt": f"A long story about {TOPICS[number]}:",
        "max_tokens": TOKENS,
        "temperature": 0,
        "logit_bias": {"0": -100},
    }
    request = urllib.request.Request(
        url + "/completions", json.dumps(body).encode(), {"Content-Type": "application/json"}
    )
    with urllib.request.urlopen(request) as reply:
        choice = json.load(reply)["choices"][0]
    return str(choice["text"])


def main() -> None:
    """Start a server, measure, and print a line for each number of clients."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("-t", "--threads", default="1")
    args = parser.parse_args()
    command = [sys.executable, "-m", "edgeq", "serve", f"model={args.model}", "--port", "0",
               "-c", "512", "-t", args.threads, "--parallel", str(len(TOPICS))]  # fmt: skip
    server = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert server.stderr is not None
    try:
        said = "".join(server.stderr.readline() for _ in range(4))
        match = re.search(r"OpenAI API\s+(\S+)", said)
        if match is None:
            sys.exit(said)
        threading.Thread(target=server.stderr.read, daemon=True).start()
        url = match[1]
        alone = [answer(url, number) for number in range(len(TOPICS))]
        for clients in (1, 2, 4, 8):
            rates, same = [], True
            for _ in range(3):
                before = processor_seconds(server.pid)
                with ThreadPoolExecutor(clients) as pool:
                    texts = list(pool.map(lambda n: answer(url, n), range(clients)))
                rates.append(clients * TOKENS / (processor_seconds(server.pid) - before))
                same = same and texts == alone[:clients]
            middle = sorted(rates)[1]
            print(f"{clients} clients: {middle:.1f} tok/s, answers as alone: {same}", flush=True)
    finally:
        server.terminate()
        server.wait()


if __name__ == "__main__":
    main()
