"""Golden tests of language models: what each form of a package says after 20 prompts.

The results are those of the form itself, in its own runtime, as it was when the package was made
and its certificate showed that it computes what its source does. On another processor the sums of
a runtime fall in another order, and values that it rounds to 8 bits fall on the other side of a
border now and then. So a result may differ by what the rounding of this very form was measured to
change: `allowed_rms`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.converters.runners import DecoderRunner, Precision
from edgeq.core.progress import Progress
from edgeq.runtime.tokenizer import Tokenizer

STEPS = 4
"""Greedy tokens after each prompt."""
LOGITS = 5
"""Largest logits that are recorded of each step."""
PARTS: Mapping[Precision, float] = {"float32": 1e-3, "float16": 2e-2, "int8": 1e-3}
"""How a form computes -> part of the logits' range that results may differ by."""
ROUNDING = 2.0
"""Times the measured effect of a form's own rounding to 8 bits that results may differ by."""
TIE = 4.0
"""Two logits nearer than this times the allowed difference may change places."""


def allowed_rms(precision: Precision, logits: Mapping[str, float]) -> float:
    """Root mean square difference of logits that is allowed between two machines.

    Args:
        precision: how the form computes.
        logits: what its certificate says: "rms" (difference from exact arithmetic), "range".
    """
    rounding = ROUNDING * logits["rms"] if precision == "int8" else 0.0
    return PARTS[precision] * logits["range"] + rounding


def record(
    runner: DecoderRunner,
    prompts: list[dict[str, Any]],
    tokenizer: Tokenizer,
    allowed: float,
    progress: Progress | None = None,
) -> dict[str, Any]:
    """Run a form on all prompts.

    Args:
        runner: the form in its runtime.
        prompts: of `edgeq.packaging.prompts.golden_prompts`.
        tokenizer: of the model.
        allowed: of `allowed_rms`.
        progress: called with what is done, how far, and of how much.

    Returns:
        what the golden file of the form holds.
    """
    results = []
    for done, prompt in enumerate(prompts):
        if progress:
            progress("golden tests", done, len(prompts))
        tokens: list[int] = []
        logits = []
        for row in _rows(runner, prompt["ids"], tokens):
            best = np.argsort(-row, kind="stable")[:LOGITS]
            logits.append({str(int(i)): _short(row[i]) for i in best})
            tokens.append(int(best[0]))
            if len(tokens) == STEPS:
                break
        results.append(
            {"id": prompt["id"], "tokens": tokens, "text": tokenizer.decode(tokens),
             "logits": logits}
        )  # fmt: skip
    return {
        "runtime": runner.runtime,
        "allowed": {"logits_rms": _short(allowed), "tie": _short(TIE * allowed)},
        "results": results,
    }


def first_fault(
    runner: DecoderRunner,
    prompts: list[dict[str, Any]],
    golden: Mapping[str, Any],
    progress: Progress | None = None,
) -> str | None:
    """What is wrong with a form first, by its golden results; None if nothing is."""
    allowed, tie = golden["allowed"]["logits_rms"], golden["allowed"]["tie"]
    known = {result["id"]: result for result in golden["results"]}
    for done, prompt in enumerate(prompts):
        if progress:
            progress("golden tests", done, len(prompts))
        result = known.get(prompt["id"])
        if result is None:
            return f"there is no golden result for the prompt {prompt['id']}"
        squares: list[float] = []
        tokens = result["tokens"]
        for step, row in enumerate(_rows(runner, prompt["ids"], tokens)):
            expected: Mapping[str, float] = result["logits"][step]
            got = np.array([row[int(i)] for i in expected])
            squares += np.square(got - np.array(list(expected.values()))).tolist()
            best, right = int(row.argmax()), int(tokens[step])
            if best != right and not row[best] - row[right] <= tie:
                return (
                    f"prompt {prompt['id']}, token {step + 1}: it chooses {best}, the golden "
                    f"token is {right}, whose logit is smaller by {row[best] - row[right]:.3g} "
                    f"(allowed {tie:.3g})"
                )
            if step + 1 == len(tokens):
                break
        rms = float(np.sqrt(np.mean(squares)))
        if not rms <= allowed:  # so that NaN is a fault
            return (
                f"prompt {prompt['id']}: the logits differ from the golden ones by {rms:.3g} "
                f"(root mean square; allowed {allowed:.3g})"
            )
    return None


def _rows(
    runner: DecoderRunner, ids: list[int], tokens: list[int]
) -> Iterable[NDArray[np.float32]]:
    """The logits after a prompt, and after each token that ``tokens`` has by then."""
    runner.reset()
    yield runner.forward(np.asarray(ids, np.int64))[-1]
    step = 0
    while True:
        yield runner.forward(np.asarray([tokens[step]], np.int64))[-1]
        step += 1


def _short(value: float) -> float:
    """A number with the digits that comparisons need."""
    return float(f"{float(value):.6g}")
