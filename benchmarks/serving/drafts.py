"""How much faster a draft model makes answers, for pairs whose acceptance is known.

    python benchmarks/serving/drafts.py [--shape smollm2-135m] [--layers 3] [-n 256] [-t 1]

The large model has a known shape and random weights, of which all layers but the first few add
nothing, so that those few are a small model that is always right. Of its drafted tokens a share is
replaced by wrong ones. Every answer is compared with the one without a draft, token for token.
Times are processor seconds of this process, also those by which it is decided how much to draft;
answers with and without a draft alternate, and ratios are of medians.
"""

from __future__ import annotations

import argparse
import random
import re
import statistics
import time
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import numpy as np

import edgeq
from edgeq.importers.shapes import random_model, shape
from edgeq.model.model import Model
from edgeq.runtime import drafting
from edgeq.runtime import generate as generating

SHARES = (1.0, 0.9, 0.8, 0.7, 0.5, 0.2, 0.0)


class NoText:
    """A tokenizer of no text."""

    eos_ids = ()

    def stream(self, prompt: Any = ()) -> Any:
        """A stream that says nothing."""
        return SimpleNamespace(push=lambda token: "")


def pair(name: str, layers: int) -> tuple[Model, Model]:
    """A model whose layers from ``layers`` on add nothing, and the one of the others alone."""
    config = replace(shape(name), eos=())
    model = random_model(config, edgeq.Recipe.from_options("w4-g32").scheme_for)
    for tensor, held in model.tensors.items():
        layer = re.match(r"model\.layers\.(\d+)\..*(?:o_proj|down_proj)", tensor)
        if layer and int(layer[1]) >= layers:
            held.scales[...] = 0
    small = replace(config, blocks=config.blocks[:layers])
    names = {tensor for tensor, _ in (*small.linears(), *small.norms(), *small.biases())}
    kept = {tensor: held for tensor, held in model.tensors.items() if tensor in names}
    return model, Model(small, kept)


class OftenRight(drafting.TextDraft):
    """Drafts of which each token is kept with a given chance, and is wrong otherwise."""

    share = 1.0
    chance = random.Random(0)

    def propose(self, n: int, *limits: Any) -> list[int]:
        """As of the small model, with mistakes."""
        return [
            token if self.chance.random() < self.share else (token + 1) % self._sampler.vocab
            for token in super().propose(n, *limits)
        ]


def main() -> None:
    """Print a line for each share of right tokens."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--shape", default="smollm2-135m")
    parser.add_argument("--layers", type=int, default=3, help="of the small model")
    parser.add_argument("-n", type=int, default=256, help="tokens of an answer")
    parser.add_argument("-t", "--threads", type=int, default=1)
    parser.add_argument("-r", "--rounds", type=int, default=5)
    parser.add_argument("--shares", type=float, nargs="+", default=SHARES, help="of right tokens")
    args = parser.parse_args()

    clock: Any = SimpleNamespace(perf_counter=time.process_time)
    drafting.time = generating.time = clock
    drafting.TextDraft = OftenRight  # type: ignore[misc]
    model, small = pair(args.shape, args.layers)
    prompt = np.random.default_rng(1).integers(0, model.config.vocab, 32).tolist()
    greedy = edgeq.SamplingParams(temperature=0)
    text: Any = NoText()
    options: dict[str, Any] = {"context": 1024, "threads": args.threads}
    with edgeq.Engine(model, **options) as engine, edgeq.Engine(small, **options) as helper:

        def answer(draft: edgeq.Draft | None) -> tuple[float, list[Any], Any]:
            engine.reset()
            started = time.process_time()
            chunks = list(
                edgeq.generate(engine, text, prompt, greedy, max_tokens=args.n, draft=draft)
            )
            taken = time.process_time() - started
            return taken, [chunk.token for chunk in chunks], chunks[-1]

        want = answer(None)[1]
        answer(edgeq.Draft(helper, model, 4))
        print(
            f"{args.shape}: {args.layers} of {model.config.layers} layers draft, {args.n} tokens, "
            f"{args.threads} threads"
        )
        print("right  first answer  later answers  drafted  accepted")
        for share in args.shares:
            OftenRight.share = share
            first, later, alone = [], [], []
            drafted = accepted = 0
            for _ in range(args.rounds):
                draft = edgeq.Draft(helper, model)  # knows nothing
                helper.reset()
                for times in (first, later, later):
                    alone.append(answer(None)[0])
                    taken, tokens, last = answer(draft)
                    times.append(taken)
                    assert tokens == want
                    drafted, accepted = drafted + last.n_drafted, accepted + last.n_accepted
            base = statistics.median(alone)
            print(
                f"{share:5.0%} {base / statistics.median(first):12.3f}x "
                f"{base / statistics.median(later):13.3f}x {drafted / (3 * args.rounds):8.0f} "
                f"{accepted / max(drafted, 1):9.0%}",
                flush=True,
            )


if __name__ == "__main__":
    main()
