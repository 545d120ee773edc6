"""Quantized real models: the engine against the reference on the very same codes."""

from __future__ import annotations

from pathlib import Path

import pytest

from edgeq import quantize
from edgeq.evaluation.text import Evaluation, perplexity
from edgeq.importers import load
from edgeq.model.model import Model
from edgeq.model.reference import Reference
from edgeq.quant.recipe import Recipe
from edgeq.runtime.engine import Engine
from edgeq.runtime.tokenizer import Tokenizer
from tests.conftest import need

MODELS = {"stories260K": "models/stories260K", "babyllama105": "data/babyllama105/model5000.bin"}
CONTEXT = 256


def score(model: Model, tokens: list[int], *, engine: bool, base: Model) -> Evaluation:
    """Perplexity, and divergence from ``base``; through the engine or the reference."""
    tokenizer = Tokenizer(base.files)
    reference = Reference(base, keep=True)
    if not engine:
        plain = Reference(model, keep=True)
        return perplexity(
            plain.forward, tokens, context=CONTEXT, bos=tokenizer.bos, base=reference.forward
        )
    with Engine(model, context=CONTEXT, kv_bits=16, threads=2) as run:

        def logits(ids: object) -> object:
            run.reset()
            return run.forward(ids, all_logits=True)

        return perplexity(
            logits,  # type: ignore[arg-type]
            tokens,
            context=CONTEXT,
            bos=tokenizer.bos,
            base=reference.forward,
        )


@pytest.fixture(scope="module", params=MODELS)
def measured(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, Evaluation]:
    source = need(MODELS[request.param])
    text = need("data/text_tinystories_train/tinystories_train_2MB.txt").read_text()[10000:16000]
    model = load(source)
    tokens = Tokenizer(model.files).encode(text, add_bos=False)[:2550]
    out: dict[str, Evaluation] = {}
    folder = tmp_path_factory.mktemp(request.param)
    for method in ("rtn", "mse"):
        path = Path(folder) / f"{method}.edgeq"
        quantize(source, path, Recipe.from_options(preset="w4-g32"), method=method)
        packed = load(path)
        out[f"{method} engine"] = score(packed, tokens, engine=True, base=model)
        out[f"{method} reference"] = score(packed, tokens, engine=False, base=model)
    return out


@pytest.mark.parametrize("method", ["rtn", "mse"])
def test_the_engine_loses_nothing_against_its_own_codes(
    measured: dict[str, Evaluation], method: str
) -> None:
    engine, reference = measured[f"{method} engine"], measured[f"{method} reference"]
    assert engine.ppl == pytest.approx(reference.ppl, rel=0.01)


def test_clipping_by_least_squares_is_no_worse_than_rounding(
    measured: dict[str, Evaluation],
) -> None:
    mse, rtn = measured["mse engine"].kl_mean, measured["rtn engine"].kl_mean
    assert mse is not None
    assert rtn is not None
    assert mse <= rtn
