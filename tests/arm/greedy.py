"""Greedy tokens of small real models: found on this machine, compared with on emulated boards.

    python -m tests.arm.greedy FOLDER

writes the packed models and ``tokens.json``, which `test_board` reads.
"""

from __future__ import annotations

import json
import sys
from itertools import pairwise
from pathlib import Path

import edgeq
from edgeq import quantize
from edgeq.importers import load
from edgeq.quant import Recipe
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import SHARED

PROMPT = "Once upon a time there was a little girl who had a red ball and a small dog named"
STEPS = 200
SOURCES = {
    "demo": Path(edgeq.__file__).parent / "demo_model",
    "stories260K": SHARED / "models/stories260K",
}
SCHEMES = ("w4-g32", "w8-channel")


def greedy_tokens(path: Path, threads: int, chunks: bool) -> list[int]:
    """The first token after the prompt and ``STEPS`` more.

    Args:
        path: a packed model.
        threads: threads of the engine, which has an 8-bit KV cache.
        chunks: feed the prompt in pieces of 1 to 7 tokens, not at once.
    """
    model = load(path)
    ids = Tokenizer(model.files).encode(PROMPT)
    ends = [1, 2, 9, 13, 15, len(ids)] if chunks else [len(ids)]
    with Engine(model, context=256, threads=threads, kv_bits=8) as engine:
        for start, end in pairwise([0, *ends]):
            token = int(engine.forward(ids[start:end]).argmax())
        return [token, *engine.greedy(token, STEPS)]


def write(folder: Path) -> None:
    """Pack the models into ``folder`` and write the tokens found here."""
    folder.mkdir(parents=True, exist_ok=True)
    found = {}
    for name, source in SOURCES.items():
        for scheme in SCHEMES if source.exists() else ():
            path = folder / f"{name}-{scheme}.edgeq"
            quantize(source, path, Recipe.from_options(scheme))
            found[path.name] = greedy_tokens(path, 2, False)
    (folder / "tokens.json").write_text(json.dumps(found))


if __name__ == "__main__":
    write(Path(sys.argv[1]))
