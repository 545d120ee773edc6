"""Golden tests of language models: the tokens that each form generates after 20 prompts.

The expected results are those of the form itself in its own runtime, recorded when the package was
built and the form had passed validation against its source. On another processor a runtime adds in
another order, so a value that it rounds to 8 bits is sometimes rounded to the neighboring integer.
Logits may therefore differ by as much as the rounding of this form was measured to change them:
see `allowed_rms`.
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
"""Number of greedy tokens after each prompt."""
LOGITS = 5
"""Number of the largest logits that are recorded at each step."""
PARTS: Mapping[Precision, float] = {"float32": 1e-3, "float16": 2e-2, "int8": 1e-3}
"""Precision in which a form computes -> allowed difference, as a fraction of the range of the
logits."""
ROUNDING = 2.0
"""Factor on the measured effect of a form's rounding to 8 bits, for the allowed difference."""
TIE = 4.0
"""Two logits that differ by less than this factor times the allowed difference may swap ranks."""


def allowed_rms(precision: Precision, logits: Mapping[str, float]) -> float:
    """Root mean square difference of logits that is allowed between two machines.

    Args:
        precision: the precision in which the form computes.
        logits: from the form's certificate: "rms" (root mean square difference from exact
            arithmetic) and "range" (of the logits).
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
    """Run a form on all prompts and record the results.

    Args:
        runner: the form in its runtime.
        prompts: the prompts that `edgeq.packaging.prompts.golden_prompts` gives.
        tokenizer: the tokenizer of the model.
        allowed: the allowed difference of logits that `allowed_rms` gives.
        progress: called with what is done, how far, and of how much.

    Returns:
        the content of the form's golden file.
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
    """Run the golden tests of a form.

    Returns:
        a sentence about the first result that is wrong; None if all results are right.
    """
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
                    f"prompt {prompt['id']}, token {step + 1}: the form chooses token {best}, and "
                    f"the logit of the golden token {right} is {row[best] - row[right]:.3g} "
                    f"smaller (allowed {tie:.3g})"
                )
            if step + 1 == len(tokens):
                break
        rms = float(np.sqrt(np.mean(squares)))
        if not rms <= allowed:  # also true for NaN
            return (
                f"prompt {prompt['id']}: the logits differ from the golden ones by {rms:.3g} "
                f"(root mean square; allowed {allowed:.3g})"
            )
    return None


def _rows(
    runner: DecoderRunner, ids: list[int], tokens: list[int]
) -> Iterable[NDArray[np.float32]]:
    """Logits [V] after a prompt, then after each of ``tokens``, which may grow meanwhile."""
    runner.reset()
    yield runner.forward(np.asarray(ids, np.int64))[-1]
    step = 0
    while True:
        yield runner.forward(np.asarray([tokens[step]], np.int64))[-1]
        step += 1


def _short(value: float) -> float:
    """Round a number to the six digits that are stored."""
    return float(f"{float(value):.6g}")
