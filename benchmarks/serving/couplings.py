"""How many drafted tokens are accepted, of those that any way of drawing could accept.

    python benchmarks/serving/couplings.py MODEL [--recipe w3-g32 | --layers 28] [-n 64]

The draft model is MODEL in a coarser recipe, or without its last layers. For each place of texts
that MODEL writes, the chances that the two models choose the same token are computed from their
distributions, without drawing:

    inverse    one random number for a token, through the two cumulative distributions
    race       a random number for each token of the vocabulary (`edgeq.runtime.sampling`), which
               edgeq uses
    rejection  rejection sampling, which accepts as many as any way can
"""

from __future__ import annotations

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

import edgeq
from edgeq.model.model import Model
from edgeq.runtime.sampling import Sampler

PROMPTS = ("Once upon a time", "The little fox", "Tom had a lamp and", "Lily saw a big tree")
SETTINGS = (
    edgeq.SamplingParams(),
    edgeq.SamplingParams(temperature=1.0),
    edgeq.SamplingParams(temperature=1.0, top_k=0, top_p=1, min_p=0),
)


def shortened(model: Model, layers: int) -> Model:
    """A model without its last layers."""
    config = replace(model.config, blocks=model.config.blocks[:layers])
    names = {name for name, _ in (*config.linears(), *config.norms(), *config.biases())}
    kept = {name: held for name, held in model.tensors.items() if name in names}
    return replace(model, config=config, tensors=kept)


def distribution(
    logits: NDArray[np.float32], params: edgeq.SamplingParams
) -> tuple[NDArray[np.int64], NDArray[np.float64]]:
    """Candidates in the order in which they are drawn, and their probabilities."""
    ids = Sampler(params, logits.size).candidates(logits)
    weights = logits[ids].astype(np.float64) / params.temperature
    weights = np.exp(weights - weights.max())
    return ids, weights / weights.sum()


def chances(
    large: NDArray[np.float32], small: NDArray[np.float32], params: edgeq.SamplingParams
) -> tuple[float, float, float]:
    """The chances of the same token: by inverse, race and rejection."""
    places = np.zeros((4, large.size))  # where a token's part of [0, 1) begins and ends
    probabilities = np.zeros((2, large.size))
    for number, logits in enumerate((large, small)):
        ids, p = distribution(logits, params)
        probabilities[number, ids] = p
        places[2 * number + 1, ids] = np.cumsum(p)
        places[2 * number, ids] = np.cumsum(p) - p
    overlap = np.minimum(places[1], places[3]) - np.maximum(places[0], places[2])
    p, q = probabilities[:, probabilities.any(axis=0)]
    return float(np.maximum(overlap, 0).sum()), race(p, q), float(np.minimum(p, q).sum())


def race(p: NDArray[np.float64], q: NDArray[np.float64]) -> float:
    """The chance of the same token: the sum over i of 1 / sum over j of max(p[j]/p[i], q[j]/q[i]).

    Source: Daliri, Musco and Suresh 2024 (arXiv 2408.07978)
    """
    with np.errstate(divide="ignore"):
        order = np.argsort(p / q)  # p[j]/p[i] is the larger one where p[j]/q[j] > p[i]/q[i]
    p, q = p[order], q[order]
    above, below = np.cumsum(p[::-1])[::-1], np.cumsum(q) - q
    both = (p > 0) & (q > 0)
    return float((1 / (above[both] / p[both] + below[both] / q[both])).sum())


def main() -> None:
    """Print a line for each setting of sampling."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--recipe", default="w3-g32", help="of the draft model")
    parser.add_argument("--layers", type=int, help="of the draft model")
    parser.add_argument("-n", type=int, default=64, help="tokens of each of four texts")
    args = parser.parse_args()

    model = edgeq.load(args.model)
    tokenizer = edgeq.Tokenizer(model)
    with tempfile.TemporaryDirectory() as folder:
        if args.layers:
            draft = shortened(model, args.layers)
        else:
            path = Path(folder) / "draft.edgeq"
            edgeq.quantize(args.model, path, args.recipe, requantize=True)
            draft = edgeq.load(path)
        options = {"threads": 1, "context": 512}
        with edgeq.Engine(model, **options) as large, edgeq.Engine(draft, **options) as small:
            print("temperature top-k top-p min-p  inverse    race  rejection")
            for params in SETTINGS:
                found = []
                for seed, prompt in enumerate(PROMPTS):
                    ids = tokenizer.encode(prompt)
                    large.reset()
                    chunks = edgeq.generate(
                        large, tokenizer, ids, replace(params, seed=seed), max_tokens=args.n
                    )
                    text = ids + [chunk.token for chunk in chunks if chunk.token is not None]
                    rows = []
                    for engine in (large, small):
                        engine.reset()
                        rows.append(engine.forward(text[:-1], all_logits=True).copy())
                    found += [
                        chances(rows[0][place], rows[1][place], params)
                        for place in range(len(ids) - 1, len(text) - 1)
                    ]
                mean = np.mean(found, axis=0)
                print(
                    f"{params.temperature:11} {params.top_k:5} {params.top_p:5} {params.min_p:5}"
                    f"  {mean[0]:7.3f}  {mean[1]:6.3f}  {mean[2]:9.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
